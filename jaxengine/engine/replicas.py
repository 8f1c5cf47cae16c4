"""Several engines that hold the same weights, behind the face of one: data parallelism.

Each has its own devices, pages and scheduler, and knows nothing of the others; only the placement of new requests looks
at all of them. The steps of all are under way at the same time: each is handed to its devices before the first is
waited for.
"""

import contextlib
import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxengine.config import EngineConfig
from jaxengine.engine.engine import Engine, Occupancy, Weights, check_new
from jaxengine.engine.lockstep import Lockstep
from jaxengine.engine.weights import homes, placed
from jaxengine.host.placement import Placement
from jaxengine.host.sample import Request


class Replicas:
    """As an Engine is used: every method does for all of them what it says there."""

    def __init__(self, engine_config: EngineConfig, engines: Sequence[Engine]) -> None:
        self.engine_config, self.engines = engine_config, list(engines)
        first = engines[0]
        self.model_config, self.tokenizer, self.kernels = first.model_config, first.tokenizer, first.kernels
        self.step_variants = first.step_variants  # what is refused on one is refused on all: their devices are alike
        self.lockstep: Lockstep | None = None  # all devices are this process's
        self._placement = Placement(engine_config.page_size)
        self._ids = itertools.count()
        self._only: int | None = None

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> Mapping[str, Request]:
        """Unfinished requests by id."""
        return ChainMap(*(engine.requests for engine in self.engines))

    @property
    def num_replicas(self) -> int:
        return len(self.engines)

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def owes_answers(self) -> bool:
        return False

    def loads(self) -> tuple[list[int], int]:
        """(unfinished samples of each replica, how many of all wait)."""
        occupied = [engine.occupancy() for engine in self.engines]
        return [each.waiting + each.running for each in occupied], sum(each.waiting for each in occupied)

    def add(self, request: Request, *, with_text: bool = False) -> None:
        """Queue a request on one of the replicas, with all of its samples: they share their prompt's pages."""
        loads, num_waiting = self.loads()
        check_new(request, self.requests, self._ids, num_waiting, self.engine_config.max_waiting)
        chosen = self._placement.choose(request.prompt_token_ids, loads) if self._only is None else self._only
        self._serve(chosen, request, with_text)

    def _serve(self, replica: int, request: Request, with_text: bool) -> None:
        self.engines[replica].add(request, with_text=with_text)

    @contextlib.contextmanager
    def only(self, index: int) -> Iterator[None]:
        """One replica serves all that is added in here."""
        self._only = index
        try:
            yield
        finally:
            self._only = None

    def abort(self, request_id: str) -> None:
        for engine in self.engines:
            if request_id in engine.requests:
                engine.abort(request_id)

    def step(self) -> list[Request]:
        """One step of every replica that has work.

        Where one raises, the others' steps are read first: each recovers by itself.
        """
        steps = [engine.stepping() for engine in self.engines if engine.has_work]
        ended: list[Request] = []
        with contextlib.ExitStack() as stack:
            for step in steps:
                stack.callback(step.close)  # an interrupt closes what is under way, which recovers then
            errors = [error for step in steps for error in _advanced(step)]
            for step in steps:
                errors += _advanced(step, ended)
            if errors:
                raise errors[0]
        return ended

    # -- the device ---------------------------------------------------------------------------------------------------

    @property
    def params(self) -> Any:
        """Those of the first replica."""
        return self.engines[0].params

    @property
    def weights(self) -> Weights:
        return self.engines[0].weights

    @property
    def cache(self) -> list[Any]:
        return [engine.cache for engine in self.engines]

    @property
    def has_pool(self) -> bool:
        return any(engine.has_pool for engine in self.engines)

    def occupancy(self) -> Occupancy:
        return Occupancy(*map(sum, zip(*(engine.occupancy() for engine in self.engines), strict=True)))

    def warm_up(self) -> None:
        for engine in self.engines:
            engine.warm_up()

    def update_params(self, params: Any, version: int, *, keep: bool = False) -> list[Request]:
        """`params` lie on the first replica's devices or on those of all; what lies on a replica's own stays there."""
        copies = [self._at_home(engine, params) for engine in self.engines]
        updated = [
            engine.update_params(copy, version, keep=keep) for engine, copy in zip(self.engines, copies, strict=True)
        ]
        return [request for requests in updated for request in requests]

    def move_weights(self, params: Any) -> None:
        """Arrays of the host are one copy for all replicas."""
        on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        for engine in self.engines:
            engine.move_weights(self._at_home(engine, params) if on_devices else params)

    def _at_home(self, engine: Engine, params: Any) -> Any:
        return placed(params, homes(params, self.model_config, engine.kernels))

    def drop_weights(self) -> None:
        for engine in self.engines:
            engine.drop_weights()

    def release_pool(self) -> None:
        for engine in self.engines:
            engine.release_pool()

    def restore_pool(self) -> None:
        for engine in self.engines:
            engine.restore_pool()

    def clear_prefix_cache(self) -> None:
        for engine in self.engines:
            engine.clear_prefix_cache()

    @contextlib.contextmanager
    def adjusted(self, **changes: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.adjusted(**changes))
            yield


def _advanced(step: Iterator[list[Request]], ended: list[Request] | None = None) -> list[Exception]:
    """The errors of a step that goes on to where it waits, or to its end; what it gives is added to `ended`."""
    try:
        for requests in step:
            if ended is None:
                break
            ended += requests
    except Exception as error:
        return [error]
    return []
