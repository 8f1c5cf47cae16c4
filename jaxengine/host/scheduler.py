"""What is computed in the next step: continuous batching, chunked prefill, preemption. Plain Python, no jax.

The same requests in the same order give the same plans, and no plan changes a bit of any output.
"""

import bisect
import contextlib
from collections.abc import Iterable, Iterator

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.host.page_pool import PagePool
from jaxengine.host.plan import Chunk, Plan, new_decode
from jaxengine.host.queue import Queue
from jaxengine.host.sample import Request, Sample, Status
from pallas_kernels.numbers import cdiv


class MustCollect(Exception):
    """A sample has to be preempted whose last tokens are still under way: collect the results, then schedule again."""


class Scheduler:
    """Queues of samples over a pool of pages and slots."""

    def __init__(self, engine_config: EngineConfig, page_pool: PagePool) -> None:
        self.engine_config, self.page_pool = engine_config, page_pool
        self.waiting = Queue()
        self.running: list[Sample] = []  # by priority, then by arrival: the last is the first to be preempted
        self.ended: list[Sample] = []  # since the engine looked last
        self.version = 0  # of the weights that run
        self._free_slots = list(range(engine_config.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self._grown: list[Sample] = []  # since the last plan that was made
        self._refused: tuple[Sample, int] | None = None  # see _is_refused_again
        self.num_preemptions = 0

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue every sample of a request."""
        first, self._arrivals = self._arrivals, self._arrivals + request.sampling.n
        request.samples = [Sample.of(request, index, first + index) for index in range(request.sampling.n)]
        for sample in request.samples:
            if sample.status is Status.WAITING:
                self.waiting.push(sample)

    def finish(self, sample: Sample, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sample wherever it is; idempotent."""
        if sample.status is Status.FINISHED:
            return
        if sample.status is Status.WAITING:
            self.waiting.discard(sample)  # where an interrupt came before it was queued it is not there
        else:
            self._release(sample)
        sample.end(reason, stop_reason)
        self.ended.append(sample)

    def _release(self, sample: Sample) -> None:
        """Out of the running set.

        Pages and slot are free for the next plan, which the device runs after those under way.
        """
        place = bisect.bisect_left(self.running, _order(sample), key=_order)
        assert self.running[place] is sample, "running samples are not in order"
        del self.running[place]
        self.page_pool.release(sample.pages)
        self._free_slots.append(sample.slot)
        sample.pages, sample.slot, sample.num_computed, sample.num_registered = [], -1, 0, 0
        sample.quiet_length = sample.next_event = 0
        sample.has_old_pages = False

    def preempt(self, sample: Sample) -> None:
        """Back to the front of the queue; its tokens stay, its keys and values are computed again."""
        assert sample.num_pending == 0
        self._release(sample)
        sample.status = Status.WAITING
        self.waiting.push_front(sample)
        self.num_preemptions += 1

    def change_version(self, version: int, keep: bool) -> None:
        """Other weights run from now on, and nothing is under way.

        What runs is preempted, in the old order; with `keep` what decodes goes on with the pages that it has.
        """
        self.version = version
        for sample in reversed(list(self.running)):
            if keep and sample.is_decoding:
                sample.version, sample.has_old_pages = version, True
            else:
                self.preempt(sample)

    def restart(self, samples: Iterable[Sample]) -> None:
        """Nothing is on the device and these samples wait, whatever state an interrupt left behind."""
        self.page_pool = PagePool(self.page_pool.num_pages, self.page_pool.page_size, self.page_pool.caching)
        self.running, self._free_slots = [], list(range(self.engine_config.max_num_seqs - 1, -1, -1))
        self.waiting, self._refused = Queue(sorted(samples, key=_order)), None
        self.ended, self._grown = [], []
        for sample in self.waiting:
            sample.restart()

    @contextlib.contextmanager
    def withheld(self, num_pages: int, num_slots: int) -> Iterator[None]:
        """Pages and slots that no sample gets for a while."""
        page_pool, pages = self.page_pool, self.page_pool.take(num_pages)
        slots, self._free_slots = self._free_slots[:num_slots], self._free_slots[num_slots:]
        try:
            yield
        finally:
            if self.page_pool is page_pool:  # else a restart has taken them back
                page_pool.release(pages)
                self._free_slots += slots

    # -- plans --------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """The next step. Raises MustCollect where results under way must be collected first."""
        plan = Plan()
        prefilling = self._plan_decode(plan)
        # The budget is shared with decoding, so that a long prompt adds little to the time between the others' tokens.
        budget = max(self.engine_config.max_num_batched_tokens - len(plan.decodes), QUERY_BLOCK)
        budget = self._plan_running_prefills(plan, prefilling, budget)
        self._admit(plan, budget)
        for sample, _, count in plan.decodes:
            sample.num_computed += count
            sample.length += count
        for chunk in plan.chunks:
            chunk.rows = chunk.wanted_rows()
            for sample in chunk.samples if chunk.is_last else ():
                sample.length += 1
                if sample.is_steered:
                    plan.steered.append(sample)
        plan.grown, self._grown = self._grown, []
        return plan

    def _plan_decode(self, plan: Plan) -> list[Sample]:
        """Plan a decode of every sample that may draw its next token; returns those that still have to be prefilled.

        It looks at each running sample in each step, and is written so that a look is short. Samples that are preempted
        for a page leave `running` at its end, and so are not come to.
        """
        most, prefilling, decodes = self.engine_config.decode_steps, [], plan.decodes
        for sample in self.running:
            computed, length = sample.num_computed, sample.length
            if computed < length - 1 or computed < sample.prompt_length:
                prefilling.append(sample)
            elif length <= sample.quiet_length:
                decodes.append(new_decode((sample, length - 1, most)))
            elif sample.is_steered and sample.num_pending:
                continue  # what it may draw next depends on the token that is under way; others go on meanwhile
            else:
                count = min(sample.request.limit - length, most)
                if count > 0 and self._grow(sample, length + count - 1):  # the last token's own are written later
                    if sample.is_steered:
                        count = 1  # what the dispatch draws after it knows no grammar, and is drawn again
                        plan.steered.append(sample)
                    decodes.append(new_decode((sample, length - 1, count)))
        return prefilling

    def _grow(self, sample: Sample, num_tokens: int) -> bool:
        """Pages for num_tokens tokens, preempting the last samples for them, at last itself; True where it may run.

        Samples grow in order, so a preempted one, which is the last, is in no plan yet.
        """
        missing = self._pages_of(num_tokens) - len(sample.pages)
        while missing > self.page_pool.num_available:
            victim = self.running[-1]
            if victim.num_pending:
                raise MustCollect
            self.preempt(victim)
            if victim is sample:
                return False
        if missing > 0:
            sample.pages += self.page_pool.take(missing)
            self._grown.append(sample)
        edge = min(len(sample.pages) * self.engine_config.page_size + 1, sample.request.limit)
        sample.quiet_length = 0 if sample.is_steered else edge - self.engine_config.decode_steps
        return True

    def _plan_running_prefills(self, plan: Plan, samples: list[Sample], budget: int) -> int:
        for sample in samples:
            if budget < QUERY_BLOCK:
                break
            if sample.status is Status.RUNNING:  # not preempted for a page since
                budget -= self._plan_chunk(plan, sample, budget)
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        """Waiting samples in order, while slots, pages and budget last."""
        while self.waiting and self._free_slots and budget >= QUERY_BLOCK:
            sample = self.waiting.head
            if self._waits_for_sibling(sample) or self._is_refused_again(sample):
                break
            cached = self._cached_pages(sample)
            needed, held = self._pages_of(sample.num_tokens) - len(cached), self.page_pool.num_held(cached)
            self.page_pool.share(cached)
            if needed > self.page_pool.num_available - self._reserve():
                self.page_pool.release(cached)
                self._refused = sample, held - self.page_pool.num_gained
                break
            sample.pages = cached + self.page_pool.take(needed)
            self._enter(plan, self.waiting.pop(), len(cached))
            budget -= self._plan_chunk(plan, sample, budget)

    def _waits_for_sibling(self, sample: Sample) -> bool:
        """Whether a sibling computes the prompt, whose pages the sample will share."""
        if sample.drawn.token_ids:
            return False
        return any(other.computes_prompt for other in sample.request.samples)

    def _is_refused_again(self, sample: Sample) -> bool:
        """Whether the head of the queue, for which pages were missing, still lacks some: found without a look at its
        prefix, which may be long.

        It needs all its pages but those of its prefix that others hold (a cached page of it counts as available). Since
        it was refused they can have become no more than pages were registered or taken out of the cache.
        """
        if self._refused is None or self._refused[0] is not sample:
            return False
        most_held = self._refused[1] + self.page_pool.num_gained
        return self._pages_of(sample.num_tokens) - most_held > self.page_pool.num_available - self._reserve()

    def _pages_of(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.engine_config.page_size)

    def _reserve(self) -> int:
        """Pages kept back at admission.

        One for each running sample, or admission and preemption would take turns for ever.
        """
        return min(len(self.running), self.engine_config.num_pages // 8)

    def _cached_pages(self, sample: Sample) -> list[int]:
        if sample.scores_prompt:
            return []  # every position's logits are wanted
        return self.page_pool.match(sample.token_ids, self.version, sample.request.cache_salt, sample)

    def _enter(self, plan: Plan, sample: Sample, num_cached_pages: int) -> None:
        """Into the running set, in its order."""
        sample.slot, sample.status, sample.version = self._free_slots.pop(), Status.RUNNING, self.version
        sample.num_registered, sample.num_computed = num_cached_pages, num_cached_pages * self.engine_config.page_size
        if sample.request.num_cached_tokens is None:
            sample.request.num_cached_tokens = sample.num_computed
        bisect.insort(self.running, sample, key=_order)
        plan.admitted.append(sample)

    def _plan_chunk(self, plan: Plan, sample: Sample, budget: int) -> int:
        """Plan as much of the sample's prefill as the budget holds; returns what it takes, in whole query blocks."""
        start, end = sample.num_computed, sample.num_tokens
        stop = min(end, start + budget // QUERY_BLOCK * QUERY_BLOCK)
        chunk = Chunk(sample, start, stop, stop == end)
        plan.chunks.append(chunk)
        sample.num_computed = stop
        # At once: of equal prompts in one step only the first is computed, and the others read its pages.
        self.register_pages(sample)
        if chunk.is_last and not sample.drawn.token_ids:
            self._fork(plan, chunk)
        return chunk.num_blocks * QUERY_BLOCK

    def _fork(self, plan: Plan, chunk: Chunk) -> None:
        """Samples of the same request that wait next share the prompt's full pages and copy the last, partly filled
        one.
        """
        source, size = chunk.sample, self.engine_config.page_size
        full, num_partly_filled = source.prompt_length // size, 1 if source.prompt_length % size else 0
        while self.waiting and self._free_slots:
            sample = self.waiting.head
            if sample.request is not source.request or sample.drawn.token_ids:
                break
            if num_partly_filled > self.page_pool.num_available - self._reserve():
                break
            own = self.page_pool.take(num_partly_filled)
            plan.copies += [(source.pages[full], page) for page in own]
            self.page_pool.share(source.pages[:full])
            sample.pages = source.pages[:full] + own
            self._enter(plan, self.waiting.pop(), 0)
            sample.num_computed, sample.num_registered = source.prompt_length, min(full, source.num_registered)
            chunk.forks.append(sample)

    # -- results ------------------------------------------------------------------------------------------------------

    def register_pages(self, sample: Sample) -> None:
        """Offer the pages that are full of known tokens to the prefix cache."""
        if sample.has_old_pages:
            return  # its keys and values follow from more than one version of the weights
        size = self.engine_config.page_size
        # A page may be offered before the step that fills it has run: a sample that reads it runs in a later step or in
        # the same one, and within a step all keys and values of a layer are written before any is read.
        full = min(sample.num_computed, sample.num_tokens) // size
        for index in range(sample.num_registered, full):
            parent = sample.pages[index - 1] if index else None
            tokens = sample.tokens(index * size, (index + 1) * size)
            self.page_pool.register(sample.pages[index], parent, tokens, sample.version, sample.request.cache_salt)
        sample.num_registered = max(sample.num_registered, full)

    def check_integrity(self) -> None:
        """Assert the scheduler's own invariants and the page pool's."""
        self.page_pool.check_integrity([sample.pages for sample in self.running])
        slots = [sample.slot for sample in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.engine_config.max_num_seqs)), "a slot is lost or in two places"
        holders = [sample for sample in self.waiting if sample.pages or sample.slot >= 0]
        assert not holders, "a waiting sample holds pages or a slot"
        order = list(map(_order, self.running))
        assert order == sorted(order), "running samples are not in order"


def _order(sample: Sample) -> tuple[int, int]:
    """Where a sample stands among those that run: who has to wait longest is preempted first."""
    return sample.priority, sample.arrival
