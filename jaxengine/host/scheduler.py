"""Who computes what in the next step: continuous batching, chunked prefill, preemption. Plain Python, no jax.

The same requests in the same order give the same plans, and no plan changes a bit of any output.
"""
import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.host.page_pool import BlockManager
from jaxengine.host.sample import Request, Sequence, Status


class MustSettle(Exception):
    """A sequence has to be preempted whose last tokens are still under way: collect them, then schedule again."""


@dataclasses.dataclass
class Chunk:
    """Tokens [start, stop) of a sequence to prefill. The last chunk also draws, for the sequence and for its forks."""

    sequence: Sequence
    start: int
    stop: int
    is_last: bool
    forks: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return -(-(self.stop - self.start) // QUERY_BLOCK)


@dataclasses.dataclass
class Plan:
    """One step: a decode over `decode`, then a prefill of `chunks`, then the page copies."""

    decode: list[Sequence] = dataclasses.field(default_factory=list)
    decode_positions: list[int] = dataclasses.field(default_factory=list)  # of each sequence's last token
    decode_counts: list[int] = dataclasses.field(default_factory=list)  # tokens that each will get
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class Scheduler:
    """Queues of sequences over a pool of pages and slots."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config, self.blocks = config, blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival: the newest is the first to be preempted
        self.version = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self.num_preemptions = 0

    # -- requests --------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue every sample of a request."""
        first, self._arrivals = self._arrivals, self._arrivals + request.params.n
        request.samples = [Sequence.of(request, index, first + index) for index in range(request.params.n)]
        self.waiting.extend(sample for sample in request.samples if sample.status is Status.WAITING)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence wherever it is; idempotent."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            with contextlib.suppress(ValueError):  # an interrupt may have come before it was queued
                self.waiting.remove(sequence)
        else:
            self._leave(sequence)
        sequence.status, sequence.finish_reason, sequence.stop_reason = Status.FINISHED, reason, stop_reason

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running set: pages and slot are free for the next plan, which the device runs after those under way."""
        self.running.remove(sequence)
        self.blocks.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.num_computed, sequence.num_registered, sequence.has_old_pages = [], -1, 0, 0, False
        if sequence.request.prefilling is sequence:
            sequence.request.prefilling = None

    def preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue; its tokens stay, its keys and values are recomputed."""
        assert sequence.num_pending == 0
        self._leave(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def change_version(self, version: int, keep: bool) -> None:
        """Other weights run from now on, and nothing is under way. What runs is preempted, in the old order; with `keep` what decodes goes
        on with the pages that it has."""
        self.version = version
        for sequence in reversed(list(self.running)):
            if keep and sequence.is_decoding:
                sequence.version, sequence.has_old_pages = version, True
            else:
                self.preempt(sequence)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Nothing is on the device and these sequences wait, whatever state an interrupt left behind."""
        self.blocks = BlockManager(self.blocks.num_pages, self.blocks.page_size, self.blocks.caching)
        self.running, self._free_slots = [], list(range(self.config.max_num_seqs - 1, -1, -1))
        self.waiting = deque(sorted(sequences, key=lambda s: s.arrival))
        for sequence in self.waiting:
            sequence.restart()

    @contextlib.contextmanager
    def withheld(self, num_pages: int, num_slots: int) -> Iterator[None]:
        """Pages and slots that nobody gets for a while."""
        blocks, pages = self.blocks, self.blocks.allocate(num_pages)
        slots, self._free_slots = self._free_slots[:num_slots], self._free_slots[num_slots:]
        try:
            yield
        finally:
            if self.blocks is blocks:  # else a restart has taken them back
                blocks.release(pages)
                self._free_slots += slots

    # -- plans -----------------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """The next step. Raises MustSettle where results under way must be collected first."""
        plan = Plan()
        self._plan_decode(plan)
        # The budget is shared with decoding, so that a long prompt adds little to the time between two tokens of the others.
        budget = max(self.config.max_num_batched_tokens - len(plan.decode), QUERY_BLOCK)
        budget = self._plan_running_prefills(plan, budget)
        self._admit(plan, budget)
        for sequence, steps in zip(plan.decode, plan.decode_counts, strict=True):
            sequence.num_computed += steps
            sequence.num_pending += steps
        for chunk in plan.chunks:
            for sequence in (chunk.sequence, *chunk.forks) if chunk.is_last else ():
                sequence.num_pending += 1
        return plan

    def _plan_decode(self, plan: Plan) -> None:
        decoding = [s for s in self.running if s.is_decoding and s.length < s.request.limit]
        for sequence in decoding:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an older one
            steps = min(self.config.decode_steps, sequence.request.limit - sequence.length)
            if self._grow(sequence, sequence.length + steps - 1):
                plan.decode.append(sequence)
                plan.decode_positions.append(sequence.length - 1)
                plan.decode_counts.append(steps)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for num_tokens tokens, preempting the newest sequences for them, at last itself; True where it may run.

        Sequences grow by age, so whoever is preempted is in no plan yet.
        """
        missing = -(-num_tokens // self.config.page_size) - len(sequence.pages)
        while missing > self.blocks.num_available:
            victim = self.running[-1]
            if victim.num_pending:
                raise MustSettle
            self.preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.blocks.allocate(missing)
        return True

    def _plan_running_prefills(self, plan: Plan, budget: int) -> int:
        for sequence in [s for s in self.running if not s.is_decoding]:
            if budget < QUERY_BLOCK:
                break
            budget -= self._plan_chunk(plan, sequence, budget)
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        """Waiting sequences in order, while slots, pages and budget last."""
        while self.waiting and self._free_slots and budget >= QUERY_BLOCK:
            sequence = self.waiting[0]
            if sequence.request.prefilling is not None and not sequence.generated:
                break  # its prompt is being computed by a sibling whose pages it will share
            cached = self._cached_pages(sequence)
            needed = -(-len(sequence.token_ids) // self.config.page_size) - len(cached)
            self.blocks.share(cached)
            if needed > self.blocks.num_available - self._reserve():
                self.blocks.release(cached)
                break
            sequence.pages = cached + self.blocks.allocate(needed)
            self._enter(plan, self.waiting.popleft(), len(cached))
            if not sequence.generated:
                sequence.request.prefilling = sequence
            budget -= self._plan_chunk(plan, sequence, budget)

    def _reserve(self) -> int:
        """Pages kept back at admission: a page for each running sequence, or admission and preemption would take turns for ever."""
        return min(len(self.running), self.config.num_pages // 8)

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        if sequence.scores_prompt:
            return []  # every position's logits are wanted
        if sequence.known_pages is None or sequence.known_pages[0] != self.version:
            sequence.known_pages = self.version, []
        return self.blocks.match(sequence.token_ids, self.version, sequence.request.cache_salt, sequence.known_pages[1])

    def _enter(self, plan: Plan, sequence: Sequence, num_cached_pages: int) -> None:
        """Into the running set, in order of arrival."""
        sequence.slot, sequence.status, sequence.version = self._free_slots.pop(), Status.RUNNING, self.version
        sequence.num_registered, sequence.num_computed = num_cached_pages, num_cached_pages * self.config.page_size
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = sequence.num_computed
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        plan.admitted.append(sequence)

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Plan as much of the sequence's prefill as the budget holds; returns what it takes, in whole query blocks."""
        start, end = sequence.num_computed, len(sequence.token_ids)
        stop = min(end, start + budget // QUERY_BLOCK * QUERY_BLOCK)
        chunk = Chunk(sequence, start, stop, stop == end)
        plan.chunks.append(chunk)
        sequence.num_computed = stop
        self.register_pages(sequence)  # at once: of equal prompts in one step the first alone is computed, the others read its pages
        if chunk.is_last and sequence.request.prefilling is sequence:
            sequence.request.prefilling = None
            self._fork(plan, chunk)
        return chunk.num_blocks * QUERY_BLOCK

    def _fork(self, plan: Plan, chunk: Chunk) -> None:
        """Samples of the same request that wait right behind share the prompt's full pages and copy the last, partly filled one."""
        source, size = chunk.sequence, self.config.page_size
        full = source.prompt_length // size
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if sequence.request is not source.request or sequence.generated:
                break
            if (source.prompt_length % size > 0) > self.blocks.num_available - self._reserve():
                break
            own = self.blocks.allocate(1) if source.prompt_length % size else []
            plan.copies += [(source.pages[full], page) for page in own]
            self.blocks.share(source.pages[:full])
            sequence.pages = source.pages[:full] + own
            self._enter(plan, self.waiting.popleft(), 0)
            sequence.num_computed = source.prompt_length
            chunk.forks.append(sequence)

    # -- results ---------------------------------------------------------------------------------------------------------------

    def register_pages(self, sequence: Sequence) -> None:
        """Offer the pages that are full of known tokens to the prefix cache."""
        if sequence.has_old_pages:
            return  # its keys and values follow from more than one version of the weights
        size = self.config.page_size
        # A page may be offered before the step that fills it has run: whoever reads it runs behind it, or in it, and in a step all keys and
        # values of a layer are written before any is read.
        full = min(sequence.num_computed, len(sequence.token_ids)) // size
        for index in range(sequence.num_registered, full):
            parent = sequence.pages[index - 1] if index else None
            self.blocks.register(sequence.pages[index], parent, sequence.token_ids[index * size : (index + 1) * size],
                                 sequence.version, sequence.request.cache_salt)
        sequence.num_registered = max(sequence.num_registered, full)

    def check_integrity(self) -> None:
        """Assert the scheduler's own invariants and the block manager's."""
        self.blocks.check_integrity([s.pages for s in self.running])
        slots = [s.slot for s in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), "a slot is lost or in two places"
        assert all(not s.pages and s.slot < 0 for s in self.waiting), "a waiting sequence holds pages or a slot"
        assert [s.arrival for s in self.running] == sorted(s.arrival for s in self.running)
