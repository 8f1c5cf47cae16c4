"""LLM: a model, its tokenizer and an engine behind the names that vLLM's users know."""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from checkpoints.model_folder import find_folder
from jaxengine.base.arguments import check_keywords
from jaxengine.base.keys import key_data, seeded
from jaxengine.base.progress import Progress
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.contract.compare import Comparison, compare
from jaxengine.contract.report import Verification
from jaxengine.contract.verify import verify
from jaxengine.coordinate import Contract, Coordinate
from jaxengine.device import scoring, trunk
from jaxengine.engine.contract_digest import contract
from jaxengine.engine.engine import Engine, memory
from jaxengine.engine.runner import Runner, ended
from jaxengine.engine.to_outputs import render, text_ids
from jaxengine.engine.weights import check_alive, placed, prepared
from jaxengine.host.admission import check_scored, extended, make_request, prompts_of, replayed, sampling_of
from jaxengine.host.sample import Request, Sample
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.outputs import RequestOutput, RequestOutputs
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.tokenizer import Tokenizer

CPU_TOKENS, DEVICE_TOKENS = 512, 8192  # default budget of a step
IN_FLIGHT = ("recompute", "keep", "drain")
CONTRACTS_KEPT = 16  # of earlier versions of the weights, for outputs that are rendered after an update
ENGINE_KEYWORDS = tuple(field.name for field in dataclasses.fields(EngineConfig))
OWN_KEYWORDS = (
    "model",
    "dtype",
    "tokenizer",
    "seed",
    "reduction_leaves",
    "tensor_parallel_size",
    "data_parallel_size",
    "mesh",
    "progress",
)


