"""The engine: schedule, run, collect. Here the host half and the device half meet."""

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.device import kv_cache, slot_state
from jaxengine.device.step_inputs import RowOutputs
from jaxengine.engine import idle_pools, memory, page_checksums
from jaxengine.engine.collect import HostRows, append_decoded, append_prefilled
from jaxengine.engine.lockstep import Lockstep
from jaxengine.engine.step_variants import Variant, variants_of
from jaxengine.host.page_pool import PagePool
from jaxengine.host.plan import Decode, Plan, Row
from jaxengine.host.plan_record import record
from jaxengine.host.sample import Request, Sample, Status, text_ids
from jaxengine.host.scheduler import MustCollect, Scheduler
from jaxengine.ops.kernels import choose_kernels
from jaxengine.text.detokenizer import Detokenizer, detokenizer_for
from jaxengine.text.tokenizer import Tokenizer
from pallas_kernels.numbers import cdiv

ADJUSTABLE = {"overlap", "enable_prefix_caching", "max_num_batched_tokens"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A pytree and its version.

    One attribute, so that an interrupt finds the old ones or the new ones, never a mixture.
    """

    params: Any
    version: int


@dataclasses.dataclass
class InFlight:
    """A dispatched plan whose results are not read yet."""

    plan: Plan
    decoded: RowOutputs | None
    prefilled: RowOutputs | None
    watch: page_checksums.Watch | None

    @property
    def samples(self) -> Iterator[Sample]:
        return itertools.chain(_decoding(self.plan), self.plan.prefilling)

    @property
    def prefill_rows(self) -> list[Row]:
        """What the prefill's rows are; decodes that ran in no step of their own rode along, and come first."""
        riding = self.plan.decodes if self.decoded is None else ()
        return [*(Row(sample, position, False) for sample, position, _ in riding), *self.plan.rows]


class Occupancy(NamedTuple):
    """What an engine is doing."""

    running: int  # samples that have a slot
    waiting: int  # samples that wait for one
    preemptions: int  # so far
    held_pages: int
    pages: int


class QueueFull(ValueError):
    """More samples would wait than `max_waiting` allows."""


class OutOfDeviceMemory(Exception):
    """The device has no memory for what it was to do for these samples."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__(f"no memory on the device for {len(samples)} samples")
        self.samples = samples


def check_new(
    request: Request, unfinished: Mapping[str, Request], ids: Iterator[int], num_waiting: int, max_waiting: int
) -> None:
    """Give a request that has no id the next of `ids` that is no caller's. Raises what Engine.add raises."""
    if not request.request_id:
        request.request_id = next(name for name in map(str, ids) if name not in unfinished)
    if request.request_id in unfinished:
        raise ValueError(f"request id {request.request_id!r} is in use: ids of unfinished requests must differ")
    if num_waiting + request.sampling.n > max_waiting:
        raise QueueFull(
            f"the queue holds {num_waiting} of at most {max_waiting} samples: no room for {request.sampling.n} more; "
            "wait, or raise max_waiting"
        )


def give_detokenizers(request: Request, tokenizer: Tokenizer | None, with_text: bool) -> None:
    """One to each sample, where its text is read as it grows: by stop strings, or by a stream."""
    if tokenizer is not None and (request.sampling.stop or with_text):
        for sample in request.samples:
            sample.detokenizer = detokenizer_of(tokenizer, sample)


def detokenizer_of(tokenizer: Tokenizer, sample: Sample) -> Detokenizer:
    """One that has read what the sample has."""
    detokenizer = detokenizer_for(tokenizer, sample.request.sampling)
    detokenizer.push(text_ids(sample))
    if sample.status is Status.FINISHED:
        detokenizer.finish()
    return detokenizer


class Engine:
    """One model on one device, or on a mesh of some that share it.

    Params, cache and what steps know of the slots are its only device state.

    Nothing in here locks: `engine.runner.Runner` lets one thread in at a time.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        params: Any,
        *,
        tokenizer: Tokenizer | None = None,
        report: Report = say_nothing,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.model_config, self.engine_config, self.weights = model_config, engine_config, Weights(params, 0)
        self.tokenizer, self.lockstep = tokenizer, lockstep  # the latter where several processes run it
        self.kernels = choose_kernels(engine_config.kernels, model_config, engine_config.mesh)
        # The cache comes first, because it takes the most memory and may be refused.
        self.cache = kv_cache.empty_cache(model_config, engine_config, self.kernels, params)
        self.kernels.memory.settle(params)
        pool = PagePool(engine_config.num_pages, engine_config.page_size, engine_config.enable_prefix_caching)
        self.scheduler = Scheduler(engine_config, pool)
        self.step_variants = variants_of(model_config, engine_config, self.kernels, report)
        self.batch = self.step_variants.batch
        self.slot_state = self._new_slot_state()
        self.page_checksums = self._new_checksums()
        self.requests: dict[str, Request] = {}
        self._ids = itertools.count()
        self.has_pool = True  # False after release_pool, until the next step
        self._in_flight: InFlight | None = None
        self._begun: object | None = None  # what neither ended nor was recovered from

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, *, with_text: bool = False) -> None:
        """Queue a request, `with_text` where a stream reads its text as it grows.

        A request without an id gets the next number that is no caller's. Raises ValueError for an id in use, QueueFull
        for a queue that is full.
        """
        check_new(request, self.requests, self._ids, len(self.scheduler.waiting), self.engine_config.max_waiting)
        with self._whole():
            self.requests[request.request_id] = request  # first, so that nothing is queued that abort misses
            self.scheduler.add(request)
            give_detokenizers(request, self.tokenizer, with_text)
            self._retire(request)  # where all of its samples had ended before

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are no error. Its pages are free at once."""
        with self._whole():
            request = self.requests.get(request_id)
            for sample in request.samples if request else ():
                self.scheduler.finish(sample, "abort")
            self.requests.pop(request_id, None)
            self._retire_ended()

    @property
    def params(self) -> Any:
        return self.weights.params

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def owes_answers(self) -> bool:
        """Whether requests that have ended here are still to be told to other processes (engine/spread.py)."""
        return False

    def occupancy(self) -> Occupancy:
        scheduler, pages = self.scheduler, self.engine_config.num_pages - 1
        held = pages - scheduler.page_pool.num_available
        return Occupancy(len(scheduler.running), len(scheduler.waiting), scheduler.num_preemptions, held, pages)

    def clear_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self.scheduler.page_pool.clear_cache()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile every step now, instead of when it is first needed."""
        with self._whole():
            self.restore_pool()
            self.cache = self.step_variants.warm_up(self.params, self.cache)
            self._change_slots(*self.batch.empty_changes())
            vocab_size = self.model_config.padded_vocab_size
            self.cache = kv_cache.write_rules(self.cache, *self.batch.no_rules(vocab_size))
            self.cache = kv_cache.write_allowed(self.cache, *self.batch.nothing_allowed(vocab_size))

    @contextlib.contextmanager
    def adjusted(self, *, held_pages: int = 0, held_slots: int = 0, **changes: Any) -> Iterator[None]:
        """Other settings of the host for a while, on the same compiled steps.

        They are `overlap`, `enable_prefix_caching` and a smaller `max_num_batched_tokens`; and pages and slots
        withheld, as if other requests had them. The engine must be idle.
        """
        assert not self.requests and changes.keys() <= ADJUSTABLE
        kept = self.engine_config
        self._adjust(dataclasses.replace(kept, **changes))
        try:
            with self.scheduler.withheld(held_pages, held_slots):
                yield
        finally:
            self._adjust(kept)

    def _adjust(self, engine_config: EngineConfig) -> None:
        self.engine_config = self.scheduler.engine_config = engine_config
        self.scheduler.page_pool.caching = engine_config.enable_prefix_caching

    def update_params(self, params: Any, version: int, *, keep: bool = False) -> list[Request]:
        """Other weights from the next token on.

        No token drawn so far is lost, and no page written so far is found again.

        Keys and values of running requests are computed again under them. With `keep` those that decode keep theirs:
        what follows depends on both versions, and their pages are not offered to others. Returns the requests that
        ended with the last step under the old weights.
        """
        with self._whole():
            ended, self._in_flight = self._collect(self._in_flight), None
            self.weights = Weights(params, version)
            self.scheduler.change_version(version, keep)
            self.step_variants.forget_expected()
            return ended

    def release_pool(self) -> None:
        """Give the cache's memory back until the next step.

        Requests lose no token: their keys and values are computed again. Cached prefixes are gone.
        """
        with self._whole():
            self._collect(self._in_flight)
            self._recover()
            self.has_pool = False
            kv_cache.delete(self.cache)

    def restore_pool(self) -> None:
        """The cache's memory again, empty; nothing where it is there. Raises MemoryError where there is no room."""
        if not self.has_pool:
            self.cache = idle_pools.with_room(self._new_pool)
            self.has_pool = True

    def _new_pool(self) -> kv_cache.Cache:
        with memory.explained(self.model_config, self.engine_config, "making room for the cache again"):
            cache = kv_cache.rebuild(self.cache, self.model_config, self.engine_config, self.kernels)
            return jax.block_until_ready(cache)

    def move_weights(self, params: Any) -> None:
        """The same weights in another memory, or None: `update_params` has to bring others before the next step."""
        with self._whole():
            self.weights = Weights(params, self.weights.version)

    def drop_weights(self) -> None:
        """No weights, requests and cached prefixes, as at first: the next weights may have the same version."""
        with self._whole():
            self.weights, self.requests = Weights(None, 0), {}
            self.step_variants.forget_expected()
            self._recover()

    def step(self) -> list[Request]:
        """One step; returns the requests that ended in it. After any error the engine is usable again.

        Where the device runs out of memory, the samples that it worked for fail, with finish reason "error"; all others
        are computed again.
        """
        with contextlib.closing(self.stepping()) as halves:  # an interrupt between them closes it, which recovers then
            return [request for requests in halves for request in requests]

    def stepping(self) -> Generator[list[Request], None, None]:
        """`step` in two halves: the device has been handed its work, results are read; the requests that ended.

        The first half gives none. Other engines' steps may begin in between (engine/replicas.py).
        """
        with self._together(), self._whole():
            self.restore_pool()
            ended: list[Request] = []
            try:
                yield from self._step_overlapped(ended) if self.engine_config.overlap else self._step_plain(ended)
            except OutOfDeviceMemory as error:
                ended += self._fail(error.samples)
            if self.lockstep is not None and not self.requests:
                self.lockstep.settle()
        yield ended

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.lockstep is None else self.lockstep.together()

    def _step_plain(self, ended: list[Request]) -> Iterator[list[Request]]:
        """The specification: schedule, run, collect."""
        step = self._dispatch(self.scheduler.schedule())
        yield []
        ended += self._collect(step)

    def _step_overlapped(self, ended: list[Request]) -> Iterator[list[Request]]:
        """Schedule and run the next step before the last one's results are read."""
        try:
            plan = self.scheduler.schedule()
        except MustCollect:
            collected, self._in_flight = self._collect(self._in_flight), None
            ended += collected
            plan = self.scheduler.schedule()
        previous, self._in_flight = self._in_flight, self._dispatch(plan) if plan else None
        yield []
        ended += self._collect(previous)

    def _dispatch(self, plan: Plan) -> InFlight:
        """Hand a plan to the device."""
        if self.lockstep is not None:
            self.lockstep.follow(record(plan))
        for sample in plan.admitted:
            self.batch.admit(sample)
        with _blaming(plan.admitted):
            for upload in self.batch.histories(plan.admitted):
                self.cache = kv_cache.write_history(self.cache, *upload)
            for rules in self.batch.rules(plan.admitted, self.model_config.padded_vocab_size):
                self.cache = kv_cache.write_rules(self.cache, *rules)
        with _blaming(plan.steered):
            for allowed in self.batch.allowed(plan.steered, self.model_config.padded_vocab_size):
                self.cache = kv_cache.write_allowed(self.cache, *allowed)
        changed = plan.admitted + plan.grown
        with _blaming(changed):
            self._change_slots(self.batch.table_changes(changed), self.batch.slot_changes())
        riding = plan.decodes if plan.chunks and self._may_ride else []
        # Both are made ready before either runs: where one is to be proven, what fails then is not the other's doing.
        with _blaming(_decoding(plan)):
            decode = self._ready_decode(plan) if plan.decodes and not riding else None
        with _blaming(plan.prefilling):
            prefill = self._ready_prefill(plan, riding) if plan.chunks else None
        with _blaming(_decoding(plan)):
            decoded = self._run(self.step_variants.run_decode, *decode) if decode else None
        with _blaming(plan.prefilling):
            prefilled = self._run(self.step_variants.run_prefill, *prefill) if prefill else None
        step = InFlight(plan, decoded, prefilled, None)
        if self.page_checksums is not None:
            samples = list(step.samples)
            with _blaming(samples):
                step.watch = self.page_checksums.watch(self.cache, samples, self.scheduler.page_pool)
        return step

    def _change_slots(self, tables: Iterable[Any], slots: Iterable[Any]) -> None:
        """What is new in block tables and slots goes to the device."""
        for entries in tables:
            self.slot_state = slot_state.write_tables(self.slot_state, entries)
        for which, rows in slots:
            self.slot_state = slot_state.write_slots(self.slot_state, which, rows)

    def _ready_decode(self, plan: Plan) -> tuple[Variant, tuple]:
        """The compiled step for the plan's decodes, and its inputs."""
        slots = [decode.sample.slot for decode in plan.decodes]
        variant = self._pick("decode", len(slots), slots)
        return variant, (self.batch.decode(plan.decodes, variant.tile),)

    @property
    def _may_ride(self) -> bool:
        """Whether samples that decode are rows of a prefill, where there is one: the weights are read once for all."""
        return self.batch.packs_rows and self.engine_config.decode_steps == 1

    def _ready_prefill(self, plan: Plan, riding: list[Decode]) -> tuple[Variant, tuple]:
        """The compiled step for the plan's chunks, and for those that ride along, and its inputs."""
        num_blocks = sum(chunk.num_blocks for chunk in plan.chunks) + cdiv(len(riding), QUERY_BLOCK)
        slots = [decode.sample.slot for decode in riding] + [sample.slot for sample in plan.prefilling]
        variant = self._pick("prefill", num_blocks, slots)
        return variant, self.batch.prefill(plan, variant.tile, riding)

    def _pick(self, kind: str, num_blocks: int, slots: Sequence[int]) -> Variant:
        needs, pick = self.batch.needs(slots), self.step_variants.pick
        self.cache, variant = pick(kind, num_blocks, needs, self.params, self.cache, self._settle)
        return variant

    def _settle(self) -> None:
        """Wait for the step in flight, so that its samples are to blame where it fails."""
        if self._in_flight is not None:
            with _blaming(self._in_flight.samples):
                jax.block_until_ready(self.cache)

    def _run(self, run: Callable, variant: Variant, inputs: tuple) -> RowOutputs:
        state = self.slot_state
        self.cache, out = run(self.params, self.cache, state.tables, state.slots, *inputs, variant)
        return out

    # -- results ------------------------------------------------------------------------------------------------------

    def _collect(self, step: InFlight | None) -> list[Request]:
        """Read a step's results, append its tokens and end the samples that are done.

        Returns the requests that ended.
        """
        if step is None:
            return []
        decoded, prefilled = self._read(step)
        if decoded is not None:
            append_decoded(self.scheduler, step.plan.decodes, decoded)
        if prefilled is not None:
            append_prefilled(self.scheduler, step.prefill_rows, prefilled)
        return self._retire_ended()

    def _read(self, step: InFlight) -> tuple[HostRows | None, HostRows | None]:
        """A step's rows on the host. Samples that held a damaged page are ended.

        The device's errors surface here, before anything is written down.
        """
        with _blaming(_decoding(step.plan)):
            decoded = HostRows(step.decoded) if step.decoded is not None else None
        with _blaming(step.plan.prefilling):
            prefilled = HostRows(step.prefilled) if step.prefilled is not None else None
        with _blaming(step.samples):
            self._end_damaged(step.watch)
        return decoded, prefilled

    def _end_damaged(self, watch: page_checksums.Watch | None) -> None:
        """End the samples that hold a damaged page.

        Their other pages, which may have been computed from it, leave the prefix cache with it.
        """
        if self.page_checksums is None or watch is None:
            return
        pool = self.scheduler.page_pool
        pages = self.page_checksums.damaged(watch, pool)
        samples = [sample for sample in self.scheduler.running if pages.intersection(sample.pages)]
        for table in (*watch.tables, *(sample.pages for sample in samples)):
            if pages.intersection(table):
                pool.discard(table)
        for sample in samples:
            self.scheduler.finish(sample, "error", page_checksums.CAUSE)

    def _retire_ended(self) -> list[Request]:
        """The requests whose last sample has ended since this was asked before."""
        ended, self.scheduler.ended = self.scheduler.ended, []
        requests = {id(sample.request): sample.request for sample in ended}
        return [request for request in requests.values() if self._retire(request)]

    def _retire(self, request: Request) -> bool:
        """Let go of a request whose samples have all ended; True where the engine still had it."""
        if not request.is_finished or self.requests.get(request.request_id) is not request:
            return False  # it goes on; or it was aborted, and its id may be another's by now
        del self.requests[request.request_id]
        return True

    # -- recovery -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All of the body, or a recovery.

        Where an interrupt cuts the recovery off as well, it comes before whatever is done next.
        """
        if self._begun is not None:
            self._recover()
        own = self._begun = object()
        try:
            yield
        except BaseException:
            if self._begun is own:  # else it was left in the middle, and is put away when something else has begun
                self._recover()
            raise
        self._begun = None

    def _recover(self) -> None:
        """After an error or an interrupt anywhere in a step.

        Unfinished samples start again, lost buffers are rebuilt.
        """
        self._in_flight = None
        samples = [sample for request in self.requests.values() for sample in request.samples]
        unfinished = [sample for sample in samples if sample.status is not Status.FINISHED]
        self.requests = {sample.request.request_id: sample.request for sample in unfinished}
        self.scheduler.restart(unfinished)
        self.scheduler.version = self.weights.version
        for sample in unfinished:
            if sample.detokenizer is not None and self.tokenizer is not None:
                sample.detokenizer = detokenizer_of(self.tokenizer, sample)
        self.slot_state = self._new_slot_state()
        self.page_checksums = self._new_checksums()
        if self.has_pool and kv_cache.is_lost(self.cache):
            self.cache = kv_cache.rebuild(self.cache, self.model_config, self.engine_config, self.kernels)
        self._begun = None

    def _new_slot_state(self) -> slot_state.SlotState:
        """Every slot is given away before a step reads it, so nothing of an earlier one is needed."""
        return slot_state.empty_state(self.batch.num_slots, self.engine_config.pages_per_seq, self.kernels.whole)

    def _new_checksums(self) -> page_checksums.PageChecksums | None:
        return page_checksums.PageChecksums(self.kernels) if self.engine_config.page_checksums else None

    def _fail(self, samples: list[Sample]) -> list[Request]:
        """The device has no memory for these samples: they fail, all others start again.

        Returns the requests that ended.
        """
        known = dict(self.requests)  # those too that ended in this very step
        self._recover()
        self._begun = object()  # until it is written down which samples failed
        advice = memory.advice(self.model_config, self.engine_config)
        for sample in samples:
            self.scheduler.finish(sample, "error", f"the device ran out of memory: {advice}")
        self.requests = known
        return [request for request in list(known.values()) if self._retire(request)]


def _decoding(plan: Plan) -> Iterator[Sample]:
    """The samples that a plan decodes: there are many, and they are wanted where something goes wrong."""
    return map(operator.itemgetter(0), plan.decodes)


@contextlib.contextmanager
def _blaming(samples: Iterable[Sample]) -> Iterator[None]:
    """Where the device runs out of memory in here, OutOfDeviceMemory names the samples that it worked for."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        to_blame = list(samples)
        if not memory.ran_out(error) or not to_blame:
            raise
        raise OutOfDeviceMemory(to_blame) from error
