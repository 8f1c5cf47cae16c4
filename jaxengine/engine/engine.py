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
from jaxengine.engine.step_variants import Report, StepVariants
from jaxengine.host.page_pool import PagePool
from jaxengine.host.sample import Request, Sample, Status
from jaxengine.host.scheduler import MustSettle, Plan, Scheduler
from jaxengine.ops.kernels import choose_kernels
from jaxengine.ops.tiles import Tile
from jaxengine.text.detokenizer import Detokenizer


@dataclasses.dataclass(frozen=True)
class Weights:
    """A pytree and its version: one attribute, so that an interrupt finds the old ones or the new ones, never a mixture."""

    params: Any
    version: int


@dataclasses.dataclass
class InFlight:
    """A dispatched plan whose results are not read yet, and which rows belong to whom."""

    decode: list[Sample]
    decode_counts: list[int]
    decoded: RowOutputs | None
    prefill: list[tuple[Sample, int, bool]]
    prefilled: RowOutputs | None
    chunked: list[Sample]  # whose chunks it prefills, whether or not they want a row
    watch: page_checksums.Watch | None


class Engine:
    """One model on one device: params and cache are its only device state."""

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        params: Any,
        *,
        make_detokenizer: Callable[[Sample], Detokenizer] | None = None,
        report: Report = lambda text: None,
    ) -> None:
        self.model_config, self.engine_config, self.weights = model_config, engine_config, Weights(params, 0)
        self.kernels = choose_kernels(engine_config.kernels, model_config)
        self.cache = kv_cache.empty_cache(
            model_config, engine_config, self.kernels, params
        )  # first: it takes the most memory, and may be refused
        self.scheduler = Scheduler(
            engine_config,
            PagePool(engine_config.num_pages, engine_config.page_size, engine_config.enable_prefix_caching),
        )
        self.batch = BatchBuilder(engine_config)
        self.step_variants = StepVariants(model_config, engine_config, self.kernels, self.batch, report)
        self.page_checksums = page_checksums.PageChecksums(self.kernels) if engine_config.page_checksums else None
        self.requests: dict[str, Request] = {}
        self._make_detokenizer = make_detokenizer  # one that has read what the sequence has
        self._in_flight: InFlight | None = None
        self._broken = False  # whether something began and neither ended nor was recovered from
        self._settled: list[Request] = []  # that ended in this step before its plan was made
        self._at_work: list[
            Sample
        ] = []  # for whom something is on the device right now: who fails where it has no memory

    # -- requests --------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; refuses an id in use and a queue that is full."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use: ids of unfinished requests must differ")
        if len(self.scheduler.waiting) + request.sampling.n > self.engine_config.max_waiting:
            raise ValueError(
                f"the queue holds {len(self.scheduler.waiting)} of at most {self.engine_config.max_waiting} samples: "
                f"no room for {request.sampling.n} more; wait, or raise max_waiting"
            )
        self.requests[request.request_id] = (
            request  # first: an interrupt from here on leaves nothing that abort does not find
        )
        self.scheduler.add(request)
        if request.sampling.stop and self._make_detokenizer is not None:
            for sample in request.samples:
                sample.detokenizer = self._make_detokenizer(sample)
        self._retire(request)  # where all of its samples had ended before

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are no error. Its pages are free at once."""
        with self._whole():
            request = self.requests.get(request_id)
            for sample in request.samples if request else ():
                self.scheduler.finish(sample, "abort")
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
            self.cache = self.step_variants.warm_up(self.params, self.cache)

    def proven(self, tile: Tile) -> Tile:
        """`tile` where prefill on it gives the base tile's bits, else the base tile."""
        with self._whole():
            self.cache, tile = self.step_variants.proven(tile, self.params, self.cache)
            return tile

    @contextlib.contextmanager
    def adjusted(self, *, held_pages: int = 0, held_slots: int = 0, **changes: Any) -> Iterator[None]:
        """Other habits of the host for a while, on the same compiled steps: `overlap`, `enable_prefix_caching`, a smaller
        `max_num_batched_tokens`; pages and slots withheld as if other requests had them. The engine must be idle."""
        assert not self.requests and changes.keys() <= {"overlap", "enable_prefix_caching", "max_num_batched_tokens"}
        kept, scheduler = self.engine_config, self.scheduler
        self.engine_config = scheduler.engine_config = dataclasses.replace(kept, **changes)
        scheduler.page_pool.caching = self.engine_config.enable_prefix_caching
        try:
            with scheduler.withheld(held_pages, held_slots):
                yield
        finally:
            self.engine_config = scheduler.engine_config = kept
            scheduler.page_pool.caching = kept.enable_prefix_caching

    def update_params(self, params: Any, version: int, *, keep: bool = False) -> list[Request]:
        """Other weights from the next token on: no token drawn so far is lost, and no page written so far is found again.

        Keys and values of running requests are computed anew under them. With `keep` those that decode keep theirs: what follows depends
        on both versions, and their pages are offered to nobody. Returns the requests that ended with the last step under the old weights.
        """
        with self._whole():
            ended, self._in_flight = self._collect(self._in_flight), None
            self.weights = Weights(params, version)
            self.scheduler.change_version(version, keep)
            self.step_variants.forget()
            return ended

    def forget(self) -> None:
        """No weights, requests and cached prefixes, as at first: the next weights may have the same version."""
        with self._whole():
            self.weights, self.requests = Weights(None, 0), {}
            self.step_variants.forget()
            self._recover()

    def step(self) -> list[Request]:
        """One step; returns the requests that ended in it. After any error the engine is usable again.

        Where the device runs out of memory those fail for whom it worked, with finish reason "error"; all others are computed anew.
        """
        with self._whole():
            self._at_work, self._settled = [], []
            try:
                return self._step_overlapped() if self.engine_config.overlap else self._step_plain()
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
        for sample in plan.admitted:
            self.batch.admit(sample)
        self._at_work = plan.admitted
        for upload in self.batch.histories(plan.admitted):
            self.cache = steps.write_history(self.cache, *upload)
        chunked = [s for chunk in plan.chunks for s in (chunk.sample, *chunk.forks)]
        tables, slots = self.batch.sync_tables(plan.decode + chunked), self.batch.device_slots()
        self._at_work = plan.decode
        decoded = self._decode(plan, tables, slots) if plan.decode else None
        self._at_work = chunked
        prefilled = self._prefill(plan, tables, slots) if plan.chunks else None
        self._at_work = plan.decode + chunked
        watch = (
            self.page_checksums.watch(self.cache, self._at_work, self.scheduler.page_pool)
            if self.page_checksums
            else None
        )
        return InFlight(
            plan.decode,
            plan.decode_counts,
            decoded,
            [row for chunk in plan.chunks for row in wanted_rows(chunk)],
            prefilled,
            chunked,
            watch,
        )

    def _decode(self, plan: Plan, tables, slots) -> RowOutputs:
        self.cache, tile = self.step_variants.choose("decode", len(plan.decode), self.params, self.cache)
        rows = self.batch.decode(plan.decode, plan.decode_positions)
        self.cache, out = self.step_variants.run_decode(self.params, self.cache, tables, slots, rows, tile)
        return out

    def _prefill(self, plan: Plan, tables, slots) -> RowOutputs:
        num_blocks = sum(chunk.num_blocks for chunk in plan.chunks)
        self.cache, tile = self.step_variants.choose("prefill", num_blocks, self.params, self.cache)
        inputs = self.batch.prefill(plan, tile.tokens)
        self.cache, out = self.step_variants.run_prefill(self.params, self.cache, tables, slots, *inputs, tile)
        return out

    # -- results ---------------------------------------------------------------------------------------------------------------

    def _collect(self, step: InFlight | None) -> list[Request]:
        """Read a step's results, extend the sequences and end those that are done."""
        if step is None:
            return []
        decoded, prefilled, hurt = self._read(step)
        if decoded is not None:
            for lane, (sample, count) in enumerate(zip(step.decode, step.decode_counts, strict=True)):
                for i in range(count):
                    extend(self.scheduler, sample, decoded, (i, lane))
        if prefilled is not None:
            for lane, (sample, position, scored) in enumerate(step.prefill):
                if scored:
                    score_prompt(self.scheduler, sample, prefilled, lane, position + 1)
                else:
                    extend(self.scheduler, sample, prefilled, lane)
        touched = {id(s.request): s.request for s in (*hurt, *step.decode, *step.chunked)}
        return [request for request in touched.values() if self._retire(request)]

    def _read(self, step: InFlight) -> tuple[HostRows | None, HostRows | None, list[Sample]]:
        """A step's rows on the host, and whom the canary ended. Errors of the device surface here, before anything is written down."""
        self._at_work = step.decode
        decoded = HostRows(step.decoded) if step.decoded is not None else None
        self._at_work = step.chunked
        prefilled = HostRows(step.prefilled) if step.prefilled is not None else None
        self._at_work = step.decode + step.chunked
        return (
            decoded,
            prefilled,
            self._drop_damaged(self.page_checksums, step.watch) if self.page_checksums and step.watch else [],
        )

    def _drop_damaged(self, found_by: page_checksums.PageChecksums, watch: page_checksums.Watch) -> list[Sample]:
        """End whoever holds a damaged page. Their other pages, which may have been computed from it, leave the prefix cache with it."""
        damaged = found_by.damaged(watch, self.scheduler.page_pool)
        hurt = [s for s in self.scheduler.running if damaged.intersection(s.pages)]
        for pages in (*watch.tables, *(s.pages for s in hurt)):
            if damaged.intersection(pages):
                self.scheduler.page_pool.discard(pages)
        for sample in hurt:
            self.scheduler.finish(sample, "error", page_checksums.CAUSE)
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
        unfinished = [
            s for request in self.requests.values() for s in request.samples if s.status is not Status.FINISHED
        ]
        self.requests = {s.request.request_id: s.request for s in unfinished}
        self.scheduler.restart(unfinished)
        self.scheduler.version = self.weights.version
        for sample in unfinished:
            if sample.detokenizer is not None and self._make_detokenizer is not None:
                sample.detokenizer = self._make_detokenizer(sample)
        if self.page_checksums:
            self.page_checksums = page_checksums.PageChecksums(self.kernels)
        if kv_cache.is_lost(self.cache):
            self.cache = kv_cache.rebuild(self.cache, self.model_config, self.engine_config, self.kernels)
        self._broken = False

    def _fail_at_work(self) -> list[Request]:
        """The device has no memory for a program: those it served fail, everybody else starts anew."""
        known = dict(self.requests)  # those too that ended in this very step
        self._recover()
        self._broken = True  # until it is written down who failed
        for sample in self._at_work:
            self.scheduler.finish(
                sample, "error", f"the device ran out of memory: {memory.advice(self.model_config, self.engine_config)}"
            )
        self.requests = known
        return self._settled + [request for request in list(known.values()) if self._retire(request)]