class LLM:
    """An engine for one model.

    `model` is the name of the model that ships ("calc"), a folder in Hugging Face format or a hub id. `dtype` is "auto" (the file's),
    "float32", "bfloat16" or "float16", or numpy's or JAX's own. `tokenizer` is another folder's. `reduction_leaves` is the number of parts
    that every long sum is cut into, and so the most devices that can ever share the model; it is in the bits. `num_pages` is sized from
    memory unless given. `seed` is the key of calls that bring none. `progress` shows loading, compiling and tokens on stderr. Further
    keywords are EngineConfig's: they change room and speed, never a bit but for `kernels`.

        llm = LLM("calc")
        outputs = llm.generate(["12+30=", "7*8="], SamplingParams(n=8, max_tokens=16), key=jax.random.key(0))
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: Any = "auto",
        tokenizer: str | os.PathLike[str] | None = None,
        seed: int = 0,
        reduction_leaves: int = 1,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        mesh: Any = None,
        progress: bool = True,
        **engine: Any,
    ) -> None:
        check_keywords("LLM", engine, (*OWN_KEYWORDS, *ENGINE_KEYWORDS))
        if tensor_parallel_size != 1 or data_parallel_size != 1 or mesh is not None:
            raise NotImplementedError(
                "this version runs on one device: leave tensor_parallel_size and data_parallel_size at 1"
            )
        self._key = seeded(seed)
        folder = find_folder(model)
        self.progress = Progress(progress)
        config = loading.read_model_config(folder, dtype=dtype, reduction_leaves=reduction_leaves)
        config_of_engine, text = resolve_engine_config(config, engine), _load_tokenizer(tokenizer, folder)
        with memory.explained(config, config_of_engine, "loading the weights"):
            params = jax.block_until_ready(
                loading.load(folder, config, self.progress.counter("loading weights", "tensors"))
            )
        self._start(config, config_of_engine, params, text)

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        params: Decoder | None,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        progress: bool = False,
        **engine: Any,
    ) -> "LLM":
        """An LLM over parameters that are already in memory; they are used as they are, not copied. None: they are set before each call."""
        check_keywords(
            "LLM.from_params", engine, ("config", "params", "tokenizer", "seed", "progress", *ENGINE_KEYWORDS)
        )
        self = cls.__new__(cls)
        self._key, self.progress = seeded(seed), Progress(progress)
        self._start(config, resolve_engine_config(config, engine, params), params, tokenizer)
        return self

    def _start(
        self, config: ModelConfig, engine: EngineConfig, params: Decoder | None, tokenizer: Tokenizer | None
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        with memory.explained(config, engine, "making room for the cache"):
            self.engine = Engine(
                config, engine, placed(params), make_detokenizer=self._detokenizer, report=self.progress.line
            )
            jax.block_until_ready(self.engine.cache)
        self._calls, self._ids = itertools.count(), itertools.count()
        self.runner = Runner(self.engine)
        self._contracts: dict[int, Contract] = {}

    @property
    def params(self) -> Decoder | None:
        """The parameters that run, as a pytree."""
        return self.engine.params

    @property
    def engine_config(self) -> EngineConfig:
        return self.engine.engine_config

    def memory_plan(self) -> memory.MemoryPlan:
        """What weights, cache and workspace take on the device."""
        return memory.memory_plan(self.config, self.engine_config)

    # -- generation ------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        use_tqdm: bool | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> RequestOutputs:
        """Complete prompts: strings, lists of token ids or dicts with `prompt` or `prompt_token_ids`; outputs in their order.

        The draws depend on (key, index of the prompt, index of the sample, position) alone. Without a key each call takes the next one
        of the LLM's seed. An interrupt aborts the call's requests and leaves the engine usable.

        `sampling_params` are one for all prompts or one each; `request_ids`, one each, are what `abort` takes. Raises ValueError or
        TypeError, naming the prompt and what is allowed, before anything is computed; what goes wrong later ends its own request with
        finish reason "error".
        """
        return self._complete(self._requests(prompts_of(prompts), sampling_params, key, request_ids), use_tqdm)

    def extend(
        self,
        outputs: Sequence[RequestOutput],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> RequestOutputs:
        """Go on where samples stopped that came to their end by "length" or "abort", under the weights that run now: partial rollouts.

        The outputs hold all tokens from the first on, and `weight_versions` says which weights drew which. `sampling_params` are those of
        the whole samples (`max_tokens` counts from the prompt), by default their own. Where the weights are the same, so are the bits.
        """
        self.runner.check_process()
        going_on = lambda output: extended(
            self._new_id(), output, sampling_params, self.config, self.engine_config, self.tokenizer
        )
        return self._complete([*map(going_on, outputs)], use_tqdm)

    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, *, key: Any = None
    ) -> Iterator[RequestOutput]:
        """The output of one prompt again and again as it grows; the last one is finished. Closing the iterator aborts the request."""
        prompts = prompts_of(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}: stream each of them, or use generate")
        (request,) = self._requests(prompts, sampling_params, key, None)
        output = None
        for _ in self._run([request], streaming=True):
            with self.runner.alone():  # no other thread's step may add a token to what is being read
                output = self._output(request)
            yield output
        if output is None or not output.finished:  # another call's step brought the end
            yield self._output(request)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutputs:
        """Complete a conversation (a list of messages) or several, with the model's chat template in a sandbox; else as `generate`.

        Raises ValueError where the model has no tokenizer or no template, and where the template refuses the messages or fails.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so there is no chat: give LLM one as tokenizer=, or token ids to generate"
            )
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        ids = [
            self.tokenizer.encode_chat(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(
            [{"prompt_token_ids": tokens} for tokens in ids], sampling_params, key=key, use_tqdm=use_tqdm
        )

    def abort(self, request_id: str) -> None:
        """End a request from another thread; its tokens so far are returned with finish reason "abort". Idempotent.

        A signal handler may call it: where the engine is at work, the request ends with the step that runs.
        """
        request = self.engine.requests.get(request_id)
        if request is not None:
            self.runner.leave([request])

    # -- weights ---------------------------------------------------------------------------------------------------------------

    def update_params(
        self, params: Decoder, *, in_flight: str = "recompute", version: int | None = None, cast: bool = False
    ) -> int:
        """Run other weights from the next token on; returns their version, which every token of theirs carries.

        All or nothing: where leaves are missing, misnamed, of another shape or dtype or not finite, ValueError lists them and the old
        weights stay. Nothing is compiled anew, and leaves are copied only where they do not lie on the device yet. With `cast`, floating
        leaves are rounded to the declared dtype; score such a policy by `llm.params`, whose bits are those that run.

        Requests in flight: "recompute" (their keys and values are rebuilt under the new weights before the next token), "keep" (those that
        decode keep what is in the cache, so what follows depends on both versions, and on whether it was preempted), "drain" (the update
        waits until they have ended). `version` is by default the next integer; a resumed run gives its own, higher than the current one.
        """
        if in_flight not in IN_FLIGHT:
            raise ValueError(f"in_flight must be one of {', '.join(map(repr, IN_FLIGHT))}, got {in_flight!r}")
        self.runner.check_process()
        params = prepared(params, self.config, self.params, cast=cast)
        with self.runner.alone():
            current = self.engine.weights.version
            if version is not None and version <= current:
                raise ValueError(f"version must be higher than the current one, {current}, got {version}")
            if in_flight == "drain":
                self._drain()
            self.engine.update_params(params, current + 1 if version is None else version, keep=in_flight == "keep")
        return self.engine.weights.version

    @property
    def weights_version(self) -> int:
        """Version of the weights that run: 0 at first, raised by `update_params`."""
        return self.engine.weights.version

    def pause(self) -> None:
        """No step begins until `resume`: requests, their own threads included, wait where they are. Idempotent."""
        self.runner.pause()

    def resume(self) -> None:
        """Go on behind a `pause`. Idempotent."""
        self.runner.resume()

    @property
    def is_paused(self) -> bool:
        return self.runner.is_paused

    def _drain(self) -> None:
        if self.is_paused and self.engine.has_work:
            raise RuntimeError(
                'in_flight="drain" waits for requests, and the LLM is paused: call resume() first, or recompute or keep'
            )
        while self.engine.has_work:
            self.engine.step()

    # -- the contract ----------------------------------------------------------------------------------------------------------

    def score(
        self,
        tokens: Any,
        mask: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        entropy: bool = False,
    ) -> Any:
        """float32 logprobs `[B, T]` of the tokens under `mask`: `jaxengine.score` under this LLM's weights, as a numpy array.

        Rows go through in batches of bounded size. Where the wide tile does not hold on this machine the base tile is used: the bits are
        those of `generate` in any case.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        check_scored(tokens, mask, self.config)
        slots = scoring.sampling_arrays_of(sampling_of(sampling_params, tokens.shape[0]), self.config)
        with self.runner.alone():
            assert self.params is not None
            tile = self.engine.proven(trunk.WIDE)
            logprobs, entropies = scoring.in_batches(
                self.params,
                tokens,
                mask,
                slots,
                model_config=self.config,
                kernels=self.engine.kernels,
                entropy=entropy,
                tile=tile,
            )
        return (logprobs, entropies) if entropy else logprobs

    def replay(self, coordinate: Coordinate) -> Comparison:
        """Draw one sample again, alone, and compare every bit; the result's `holds` says whether it matched.

        Raises ValueError, naming what differs, for the coordinate of another contract: other versions, device, model or weights.
        A sample that several versions of the weights drew has such a one.
        """
        self.runner.check_process()
        if not coordinate.token_ids:
            raise ValueError("this coordinate's sample ended before its first token: there is nothing to draw again")
        differences = coordinate.contract.differences(self.contract())
        if differences:
            raise ValueError(
                "this coordinate belongs to another contract, its bits cannot be expected here: "
                + "; ".join(differences)
            )
        request = replayed(self._new_id(), coordinate, self.config, self.engine_config)
        for _ in self.runner.run([request]):
            pass
        drawn = self._output(request).outputs[0]
        return compare(
            "drawn again",
            [(coordinate.token_ids, coordinate.token_logprobs)],
            [(drawn.token_ids, drawn.token_logprobs)],
        )

    def verify(self, *, quick: bool = False, samples: int | None = None, seed: int = 0) -> Verification:
        """Run the contract on this machine with this model (verify.py); shows a table in a notebook, and is True where every axis held."""
        return verify(self, quick=quick, samples=samples, seed=seed, report=self.progress.line)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _requests(self, prompts: list[Any], params: Any, key: Any, request_ids: Sequence[str] | None) -> list[Request]:
        self.runner.check_process()
        if request_ids is not None and len(request_ids) != len(prompts):
            raise ValueError(f"{len(request_ids)} request_ids for {len(prompts)} prompts: give one each")
        for index, request_id in enumerate(request_ids or ()):
            if not isinstance(request_id, str):
                raise ValueError(f"request_ids[{index}] must be a string, got {request_id!r:.80}")
        each = sampling_of(params, len(prompts))
        if not prompts:
            return []
        data = (0, 0) if key is None else key_data(key)
        ids = request_ids if request_ids is not None else [self._new_id() for _ in prompts]
        requests = [
            make_request(request_id, prompt, index, item, data, self.config, self.engine_config, self.tokenizer)
            for index, (request_id, prompt, item) in enumerate(zip(ids, prompts, each, strict=True))
        ]
        if key is None:  # a call that was refused takes no number
            data = key_data(jax.random.fold_in(self._key, next(self._calls)))
            for request in requests:
                request.key = data if request.prompt_index >= 0 else request.key
        return requests

    def _new_id(self) -> str:
        """The next number that no caller took as an id of its own."""
        return next(name for name in map(str, self._ids) if name not in self.engine.requests)

    def _complete(self, requests: list[Request], use_tqdm: bool | None) -> RequestOutputs:
        """Queue requests, run them to their ends and render them."""
        show = self.progress.enabled if use_tqdm is None else use_tqdm
        with Progress(show).bar(len(requests), "generating", "prompt") as bar:
            shown = 0.0
            for _ in self._run(requests):
                if show and time.monotonic() > shown + bar.mininterval:  # not with every step: requests may be many
                    bar.update(sum(map(ended, requests)) - bar.n)
                    shown = time.monotonic()
            bar.update(len(requests) - bar.n)
        return RequestOutputs(self._output(request) for request in requests)

    def _run(self, requests: list[Request], streaming: bool = False) -> Iterator[None]:
        """Queue requests and step until they have ended; the contract is written down before the weights can change."""

        def prepare() -> None:
            check_alive(self.params)
            self.contract()
            for sample in requests[0].samples if streaming and self.tokenizer is not None else ():
                sample.detokenizer = sample.detokenizer or self._detokenizer(sample)

        return self.runner.run(requests, prepare)

    def _detokenizer(self, sample: Sample) -> Detokenizer:
        assert self.tokenizer is not None
        params = sample.request.sampling
        detokenizer = Detokenizer(
            self.tokenizer,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        detokenizer.push(text_ids(sample))
        return detokenizer

    def _output(self, request: Request) -> RequestOutput:
        """The request as it stands, under the contract of the weights that drew its newest token."""
        versions = [sample.token_versions[-1] for sample in request.samples if sample.token_versions]
        known = self._contracts.get(max(versions)) if versions else None
        return render(request, self.tokenizer, known or self.contract())

    def contract(self) -> Contract:
        """What has to be equal for bits to be equal (contract.py), of the weights that run."""
        weights = self.engine.weights
        if weights.version not in self._contracts:
            assert weights.params is not None
            self._contracts[weights.version] = contract(
                self.config, self.engine.kernels, weights.params, weights.version
            )
            for old in sorted(self._contracts)[:-CONTRACTS_KEPT]:
                del self._contracts[old]
        return self._contracts[weights.version]

    def warm_up(self) -> None:
        """Compile every step of the engine now: none is compiled afterwards. `score` compiles for each shape at its first use."""
        with self.runner.alone(), memory.explained(self.config, self.engine_config, "compiling"):
            self.engine.warm_up()

    def forget(self) -> None:
        """Let go of the weights and of all that depends on them: requests, cached prefixes and contracts."""
        self.engine.forget()
        self._contracts.clear()

    def __reduce__(self) -> Any:
        raise TypeError(
            "an LLM holds device memory and cannot be pickled or copied: build it anew from its model in each process"
        )


def resolve_engine_config(model: ModelConfig, given: dict[str, Any], params: Decoder | None = None) -> EngineConfig:
    """EngineConfig from keywords; None means the default. The pool is sized from memory, where `params` may be already, unless num_pages
    is given."""
    given = {name: value for name, value in given.items() if value is not None}
    on_cpu = jax.devices()[0].platform == "cpu"
    given.setdefault("max_model_len", model.max_position_embeddings)
    given.setdefault("max_num_batched_tokens", CPU_TOKENS if on_cpu else DEVICE_TOKENS)
    given["kernels"] = choose_kernels(given.get("kernels", "auto"), model).name
    config = EngineConfig(**given)
    if config.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the model's max_position_embeddings="
            f"{model.max_position_embeddings}"
        )
    if "num_pages" not in given:
        config = memory.sized_pool(model, config, params)
    memory.check_fits(model, config)
    return config


def _load_tokenizer(given: Any, folder: Any) -> Tokenizer | None:
    """The tokenizer asked for, else the model folder's; None where the folder has none (token ids work without)."""
    if given is not None:
        return Tokenizer.load(find_folder(given, "tokenizer"))
    return Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
