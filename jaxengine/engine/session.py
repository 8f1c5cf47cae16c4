"""Requests in, outputs out: one engine as threads use it, under whichever weights run."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.coordinate import Contract
from jaxengine.device import scoring, trunk
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.device.scoring_input import check_sampling_mask, check_scored
from jaxengine.engine import memory
from jaxengine.engine.contract_digest import Contracts
from jaxengine.engine.engine import Engine
from jaxengine.engine.runner import Runner
from jaxengine.engine.to_outputs import to_output
from jaxengine.engine.weights import placed, prepared
from jaxengine.host.admission import Admission, sampling_of
from jaxengine.host.sample import Request
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

IN_FLIGHT = ("recompute", "keep", "drain")


class Session:
    """An engine, the lock over it, its contracts and its tokenizer. Every method may be called from any thread."""

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        params: Any,
        tokenizer: Tokenizer | None,
        report: Report = say_nothing,
    ) -> None:
        self.model_config, self.tokenizer = model_config, tokenizer
        with memory.explained(model_config, engine_config, "making room for the cache"):
            self.engine = Engine(model_config, engine_config, placed(params), tokenizer=tokenizer, report=report)
            jax.block_until_ready(self.engine.cache)
        self.contracts = Contracts(self.engine)
        self.runner = Runner(self.engine, self.contracts)
        self.admission = Admission(model_config, engine_config, tokenizer)
        self._ids = itertools.count()

    @property
    def engine_config(self) -> EngineConfig:
        return self.engine.engine_config

    @property
    def params(self) -> Decoder | None:
        """The parameters that run."""
        return self.engine.params

    # -- requests -----------------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """The next number that no caller took as an id of its own."""
        for number in self._ids:
            if str(number) not in self.engine.requests:
                return str(number)
        raise AssertionError("the numbers never end")

    def requests(
        self,
        prompts: list[Any],
        sampling: list[SamplingParams],
        key: tuple[int, int],
        request_ids: Sequence[str] | None = None,
    ) -> list[Request]:
        """A checked request for each prompt; `key` are the words of the call's key. Raises RuntimeError in a fork."""
        self.runner.check_process()
        ids = request_ids if request_ids is not None else [self.new_id() for _ in prompts]
        given = enumerate(zip(ids, prompts, sampling, strict=True))
        return [self.admission.request(name, prompt, index, each, key) for index, (name, prompt, each) in given]

    def complete(
        self, requests: list[Request], progress: Callable[[Sequence[Request]], None] | None = None
    ) -> list[RequestOutput]:
        """Queue requests, run them to their ends and render them. `progress` is shown them after each step."""
        for _ in self.runner.run(requests):
            if progress is not None:
                progress(requests)
        return [self.output(request) for request in requests]

    def stream(self, request: Request) -> Iterator[RequestOutput]:
        """The request's output again and again as it grows; the last one is finished.

        Closing the iterator aborts it.
        """
        output = None
        for _ in self.runner.run([request], with_text=True):
            with self.runner.alone():  # no other thread's step may add a token to what is being read
                output = self.output(request)
            yield output
        if output is None or not output.finished:  # another call's step brought the end
            yield self.output(request)

    def abort(self, request_id: str) -> None:
        """End a request; idempotent. While the engine is at work, the request ends with the step that runs."""
        request = self.engine.requests.get(request_id)
        if request is not None:
            self.runner.abort_later([request])

    def output(self, request: Request) -> RequestOutput:
        """The request as it stands, under the contract of the weights that drew its newest token."""
        return to_output(request, self.tokenizer, self.contracts.of(request))

    # -- weights ------------------------------------------------------------------------------------------------------

    def contract(self) -> Contract:
        """What has to be equal for bits to be equal, of the weights that run."""
        return self.contracts.current()

    def update_params(self, params: Decoder, *, in_flight: str, version: int | None, cast: bool) -> int:
        """Other weights from the next token on (LLM.update_params); returns their version. Holds the lock."""
        if in_flight not in IN_FLIGHT:
            raise ValueError(f"in_flight must be one of {', '.join(map(repr, IN_FLIGHT))}, got {in_flight!r}")
        self.runner.check_process()
        params = prepared(params, self.model_config, self.params, cast=cast)
        with self.runner.alone():
            current = self.engine.weights.version
            if version is not None and version <= current:
                raise ValueError(f"version must be higher than the current one, {current}, got {version}")
            if in_flight == "drain":
                self._drain()
            self.engine.update_params(params, current + 1 if version is None else version, keep=in_flight == "keep")
        return self.engine.weights.version

    def _drain(self) -> None:
        if self.runner.is_paused and self.engine.has_work:
            raise RuntimeError(
                'in_flight="drain" waits for requests, and the LLM is paused: call resume() first, or recompute or keep'
            )
        while self.engine.has_work:
            self.engine.step()

    def warm_up(self) -> None:
        """Compile every step now. Holds the lock."""
        with self.runner.alone(), memory.explained(self.model_config, self.engine_config, "compiling"):
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

        Holds the lock.

        Where the wide tile does not hold on this machine the base tile is used.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        check_scored(tokens, mask, self.model_config)
        check_sampling_mask(sampling_mask, tokens)
        sampling = sampling_of(sampling_params, tokens.shape[0])
        slots = scoring.sampling_arrays_of(sampling, self.model_config, sampling_mask)
        with self.runner.alone():
            assert self.params is not None
            tile = self.engine.checked_tile(trunk.WIDE)
            return scoring.in_batches(
                self.params,
                tokens,
                mask,
                slots,
                model_config=self.model_config,
                kernels=self.engine.kernels,
                entropy=entropy,
                tile=tile,
            )
