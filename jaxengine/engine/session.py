"""Requests in, outputs out: one engine as threads use it, under whichever weights run."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxengine.base import compiled_code
from jaxengine.base.keys import CallKeys
from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.coordinate import Contract
from jaxengine.device import scoring
from jaxengine.device.grammar_mask import find_grammar_mask
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.device.scoring_input import check_sampling_mask, check_scored
from jaxengine.engine import idle_pools, memory
from jaxengine.engine.contract_digest import Contracts
from jaxengine.engine.deltas import DeltaReader
from jaxengine.engine.engine import Engine
from jaxengine.engine.lockstep import Lockstep, as_one
from jaxengine.engine.mesh_proof import check_mesh
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.runner import Runner
from jaxengine.engine.scoring_proof import scoring_tiles
from jaxengine.engine.spread import SpreadReplicas
from jaxengine.engine.to_outputs import to_output
from jaxengine.engine.weights import check_alive, homes, placed, prepared
from jaxengine.host.admission import ON_ERROR, Admission, priorities_of, sampling_of
from jaxengine.host.prompts import Prompts
from jaxengine.host.sample import Request
from jaxengine.models.named_weights import to_decoder
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels, choose_for_all_replicas, choose_kernels
from jaxengine.outputs import RequestDelta, RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.bad_words import each_with_token_ids
from jaxengine.text.tokenizer import Tokenizer
from sharding.mesh import joined, own_parts, processes_of, replicas

IN_FLIGHT = ("recompute", "keep", "drain")
SLEEP_LEVELS = (1, 2)
T = TypeVar("T")
WAKE_TAGS = ("weights", "kv_cache")


class Session:
    """An engine, the lock over it, its contracts and its tokenizer. Every method may be called from any thread."""

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        params: Any,
        tokenizer: Tokenizer | None,
        report: Report = say_nothing,
        call_keys: CallKeys | None = None,
    ) -> None:
        self.model_config, self.tokenizer, self.report = model_config, tokenizer, report
        if engine_config.compilation_cache:
            compiled_code.keep()
        self.engine = idle_pools.with_room(lambda: self._new_engine(engine_config, params))
        self.contracts = Contracts(self.engine)
        self.runner = Runner(self.engine, self.contracts, call_keys)
        self.admission = Admission(model_config, engine_config, Prompts(model_config.vocab_size, tokenizer))
        self._homes: Any = None  # of the weights, while they wait in the host's memory
        idle_pools.register(self)

    def _new_engine(self, engine_config: EngineConfig, params: Any) -> Engine | Replicas:
        if engine_config.mesh is None:
            return self._new_replica(engine_config, params)
        configs = [dataclasses.replace(engine_config, mesh=mesh) for mesh in replicas(engine_config.mesh)]
        processes = [processes_of(config.mesh) for config in configs]
        own = [number for number, each in enumerate(processes) if jax.process_index() in each]
        everyone = processes_of(engine_config.mesh)
        params = self._own_parts(params, engine_config)
        lockstep = Lockstep.of(everyone, engine_config.process_timeout) if len(configs) > 1 else None
        engines = {number: self._new_replica(configs[number], params) for number in own}
        if len(configs) == 1:
            return engines[0]
        if lockstep is None:
            return Replicas(engine_config, list(engines.values()))
        return SpreadReplicas(engine_config, engines, [each[0] for each in processes], lockstep)

    def _own_parts(self, params: Any, engine_config: EngineConfig) -> Any:
        """Weights that lie over the processes of several replicas, as this process's first replica has them."""
        mesh = engine_config.mesh
        if mesh is None or mesh.shape["data"] == 1 or len(processes_of(mesh)) == 1:
            return params
        kernels = choose_kernels(engine_config.kernels, self.model_config, mesh)
        like = homes(params, self.model_config, kernels)
        return jax.tree.map(lambda x, home: own_parts(x, home, mesh), params, like)

    def _new_replica(self, engine_config: EngineConfig, params: Any) -> Engine:
        kernels = choose_kernels(engine_config.kernels, self.model_config, engine_config.mesh)
        lockstep = Lockstep.of(processes_of(engine_config.mesh), engine_config.process_timeout)
        setup = jax.__version__, self.model_config, dataclasses.replace(engine_config, mesh=None)
        explained = memory.explained(self.model_config, engine_config, "making room for the cache")
        with explained, as_one(lockstep, setup):
            params = placed(params, homes(params, self.model_config, kernels))
            check_mesh(self.model_config, kernels, self.report)
            engine = Engine(
                self.model_config,
                engine_config,
                params,
                tokenizer=self.tokenizer,
                report=self.report,
                lockstep=lockstep,
            )
            jax.block_until_ready(engine.cache)
        return engine

    @property
    def engine_config(self) -> EngineConfig:
        return self.engine.engine_config

    @property
    def params(self) -> Decoder | None:
        """The parameters that run."""
        return self.engine.params

    # -- requests -----------------------------------------------------------------------------------------------------

    def requests(
        self,
        prompts: list[Any],
        sampling: list[SamplingParams],
        key: tuple[int, int] | None,
        request_ids: Sequence[str] | None = None,
        on_error: str = "refuse",
        priority: int | Sequence[int] = 0,
    ) -> list[Request]:
        """A checked request for each prompt; `key` are the words of the call's key, None has it take the next one as it
        is queued. `priority` is one for all or one each.

        Without `request_ids` each gets an id as it is queued. With `on_error="return"` a prompt that is wrong has a
        request that has ended, instead of raising. Raises RuntimeError in a fork, and after `close`.
        """
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, ON_ERROR))}, got {on_error!r}")
        self.runner.check_usable()
        if on_error == "refuse":
            sampling, admit = each_with_token_ids(sampling, self.tokenizer), self.admission.request
        else:
            admit = self.admission.request_or_error
        priorities = priorities_of(priority, len(prompts))
        ids = request_ids if request_ids is not None else [""] * len(prompts)
        given = enumerate(zip(ids, prompts, sampling, strict=True))
        requests = [admit(name, prompt, index, each, key or (0, 0)) for index, (name, prompt, each) in given]
        for request, each in zip(requests, priorities, strict=True):
            request.priority, request.is_keyless = each, key is None
        return requests

    def complete(
        self, requests: list[Request], progress: Callable[[Sequence[Request]], None] | None = None
    ) -> list[RequestOutput]:
        """Queue requests, run them to their ends and render them. `progress` is shown them after each step."""
        for _ in self.runner.run(requests):
            if progress is not None:
                progress(requests)
        return [self.output(request) for request in requests]

    def stream(self, request: Request) -> Iterator[RequestDelta]:
        """What the request gained, after each step; the last delta has the whole output.

        Closing the iterator aborts it.
        """
        reader = DeltaReader(request, self.tokenizer)
        for deltas, finished in self._watched(request, reader.read):
            if finished:
                yield RequestDelta(request.request_id, deltas, True, self.output(request))
            elif deltas:
                yield RequestDelta(request.request_id, deltas, False)

    def growing(self, request: Request) -> Iterator[RequestOutput]:
        """The request's whole output each time that it has grown; the last one is finished.

        Closing the iterator aborts it.
        """
        shown = 0  # tokens
        for output, finished in self._watched(request, lambda: self.output(request)):
            count = sum(len(sample.token_ids) for sample in output.outputs)
            if finished or count > shown:
                shown = count
                yield output

    def _watched(self, request: Request, read: Callable[[], T]) -> Iterator[tuple[T, bool]]:
        """(what `read` gives, whether the request has ended) after each step; the last time it has."""
        finished = False
        for _ in self.runner.run([request], with_text=True):
            with self.runner.alone():  # no other thread's step may add a token to what is being read
                found, finished = read(), request.is_finished
            yield found, finished
        if not finished:  # another call's step brought the end
            yield read(), True

    def abort(self, request_id: str) -> None:
        """End a request; idempotent. While the engine is at work, the request ends with the step that runs."""
        request = self.engine.requests.get(request_id)
        if request is not None:
            self.runner.abort_later([request])

    def output(self, request: Request) -> RequestOutput:
        """The request as it stands."""
        return to_output(request, self.tokenizer, self.contracts)

    # -- weights ------------------------------------------------------------------------------------------------------

    def contract(self) -> Contract:
        """What has to be equal for bits to be equal, of the weights that run."""
        return self.contracts.current()

    def update_params(self, params: Any, *, in_flight: str, version: int | None, cast: bool) -> int:
        """Other weights from the next token on (LLM.update_params); returns their version. Holds the lock."""
        if in_flight not in IN_FLIGHT:
            raise ValueError(f"in_flight must be one of {', '.join(map(repr, IN_FLIGHT))}, got {in_flight!r}")
        self.runner.check_usable()
        params = to_decoder(params, self.model_config, cast=cast, split=self.engine.kernels.split)
        params = self._own_parts(params, self.engine_config)
        kernels, home = self._kernels_of_all(), self.params if self._homes is None else self._homes
        if home is None or self._homes is None and kernels.replicas > 1:  # each replica takes its copy from there
            home = homes(params, self.model_config, kernels)
        with as_one(self.engine.lockstep, ("update_params", version, in_flight)):
            params = prepared(params, self.model_config, home, cast=cast)
        with self.runner.alone():
            current = self.engine.weights.version
            if version is not None and version <= current:
                raise ValueError(f"version must be higher than the current one, {current}, got {version}")
            if in_flight == "drain":
                self._drain()
            if self.engine.has_work:
                self.contracts.current()  # of the weights that drew what is in flight, while they are here
            version = current + 1 if version is None else version
            self.engine.update_params(params, version, keep=in_flight == "keep")
            self._homes = None
        return version

    def _drain(self) -> None:
        if self.runner.is_paused and self.engine.has_work:
            raise RuntimeError(
                'in_flight="drain" waits for requests, and the LLM is paused: call resume() first, or recompute or keep'
            )
        while self.engine.has_work:
            self.engine.step()

    # -- memory -------------------------------------------------------------------------------------------------------

    def release_pool_if_idle(self) -> bool:
        """Give the pool's memory back until the next request, where nothing is under way; whether that was done."""
        if not self.runner.lock.acquire(blocking=False):
            return False
        try:
            if self.engine.has_work or not self.engine.has_pool:
                return False
            self.engine.release_pool()
            return True
        finally:
            self.runner.lock.release()
            self.runner.sweep()

    def clear_prefix_cache(self) -> None:
        """Forget every cached prefix. Holds the lock."""
        with self.runner.alone():
            self.engine.clear_prefix_cache()

    def sleep(self, level: int) -> None:
        """LLM.sleep. Holds the lock."""
        if level not in SLEEP_LEVELS:
            raise ValueError(f"level must be one of {', '.join(map(str, SLEEP_LEVELS))}, got {level!r}")
        if level == 1 and self.engine.lockstep is not None and not _on_host(self.params):
            raise NotImplementedError(
                "sleep(level=1) keeps the weights in one process's memory, and several processes share them: "
                "sleep(level=2), and give them to update_params again"
            )
        with self.runner.alone():
            self.runner.fall_asleep()
            if self.engine.has_work or level == 1 and self.params is not None:
                self.contracts.current()  # while the weights are here
            self.engine.release_pool()
            if level == 2:
                self._homes = None
                self.engine.move_weights(None)
            elif self._homes is None and not _on_host(self.params):
                self._homes = jax.tree.map(_sharding, self.params)
                self.engine.move_weights(jax.device_get(self.params))

    def wake_up(self, tags: Sequence[str] | None) -> None:
        """LLM.wake_up. Holds the lock."""
        wanted = WAKE_TAGS if tags is None else tuple(tags)
        unknown = [tag for tag in wanted if tag not in WAKE_TAGS]
        if unknown:
            raise ValueError(f"tags must be of {', '.join(WAKE_TAGS)}, got {unknown[0]!r}")
        with self.runner.alone():
            if not self.runner.is_asleep:
                return
            if "weights" in wanted and self._homes is not None:
                with memory.explained(self.model_config, self.engine_config, "bringing the weights back"):
                    self.engine.move_weights(jax.block_until_ready(jax.device_put(self.params, self._homes)))
                self._homes = None
            if "kv_cache" not in wanted:
                return
            if self.params is None or self._homes is not None:
                raise RuntimeError('the weights are not here: wake_up(["weights"]) or update_params comes first')
            self.engine.restore_pool()
            self.runner.awake()

    def close(self) -> None:
        """End every request, and give back pool and weights for good. Idempotent. Holds the lock."""
        if self.runner.is_closed:
            return
        with self.runner.alone():
            self.runner.is_closed = True
            for name in list(self.engine.requests):
                self.engine.abort(name)
            self.engine.release_pool()
            self.engine.drop_weights()
            if self.engine.lockstep is not None:
                self.engine.lockstep.close()
        self.runner.awake()
        self.runner.resume()

    def warm_up(self) -> None:
        """Compile every step now. Holds the lock."""
        with self.runner.alone(), memory.explained(self.model_config, self.engine_config, "compiling"):
            self.runner.check_awake()
            self.engine.warm_up()

    def set_first_weights(self, params: Decoder) -> None:
        """Version 0, as if the engine were new: what an interrupt kept of earlier weights goes first."""
        self.drop_weights()
        self.engine.update_params(params, version=0)

    def drop_weights(self) -> None:
        """Let go of the weights and of all that depends on them: requests, cached prefixes and contracts."""
        self.engine.drop_weights()
        self.contracts.clear()

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self, tokens: Any, mask: Any, sampling_params: Any, *, entropy: bool, sampling_mask: SamplingMask | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(logprobs, entropies if asked) `[B, T]` of the tokens under `mask`, in batches of bounded size.

        Holds the lock. The tiles are proven on this machine first (engine/scoring_proof.py). Replicas of one process
        share the sequences; of several processes each scores all of them.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        check_scored(tokens, mask, self.model_config)
        check_sampling_mask(sampling_mask, tokens)
        sampling = each_with_token_ids(sampling_of(sampling_params, tokens.shape[0]), self.tokenizer)
        grammar = find_grammar_mask(tokens, mask, sampling, self.tokenizer, self.model_config)
        slots = scoring.sampling_arrays_of(sampling, self.model_config, sampling_mask, grammar)
        with self.runner.alone():
            self.runner.check_awake()
            check_alive(self.params)
            params, kernels = self._of_all_replicas()
            what = None
            if self.engine.lockstep is not None:  # what is scored may be long: its digest
                given = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((tokens, mask, slots))]
                what = "score", tokens.shape, entropy, hashlib.sha256(b"".join(given)).hexdigest()
            with as_one(self.engine.lockstep, what):
                return scoring.in_batches(
                    params,
                    tokens,
                    mask,
                    slots,
                    model_config=self.model_config,
                    kernels=kernels,
                    entropy=entropy,
                    tiles=scoring_tiles(self.model_config, kernels, self.report),
                )

    def _of_all_replicas(self) -> tuple[Decoder, Kernels]:
        """The weights that run, as one array of every replica's copy, and the kernels of all their devices."""
        engine, kernels = self.engine, self._kernels_of_all()
        assert engine.params is not None
        if kernels.replicas == 1:
            return engine.params, kernels
        assert isinstance(engine, Replicas)
        copies = [replica.params for replica in engine.engines]
        everywhere = homes(copies[0], self.model_config, kernels)
        return jax.tree.map(lambda home, *parts: joined(parts, home), everywhere, *copies), kernels

    def _kernels_of_all(self) -> Kernels:
        return choose_for_all_replicas(self.engine.kernels.name, self.model_config, self.engine_config.mesh)


def _sharding(leaf: jax.Array) -> jax.sharding.Sharding:
    return leaf.sharding


def _on_host(params: Any) -> bool:
    """Whether the weights lie in the host's memory already: there are none, or the device is the CPU."""
    leaves = jax.tree.leaves(params)
    return all(not isinstance(leaf, jax.Array) or {d.platform for d in leaf.devices()} == {"cpu"} for leaf in leaves)
