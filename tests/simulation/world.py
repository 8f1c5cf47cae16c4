"""The world that is simulated: the real engine loop over the fake device, and everything that may happen to it.

No clock, no chance.

Whoever drives it (a seed in `driver.py`, hypothesis in `test_state_machine.py`) decides what happens when; the world
checks the invariants after every step and every answer at its end.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import device
from device import Fault
from invariants import CacheCheck, Watch, Watched, check_step
from model import STOP, Spans, check_answer

from jaxengine.config import QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.engine import batch, collect, engine
from jaxengine.host import page_pool, queue, scheduler
from jaxengine.host import sample as host_sample
from jaxengine.host.sample import Request, Sample, Status
from jaxengine.sampling_params import SamplingParams

SALTS = ("", "salted")
MODEL = ModelConfig(
    "simulated", 40, 8, 8, 1, 1, 1, 8, 256
)  # its sizes are named in errors, nothing is computed with it
CUT = object()
HOST_FILES = {module.__file__ for module in (batch, page_pool, queue, engine, collect, scheduler, host_sample)}
PARTS = dict(kv_cache=device, slot_state=device, variants_of=device.StepVariants, Scheduler=Watched)


class World:
    """One engine and its requests. Steps are its only time."""

    def __init__(
        self,
        config: EngineConfig,
        tokens_per_block: int = QUERY_BLOCK,
        packs_rows: bool = False,
        trusting: bool = False,
    ) -> None:
        self.config, self.stats = config, Counter[str]()
        self.watch, self.cache_check = Watch(self.stats), CacheCheck()
        with mock.patch.multiple(engine, **PARTS):
            self.engine = engine.Engine(MODEL, config, params=0)
        self.scheduler.watch = self.watch
        self.device.tokens_per_block, self.device.trusting = tokens_per_block, trusting
        self.device.batch.packs_rows = packs_rows
        self.live: dict[str, Request] = {}
        self.ended: list[Request] = []  # the last few: their tokens are the fronts of later prompts
        self.held: list[int] = []
        self._delivered: dict[
            int, list[int]
        ] = {}  # by id of the sample, the tokens that a stream would have shown, prompt included
        self._first_versions: dict[str, int] = {}
        self._kept: dict[
            int, tuple[Sample, list[Spans]]
        ] = {}  # samples that went on with their pages under other weights, by id

    @property
    def scheduler(self) -> Watched:
        return self.engine.scheduler

    @property
    def device(self) -> device.StepVariants:
        return self.engine.step_variants

    @property
    def samples(self) -> list[Sample]:
        return [sample for request in self.live.values() for sample in request.samples]

    # -- what happens --------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        stops: bool = False,
        salt: str = "",
        interrupt_after: int = 0,
        **params,
    ) -> None:
        """A request under the lowest free number, so that the ids of aborted ones are used again at once.

        Where an interrupt comes between, its caller aborts it.
        """
        room = (self.config.num_pages - 1) * self.config.page_size
        limit = min(len(prompt) + max_tokens, self.config.max_model_len, room)
        name = next(name for name in map(str, range(len(self.live) + 1)) if name not in self.live)
        self.stats["requests"] += 1
        request = Request(
            name,
            prompt[: limit - 1],
            SamplingParams(**params),
            (self.stats["requests"], 7),
            self.stats["requests"] % 5,
            frozenset([STOP] if stops else []),
            limit,
            cache_salt=salt,
        )
        if self._cut_off(lambda: self.engine.add(request), interrupt_after) is CUT:
            self._abort(name)
        else:
            self.live[name], self._first_versions[name] = request, self.scheduler.version

    def abort(self, name: str, interrupt_after: int = 0) -> None:
        """Idempotent, also for names that are unknown, and done again where an interrupt came between."""
        request = self.live.get(name)
        self.stats.update(f"aborted while {state_of(sample)}" for sample in (request.samples if request else ()))
        if self._cut_off(lambda: self.engine.abort(name), interrupt_after) is CUT:
            self._abort(name)
        self._judge([request] if request else [])

    def squeeze(self, num_pages: int) -> None:
        """Take pages away from the scheduler."""
        self.held += self.scheduler.page_pool.take(min(num_pages, self.scheduler.page_pool.num_available))

    def relax(self) -> None:
        self.scheduler.page_pool.release(self.held)
        self.held = []

    def preempt_newest(self) -> None:
        """As if its pages were wanted."""
        if self.scheduler.running and not self.scheduler.running[-1].num_pending:
            self.scheduler.preempt(self.scheduler.running[-1])

    def raise_version(self, keep: bool = False) -> None:
        """New weights between two steps.

        What runs is computed again under them or, with `keep`, goes on with its pages; what was drawn stays.
        """
        before = self.scheduler.num_preemptions
        self._new_weights(keep)
        self.stats["recomputed under new weights"] += self.scheduler.num_preemptions - before
        self.scheduler.num_preemptions = 0  # only those that a lack of pages brought are counted

    def rebuild(self) -> None:
        """New weights in a new pool."""
        self._recover()
        self._new_weights()

    def _new_weights(self, keep: bool = False) -> None:
        old, version = self.scheduler.version, self.scheduler.version + 1
        mixed = {id(sample): spans[-1] for sample, spans in self._kept.values() if sample.has_old_pages}
        with self._plugged():
            ended = self.engine.update_params(version, version, keep=keep)
        for sample in self.scheduler.running:
            spans = mixed.get(id(sample), ((0, old),)) + ((sample.num_computed, version),)
            self._kept.setdefault(id(sample), (sample, []))[1].append(spans)
            self.stats["kept under new weights"] += 1
        self.stats["versions"] += 1
        self._judge(ended)

    def _recover(self) -> None:
        with self._plugged():
            self.engine._recover()
        self.held = []

    # -- time ----------------------------------------------------------------------------------------------------------

    def step(self, interrupt_after: int = 0) -> None:
        """One step of the engine, cut off after that many lines of the host half's code, if any."""
        preempted = self.scheduler.num_preemptions
        self.stats["steps"] += 1
        ended = self._cut_off(self.engine.step, interrupt_after)
        self.stats["preemptions"] += self.scheduler.num_preemptions - preempted
        self.check()
        done = [r for r in self.live.values() if all(s.status is Status.FINISHED for s in r.samples)]
        assert ended is CUT or set(ended) == set(done), "the requests that ended are not those that were returned"
        self._judge(done)

    def _cut_off(self, call: Callable[[], Any], interrupt_after: int) -> Any:
        """What a call returns, or CUT where a fault or an interrupt ended it."""
        blocks = self.scheduler.page_pool
        try:
            with self._plugged(), interrupted(interrupt_after):
                return call()
        except Fault:
            self.stats["faults"] += 1
            self._mend()
            return CUT
        finally:
            if self.scheduler.page_pool is not blocks:  # a new pool, in which nothing is held
                self.held = []
                self.stats["restarts"] += 1

    def _mend(self) -> None:
        """A fault in the recovery from a fault is mended by the next call, whichever it is."""
        self.stats["faults in a recovery"] += self.engine._begun is not None
        self._abort("nobody")

    def _abort(self, name: str) -> None:
        with self._plugged():
            self.engine.abort(name)

    def check(self) -> None:
        check_step(self.engine, self.held)
        self.cache_check.check(self.engine, SALTS)
        for sample in self.samples:
            shown = self._delivered.setdefault(id(sample), list(sample.token_ids))
            assert sample.token_ids[len(shown) - 1 : len(shown)] == shown[-1:], (
                "a token that was delivered has changed"
            )  # _judge: all
            shown += sample.token_ids[len(shown) :]

    def drain(self) -> None:
        """To the end of all that is there.

        The oldest sequence comes forward with every step, which bounds their number.
        """
        self.relax()
        steps = sum(4 + s.request.limit // QUERY_BLOCK + 2 * (s.request.limit - len(s.token_ids)) for s in self.samples)
        while self.engine.has_work:
            assert (steps := steps - 1) >= 0, "no end"
            self.step()
        self.step()
        assert not self.live and not self.scheduler.running and not self.scheduler.waiting, "a request was lost"
        assert self.scheduler.page_pool.num_available == self.config.num_pages - 1, "a page is still held"

    def _judge(self, ended: list[Request]) -> None:
        for request in ended:
            del self.live[request.request_id]
            for sample in request.samples:
                shown = self._delivered.pop(id(sample), [])
                assert sample.token_ids[: len(shown)] == shown, "a token that was delivered has changed"
            kept = {
                sample.index: self._kept.pop(id(sample))[1] for sample in request.samples if id(sample) in self._kept
            }
            check_answer(request, self._first_versions.pop(request.request_id), kept)
            self.stats.update(f"ended by {sample.drawn.finish_reason}" for sample in request.samples)
            self.stats["tokens"] += sum(len(sample.drawn.token_ids) for sample in request.samples)
            assert all(not s.pages and s.slot < 0 for s in request.samples), "an ended sequence holds pages or a slot"
        self.ended = [*self.ended, *ended][-8:]
        assert self.engine.requests == self.live, "a request that ended is kept, or one that runs is not"

    @contextlib.contextmanager
    def _plugged(self) -> Iterator[None]:
        """The fake device in the place of the real steps."""
        with mock.patch.multiple(engine, kv_cache=device, slot_state=device):
            yield


def state_of(sample: Sample) -> str:
    """Where a sequence is in its life."""
    if sample.status is Status.FINISHED:
        return "ended"
    if sample.status is Status.WAITING:
        return "preempted" if sample.drawn.token_ids else "waiting"
    if not sample.is_decoding:
        return "prefilling"
    return "under way" if sample.num_pending else "decoding"


@contextlib.contextmanager
def interrupted(lines: int) -> Iterator[None]:
    """Raise after that many lines of the host half, as Ctrl-C would.

    Anywhere, the recovery from another fault included. 0: never.
    """

    def count(frame, event, arg):
        nonlocal lines
        lines -= event == "line"
        if lines <= 0:
            raise Fault("interrupted")
        return count

    before = sys.gettrace()
    if lines:
        sys.settrace(lambda frame, event, arg: count if frame.f_code.co_filename in HOST_FILES else None)
    try:
        yield
    finally:
        sys.settrace(before)
