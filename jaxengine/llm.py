"""LLM: a model, its tokenizer and an engine, under the names that vLLM's users know."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from checkpoints.model_folder import find_folder
from jaxengine.base.absent_methods import explains_absent_methods
from jaxengine.base.arguments import check_keywords
from jaxengine.base.keys import CallKeys, key_data, seeded
from jaxengine.base.progress import Progress
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.contract.compare import Comparison, compare
from jaxengine.contract.report import Verification
from jaxengine.contract.verify import verify
from jaxengine.coordinate import Contract, Coordinate
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.engine import idle_pools, memory
from jaxengine.engine.engine import Engine
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.session import Session
from jaxengine.engine.settings import ENGINE_KEYWORDS, profile_line, resolve_engine_config, sharing_devices
from jaxengine.engine.weights import check_alive
from jaxengine.host.admission import sampling_of
from jaxengine.host.prompts import Refused, conversations_of, prompts_of
from jaxengine.host.sample import Request
from jaxengine.models import loading
from jaxengine.models.generation_config import log_defaults_not_taken, sampling_defaults
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.outputs import RequestOutput, RequestOutputs
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

OWN_KEYWORDS = (
    "model", "dtype", "tokenizer", "seed", "reduction_leaves", "progress", "revision", "hf_overrides",
)  # fmt: skip


@explains_absent_methods
class LLM:
    """An engine for one model. Every method may be called from any thread.

    Those that compute or change it take turns under one lock, a step at a time: `generate`, `chat`, `extend`, `stream`
    and `replay` (whose requests run together), `score`, `update_params`, `warm_up`, `pause`, `sleep`, `wake_up` and
    `close`. `verify` has the LLM to itself from its first check to its last. `contract` has a lock of its own, and
    `abort` and `resume` wait for nothing.

    `model` is the name of the model that ships ("calc"), a folder in Hugging Face format or a hub id, `revision` the
    branch, tag or commit of a hub id. `dtype` is "auto" (the file's), "float32", "bfloat16" or "float16", or numpy's or
    JAX's own. `tokenizer` is another folder's. `hf_overrides` is a dict of what counts in the place of config.json's
    values, merged key by key: `{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}` stretches the context.
    Where config.json and the weights' file disagree (tied head, dtype), the file counts and a warning says so.
    `reduction_leaves` is the number of parts that every long sum is cut into, and so the most devices that can ever
    share the model; it is in the bits. None is the most that its key-value heads allow, up to 8, or one for each device
    that shares it, where they are more: each head is then held by several leaves. `num_pages` is sized from memory
    unless given. `seed` is the key of calls that bring none. `progress` shows loading, compiling and tokens on stderr.
    `profile` is "rl" or "serving", a line of defaults for EngineConfig (engine/settings.py), which is shown. Further
    keywords are EngineConfig's: they change room and speed, never a bit except for `kernels`.

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
        reduction_leaves: int | None = None,
        progress: bool = True,
        revision: str | None = None,
        hf_overrides: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        check_keywords("LLM", engine, (*OWN_KEYWORDS, *ENGINE_KEYWORDS))
        key, folder, shown = seeded(seed), find_folder(model, revision=revision), Progress(progress)
        self._folder, self._tokenizer_folder = folder, _tokenizer_folder(tokenizer, folder)
        text = None if self._tokenizer_folder is None else Tokenizer.load(self._tokenizer_folder)
        config = loading.read_model_config(
            folder,
            dtype=dtype,
            reduction_leaves=reduction_leaves,
            devices=sharing_devices(engine),
            hf_overrides=hf_overrides,
            tokenizer=text,
        )
        engine_config = idle_pools.with_room(lambda: resolve_engine_config(config, engine))
        if engine.get("profile") is not None:
            shown.line(profile_line(engine["profile"], engine_config))

        def load() -> Decoder:
            with memory.explained(config, engine_config, "loading the weights"):
                counter = shown.counter("loading weights", "tensors")
                kernels = choose_kernels(engine_config.kernels, config, engine_config.mesh)
                return jax.block_until_ready(loading.load(folder, config, counter, kernels.split))

        self._start(config, engine_config, idle_pools.with_room(load), text, key, shown)

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        params: Decoder,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        progress: bool = False,
        **engine: Any,
    ) -> "LLM":
        """An LLM over parameters that are already in memory; they are used as they are, not copied.

        Samples end with `config.eos_token_ids`; a tokenizer adds none here.
        """
        own = ("config", "params", "tokenizer", "seed", "progress")
        check_keywords("LLM.from_params", engine, (*own, *ENGINE_KEYWORDS))
        self = cls.__new__(cls)
        self._folder = self._tokenizer_folder = None
        engine_config = idle_pools.with_room(lambda: resolve_engine_config(config, engine, params))
        self._start(config, engine_config, params, tokenizer, seeded(seed), Progress(progress))
        return self

    def _start(
        self,
        config: ModelConfig,
        engine_config: EngineConfig,
        params: Decoder,
        tokenizer: Tokenizer | None,
        key: jax.Array,
        progress: Progress,
    ) -> None:
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.session = Session(config, engine_config, params, tokenizer, progress.line, CallKeys(key))
        self._untold = self._folder  # whose sampling defaults nobody was told of

    @property
    def engine(self) -> Engine | Replicas:
        """The loop under this LLM, or those of its replicas.

        It does not lock: use it from one thread, while no call is under way.
        """
        return self.session.engine

    @property
    def params(self) -> Decoder | None:
        """The parameters that run, as a pytree."""
        return self.session.params

    @property
    def engine_config(self) -> EngineConfig:
        return self.session.engine_config

    def get_default_sampling_params(self) -> SamplingParams:
        """What the folder's generation_config.json recommends (models/generation_config.py).

        Unlike in vLLM, `generate` without sampling_params does not take it: it draws with SamplingParams(), from the
        model's own distribution, and nothing in a folder changes what a policy is scored under. Pass it on purpose; the
        first call that leaves it open is told in a warning.
        Raises ValueError naming the file for a value that SamplingParams refuses.
        """
        return SamplingParams() if self._folder is None else sampling_defaults(self._folder)

    def memory_plan(self) -> memory.MemoryPlan:
        """What weights, cache and workspace take on the device."""
        return memory.memory_plan(self.config, self.engine_config)

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        use_tqdm: bool | None = None,
        request_ids: Sequence[str] | None = None,
        priority: int | Sequence[int] = 0,
        on_error: str = "refuse",
    ) -> RequestOutputs:
        """Complete prompts.

        Strings, lists of token ids, or dicts with `prompt` (and `add_special_tokens`, `allow_special_tokens`) or
        `prompt_token_ids`; outputs in their order.

        The draws depend on (key, index of the prompt, index of the sample, position) alone. Without a key each call
        takes the next one of the LLM's seed. An interrupt aborts the call's requests and leaves the engine usable.

        `sampling_params` are one for all prompts or one each; `request_ids`, one each, are what `abort` takes. Of
        requests that wait for room those of the lowest `priority`, one for all or one each, come first, of equal ones
        the first that came; those of the highest are the first to be preempted. No bit depends on it. Raises
        ValueError or TypeError, naming the prompt and what is allowed, before anything is computed; what goes wrong
        later ends its own request with finish reason "error". With `on_error="return"` a prompt that is wrong does so
        too: its samples have no tokens, their `stop_reason` is the message, and the others draw what they always draw.
        """
        requests = self.admitted(prompts_of(prompts), sampling_params, key, request_ids, on_error, priority)
        return self._complete(requests, use_tqdm)

    def extend(
        self,
        outputs: Sequence[RequestOutput],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> RequestOutputs:
        """Go on where samples ended by "length" or "abort", under the weights that run now: partial rollouts.

        The outputs hold all tokens from the first on, and `weight_versions` says which weights drew which.
        `sampling_params` are those of the whole samples (`max_tokens` counts from the prompt), by default their own.
        Where the weights are the same, so are the bits.
        """
        session = self.session
        session.runner.check_usable()
        admit = session.admission.extended
        return self._complete([admit("", output, sampling_params) for output in outputs], use_tqdm)

    def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        key: Any = None,
        cumulative: bool = False,
        priority: int = 0,
    ) -> Iterator[Any]:
        """What one prompt's samples gained, after each step: RequestDelta, the last one with the whole RequestOutput.

            for delta in llm.stream("12+30="):
                print(delta.outputs[0].text, end="")

        A delta costs what is new in it. With `cumulative` whole RequestOutputs are yielded, which grow, and cost what
        is in them. `priority` is as for `generate`. Closing the iterator aborts the request.
        """
        prompts = prompts_of(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}: stream each of them, or use generate")
        (request,) = self.admitted(prompts, sampling_params, key, None, priority=priority)
        yield from self.session.growing(request) if cumulative else self.session.stream(request)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        on_error: str = "refuse",
    ) -> RequestOutputs:
        """Complete a conversation (a list of messages) or several, with the model's chat template in a sandbox.

        Else as `generate`. The outputs' `prompt` is the text that the template made, control tokens by name. The
        assistant's turn is begun, unless `add_generation_prompt` is False; with `continue_final_message` the model goes
        on with the last message instead.

        Raises ValueError where the model has no tokenizer or no template, and where the template refuses the messages
        or fails.
        """
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts = [self.chat_prompt(each, options, on_error) for each in conversations_of(messages)]
        return self._complete(self.admitted(prompts, sampling_params, key, None, on_error), use_tqdm)

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, as `LLM.tokenizer`; None where it has none."""
        return self.tokenizer

    def abort(self, request_id: str) -> None:
        """End a request from another thread; its tokens so far are returned with finish reason "abort". Idempotent.

        A signal handler may call it: while the engine is at work, the request ends with the step that runs.
        """
        self.session.abort(request_id)

    # -- weights ------------------------------------------------------------------------------------------------------

    def update_params(
        self, params: Any, *, in_flight: str = "recompute", version: int | None = None, cast: bool = False
    ) -> int:
        """Run other weights from the next token on; returns their version, which every token of theirs carries.

        A token that a step is drawing (`overlap`) is the old weights', and says so.

        `params` are a pytree as `llm.params` is, or weights under Hugging Face's names: a folder's path, a dict from
        names to arrays (numpy's, JAX's, PyTorch's), or pairs of them in any order (models/named_weights.py).

        All or nothing: where leaves are missing, misnamed, of another shape or dtype or not finite, ValueError lists
        them and the old weights stay. Nothing is compiled again, and leaves are copied only where they do not lie on
        the device yet. With `cast`, floating leaves are rounded to the declared dtype; score such a policy by
        `llm.params`, whose bits are those that run.

        Requests in flight: "recompute" (their keys and values are rebuilt under the new weights before the next token),
        "keep" (those that decode keep what is in the cache, so what follows depends on both versions, and on whether it
        was preempted), "drain" (the update waits until they have ended). `version` is by default the next integer; a
        resumed run gives its own, higher than the current one.
        """
        return self.session.update_params(params, in_flight=in_flight, version=version, cast=cast)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights that run as a folder in Hugging Face format, which LLM, transformers and vLLM open.

        safetensors of at most 5 GB each, config.json, and the tokenizer and generation_config.json of the folder that
        this LLM was built from; `from_params` knows none. Raises FileExistsError where the folder holds tensors,
        ValueError where copies of a key-value head differ (config.py), RuntimeError where the weights were donated or
        are not here (`sleep(2)`, `close`).
        """
        self.session.runner.check_usable()
        params = self.params
        check_alive(params)
        assert params is not None
        loading.save(folder, self.config, params, tokenizer_from=self._tokenizer_folder, generation_from=self._folder)

    @property
    def weights_version(self) -> int:
        """Version of the weights that run: 0 at first, raised by `update_params`."""
        return self.engine.weights.version

    def pause(self) -> None:
        """No step begins until `resume`: requests, their own threads included, wait where they are. Idempotent."""
        self.session.runner.pause()

    def resume(self) -> None:
        """Go on after a `pause`. Idempotent."""
        self.session.runner.resume()

    @property
    def is_paused(self) -> bool:
        return self.session.runner.is_paused

    # -- memory -------------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give device memory back until `wake_up`: the pool of pages, and the weights.

        Level 1 keeps the weights in the host's memory; level 2 drops them, and `update_params` has to bring others (or
        the same again) before the LLM wakes up. On a CPU the host's memory is where they lie already. Weights that
        something else refers to, a trainer for one, stay where they are for it.

        Requests that are under way wait; they lose no token, and no bit changes. New ones are refused. Idempotent.
        """
        self.session.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take back what `sleep` gave: all, or of ["weights", "kv_cache"] what is named.

        A loop that syncs weights wakes the weights, calls `update_params` and wakes the cache, so that the pool is
        made last. Raises RuntimeError for the cache where the weights are not there, MemoryError where there is no
        room. Idempotent.
        """
        self.session.wake_up(tags)

    @property
    def is_sleeping(self) -> bool:
        return self.session.runner.is_asleep

    def close(self) -> None:
        """End every request (finish reason "abort") and give back all device memory for good. Idempotent.

        `with LLM(...) as llm:` does it at the end. Without it the memory is given back when nothing refers to the LLM
        any more. Raises RuntimeError at whatever is asked of the LLM afterwards.
        """
        self.session.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the contract -------------------------------------------------------------------------------------------------

    def score(
        self,
        tokens: Any,
        mask: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        entropy: bool = False,
        sampling_mask: SamplingMask | None = None,
    ) -> Any:
        """float32 logprobs `[B, T]` of the tokens under `mask`.

        `jaxengine.score` under this LLM's weights, as a numpy array.

        Rows go through in batches of bounded size. Where the wide tile does not hold on this machine the base tile is
        used: the bits are those of `generate` in any case.
        """
        how: dict[str, Any] = dict(entropy=entropy, sampling_mask=sampling_mask)
        logprobs, entropies = self.session.score(tokens, mask, sampling_params, **how)
        return (logprobs, entropies) if entropy else logprobs

    def replay(self, coordinate: Coordinate) -> Comparison:
        """Draw one sample again, alone, and compare every bit; the result's `holds` says whether it matched.

        Raises ValueError, naming what differs, for the coordinate of another contract: other versions, device, model or
        weights. A sample that several versions of the weights drew has such a one.
        """
        session = self.session
        session.runner.check_usable()
        if not coordinate.token_ids:
            raise ValueError("this coordinate's sample ended before its first token: there is nothing to draw again")
        here = self.contract()
        if coordinate.sampling_params.structure is not None and self.tokenizer is not None:
            here = here.with_grammars(self.tokenizer.grammars.identity)
        differences = coordinate.contract.differences(here)
        if differences:
            raise ValueError(
                "this coordinate belongs to another contract, its bits cannot be expected here: "
                + "; ".join(differences)
            )
        (output,) = session.complete([session.admission.replayed("", coordinate)])
        drawn = (output.outputs[0].token_ids, output.outputs[0].token_logprobs)
        return compare("drawn again", [(coordinate.token_ids, coordinate.token_logprobs)], [drawn])

    def verify(self, *, quick: bool = False, samples: int | None = None, seed: int = 0) -> Verification:
        """Run the contract on this machine with this model (contract/verify.py).

        The result shows a table in a notebook, and is True where every axis held.
        """
        return verify(self.session, quick=quick, samples=samples, seed=seed, report=self.progress.line)

    def contract(self) -> Contract:
        """What has to be equal for bits to be equal (engine/contract_digest.py), of the weights that run."""
        return self.session.contract()

    def warm_up(self) -> None:
        """Compile every step of the engine now: none is compiled afterwards.

        `score` compiles for each shape at its first use.
        """
        self.session.warm_up()

    # -- inside -------------------------------------------------------------------------------------------------------

    def admitted(
        self,
        prompts: list[Any],
        sampling_params: Any,
        key: Any,
        request_ids: Sequence[str] | None,
        on_error: str = "refuse",
        priority: int | Sequence[int] = 0,
    ) -> list[Request]:
        """A call's requests, checked and not queued yet; without a key they take the next one of the LLM's seed as they
        are queued.
        """
        self.session.runner.check_usable()
        if sampling_params is None:
            self._log_defaults_not_taken()
        _check_ids(request_ids, len(prompts))
        sampling = sampling_of(sampling_params, len(prompts))
        if not prompts:
            return []
        words = None if key is None else key_data(key)
        return self.session.requests(prompts, sampling, words, request_ids, on_error, priority)

    def _log_defaults_not_taken(self) -> None:
        """Once, and only where somebody leaves it open how to draw."""
        folder, self._untold = self._untold, None
        if folder is not None:
            log_defaults_not_taken(folder)

    def chat_prompt(self, messages: Any, options: dict[str, Any], on_error: str = "refuse") -> Any:
        """The prompt of a conversation, or with on_error="return" why there is none.

        `options` are those of `Tokenizer.render_chat`.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so there is no chat: give LLM one as tokenizer=, or token ids to generate"
            )
        try:
            chat = self.tokenizer.render_chat(messages, **options)
        except ValueError as error:
            if on_error != "return":
                raise
            return Refused(str(error))
        return {"prompt": chat.text, "prompt_token_ids": chat.token_ids}

    def _complete(self, requests: list[Request], use_tqdm: bool | None) -> RequestOutputs:
        """Queue requests, run them to their ends and render them."""
        show = self.progress.enabled if use_tqdm is None else use_tqdm
        with Progress(show).bar(len(requests), "generating", "prompt") as bar:
            shown = 0.0

            def update(requests: Sequence[Request]) -> None:
                nonlocal shown
                if show and time.monotonic() > shown + bar.mininterval:  # not with every step: requests may be many
                    bar.update(sum(request.is_finished for request in requests) - bar.n)
                    shown = time.monotonic()

            outputs = self.session.complete(requests, update)
            bar.update(len(requests) - bar.n)
        return RequestOutputs(outputs)

    def __reduce__(self) -> Any:
        raise TypeError(
            "an LLM holds device memory and cannot be pickled or copied: build one from its model in each process"
        )


def _check_ids(request_ids: Sequence[str] | None, count: int) -> None:
    if request_ids is None:
        return
    if len(request_ids) != count:
        raise ValueError(f"{len(request_ids)} request_ids for {count} prompts: give one each")
    for index, request_id in enumerate(request_ids):
        if not isinstance(request_id, str):
            raise ValueError(f"request_ids[{index}] must be a string, got {request_id!r:.80}")


def _tokenizer_folder(given: Any, folder: Path) -> Path | None:
    """Where the tokenizer asked for is, else the model's own; None where there is none (token ids work without)."""
    if given is not None:
        return find_folder(given, "tokenizer")
    return folder if (folder / "tokenizer.json").exists() else None
