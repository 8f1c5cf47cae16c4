"""Who computes what in the next step: continuous batching, chunked prefill, preemption. Plain Python, no jax.

The same requests in the same order give the same plans, and no plan changes a bit of any output.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.host.page_pool import PagePool
from jaxengine.host.sample import Request, Sample, Status


class MustSettle(Exception):
    """A sequence has to be preempted whose last tokens are still under way: collect them, then schedule again."""


@dataclasses.dataclass
class Chunk:
    """Tokens [start, stop) of a sequence to prefill. The last chunk also draws, for the sequence and for its forks."""

    sample: Sample
    start: int
    stop: int
    is_last: bool
    forks: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return -(-(self.stop - self.start) // QUERY_BLOCK)


@dataclasses.dataclass
class Plan:
    """One step: a decode over `decode`, then a prefill of `chunks`, then the page copies."""

    decode: list[Sample] = dataclasses.field(default_factory=list)
    decode_positions: list[int] = dataclasses.field(default_factory=list)  # of each sequence's last token
    decode_counts: list[int] = dataclasses.field(default_factory=list)  # tokens that each will get
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    admitted: list[Sample] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class Scheduler:
    """Queues of sequences over a pool of pages and slots."""

    def __init__(self, engine_config: EngineConfig, page_pool: PagePool) -> None:
        self.engine_config, self.page_pool = engine_config, page_pool
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []  # by arrival: the newest is the first to be preempted
        self.version = 0
        self._free_slots = list(range(engine_config.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self.num_preemptions = 0

    # -- requests --------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue every sample of a request."""
        first, self._arrivals = self._arrivals, self._arrivals + request.sampling.n
        request.samples = [Sample.of(request, index, first + index) for index in range(request.sampling.n)]
        self.waiting.extend(sample for sample in request.samples if sample.status is Status.WAITING)

    def finish(self, sample: Sample, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence wherever it is; idempotent."""
        if sample.status is Status.FINISHED:
            return
        if sample.status is Status.WAITING:
            with contextlib.suppress(ValueError):  # an interrupt may have come before it was queued
                self.waiting.remove(sample)
        else:
            self._leave(sample)
        sample.status, sample.finish_reason, sample.stop_reason = Status.FINISHED, reason, stop_reason

    def _leave(self, sample: Sample) -> None:
        """Out of the running set: pages and slot are free for the next plan, which the device runs after those under way."""
        self.running.remove(sample)
        self.page_pool.release(sample.pages)
        self._free_slots.append(sample.slot)
        sample.pages, sample.slot, sample.num_computed, sample.num_registered, sample.has_old_pages = (
            [],
            -1,
            0,
            0,
            False,
        )
        if sample.request.prefilling is sample:
            sample.request.prefilling = None

    def preempt(self, sample: Sample) -> None:
        """Back to the front of the queue; its tokens stay, its keys and values are recomputed."""
        assert sample.num_pending == 0
        self._leave(sample)
        sample.status = Status.WAITING
        self.waiting.appendleft(sample)
        self.num_preemptions += 1

    def change_version(self, version: int, keep: bool) -> None:
        """Other weights run from now on, and nothing is under way. What runs is preempted, in the old order; with `keep` what decodes goes
        on with the pages that it has."""
        self.version = version
        for sample in reversed(list(self.running)):
            if keep and sample.is_decoding:
                sample.version, sample.has_old_pages = version, True
            else:
                self.preempt(sample)

    def restart(self, samples: Iterable[Sample]) -> None:
        """Nothing is on the device and these sequences wait, whatever state an interrupt left behind."""
        self.page_pool = PagePool(self.page_pool.num_pages, self.page_pool.page_size, self.page_pool.caching)
        self.running, self._free_slots = [], list(range(self.engine_config.max_num_seqs - 1, -1, -1))
        self.waiting = deque(sorted(samples, key=lambda s: s.arrival))
        for sample in self.waiting:
            sample.restart()

    @contextlib.contextmanager
    def withheld(self, num_pages: int, num_slots: int) -> Iterator[None]:
        """Pages and slots that nobody gets for a while."""
        page_pool, pages = self.page_pool, self.page_pool.allocate(num_pages)
        slots, self._free_slots = self._free_slots[:num_slots], self._free_slots[num_slots:]
        try:
            yield
        finally:
            if self.page_pool is page_pool:  # else a restart has taken them back
                page_pool.release(pages)
                self._free_slots += slots

    # -- plans -----------------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """The next step. Raises MustSettle where results under way must be collected first."""
        plan = Plan()
        self._plan_decode(plan)
        # The budget is shared with decoding, so that a long prompt adds little to the time between two tokens of the others.
        budget = max(self.engine_config.max_num_batched_tokens - len(plan.decode), QUERY_BLOCK)
        budget = self._plan_running_prefills(plan, budget)
        self._admit(plan, budget)
        for sample, steps in zip(plan.decode, plan.decode_counts, strict=True):
            sample.num_computed += steps
            sample.num_pending += steps
        for chunk in plan.chunks:
            for sample in (chunk.sample, *chunk.forks) if chunk.is_last else ():
                sample.num_pending += 1
        return plan

    def _plan_decode(self, plan: Plan) -> None:
        decoding = [s for s in self.running if s.is_decoding and s.length < s.request.limit]
        for sample in decoding:
            if sample.status is not Status.RUNNING:
                continue  # preempted for an older one
            steps = min(self.engine_config.decode_steps, sample.request.limit - sample.length)
            if self._grow(sample, sample.length + steps - 1):
                plan.decode.append(sample)
                plan.decode_positions.append(sample.length - 1)
                plan.decode_counts.append(steps)

    def _grow(self, sample: Sample, num_tokens: int) -> bool:
        """Pages for num_tokens tokens, preempting the newest sequences for them, at last itself; True where it may run.

        Sequences grow by age, so whoever is preempted is in no plan yet.
        """
        missing = -(-num_tokens // self.engine_config.page_size) - len(sample.pages)
        while missing > self.page_pool.num_available:
            victim = self.running[-1]
            if victim.num_pending:
                raise MustSettle
            self.preempt(victim)
            if victim is sample:
                return False
        if missing > 0:
            sample.pages += self.page_pool.allocate(missing)
        return True

    def _plan_running_prefills(self, plan: Plan, budget: int) -> int:
        for sample in [s for s in self.running if not s.is_decoding]:
            if budget < QUERY_BLOCK:
                break
            budget -= self._plan_chunk(plan, sample, budget)
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        """Waiting sequences in order, while slots, pages and budget last."""
        while self.waiting and self._free_slots and budget >= QUERY_BLOCK:
            sample = self.waiting[0]
            if sample.request.prefilling is not None and not sample.generated:
                break  # its prompt is being computed by a sibling whose pages it will share
            cached = self._cached_pages(sample)
            needed = -(-len(sample.token_ids) // self.engine_config.page_size) - len(cached)
            self.page_pool.share(cached)
            if needed > self.page_pool.num_available - self._reserve():
                self.page_pool.release(cached)
                break
            sample.pages = cached + self.page_pool.allocate(needed)
            self._enter(plan, self.waiting.popleft(), len(cached))
            if not sample.generated:
                sample.request.prefilling = sample
            budget -= self._plan_chunk(plan, sample, budget)

    def _reserve(self) -> int:
        """Pages kept back at admission: a page for each running sequence, or admission and preemption would take turns for ever."""
        return min(len(self.running), self.engine_config.num_pages // 8)

    def _cached_pages(self, sample: Sample) -> list[int]:
        if sample.scores_prompt:
            return []  # every position's logits are wanted
        if sample.known_pages is None or sample.known_pages[0] != self.version:
            sample.known_pages = self.version, []
        return self.page_pool.match(sample.token_ids, self.version, sample.request.cache_salt, sample.known_pages[1])

    def _enter(self, plan: Plan, sample: Sample, num_cached_pages: int) -> None:
        """Into the running set, in order of arrival."""
        sample.slot, sample.status, sample.version = self._free_slots.pop(), Status.RUNNING, self.version
        sample.num_registered, sample.num_computed = num_cached_pages, num_cached_pages * self.engine_config.page_size
        if sample.request.num_cached_tokens is None:
            sample.request.num_cached_tokens = sample.num_computed
        self.running.append(sample)
        self.running.sort(key=lambda s: s.arrival)
        plan.admitted.append(sample)

    def _plan_chunk(self, plan: Plan, sample: Sample, budget: int) -> int:
        """Plan as much of the sequence's prefill as the budget holds; returns what it takes, in whole query blocks."""
        start, end = sample.num_computed, len(sample.token_ids)
        stop = min(end, start + budget // QUERY_BLOCK * QUERY_BLOCK)
        chunk = Chunk(sample, start, stop, stop == end)
        plan.chunks.append(chunk)
        sample.num_computed = stop
        self.register_pages(
            sample
        )  # at once: of equal prompts in one step the first alone is computed, the others read its pages
        if chunk.is_last and sample.request.prefilling is sample:
            sample.request.prefilling = None
            self._fork(plan, chunk)
        return chunk.num_blocks * QUERY_BLOCK

    def _fork(self, plan: Plan, chunk: Chunk) -> None:
        """Samples of the same request that wait right behind share the prompt's full pages and copy the last, partly filled one."""
        source, size = chunk.sample, self.engine_config.page_size
        full = source.prompt_length // size
        while self.waiting and self._free_slots:
            sample = self.waiting[0]
            if sample.request is not source.request or sample.generated:
                break
            if (source.prompt_length % size > 0) > self.page_pool.num_available - self._reserve():
                break
            own = self.page_pool.allocate(1) if source.prompt_length % size else []
            plan.copies += [(source.pages[full], page) for page in own]
            self.page_pool.share(source.pages[:full])
            sample.pages = source.pages[:full] + own
            self._enter(plan, self.waiting.popleft(), 0)
            sample.num_computed = source.prompt_length
            chunk.forks.append(sample)

    # -- results ---------------------------------------------------------------------------------------------------------------

    def register_pages(self, sample: Sample) -> None:
        """Offer the pages that are full of known tokens to the prefix cache."""
        if sample.has_old_pages:
            return  # its keys and values follow from more than one version of the weights
        size = self.engine_config.page_size
        # A page may be offered before the step that fills it has run: whoever reads it runs behind it, or in it, and in a step all keys and
        # values of a layer are written before any is read.
        full = min(sample.num_computed, len(sample.token_ids)) // size
        for index in range(sample.num_registered, full):
            parent = sample.pages[index - 1] if index else None
            self.page_pool.register(
                sample.pages[index],
                parent,
                sample.token_ids[index * size : (index + 1) * size],
                sample.version,
                sample.request.cache_salt,
            )
        sample.num_registered = max(sample.num_registered, full)

    def check_integrity(self) -> None:
        """Assert the scheduler's own invariants and the block manager's."""
        self.page_pool.check_integrity([s.pages for s in self.running])
        slots = [s.slot for s in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.engine_config.max_num_seqs)), "a slot is lost or in two places"
        assert all(not s.pages and s.slot < 0 for s in self.waiting), "a waiting sequence holds pages or a slot"
        assert [s.arrival for s in self.running] == sorted(s.arrival for s in self.running)
