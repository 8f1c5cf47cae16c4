"""The scheduler against a fake device.

Plain Python that keeps, for every token in every page, a hash of the tokens up to it.

A row that reads its pages checks each of these hashes, so a page that is shared, freed, copied or recomputed wrongly is
found where it is read. The token drawn is a function of the tokens before it and the sample's index, so every sequence
has one right answer.
"""

import dataclasses
import itertools
import random
from array import array
from collections import deque
from types import SimpleNamespace

import pytest

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.host.page_pool import PagePool
from jaxengine.host.sample import Request, Sample, Status
from jaxengine.host.scheduler import MustCollect, Plan, Scheduler
from jaxengine.sampling_params import SamplingParams

STOP = 0
PAGE = 32


def prefix_hashes(tokens) -> list[int]:
    return list(itertools.accumulate(tokens, lambda before, token: hash((before, token)), initial=1))[1:]


def drawn(tokens, sample: int) -> int:
    """The token after `tokens`: one in forty ends the sequence."""
    return hash((prefix_hashes(tokens)[-1], sample)) % 40


def answer(request: Request, sample: int) -> list[int]:
    tokens = list(request.prompt_token_ids)
    while len(tokens) < request.limit and (
        len(tokens) == len(request.prompt_token_ids) or tokens[-1] not in request.stop_token_ids
    ):
        tokens.append(drawn(tokens, sample))
    return tokens[len(request.prompt_token_ids) :]


