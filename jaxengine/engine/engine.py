"""The engine: schedule, run, collect. Here the host half and the device half meet."""
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache, steps
from jaxengine.device.step_inputs import RowOutputs
from jaxengine.engine import memory, page_checksums
from jaxengine.engine.batch import BatchBuilder, wanted_rows
from jaxengine.engine.collect import HostRows, extend, score_prompt
from jaxengine.engine.step_variants import Programs, Report
from jaxengine.host.page_pool import BlockManager
from jaxengine.host.sample import Request, Sequence, Status
from jaxengine.host.scheduler import MustSettle, Plan, Scheduler
from jaxengine.models.decoder import Tile
from jaxengine.ops.kernels import resolve
from jaxengine.text.detokenizer import Detokenizer


@dataclasses.dataclass(frozen=True)
class Weights:
    """A pytree and its version: one attribute, so that an interrupt finds the old ones or the new ones, never a mixture."""

    params: Any
    version: int


@dataclasses.dataclass
class InFlight:
    """A dispatched plan whose results are not read yet, and which rows belong to whom."""

    decode: list[Sequence]
    decode_counts: list[int]
    decoded: RowOutputs | None
    prefill: list[tuple[Sequence, int, bool]]
    prefilled: RowOutputs | None
    chunked: list[Sequence]  # whose chunks it prefills, whether or not they want a row
    watch: page_checksums.Watch | None


