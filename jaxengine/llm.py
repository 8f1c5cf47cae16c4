"""LLM: a model, its tokenizer and an engine behind the names that vLLM's users know."""
import collections
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from checkpoints.model_folder import resolve
from jaxengine import memory
from jaxengine.admission import check_scored, key_data, make_request, params_of, prompts_of, replayed
from jaxengine.compare import Comparison, compare
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.contract import contract
from jaxengine.coordinate import Contract, Coordinate
from jaxengine.detokenizer import Detokenizer
from jaxengine.engine import Engine
from jaxengine.keywords import check_keywords
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput, RequestOutputs
from jaxengine.progress import Progress
from jaxengine.render import render
from jaxengine.request import SamplingParams
from jaxengine.rl import forward, scoring
from jaxengine.sequence import Request, Status
from jaxengine.sequence import Sequence as Sample
from jaxengine.tokenizer import Tokenizer
from jaxengine.verification import Verification
from jaxengine.verify import verify

CPU_TOKENS, DEVICE_TOKENS = 512, 8192  # default budget of a step
ENGINE_KEYWORDS = tuple(field.name for field in dataclasses.fields(EngineConfig))
OWN_KEYWORDS = ("model", "dtype", "tokenizer", "seed", "reduction_leaves", "tensor_parallel_size", "data_parallel_size", "mesh", "progress")


