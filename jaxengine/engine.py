"""The engine: schedule, run, collect. Here the host half and the device half meet."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxengine import kv_cache, steps
from jaxengine.batch import BatchBuilder, wanted_rows
from jaxengine.block_manager import BlockManager
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.detokenizer import Detokenizer
from jaxengine.outputs import Logprob
from jaxengine.programs import Programs, Report
from jaxengine.scheduler import MustSettle, Plan, Scheduler
from jaxengine.sequence import Request, Sequence, Status
from jaxengine.step_inputs import RowOutputs


@dataclasses.dataclass
class InFlight:
    """A dispatched plan whose results are not read yet, and which rows belong to whom."""

    decode: list[Sequence]
    decode_counts: list[int]
    decoded: RowOutputs | None
    prefill: list[tuple[Sequence, int, bool]]
    prefilled: RowOutputs | None


class Engine:
    """One model on one device: params and cache are its only device state."""

    def __init__(self, model: ModelConfig, config: EngineConfig, params: Any, *,
                 make_detokenizer: Callable[[Sequence], Detokenizer] | None = None, report: Report = lambda text: None) -> None:
        self.model, self.config, self.params = model, config, params
        self.scheduler = Scheduler(config, BlockManager(config.num_pages, config.page_size, config.enable_prefix_caching))
        self.batch = BatchBuilder(config)
        self.programs = Programs(model, config, self.batch, report)
        self.cache = kv_cache.allocate(model, config)
        self.requests: dict[str, Request] = {}
        self._make_detokenizer = make_detokenizer
        self._in_flight: InFlight | None = None

    # -- requests --------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; refuses an id in use and a queue that is full."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use: ids of unfinished requests must differ")
        if len(self.scheduler.waiting) + request.params.n > self.config.max_waiting:
            raise ValueError(f"the queue holds {len(self.scheduler.waiting)} of at most {self.config.max_waiting} samples: "
                             f"no room for {request.params.n} more; wait, or raise max_waiting")
        self.scheduler.add(request)
        if request.params.stop and self._make_detokenizer is not None:
            for sequence in request.samples:
                sequence.detokenizer = self._make_detokenizer(sequence)
        self.requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown and finished ids are no error. Its pages are free at once."""
        request = self.requests.pop(request_id, None)
        for sequence in request.samples if request else ():
            self.scheduler.finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # -- the loop --------------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile every step now, instead of when it is first needed."""
        try:
            self.cache = self.programs.warm_up(self.params, self.cache)
        except BaseException:
            self._recover()
            raise

    def step(self) -> list[Request]:
        """One step; returns the requests that ended in it. After any error the engine is usable again."""
        try:
            return self._step_overlapped() if self.config.overlap else self._step_plain()
        except BaseException:
            self._recover()
            raise

    def _step_plain(self) -> list[Request]:
        """The specification: schedule, run, collect."""
        return self._collect(self._dispatch(self.scheduler.schedule()))

    def _step_overlapped(self) -> list[Request]:
        """Schedule and run the next step before the last one's results are read."""
        ended: list[Request] = []
        try:
            plan = self.scheduler.schedule()
        except MustSettle:
            ended, self._in_flight = self._collect(self._in_flight), None
            plan = self.scheduler.schedule()
        previous, self._in_flight = self._in_flight, self._dispatch(plan) if plan else None
        return ended + self._collect(previous)

    def _dispatch(self, plan: Plan) -> InFlight:
        """Hand a plan to the device."""
        for sequence in plan.admitted:
            self.batch.admit(sequence)
        for upload in self.batch.histories(plan.admitted):
            self.cache = steps.write_history(self.cache, *upload)
        chunked = [s for chunk in plan.chunks for s in (chunk.sequence, *chunk.forks)]
        tables, slots = self.batch.sync_tables(plan.decode + chunked), self.batch.device_slots()
        return InFlight(plan.decode, plan.decode_counts, self._decode(plan, tables, slots) if plan.decode else None,
                        [row for chunk in plan.chunks for row in wanted_rows(chunk)],
                        self._prefill(plan, tables, slots) if plan.chunks else None)

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
        if step.decoded is not None:
            rows = _HostRows(step.decoded)
            for lane, (sequence, count) in enumerate(zip(step.decode, step.decode_counts, strict=True)):
                for i in range(count):
                    self._extend(sequence, rows, (i, lane))
        if step.prefilled is not None:
            rows = _HostRows(step.prefilled)
            for lane, (sequence, position, scored) in enumerate(step.prefill):
                if scored:
                    self._score_prompt(sequence, rows, lane, position + 1)
                else:
                    self._extend(sequence, rows, lane)
        touched = {id(s.request): s.request for s in (*step.decode, *(row[0] for row in step.prefill))}
        return [request for request in touched.values() if self._end(request)]

    def _end(self, request: Request) -> bool:
        if any(s.status is not Status.FINISHED for s in request.samples):
            return False
        if self.requests.get(request.request_id) is not request:
            return False  # aborted, and its id may be another's by now
        del self.requests[request.request_id]
        return True

    def _extend(self, sequence: Sequence, rows: "_HostRows", lane) -> None:
        """Append the token in a lane of the results, unless the sequence ended in the meantime."""
        if sequence.status is Status.FINISHED:
            return
        sequence.num_pending -= 1
        if not rows.finite[lane]:
            self.scheduler.blocks.discard(sequence.pages)
            self.scheduler.finish(sequence, "error", "the model's logits were not finite")
            return
        token, params = int(rows.tokens[lane]), sequence.request.params
        sequence.token_ids.append(token)
        sequence.token_logprobs.append(float(rows.logprobs[lane]))
        sequence.token_versions.append(sequence.version)
        if params.raw_logprobs:
            sequence.raw_logprobs.append(rows.raw_logprobs[lane])
        if params.entropy:
            sequence.entropies.append(rows.entropies[lane])
        if params.logprobs is not None:
            sequence.logprobs.append(rows.likeliest(lane, params.logprobs))
        self.scheduler.register_pages(sequence)
        self._stop(sequence, token)

    def _stop(self, sequence: Sequence, token: int) -> None:
        """End the sequence where its last token says so: a stop token, a stop string, or the edge."""
        request = sequence.request
        num_generated = len(sequence.token_ids) - sequence.prompt_length
        if token in request.stop_token_ids and num_generated >= request.params.min_tokens:
            self.scheduler.finish(sequence, "stop", token if token in request.params.stop_token_ids else None)
            return
        found = sequence.detokenizer.push([token]) if sequence.detokenizer is not None else None
        if found is not None:
            self.scheduler.finish(sequence, "stop", found[1])
        elif len(sequence.token_ids) >= request.limit:
            self.scheduler.finish(sequence, "length")

    def _score_prompt(self, sequence: Sequence, rows: "_HostRows", lane: int, position: int) -> None:
        request = sequence.request
        count = request.params.prompt_logprobs
        if sequence.status is Status.FINISHED or count is None:
            return
        if not rows.finite[lane]:
            self.scheduler.blocks.discard(sequence.pages)
            self.scheduler.finish(sequence, "error", "the model's logits were not finite")
            return
        entries: Any = request.prompt_logprobs or [None] * sequence.prompt_length
        entries[position] = rows.likeliest(lane, count)
        request.prompt_logprobs = entries

    # -- recovery --------------------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """After an error or an interrupt, anywhere in a step: every unfinished sequence starts anew, donated buffers are rebuilt."""
        self._in_flight = None
        unfinished = [s for request in self.requests.values() for s in request.samples if s.status is not Status.FINISHED]
        self.requests = {s.request.request_id: s.request for s in unfinished}
        self.scheduler.restart(unfinished)
        for sequence in unfinished:
            if sequence.detokenizer is not None and self._make_detokenizer is not None:
                sequence.detokenizer = self._make_detokenizer(sequence)
                sequence.detokenizer.push(sequence.generated)
        if any(x.is_deleted() for x in jax.tree.leaves(self.cache)):
            self.cache = kv_cache.allocate(self.model, self.config)


class _HostRows:
    """A step's results as numpy arrays; those that few requests ask for are fetched when one does."""

    def __init__(self, out: RowOutputs) -> None:
        self._out = out
        self.tokens, self.logprobs, self.finite = np.asarray(out.tokens), np.asarray(out.logprobs), np.asarray(out.finite)

    def __getattr__(self, name: str) -> Any:
        array = np.asarray(getattr(self._out, name))
        setattr(self, name, array)
        return array

    def likeliest(self, lane, count: int) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest, as vLLM's dictionary."""
        chosen = {int(self.tokens[lane]): Logprob(float(self.logprobs[lane]), int(self.ranks[lane]))}
        ids, values = self.top_ids[lane][:count], self.top_logprobs[lane][:count]
        return chosen | {int(t): Logprob(float(v), i + 1) for i, (t, v) in enumerate(zip(ids, values, strict=True))}