class Engine:
    """One model on one device: params and cache are its only device state."""

    def __init__(self, model: ModelConfig, config: EngineConfig, params: Any, *,
                 make_detokenizer: Callable[[Sequence], Detokenizer] | None = None, report: Report = lambda text: None) -> None:
        self.model, self.config, self.weights = model, config, Weights(params, 0)
        self.kernels = resolve(config.kernels, model)
        self.cache = kv_cache.allocate(model, config, self.kernels, params)  # first: it takes the most memory, and may be refused
        self.scheduler = Scheduler(config, BlockManager(config.num_pages, config.page_size, config.enable_prefix_caching))
        self.batch = BatchBuilder(config)
        self.programs = Programs(model, config, self.kernels, self.batch, report)
        self.canary = page_checksums.Canary(self.kernels) if config.canary else None
        self.requests: dict[str, Request] = {}
        self._make_detokenizer = make_detokenizer  # one that has read what the sequence has
        self._in_flight: InFlight | None = None
        self._broken = False  # whether something began and neither ended nor was recovered from
        self._settled: list[Request] = []  # that ended in this step before its plan was made
        self._at_work: list[Sequence] = []  # for whom something is on the device right now: who fails where it has no memory

    # -- requests --------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; refuses an id in use and a queue that is full."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use: ids of unfinished requests must differ")
        if len(self.scheduler.waiting) + request.params.n > self.config.max_waiting:
            raise ValueError(f"the queue holds {len(self.scheduler.waiting)} of at most {self.config.max_waiting} samples: "
                             f"no room for {request.params.n} more; wait, or raise max_waiting")
        self.requests[request.request_id] = request  # first: an interrupt from here on leaves nothing that abort does not find
        self.scheduler.add(request)
        if request.params.stop and self._make_detokenizer is not None:
            for sequence in request.samples:
                sequence.detokenizer = self._make_detokenizer(sequence)
        self._retire(request)  # where all of its samples had ended before

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are no error. Its pages are free at once."""
        with self._whole():
            request = self.requests.get(request_id)
            for sequence in request.samples if request else ():
                self.scheduler.finish(sequence, "abort")
            self.requests.pop(request_id, None)

    @property
    def params(self) -> Any:
        return self.weights.params

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # -- the loop --------------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile every step now, instead of when it is first needed."""
        with self._whole():
            self.cache = self.programs.warm_up(self.params, self.cache)

    def proven(self, tile: Tile) -> Tile:
        """`tile` where prefill on it gives the base tile's bits, else the base tile."""
        with self._whole():
            self.cache, tile = self.programs.proven(tile, self.params, self.cache)
            return tile

    @contextlib.contextmanager
    def adjusted(self, *, held_pages: int = 0, held_slots: int = 0, **changes: Any) -> Iterator[None]:
        """Other habits of the host for a while, on the same compiled steps: `overlap`, `enable_prefix_caching`, a smaller
        `max_num_batched_tokens`; pages and slots withheld as if other requests had them. The engine must be idle."""
        assert not self.requests and changes.keys() <= {"overlap", "enable_prefix_caching", "max_num_batched_tokens"}
        kept, scheduler = self.config, self.scheduler
        self.config = scheduler.config = dataclasses.replace(kept, **changes)
        scheduler.blocks.caching = self.config.enable_prefix_caching
        try:
            with scheduler.withheld(held_pages, held_slots):
                yield
        finally:
            self.config = scheduler.config = kept
            scheduler.blocks.caching = kept.enable_prefix_caching

    def update_params(self, params: Any, version: int, *, keep: bool = False) -> list[Request]:
        """Other weights from the next token on: no token drawn so far is lost, and no page written so far is found again.

        Keys and values of running requests are computed anew under them. With `keep` those that decode keep theirs: what follows depends
        on both versions, and their pages are offered to nobody. Returns the requests that ended with the last step under the old weights.
        """
        with self._whole():
            ended, self._in_flight = self._collect(self._in_flight), None
            self.weights = Weights(params, version)
            self.scheduler.change_version(version, keep)
            self.programs.forget()
            return ended

    def forget(self) -> None:
        """No weights, requests and cached prefixes, as at first: the next weights may have the same version."""
        with self._whole():
            self.weights, self.requests = Weights(None, 0), {}
            self.programs.forget()
            self._recover()

    def step(self) -> list[Request]:
        """One step; returns the requests that ended in it. After any error the engine is usable again.

        Where the device runs out of memory those fail for whom it worked, with finish reason "error"; all others are computed anew.
        """
        with self._whole():
            self._at_work, self._settled = [], []
            try:
                return self._step_overlapped() if self.config.overlap else self._step_plain()
            except jax.errors.JaxRuntimeError as error:
                if not memory.ran_out(error) or not self._at_work:
                    raise
                return self._fail_at_work()

    def _step_plain(self) -> list[Request]:
        """The specification: schedule, run, collect."""
        return self._collect(self._dispatch(self.scheduler.schedule()))

    def _step_overlapped(self) -> list[Request]:
        """Schedule and run the next step before the last one's results are read."""
        try:
            plan = self.scheduler.schedule()
        except MustSettle:
            self._settled, self._in_flight = self._collect(self._in_flight), None
            plan = self.scheduler.schedule()
        previous, self._in_flight = self._in_flight, self._dispatch(plan) if plan else None
        return self._settled + self._collect(previous)

    def _dispatch(self, plan: Plan) -> InFlight:
        """Hand a plan to the device."""
        for sequence in plan.admitted:
            self.batch.admit(sequence)
        self._at_work = plan.admitted
        for upload in self.batch.histories(plan.admitted):
            self.cache = steps.write_history(self.cache, *upload)
        chunked = [s for chunk in plan.chunks for s in (chunk.sequence, *chunk.forks)]
        tables, slots = self.batch.sync_tables(plan.decode + chunked), self.batch.device_slots()
        self._at_work = plan.decode
        decoded = self._decode(plan, tables, slots) if plan.decode else None
        self._at_work = chunked
        prefilled = self._prefill(plan, tables, slots) if plan.chunks else None
        self._at_work = plan.decode + chunked
        watch = self.canary.watch(self.cache, self._at_work, self.scheduler.blocks) if self.canary else None
        return InFlight(plan.decode, plan.decode_counts, decoded, [row for chunk in plan.chunks for row in wanted_rows(chunk)], prefilled,
                        chunked, watch)

    def _decode(self, plan: Plan, tables, slots) -> RowOutputs:
        self.cache, tile = self.programs.choose("decode", len(plan.decode), self.params, self.cache)
        rows = self.batch.decode(plan.decode, plan.decode_positions)
        self.cache, out = self.programs.run_decode(self.params, self.cache, tables, slots, rows, tile)
        return out

    def _prefill(self, plan: Plan, tables, slots) -> RowOutputs:
        num_blocks = sum(chunk.num_blocks for chunk in plan.chunks)
        self.cache, tile = self.programs.choose("prefill", num_blocks, self.params, self.cache)
        inputs = self.batch.prefill(plan, tile.tokens)
        self.cache, out = self.programs.run_prefill(self.params, self.cache, tables, slots, *inputs, tile)
        return out

    # -- results ---------------------------------------------------------------------------------------------------------------

    def _collect(self, step: InFlight | None) -> list[Request]:
        """Read a step's results, extend the sequences and end those that are done."""
        if step is None:
            return []
        decoded, prefilled, hurt = self._read(step)
        if decoded is not None:
            for lane, (sequence, count) in enumerate(zip(step.decode, step.decode_counts, strict=True)):
                for i in range(count):
                    extend(self.scheduler, sequence, decoded, (i, lane))
        if prefilled is not None:
            for lane, (sequence, position, scored) in enumerate(step.prefill):
                if scored:
                    score_prompt(self.scheduler, sequence, prefilled, lane, position + 1)
                else:
                    extend(self.scheduler, sequence, prefilled, lane)
        touched = {id(s.request): s.request for s in (*hurt, *step.decode, *step.chunked)}
        return [request for request in touched.values() if self._retire(request)]

    def _read(self, step: InFlight) -> tuple[HostRows | None, HostRows | None, list[Sequence]]:
        """A step's rows on the host, and whom the canary ended. Errors of the device surface here, before anything is written down."""
        self._at_work = step.decode
        decoded = HostRows(step.decoded) if step.decoded is not None else None
        self._at_work = step.chunked
        prefilled = HostRows(step.prefilled) if step.prefilled is not None else None
        self._at_work = step.decode + step.chunked
        return decoded, prefilled, self._drop_damaged(self.canary, step.watch) if self.canary and step.watch else []

    def _drop_damaged(self, found_by: page_checksums.Canary, watch: page_checksums.Watch) -> list[Sequence]:
        """End whoever holds a damaged page. Their other pages, which may have been computed from it, leave the prefix cache with it."""
        damaged = found_by.damaged(watch, self.scheduler.blocks)
        hurt = [s for s in self.scheduler.running if damaged.intersection(s.pages)]
        for pages in (*watch.tables, *(s.pages for s in hurt)):
            if damaged.intersection(pages):
                self.scheduler.blocks.discard(pages)
        for sequence in hurt:
            self.scheduler.finish(sequence, "error", page_checksums.CAUSE)
        return hurt

    def _retire(self, request: Request) -> bool:
        """Let go of a request whose samples have all ended; True where it was still ours."""
        if any(s.status is not Status.FINISHED for s in request.samples):
            return False
        if self.requests.get(request.request_id) is not request:
            return False  # aborted, and its id may be another's by now
        del self.requests[request.request_id]
        return True

    # -- recovery --------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All of the body, or a recovery: at once, or before whatever comes next where an interrupt cut the recovery off as well."""
        if self._broken:
            self._recover()
        self._broken = True
        try:
            yield
        except BaseException:
            self._recover()
            raise
        self._broken = False

    def _recover(self) -> None:
        """After an error or an interrupt, anywhere in a step: every unfinished sequence starts anew, donated buffers are rebuilt."""
        self._in_flight = None
        unfinished = [s for request in self.requests.values() for s in request.samples if s.status is not Status.FINISHED]
        self.requests = {s.request.request_id: s.request for s in unfinished}
        self.scheduler.restart(unfinished)
        self.scheduler.version = self.weights.version
        for sequence in unfinished:
            if sequence.detokenizer is not None and self._make_detokenizer is not None:
                sequence.detokenizer = self._make_detokenizer(sequence)
        if self.canary:
            self.canary = page_checksums.Canary(self.kernels)
        if kv_cache.is_lost(self.cache):
            self.cache = kv_cache.rebuild(self.cache, self.model, self.config, self.kernels)
        self._broken = False

    def _fail_at_work(self) -> list[Request]:
        """The device has no memory for a program: those it served fail, everybody else starts anew."""
        known = dict(self.requests)  # those too that ended in this very step
        self._recover()
        self._broken = True  # until it is written down who failed
        for sequence in self._at_work:
            self.scheduler.finish(sequence, "error", f"the device ran out of memory: {memory.advice(self.model, self.config)}")
        self.requests = known
        return self._settled + [request for request in list(known.values()) if self._retire(request)]
