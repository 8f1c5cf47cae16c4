"""What must hold of every plan and after every step."""

import weakref
from collections import Counter
from collections.abc import Iterable

from model import link, root

from jaxengine.config import QUERY_BLOCK
from jaxengine.engine.engine import Engine
from jaxengine.host.page_pool import PageKey, PagePool, root_digest
from jaxengine.host.sample import Request, Sample, Status
from jaxengine.host.scheduler import Chunk, MustCollect, Plan, Scheduler


class Watched(Scheduler):
    """The scheduler.

    Whoever watches sees each plan as it is made, before the device and the results change anything.
    """

    watch: "Watch"

    def schedule(self) -> Plan:
        ready = [s for s in self.running if s.is_decoding and s.length < s.request.limit]
        try:
            plan = super().schedule()
        except MustCollect:
            self.watch.stats["settled"] += 1
            raise
        self.watch.see(self, plan, ready)
        return plan

    def finish(self, sample: Sample, reason: str, stop_reason: int | str | None = None) -> None:
        found = [page for page in sample.pages if page in self.page_pool._keys]
        assert not found or reason != "error", "a failed sequence's pages can still be found"
        if reason == "error":
            self.watch.resident.forget(self, sample)
        super().finish(sample, reason, stop_reason)

    def _release(self, sample: Sample) -> None:
        self.watch.resident.remember(self, [sample])
        super()._release(sample)

    def _cached_pages(self, sample: Sample) -> list[int]:
        found = super()._cached_pages(sample)
        if not sample.scores_prompt:
            self.watch.resident.check_hit(self, sample, len(found))
        return found


