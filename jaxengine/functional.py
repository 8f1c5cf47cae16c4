"""The functional face: weights in, outputs out; weights and tokens in, logprobs out."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.base.arguments import check_keywords
from jaxengine.config import ModelConfig
from jaxengine.device import scoring, trunk
from jaxengine.engine.weights import check_fits, placed
from jaxengine.host.admission import check_scored, prompts_of, sampling_of
from jaxengine.llm import ENGINE_KEYWORDS, LLM
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.ops.tiles import Tile
from jaxengine.outputs import RequestOutputs
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

POOLS_KEPT = 2  # engines whose pages and proofs are kept between calls
_engines: dict[Any, tuple[LLM, threading.Lock]] = {}  # by settings, the latest last
_choosing = threading.Lock()


def generate(
    params: Decoder,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    **engine: Any,
) -> RequestOutputs:
    """Complete prompts under `params`. Nothing is kept but compiled code and empty pages, both of which depend on `config` and the engine
    keywords alone: a call with other weights compiles nothing and sees nothing of an earlier one.

    Prompts are lists of token ids, or text where a tokenizer is given. `key` is a typed JAX key; draws depend on it, on the index of the
    prompt and of the sample, and on the position. Engine keywords are EngineConfig's. Raises ValueError where params do not fit config.
    """
    check_keywords(
        "generate", engine, ("params", "prompts", "sampling_params", "key", "config", "tokenizer", *ENGINE_KEYWORDS)
    )
    batch = prompts_of(prompts)
    sampling_of(sampling_params, len(batch))  # refused before an engine is built
    if not batch:
        return RequestOutputs()
    check_fits(params, config)
    params = placed(params)
    llm, lock = _engine_for(params, config, tokenizer, engine)
    with lock:  # an engine runs one set of weights at a time
        llm.forget()  # the last call's, where an interrupt kept that one from it: all weights here are version 0
        llm.engine.update_params(params, version=0)
        try:
            return llm.generate(batch, sampling_params, key=key)
        finally:
            llm.forget()


def score(
    params: Decoder,
    tokens: Any,
    mask: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    config: ModelConfig,
    entropy: bool = False,
    kernels: str = "auto",
    tile: Tile = trunk.WIDE,
) -> Any:
    """float32 logprobs `[B, T]` of the tokens under `mask`, equal by bits to those that `generate` reported for them; 0 elsewhere.

    tokens `[B, T]` are prompt then completion, padded on the right with anything; mask `[B, T]` is True on generated tokens: the layout of
    Rollout. `sampling_params`, one for all or one each, say under which distribution they were drawn. With `entropy`, returns
    (logprobs, entropies of the processed distribution in nats `[B, T]`).

    Differentiable in params by reverse mode, and the same bits under jit and inside `jax.value_and_grad`, at any batch size and padding.
    `kernels` as in EngineConfig: those that generated, whose bits they are. `tile` is the shape of the pinned regions: leave it, unless
    `llm.engine.step_variants.refused` names the wide prefill step on your machine.
    Raises ValueError where shapes do not fit each other or params do not fit config, and for a token outside the vocabulary.
    """
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    check_scored(tokens, mask, config)
    check_fits(params, config)
    slots = scoring.sampling_arrays_of(sampling_of(sampling_params, tokens.shape[0]), config)
    logprobs, entropies = scoring.token_logprobs(
        params,
        tokens,
        mask,
        slots,
        model_config=config,
        kernels=choose_kernels(kernels, config),
        entropy=entropy,
        tile=tile,
    )
    return (logprobs, entropies) if entropy else logprobs


def _engine_for(
    params: Decoder, config: ModelConfig, tokenizer: Tokenizer | None, engine: dict[str, Any]
) -> tuple[LLM, threading.Lock]:
    """The engine of the last call with these settings on these devices, or a new one, whose pool lies beside `params`; and its lock."""
    devices = frozenset(device for leaf in jax.tree.leaves(params) for device in leaf.devices())
    settings = config, tokenizer, devices, tuple(sorted(engine.items()))
    with _choosing:  # two threads at once would build two
        found = _engines.pop(settings, None)
        while len(_engines) >= POOLS_KEPT:
            del _engines[next(iter(_engines))]  # the one that is longest out of use
        _engines[settings] = found or (LLM.from_params(config, params, tokenizer=tokenizer, **engine), threading.Lock())
        return _engines[settings]