class LLM:
    """An engine for one model.

    `model` is the name of the model that ships ("calc"), a folder in Hugging Face format or a hub id. `dtype` is "auto" (the file's),
    "float32", "bfloat16" or "float16". `num_pages` is sized from memory unless given. `seed` is the key of calls that bring none.
    Further keywords are EngineConfig's: they change room and speed, never a bit.

        llm = LLM("calc")
        outputs = llm.generate(["12+30=", "7*8="], SamplingParams(n=8, max_tokens=16), key=jax.random.key(0))
    """

    def __init__(self, model: str | os.PathLike[str], *, dtype: str = "auto", tokenizer: str | os.PathLike[str] | None = None,
                 seed: int = 0, reduction_leaves: int = 1, tensor_parallel_size: int = 1, data_parallel_size: int = 1,
                 mesh: Any = None, progress: bool = True, **engine: Any) -> None:
        check_keywords("LLM", engine, (*OWN_KEYWORDS, *ENGINE_KEYWORDS))
        if tensor_parallel_size != 1 or data_parallel_size != 1 or mesh is not None:
            raise NotImplementedError("this version runs on one device: leave tensor_parallel_size and data_parallel_size at 1")
        folder = resolve(model)
        self.progress = Progress(progress)
        config = loading.read_model_config(folder, dtype=dtype, reduction_leaves=reduction_leaves)
        config_of_engine = resolve_engine_config(config, engine)
        with memory.explained(config, config_of_engine, "loading the weights"):
            params = jax.block_until_ready(loading.load(folder, config, self.progress.counter("loading weights", "tensors")))
        self._start(config, config_of_engine, params, _load_tokenizer(tokenizer, folder), seed)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Decoder | None, *, tokenizer: Tokenizer | None = None, seed: int = 0,
                    progress: bool = False, **engine: Any) -> "LLM":
        """An LLM over parameters that are already in memory; they are used as they are, not copied. None: they are set before each call."""
        check_keywords("LLM.from_params", engine, ("config", "params", "tokenizer", "seed", "progress", *ENGINE_KEYWORDS))
        self = cls.__new__(cls)
        self.progress = Progress(progress)
        self._start(config, resolve_engine_config(config, engine), params, tokenizer, seed)
        return self

    def _start(self, config: ModelConfig, engine: EngineConfig, params: Decoder | None, tokenizer: Tokenizer | None, seed: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        with memory.explained(config, engine, "making room for the cache"):
            self.engine = Engine(config, engine, params, make_detokenizer=self._detokenizer, report=self.progress.line)
            jax.block_until_ready(self.engine.cache)
        self._key = jax.random.key(seed)
        self._calls, self._ids = itertools.count(), itertools.count()
        self._process = os.getpid()
        self._lock = threading.Lock()  # one step at a time; other threads' requests ride along in it
        self._left: collections.deque[Request] = collections.deque()  # aborted, but the engine was at work: see _leave
        self._contracts: dict[int, Contract] = {}

    @property
    def params(self) -> Decoder | None:
        """The parameters that run, as a pytree."""
        return self.engine.params

    @property
    def engine_config(self) -> EngineConfig:
        return self.engine.config

    def memory_plan(self) -> memory.MemoryPlan:
        """What weights, cache and workspace take on the device."""
        return memory.memory_plan(self.config, self.engine_config)

    # -- generation ------------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, key: Any = None,
                 use_tqdm: bool | None = None, request_ids: Sequence[str] | None = None) -> RequestOutputs:
        """Complete prompts: strings, lists of token ids or dicts with `prompt` or `prompt_token_ids`; outputs in their order.

        The draws depend on (key, index of the prompt, index of the sample, position) alone. Without a key each call takes the next one
        of the LLM's seed. An interrupt aborts the call's requests and leaves the engine usable.
        """
        requests = self._requests(prompts_of(prompts), sampling_params, key, request_ids)  # they are queued in _run, which ends them too
        show = self.progress.enabled if use_tqdm is None else use_tqdm
        with Progress(show).bar(len(requests), "generating", "prompt") as bar:
            for _ in self._run(requests):
                bar.update(sum(_ended(r) for r in requests) - bar.n)
        return RequestOutputs(self._output(request) for request in requests)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None, *, key: Any = None) -> Iterator[RequestOutput]:
        """The output of one prompt again and again as it grows; the last one is finished. Closing the iterator aborts the request."""
        prompts = prompts_of(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}: stream each of them, or use generate")
        (request,) = self._requests(prompts, sampling_params, key, None)
        output = None
        for _ in self._run([request], streaming=True):
            with self._lock:  # no other thread's step may add a token to what is being read
                output = self._output(request)
            self._sweep()
            yield output
        if output is None or not output.finished:  # another call's step brought the end
            yield self._output(request)

    def chat(self, messages: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, key: Any = None,
             use_tqdm: bool | None = None, chat_template: str | None = None, add_generation_prompt: bool = True,
             tools: list[dict[str, Any]] | None = None, chat_template_kwargs: dict[str, Any] | None = None) -> RequestOutputs:
        """Complete a conversation (a list of messages) or several, with the model's chat template in a sandbox."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer, so there is no chat: give token ids to generate")
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        ids = [self.tokenizer.encode_chat(conversation, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                                          tools=tools, template_kwargs=chat_template_kwargs) for conversation in conversations]
        return self.generate([{"prompt_token_ids": tokens} for tokens in ids], sampling_params, key=key, use_tqdm=use_tqdm)

    def abort(self, request_id: str) -> None:
        """End a request from another thread; its tokens so far are returned with finish reason "abort". Idempotent.

        A signal handler may call it: where the engine is at work, the request ends with the step that runs.
        """
        request = self.engine.requests.get(request_id)
        if request is not None:
            self._leave([request])

    # -- the contract ----------------------------------------------------------------------------------------------------------

    def score(self, tokens: Any, mask: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
              entropy: bool = False) -> Any:
        """float32 logprobs `[B, T]` of the tokens under `mask`: `jaxengine.score` under this LLM's weights, as a numpy array.

        Rows go through in batches of bounded size. Where the wide tile does not hold on this machine the base tile is used: the bits are
        those of `generate` in any case.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        check_scored(tokens, mask, self.config)
        slots = scoring.slot_params(params_of(sampling_params, tokens.shape[0]), self.config)
        with self._lock:
            assert self.params is not None
            tile = self.engine.proven(forward.WIDE)
            logprobs, entropies = scoring.in_batches(self.params, tokens, mask, slots, config=self.config, entropy=entropy, tile=tile)
        self._sweep()
        return (logprobs, entropies) if entropy else logprobs

    def replay(self, coordinate: Coordinate) -> Comparison:
        """Draw one sample again, alone, and compare every bit; the result's `holds` says whether it matched.

        Raises ValueError, naming what differs, for the coordinate of another contract: other versions, device, model or weights.
        """
        differences = coordinate.contract.differences(self.contract())
        if differences:
            raise ValueError("this coordinate belongs to another contract, its bits cannot be expected here: " + "; ".join(differences))
        request = replayed(self._new_id(), coordinate, self.config, self.engine_config)
        for _ in self._run([request]):
            pass
        drawn = self._output(request).outputs[0]
        return compare("drawn again", [(coordinate.token_ids, coordinate.token_logprobs)], [(drawn.token_ids, drawn.token_logprobs)])

    def verify(self, *, quick: bool = False, samples: int | None = None, seed: int = 0) -> Verification:
        """Run the contract on this machine with this model (verify.py); shows a table in a notebook, and is True where every axis held."""
        return verify(self, quick=quick, samples=samples, seed=seed, report=self.progress.line)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _requests(self, prompts: list[Any], params: Any, key: Any, request_ids: Sequence[str] | None) -> list[Request]:
        if os.getpid() != self._process:
            raise RuntimeError(f"this LLM belongs to process {self._process}, of which this one is a fork: its device does not live on "
                               "here. Build an LLM in each process, and start processes with multiprocessing's 'spawn'")
        if request_ids is not None and len(request_ids) != len(prompts):
            raise ValueError(f"{len(request_ids)} request_ids for {len(prompts)} prompts: give one each")
        each = params_of(params, len(prompts))
        if not prompts:
            return []
        data = key_data(jax.random.fold_in(self._key, next(self._calls)) if key is None else key)
        ids = request_ids if request_ids is not None else [self._new_id() for _ in prompts]
        return [make_request(request_id, prompt, index, item, data, self.config, self.engine_config, self.tokenizer)
                for index, (request_id, prompt, item) in enumerate(zip(ids, prompts, each, strict=True))]

    def _new_id(self) -> str:
        """The next number that no caller took as an id of its own."""
        return next(name for name in map(str, self._ids) if name not in self.engine.requests)

    def _add(self, requests: list[Request], streaming: bool = False) -> None:
        with self._lock:
            self._end_left()  # their ids are free again
            for request in requests:
                self.engine.add(request)
            if streaming and self.tokenizer is not None:
                for sample in requests[0].samples:
                    sample.detokenizer = sample.detokenizer or self._detokenizer(sample)

    def _run(self, requests: list[Request], streaming: bool = False) -> Iterator[None]:
        """Queue a call's requests, all or none, and step until they have ended. Several threads may: who holds the lock steps for all."""
        try:
            self._add(requests, streaming)
            while not all(_ended(request) for request in requests):
                with self._lock:
                    if not all(_ended(request) for request in requests):
                        self.engine.step()
                self._sweep()
                yield
        finally:
            self._leave(requests)

    def _leave(self, requests: list[Request]) -> None:
        """Abort those that the engine still has; where it is at work, whoever works with it does so afterwards.

        Waiting for it could be for ever: a stream may be collected as garbage, or a signal be handled, amid this very thread's step.
        """
        self._left.extend(request for request in requests if self.engine.requests.get(request.request_id) is request)
        self._sweep()

    def _sweep(self) -> None:
        """To be called behind each use of the lock: somebody may have left in the meantime."""
        while self._left and not self._lock.locked():
            with self._lock:
                self._end_left()

    def _end_left(self) -> None:
        while self._left:
            request = self._left[0]
            if self.engine.requests.get(request.request_id) is request:  # else it ended meanwhile, and its id may be another's
                self.engine.abort(request.request_id)
            self._left.popleft()

    def _detokenizer(self, sample: Sample) -> Detokenizer:
        assert self.tokenizer is not None
        params = sample.request.params
        return Detokenizer(self.tokenizer, stop=params.stop, include_stop_str_in_output=params.include_stop_str_in_output,
                           skip_special_tokens=params.skip_special_tokens, min_tokens=params.min_tokens)

    def _output(self, request: Request) -> RequestOutput:
        return render(request, self.tokenizer, self.contract())

    def contract(self) -> Contract:
        """What has to be equal for bits to be equal (contract.py), of the weights that run."""
        version = self.engine.scheduler.version
        if version not in self._contracts:
            assert self.params is not None
            self._contracts[version] = contract(self.config, self.params, version)
        return self._contracts[version]

    def warm_up(self) -> None:
        """Compile every step now: nothing is compiled afterwards."""
        with self._lock, memory.explained(self.config, self.engine_config, "compiling"):
            self.engine.warm_up()
        self._sweep()

    def forget(self) -> None:
        """Let go of the weights and of all that depends on them: cached prefixes and contracts."""
        self.engine.params = None
        self.engine.scheduler.blocks.clear_cache()
        self._contracts.clear()

    def __reduce__(self) -> Any:
        raise TypeError("an LLM holds device memory and cannot be pickled or copied: build it anew from its model in each process")


def resolve_engine_config(model: ModelConfig, given: dict[str, Any]) -> EngineConfig:
    """EngineConfig from keywords; None means the default. The pool is sized from memory unless num_pages is given."""
    given = {name: value for name, value in given.items() if value is not None}
    on_cpu = jax.devices()[0].platform == "cpu"
    length = given.setdefault("max_model_len", model.max_position_embeddings)
    if length > model.max_position_embeddings:
        raise ValueError(f"max_model_len={length} is more than the model's max_position_embeddings={model.max_position_embeddings}")
    given.setdefault("max_num_batched_tokens", CPU_TOKENS if on_cpu else DEVICE_TOKENS)
    config = EngineConfig(**given) if "num_pages" in given else memory.sized_pool(model, EngineConfig(**given))
    memory.check_fits(model, config)
    return config


def _load_tokenizer(given: Any, folder: Any) -> Tokenizer | None:
    """The tokenizer asked for, else the model folder's; None where the folder has none (token ids work without)."""
    if given is not None:
        return Tokenizer.load(resolve(given))
    has_one = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return Tokenizer.load(folder) if has_one else None


def _ended(request: Request) -> bool:
    return all(sample.status is Status.FINISHED for sample in request.samples)