class Watch:
    """The invariants of plans, and what the plans of a run did. `trace` is a hash of all of them."""

    def __init__(self, stats: Counter[str]) -> None:
        self.stats, self.trace, self.resident = stats, 0, Resident()
        self._homes: dict[int, tuple[int, str]] = {}  # page -> weights version and salt of its last writer
        self._filled: dict[int, tuple[int, int]] = {}  # page -> its births, and how much of it is written since
        self._blocks: PagePool | None = None

    def see(self, scheduler: Scheduler, plan: Plan, ready: list[Sample]) -> None:
        _check_budget(scheduler, plan)
        _check_reasons(scheduler, plan, ready)
        forks = [s for chunk in plan.chunks for s in chunk.forks]
        self._see_writes(scheduler, plan)
        self.stats["forks"] += len(forks)
        self.stats["copied pages"] += len(plan.copies)
        self.stats["prefill tokens"] += sum(chunk.stop - chunk.start for chunk in plan.chunks)
        self.stats["decode tokens"] += sum(decode.count for decode in plan.decodes)
        self.trace = hash(
            (
                self.trace,
                *((s.arrival, s.slot, *s.pages) for s in plan.decoding),
                *plan.copies,
                *((c.sample.arrival, c.start, c.stop, *c.sample.pages) for c in plan.chunks),
            )
        )

    def _see_hit(self, scheduler: Scheduler, chunk: Chunk) -> None:
        sample, size = chunk.sample, scheduler.engine_config.page_size
        assert chunk.start % size == 0, "a hit ends within a page"
        home = (scheduler.version, sample.request.cache_salt)
        found = [self._homes.get(page) for page in sample.pages[: chunk.start // size]]
        assert all(other == home for other in found), (
            f"a hit for {home} was written by {found}: another version or salt"
        )
        self.stats["hits"] += bool(found)
        self.stats["hits under new weights"] += bool(found) and scheduler.version > 0
        self.stats["hits of recomputed sequences"] += bool(found) and bool(sample.drawn.token_ids)

    def _see_writes(self, scheduler: Scheduler, plan: Plan) -> None:
        if self._blocks is not scheduler.page_pool:
            self._blocks, self._filled = scheduler.page_pool, {}
        for sample, at, count in plan.decodes:
            self._see_write(scheduler, sample, at, at + count)
        for chunk in plan.chunks:
            if chunk.sample in plan.admitted:
                self._see_hit(scheduler, chunk)
            self._see_write(scheduler, chunk.sample, chunk.start, chunk.stop)
        for source, target in plan.copies:
            assert scheduler.page_pool._holders[target] == 1, "a copy goes to a shared page"
            self._homes[target] = self._homes[source]
            self._filled[target] = scheduler.page_pool.births[target], self._filled[source][1]

    def _see_write(self, scheduler: Scheduler, sample: Sample, start: int, stop: int) -> None:
        """A place in a page is written once: a sample that shares the page reads it."""
        size, births = scheduler.engine_config.page_size, scheduler.page_pool.births
        assert stop <= sample.request.limit, "a position after the limit is computed"
        for index, page in enumerate(sample.pages[start // size : (stop - 1) // size + 1], start // size):
            first, last = max(start - index * size, 0), min(stop - index * size, size)
            known, filled = self._filled.get(page, (0, 0))
            assert known != births[page] or first >= filled, "a place in a page is written twice"
            self._filled[page] = births[page], last
            self._homes[page] = scheduler.version, sample.request.cache_salt


class Resident:
    """What a prompt should find: the longest of its fronts, in whole pages and without its last token, that was
    computed and is still there.

    Told by the tokens that samples have computed, and by which pages are held or cached; never by the pool's keys.
    """

    def __init__(self) -> None:
        self._pool: PagePool | None = None
        self._chains: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> births, the fronts that end up to its end
        self._hidden: set[tuple[int, int]] = set()  # (page, births) that nobody may find
        self._fronts: weakref.WeakKeyDictionary[Sample, tuple[int, list[int]]] = weakref.WeakKeyDictionary()

    def remember(self, scheduler: Scheduler, samples: Iterable[Sample]) -> None:
        """What these samples' pages hold now. A page after a hidden one is hidden too."""
        if self._pool is not scheduler.page_pool:
            self._pool, self._chains, self._hidden = scheduler.page_pool, {}, set()
        births, size = scheduler.page_pool.births, scheduler.engine_config.page_size
        for sample in samples:
            full = min(sample.num_computed, sample.num_tokens) // size
            fronts, hidden = self._fronts_of(sample, sample.version, full, size), False
            for index, page in enumerate(sample.pages[:full]):
                known = self._chains.get(page, (0, ()))[0] == births[page]
                hidden |= (page, births[page]) in self._hidden or (sample.has_old_pages and not known)
                if hidden:
                    self._hidden.add((page, births[page]))
                elif not known:
                    self._chains[page] = births[page], tuple(fronts[: index + 1])

    def forget(self, scheduler: Scheduler, sample: Sample) -> None:
        """A failed sample's pages are not to be found, nor what holds the same or follows it."""
        self.remember(scheduler, scheduler.running)
        born = scheduler.page_pool.births
        known = [(page, *self._chains[page]) for page in sample.pages if page in self._chains]
        gone = {fronts[-1] for page, births, fronts in known if births == born[page]}  # else of an earlier page
        for page, (births, fronts) in list(self._chains.items()):
            if gone.intersection(fronts):
                del self._chains[page]
                self._hidden.add((page, births))

    def check_hit(self, scheduler: Scheduler, sample: Sample, num_found: int) -> None:
        self.remember(scheduler, scheduler.running)
        pool, size = scheduler.page_pool, scheduler.engine_config.page_size
        there = {
            fronts[-1]
            for page, (births, fronts) in self._chains.items()
            if births == pool.births[page] and (pool._holders[page] or page in pool._cached)
        }
        most = (sample.num_tokens - 1) // size if pool.caching else 0
        fronts = self._fronts_of(sample, scheduler.version, most, size)
        expected = next((index for index, front in enumerate(fronts[:most]) if front not in there), most)
        assert num_found == expected, f"a prompt finds {num_found} pages where {expected} were computed and are there"

    def _fronts_of(self, sample: Sample, version: int, count: int, size: int) -> list[int]:
        """A number for each front of `count` whole pages, under these weights and the sample's salt."""
        known, fronts = self._fronts.get(sample, (version, []))
        if known != version:
            fronts = []
        while len(fronts) < count:
            tokens, start = sample.tokens(len(fronts) * size, (len(fronts) + 1) * size), fronts[-1] if fronts else 0
            fronts.append(hash((start, version, sample.request.cache_salt, *tokens)))
        self._fronts[sample] = version, fronts
        return fronts


def _budget_left(scheduler: Scheduler, plan: Plan) -> int:
    budget = max(scheduler.engine_config.max_num_batched_tokens - len(plan.decoding), QUERY_BLOCK)
    return budget - QUERY_BLOCK * sum(chunk.num_blocks for chunk in plan.chunks)


def _check_budget(scheduler: Scheduler, plan: Plan) -> None:
    assert _budget_left(scheduler, plan) >= 0, "more tokens than the budget"
    for chunk in plan.chunks:
        assert chunk.start % QUERY_BLOCK == 0 and chunk.start < chunk.stop, (
            "a chunk that is empty or starts within a block"
        )
        assert chunk.is_last == (chunk.stop == len(chunk.sample.token_ids)), (
            "a last chunk that is not, or the other way round"
        )
        assert chunk.is_last or chunk.stop % QUERY_BLOCK == 0, "a chunk ends within a block"


def _check_reasons(scheduler: Scheduler, plan: Plan, ready: list[Sample]) -> None:
    """Every sequence is served or waits for a reason that can be named; the oldest one has none but its own results."""
    served = {*plan.decoding, *(s for chunk in plan.chunks for s in (chunk.sample, *chunk.forks))}
    gone = {s for s in ready if s.status is Status.WAITING} | set(plan.admitted)
    assert [s for s in ready if s not in gone] == plan.decoding, "a sequence that decodes was left out"
    short = _budget_left(scheduler, plan) < QUERY_BLOCK
    for index, sample in enumerate(scheduler.running):
        ending = sample.num_pending > 0 and sample.length >= sample.request.limit
        assert sample in served or ending or (short and index > 0 and not sample.is_decoding), (
            "a running sequence is not served"
        )
    assert not scheduler.waiting or short or _head_waits(scheduler, scheduler.waiting.head), (
        "the first in the queue waits for nothing"
    )


def _head_waits(scheduler: Scheduler, head: Sample) -> bool:
    """Whether the head of the queue lacks a slot, a sibling's prompt or pages."""
    if len(scheduler.running) == scheduler.engine_config.max_num_seqs:
        return True
    if not head.drawn.token_ids and any(_prefills_prompt_of(head.request, other) for other in scheduler.running):
        return True
    found = (
        []
        if head.scores_prompt
        else scheduler.page_pool.match(head.token_ids, scheduler.version, head.request.cache_salt)
    )
    needed = -(-len(head.token_ids) // scheduler.engine_config.page_size) - len(found)
    revived = sum(page in scheduler.page_pool._cached for page in found)
    reserve = min(len(scheduler.running), scheduler.engine_config.num_pages // 8)
    return needed > scheduler.page_pool.num_available - revived - reserve


# -- after a step ------------------------------------------------------------------------------------------------------


def check_step(engine: Engine, held: list[int]) -> None:
    """`held` are pages that the simulation keeps from the scheduler."""
    scheduler = engine.scheduler
    _check_queues(engine)
    tables = [s.pages for s in scheduler.running]
    assert all(len(set(table)) == len(table) for table in tables), "a page stands twice in one block table"
    scheduler.page_pool.check_integrity([*tables, held])
    under_way = _rows_under_way(engine)
    for sample in scheduler.running:
        assert sample.num_pending == under_way[sample], "tokens under way are not those that the device owes"
        _check_running(sample, scheduler.engine_config.page_size)


def _rows_under_way(engine: Engine) -> Counter[Sample]:
    rows: Counter[Sample] = Counter()
    if engine._in_flight is not None:
        for sample, _, count in engine._in_flight.plan.decodes:
            rows[sample] += count
        rows.update(sample for sample, _, scored in engine._in_flight.plan.rows if not scored)
    return rows


def _check_queues(engine: Engine) -> None:
    scheduler, running, waiting = engine.scheduler, engine.scheduler.running, list(engine.scheduler.waiting)
    live = [s for request in engine.requests.values() for s in request.samples if s.status is not Status.FINISHED]
    assert sorted(s.arrival for s in live) == sorted(s.arrival for s in [*running, *waiting]), (
        "a sequence is lost, or runs past its end"
    )
    assert all(s.status is Status.RUNNING for s in running) and all(s.status is Status.WAITING for s in waiting), (
        "a status is wrong"
    )
    arrivals = [s.arrival for s in [*running, *waiting]]
    assert arrivals == sorted(arrivals), "a sequence was overtaken"
    slots = [s.slot for s in running] + scheduler._free_slots
    assert sorted(slots) == list(range(scheduler.engine_config.max_num_seqs)), "a slot is lost or in two places"
    assert all(not s.pages and s.slot < 0 and not s.num_pending + s.num_computed for s in waiting), (
        "one that waits holds something"
    )


def _prefills_prompt_of(request: Request, sample: Sample) -> bool:
    return sample.request is request and not sample.drawn.token_ids and sample.num_computed < sample.prompt_length


def _check_running(sample: Sample, size: int) -> None:
    pages, known = len(sample.pages), max(sample.num_computed, len(sample.token_ids))
    assert -(-sample.num_computed // size) <= pages <= -(-known // size), "pages too few or too many for the tokens"
    assert sample.num_computed <= sample.length <= sample.request.limit, "more is computed than there are tokens"
    assert sample.num_registered <= min(sample.num_computed, len(sample.token_ids)) // size, (
        "a page is offered too early"
    )


class CacheCheck:
    """Every page that can be found holds what its chain of keys says.

    What a key stands for is worked out once, from its tokens.
    """

    def __init__(self) -> None:
        self._expected: dict[int, list[int]] = {}  # uid of a key -> the states that its page has to hold
        self._names: dict[bytes, int] = {}  # digest -> the last of these states
        self._blocks: object = None

    def check(self, engine: Engine, salts: Iterable[str]) -> None:
        blocks, cache = engine.scheduler.page_pool, engine.cache
        if blocks is not self._blocks:
            self._blocks, self._expected, self._names = blocks, {}, {}
        for page, key in blocks._keys.items():
            expected = self._expected.get(key.uid) or self._learn(key, range(engine.scheduler.version + 1), salts)
            assert expected is None or cache.pages[page] == expected, (
                "a page in the prefix cache holds other tokens than it is found by"
            )

    def _learn(self, key: PageKey, versions: Iterable[int], salts: Iterable[str]) -> list[int] | None:
        """None where the parent came and went between two checks."""
        if isinstance(key.parent, bytes):
            roots = {root_digest(version, salt): root(version) for version in versions for salt in salts}
            assert key.parent in roots, "a chain starts nowhere"
            before = roots[key.parent]
        elif key.parent in self._expected:
            before = self._expected[key.parent][-1]
        else:
            return None
        states = [before := link(before, token) for token in memoryview(key.tokens).cast("i")]
        assert self._names.setdefault(key.digest, states[-1]) == states[-1], "one digest names two prefixes"
        self._expected[key.uid] = states
        return states