class Loop:
    """The engine's loop around a fake device; `overlap` reads a step's results after the next one was run."""

    def __init__(self, overlap: bool = False, **config) -> None:
        sizes = dict(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, page_size=PAGE, num_pages=64)
        self.config = EngineConfig(**sizes | config)
        self.pool = PagePool(self.config.num_pages, self.config.page_size, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, self.pool)
        self.overlap, self.num_collected, self.num_steps = overlap, 0, 0
        self.pages = [[0] * self.config.page_size for _ in range(self.config.num_pages)]
        self.written: set[tuple[int, int, int]] = set()  # (page, births, offset)
        self.history: dict[int, list[int]] = {}
        self._ids = itertools.count()
        self._in_flight: deque[list[tuple[Sample, int]]] = deque()

    def add(self, prompt: list[int], max_tokens: int = 10, n: int = 1, stops: bool = False) -> Request:
        limit = min(
            len(prompt) + max_tokens, self.config.max_model_len, (self.config.num_pages - 1) * self.config.page_size
        )
        request = Request(
            str(next(self._ids)), prompt, SamplingParams(n=n), (0, 0), 0, frozenset([STOP] if stops else []), limit
        )
        self.scheduler.add(request)
        return request

    def step(self) -> Plan:
        running = [s for s in self.scheduler.running if s.is_decoding and s.length < s.request.limit]
        try:
            plan = self.scheduler.schedule()
        except MustCollect:
            assert self._in_flight, "there is nothing to collect"
            self.num_collected += 1
            self._collect()
            running = [s for s in running if s.status is Status.RUNNING and s.length < s.request.limit]
            plan = self.scheduler.schedule()
        self._check(plan, running)
        if plan:
            self._in_flight.append(self._run(plan))
        if not self.overlap or not plan or len(self._in_flight) > 1:
            self._collect()
        self.num_steps += 1
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int = 5_000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.num_steps < max_steps, "no end"
            self.step()
        while self._in_flight:
            self._collect()

    def _check(self, plan: Plan, running: list[Sample]) -> None:
        """What holds for every plan."""
        assert plan or self._in_flight or not (self.scheduler.running or self.scheduler.waiting), (
            "a step without progress"
        )
        stayed = [
            s for s in running if s.status is Status.RUNNING and s not in plan.admitted
        ]  # some were preempted, and may be back
        assert plan.decoding == stayed, "running decodes are left out"
        budget = max(self.config.max_num_batched_tokens - len(plan.decoding), QUERY_BLOCK)
        assert sum(chunk.num_blocks for chunk in plan.chunks) * QUERY_BLOCK <= budget, "more tokens than the budget"
        assert all(chunk.start % QUERY_BLOCK == 0 and chunk.start < chunk.stop for chunk in plan.chunks)
        assert all(chunk.stop % QUERY_BLOCK == 0 or chunk.is_last for chunk in plan.chunks)
        first_waiting = min((s.arrival for s in self.scheduler.waiting), default=self.scheduler._arrivals)
        assert all(s.arrival < first_waiting for s in self.scheduler.running), "a sequence was overtaken"

    def _run(self, plan: Plan) -> list[tuple[Sample, int]]:
        """What the device does, in the order in which it does it; returns the drawn tokens."""
        for sample in plan.admitted:
            self.history[sample.slot] = list(sample.token_ids)
        rows = []
        for sample, position, count in plan.decodes:
            for at in range(position, position + count):
                self._write(sample, at, at + 1)
                rows.append(self._draw(sample, at))
        for chunk in plan.chunks:
            self._write(chunk.sample, chunk.start, chunk.stop)
        for source, target in plan.copies:
            self.pages[target] = list(self.pages[source])
        for chunk in plan.chunks:
            rows += [self._draw(s, chunk.stop - 1) for s in (chunk.sample, *chunk.forks) if chunk.is_last]
        return rows

    def _write(self, sample: Sample, start: int, stop: int) -> None:
        """Keys and values of tokens [start, stop), which see those before them."""
        hashes, size = prefix_hashes(self.history[sample.slot][:stop]), self.config.page_size
        assert len(hashes) == stop, "the token to run is not known"
        for at in range(start):
            assert self.pages[sample.pages[at // size]][at % size] == hashes[at], f"position {at} holds another prefix"
        for at in range(start, stop):
            page = sample.pages[at // size]
            place = page, self.pool.births[page], at % size
            assert place not in self.written, "a place in a page is written twice: somebody else's page"
            self.written.add(place)
            self.pages[page][at % size] = hashes[at]

    def _draw(self, sample: Sample, position: int) -> tuple[Sample, int]:
        history = self.history[sample.slot]
        del history[position + 1 :]
        history.append(drawn(history, sample.index))
        return sample, history[-1]

    def _collect(self) -> None:
        for sample, token in self._in_flight.popleft() if self._in_flight else ():
            if sample.status is Status.FINISHED:
                continue
            sample.drawn.token_ids.append(token)
            self.scheduler.register_pages(sample)
            if token in sample.request.stop_token_ids:
                self.scheduler.finish(sample, "stop")
            elif len(sample.token_ids) >= sample.request.limit:
                self.scheduler.finish(sample, "length")


def assert_answered(*requests: Request) -> None:
    for request in requests:
        for sample in request.samples:
            assert list(sample.drawn.token_ids) == answer(request, sample.index)
            assert sample.drawn.finish_reason == (
                "stop" if sample.token_ids[-1] in request.stop_token_ids else "length"
            )


def assert_empty(loop: Loop) -> None:
    assert not loop.scheduler.running and not loop.scheduler.waiting
    assert loop.pool.num_available == loop.config.num_pages - 1, "pages are still held"


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def overlap(request) -> bool:
    return request.param


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_decoding(overlap):
    loop = Loop(overlap)
    short = [loop.add([i, 1, 2], max_tokens=30) for i in range(1, 5)]
    loop.step(), loop.step()
    long = loop.add(list(range(1, 200)), max_tokens=4)
    plans = []
    while long.samples[0].num_computed < 199:
        plans.append(loop.step())
    assert len(plans) == 5, "199 tokens in chunks of 48: what 64 leave beside four decodes, in whole pool"
    assert [(c.start, c.stop) for p in plans for c in p.chunks] == [
        (0, 48),
        (48, 96),
        (96, 144),
        (144, 192),
        (192, 199),
    ]
    assert all(len(p.decodes) == 4 for p in plans)
    loop.run()
    assert_answered(*short, long)
    assert_empty(loop)


def test_decoding_alone_leaves_prefill_a_block():
    """Even where decodes fill the budget a prompt comes forward, by one block a step."""
    loop = Loop(max_num_seqs=40, max_num_batched_tokens=32)
    for i in range(32):
        loop.add([i + 1], max_tokens=100)
    while sum(s.is_decoding for s in loop.scheduler.running) < 32:
        loop.step()
    long = loop.add(list(range(1, 50)))
    assert [(c.start, c.stop) for _ in range(4) for c in loop.step().chunks] == [(0, 16), (16, 32), (32, 48), (48, 49)]
    loop.run()
    assert_answered(long)


def test_requests_are_admitted_in_order_while_slots_last():
    loop = Loop(max_num_seqs=2)
    requests = [loop.add([i + 1] * 3, max_tokens=3) for i in range(4)]
    assert [c.sample.request for c in loop.step().chunks] == requests[:2]
    assert [s.request for s in loop.scheduler.waiting] == requests[2:]
    loop.run()
    assert_answered(*requests)


def test_a_large_request_at_the_head_is_not_overtaken():
    loop = Loop(num_pages=6)
    first, large, small = (
        loop.add([1] * 90, max_tokens=5),
        loop.add([2] * 100, max_tokens=5),
        loop.add([3], max_tokens=5),
    )
    plan = loop.step()
    assert [c.sample.request for c in plan.chunks] == [first]
    while not first.samples[0].drawn.finish_reason:
        assert not small.samples[0].drawn.token_ids
        loop.step()
    loop.run()
    assert_answered(first, large, small)


@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 5])
def test_forks_share_full_pages_and_copy_the_last_one(length):
    loop = Loop(max_num_batched_tokens=128)
    request = loop.add(list(range(1, length + 1)), n=4)
    plan = loop.step()
    (chunk,) = plan.chunks
    first, *others = request.samples
    assert chunk.sample is first and chunk.forks == others, "one prefill for all four"
    full, partly = length // PAGE, length % PAGE > 0
    for other in others:
        assert other.pages[:full] == first.pages[:full]
        assert len(other.pages) == full + partly and not set(other.pages[full:]) & set(first.pages)
    assert plan.copies == [(first.pages[full], other.pages[full]) for other in others if partly]
    loop.run()
    assert_answered(request)
    assert_empty(loop)


def test_forks_wait_for_a_prompt_that_comes_in_chunks():
    loop = Loop(max_num_batched_tokens=32)
    request = loop.add(list(range(1, 71)), n=3)
    plans = [loop.step() for _ in range(3)]
    assert [(c.start, c.stop, len(c.forks)) for p in plans for c in p.chunks] == [(0, 32, 0), (32, 64, 0), (64, 70, 2)]
    loop.run()
    assert_answered(request)


def test_forks_without_a_slot_follow_later_and_find_the_pages():
    loop = Loop(max_num_seqs=2)
    request = loop.add(list(range(1, 71)), n=5, max_tokens=4)
    computed = sum(chunk.stop - chunk.start for _ in range(40) for chunk in loop.step().chunks)
    assert_answered(request)
    assert 70 < computed <= 70 + 2 * (70 - 64), "each later leader computes what comes after the full pages"
    assert_empty(loop)


def test_another_sample_takes_over_when_the_first_ends_in_the_middle_of_its_prompt(overlap):
    loop = Loop(overlap, max_num_batched_tokens=32)
    request = loop.add(list(range(1, 71)), n=3)
    loop.step()
    loop.scheduler.finish(request.samples[0], "abort")
    loop.scheduler.check_integrity()
    loop.run()
    for sample in request.samples[1:]:
        assert list(sample.drawn.token_ids) == answer(request, sample.index)
    assert list(request.samples[0].drawn.token_ids) == [] and request.samples[0].drawn.finish_reason == "abort"
    assert_empty(loop)


def test_a_repeated_prompt_computes_only_behind_its_full_pages(overlap):
    loop = Loop(overlap)
    requests = [loop.add(list(range(1, 71)), max_tokens=3)]
    loop.run()
    requests.append(loop.add(list(range(1, 71)), max_tokens=5))
    assert [(c.start, c.stop) for c in loop.step().chunks] == [(64, 70)]
    loop.run()
    assert_answered(*requests)
    assert requests[1].num_cached_tokens == 64


@pytest.mark.parametrize("overlap", [False, True])
def test_of_equal_prompts_in_one_step_the_first_alone_is_computed(overlap):
    """A group may come as repeated prompts: its members read the pages that the first one writes in the very step."""
    loop = Loop(overlap, max_num_batched_tokens=256)
    prompt = [random.Random(3).randrange(1, 9) for _ in range(PAGE * 2 + 8)]
    requests = [loop.add(prompt) for _ in range(4)]
    plan = loop.step()
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(0, PAGE * 2 + 8)] + [(PAGE * 2, PAGE * 2 + 8)] * 3
    loop.run()
    assert [request.samples[0].drawn.token_ids for request in requests] == [answer(requests[0], 0)] * 4


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("turn", ["one after another", "in one step", "scored"])
def test_each_of_equal_prompts_finds_its_answer_in_the_second_turn(length, turn, overlap):
    """Where a prompt ends with a page each sample computes that page again; what follows it is found all the same."""
    loop = Loop(overlap, page_size=16, max_num_batched_tokens=256)
    requests = []
    for index in reversed(range(4)):
        requests.append(loop.add([5] * length, max_tokens=64))
        requests[-1].samples[0].index = index  # each has an answer of its own
        requests[-1].sampling = SamplingParams(prompt_logprobs=0 if turn == "scored" else None)  # of index 0, the last
        if turn == "one after another":
            loop.run()
    loop.run()
    turns = [loop.add([*request.samples[0].token_ids, 3, 3], max_tokens=2) for request in requests]
    loop.run()
    assert [request.num_cached_tokens for request in turns] == [(length + 64 - 1) // 16 * 16] * 4
    assert_empty(loop)


@pytest.mark.parametrize("steps", [0, 3], ids=["waiting", "running"])
def test_an_end_ends_the_text(steps):
    """Whatever ends a sample: what its text held back is text from then on, and rendering has nothing left to do."""
    loop, ends = Loop(), []
    request = loop.add([1, 2], max_tokens=9)
    request.samples[0].detokenizer = SimpleNamespace(finish=lambda: ends.append("ended"))
    for _ in range(steps):
        loop.step()
    loop.scheduler.finish(request.samples[0], "abort")
    loop.scheduler.finish(request.samples[0], "abort")
    assert ends == ["ended"]


def test_prompt_logprobs_compute_every_position():
    loop = Loop(max_num_batched_tokens=128)
    loop.add(list(range(1, 71)))
    loop.run()
    request = loop.add(list(range(1, 71)))
    request.sampling = SamplingParams(prompt_logprobs=0)
    assert [(c.start, c.stop) for c in loop.step().chunks] == [(0, 70)]


# -- pages run out -----------------------------------------------------------------------------------------------------


def test_the_newest_is_preempted_first_and_recomputed(overlap):
    loop = Loop(overlap, num_pages=8)
    requests = [loop.add([i + 1] * 60, max_tokens=60) for i in range(3)]
    preempted = []
    original = loop.scheduler.preempt

    def preempt(sample):
        preempted.append(sample)
        assert sample is loop.scheduler.running[-1], "the newest of all that run"
        original(sample)

    loop.scheduler.preempt = preempt
    loop.run()
    assert preempted and requests[0].samples[0] not in preempted
    assert preempted[0] is requests[2].samples[0]
    assert_answered(*requests)
    assert_empty(loop)


def test_a_preempted_sequence_goes_to_the_front_with_its_tokens():
    loop = Loop()
    old, new, later = [loop.add([i + 1] * 20, max_tokens=20) for i in range(3)]
    for _ in range(4):
        loop.step()
    so_far = [list(r.samples[0].drawn.token_ids) for r in (old, new)]
    assert len(so_far[0]) >= 3
    for request in (later, new):
        loop.scheduler.preempt(request.samples[0])
    loop.scheduler.check_integrity()
    assert [s.request for s in loop.scheduler.waiting] == [new, later]
    assert [list(r.samples[0].drawn.token_ids) for r in (old, new)] == so_far
    loop.run()
    assert_answered(old, new, later)
    assert loop.scheduler.num_preemptions == 2


def test_results_under_way_are_collected_before_a_preemption():
    loop = Loop(overlap=True, num_pages=8, enable_prefix_caching=False)
    requests = [loop.add([i + 1] * 60, max_tokens=60) for i in range(3)]
    loop.run()
    assert loop.num_collected > 0 and loop.scheduler.num_preemptions > 0
    assert_answered(*requests)
    assert_empty(loop)


def test_the_scheduler_asks_for_results_and_leaves_nothing_half_done():
    loop = Loop(overlap=True, num_pages=8, enable_prefix_caching=False)
    requests = [loop.add([i + 1] * 60, max_tokens=60) for i in range(3)]
    while True:
        before = [(s.length, s.num_computed) for r in requests for s in r.samples]
        try:
            plan = loop.scheduler.schedule()
        except MustCollect:
            break
        loop._in_flight.append(loop._run(plan))
        if len(loop._in_flight) > 1:
            loop._collect()
    assert [(s.length, s.num_computed) for r in requests for s in r.samples] == before
    loop.scheduler.check_integrity()
    loop.run()
    assert_answered(*requests)


def test_one_sequence_may_use_the_whole_pool(overlap):
    loop = Loop(overlap, num_pages=5, max_model_len=512)
    requests = [loop.add([i + 1] * 20, max_tokens=500) for i in range(3)]
    loop.run()
    assert all(len(r.samples[0].token_ids) == 4 * PAGE for r in requests)
    assert_answered(*requests)
    assert_empty(loop)


def test_recomputation_is_bounded(overlap):
    """A sequence is not sent back and forth.

    What is computed again stays within a few times what there is to compute.
    """
    loop = Loop(overlap, num_pages=20, max_num_seqs=16, enable_prefix_caching=False)
    requests = [loop.add([i + 1] * 30, max_tokens=150) for i in range(16)]
    computed = 0
    while loop.scheduler.running or loop.scheduler.waiting:
        plan = loop.step()
        computed += sum(decode.count for decode in plan.decodes) + sum(
            chunk.stop - chunk.start for chunk in plan.chunks
        )
    loop.run()
    assert_answered(*requests)
    assert loop.scheduler.num_preemptions > 0
    assert computed < 2 * sum(len(r.samples[0].token_ids) for r in requests)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_finish_is_idempotent_wherever_the_sequence_is(overlap):
    loop = Loop(overlap, max_num_seqs=2, max_num_batched_tokens=32)
    decoding, prefilling, waiting, other = loop.add([1]), loop.add([2] * 100), loop.add([3]), loop.add([4])
    loop.step(), loop.step()
    assert (
        decoding.samples[0].is_decoding
        and 0 < prefilling.samples[0].num_computed < 100
        and waiting.samples[0].status is Status.WAITING
    )
    for request in (decoding, prefilling, waiting):
        for reason in ("abort", "length"):
            loop.scheduler.finish(request.samples[0], reason)
            loop.scheduler.check_integrity()
        assert request.samples[0].drawn.finish_reason == "abort"
    loop.run()
    assert_answered(other)
    assert_empty(loop)


def test_several_tokens_a_step_end_at_the_limit(overlap):
    loop = Loop(overlap, decode_steps=4)
    requests = [loop.add([i + 1] * 5, max_tokens=i + 1, stops=True) for i in range(12)]
    loop.run()
    assert_answered(*requests)
    assert_empty(loop)


def test_no_work_is_an_empty_plan():
    loop = Loop()
    assert not loop.step()
    loop.add([1], max_tokens=1)
    assert loop.step()
    assert not loop.step()


@pytest.mark.parametrize("seed", range(60))
def test_random_work(seed):
    """Random engines, prompts with common fronts, samples, aborts and preemptions; every invariant after every step."""
    rng = random.Random(seed)
    loop = Loop(
        overlap=rng.random() < 0.5,
        max_num_seqs=rng.randint(1, 12),
        max_num_batched_tokens=rng.choice([16, 40, 64, 256]),
        page_size=rng.choice([16, 32, 64]),
        num_pages=rng.randint(9, 40),
        enable_prefix_caching=rng.random() < 0.8,
        decode_steps=rng.choice([1, 1, 2, 5]),
    )
    requests, aborted = [], set()
    fronts = [rng.choices(range(1, 5), k=100) for _ in range(2)]
    for _ in range(rng.randint(5, 60)):
        for _ in range(rng.choice([0, 0, 1, 1, 3])):
            prompt = rng.choice(fronts)[: rng.randint(0, 100)] + rng.choices(range(1, 5), k=rng.randint(1, 20))
            requests.append(loop.add(prompt, rng.randint(1, 40), rng.choice([1, 1, 2, 6]), stops=rng.random() < 0.5))
        if requests and rng.random() < 0.1:
            sample = rng.choice(rng.choice(requests).samples)
            aborted |= {sample} if sample.status is not Status.FINISHED else set()
            loop.scheduler.finish(sample, "abort")
        if loop.scheduler.running and loop.scheduler.running[-1].num_pending == 0 and rng.random() < 0.1:
            loop.scheduler.preempt(loop.scheduler.running[-1])
        loop.step()
    loop.run()
    for request in requests:
        for sample in request.samples:
            right = answer(request, sample.index)
            assert sample.status is Status.FINISHED
            assert list(sample.drawn.token_ids) == (
                right[: len(sample.drawn.token_ids)] if sample in aborted else right
            )
    assert_empty(loop)


def test_the_same_requests_give_the_same_plans():
    def plans():
        loop = Loop(num_pages=12)
        for i in range(10):
            loop.add([i % 3 + 1] * (10 + 7 * i), n=1 + i % 3)
        for _ in range(300):
            plan = loop.step()
            chunks = [(chunk.sample.arrival, chunk.start, chunk.stop) for chunk in plan.chunks]
            yield [(s.arrival, list(s.pages), s.slot) for s in plan.decoding], chunks, plan.copies

    assert list(plans()) == list(plans())


# -- the simulation itself ---------------------------------------------------------------------------------------------


def _matching_any_parent(pool: PagePool) -> None:
    def match(tokens, version, salt, owner=None):
        pages = []
        for start in range(0, len(tokens) - PAGE, PAGE):
            content = array("i", tokens[start : start + PAGE]).tobytes()
            pages += next(([page] for page, key in pool._keys.items() if key.tokens == content), [])
            if len(pages) * PAGE != start + PAGE:
                return pages[: start // PAGE]
        return pages

    pool.match = match


def _sharing_without_counting(pool: PagePool) -> None:
    pool.share = lambda pages: None


def _registering_other_tokens(pool: PagePool) -> None:
    register = pool.register
    pool.register = lambda page, parent, tokens, *home: register(
        page, parent, [*tokens[:-1], tokens[-1] % 4 + 1], *home
    )


def _registering_too_early(pool: PagePool) -> None:
    """A page can be found when it is allocated, before anything is written to it."""
    take = pool.take

    def take_and_register(count):
        pages = take(count)
        if count == 3:
            pool.register(pages[0], None, [2] * PAGE, 0, "")
        return pages

    pool.take = take_and_register


def _releasing_one_too_few(pool: PagePool) -> None:
    release = pool.release
    pool.release = lambda pages: release(pages[:-1])


PLANTED = [
    _matching_any_parent,
    _sharing_without_counting,
    _registering_other_tokens,
    _registering_too_early,
    _releasing_one_too_few,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_the_fake_device_finds_planted_bugs(plant):
    loop = Loop(num_pages=40)
    plant(loop.pool)
    with pytest.raises(AssertionError):
        for first, second in itertools.product(([1] * 32, [2] * 32, [2] * 31 + [3]), repeat=2):
            loop.add(first + second + [1] * 10, n=2)
            loop.step(), loop.step(), loop.step()
        loop.run()


def test_the_fake_device_finds_a_missing_copy():
    loop = Loop()
    loop.add([1] * 40, n=2)
    run = loop._run
    loop._run = lambda plan: run(dataclasses.replace(plan, copies=[]))
    with pytest.raises(AssertionError, match="holds another prefix"):
        loop.run()
