"""The functional face: weights in, outputs out; weights and tokens in, logprobs out."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.base.arguments import check_keywords
from jaxengine.base.keys import key_data
from jaxengine.config import ModelConfig
from jaxengine.device import scoring
from jaxengine.device.find_sampling_mask import find_sampling_mask
from jaxengine.device.grammar_mask import GrammarMask, find_grammar_mask
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.device.scoring_input import check_grammar_mask, check_sampling_mask, check_scored
from jaxengine.engine import idle_pools
from jaxengine.engine.scoring_proof import scoring_tiles
from jaxengine.engine.session import Session
from jaxengine.engine.settings import ENGINE_KEYWORDS, resolve_engine_config
from jaxengine.engine.weights import check_fits, check_one_device, homes, placed
from jaxengine.host.admission import sampling_of
from jaxengine.host.prompts import prompts_of
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_for_all_replicas
from jaxengine.outputs import RequestOutputs
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

OWN_KEYWORDS = ("params", "prompts", "sampling_params", "key", "config", "tokenizer", "on_error")


def generate(
    params: Decoder,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    on_error: str = "refuse",
    **engine: Any,
) -> RequestOutputs:
    """Complete prompts under `params`.

    Nothing is kept but compiled code and empty pages, both of which depend on `config` and the engine keywords alone: a
    call with other weights compiles nothing and sees nothing of an earlier one.

    Prompts are lists of token ids, or text where a tokenizer is given. `key` is a typed JAX key; draws depend on it, on
    the index of the prompt and of the sample, and on the position. `on_error` as for `LLM.generate`. Engine keywords
    are EngineConfig's. Raises ValueError where params do not fit config.
    """
    check_keywords("generate", engine, (*OWN_KEYWORDS, *ENGINE_KEYWORDS))
    batch = prompts_of(prompts)
    sampling = sampling_of(sampling_params, len(batch))  # refused before an engine is built
    if not batch:
        return RequestOutputs()
    check_fits(params, config)
    with _session(params, config, tokenizer, engine) as session:
        session.set_first_weights(placed(params, homes(params, config, session.engine.kernels)))
        try:
            return RequestOutputs(session.complete(session.requests(batch, sampling, key_data(key), on_error=on_error)))
        finally:
            session.drop_weights()


def score(
    params: Decoder,
    tokens: Any,
    mask: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    config: ModelConfig,
    entropy: bool = False,
    sampling_mask: SamplingMask | None = None,
    grammar_mask: GrammarMask | None = None,
    kernels: str = "auto",
    mesh: Mesh | None = None,
) -> Any:
    """float32 logprobs `[B, T]` of the tokens under `mask`, equal by bits to those that `generate` reported.

    0 elsewhere.

    tokens `[B, T]` are prompt then completion, padded on the right with anything; mask `[B, T]` is True on generated
    tokens: the layout of Rollout. `sampling_params`, one for all or one each, say under which distribution they were
    drawn. With `entropy`, returns (logprobs, entropies of the processed distribution in nats `[B, T]`). A
    `sampling_mask` takes the place of top-k, top-p and min-p: with that of the weights that drew, the tokens have the
    same support under any weights. Structured outputs take the `grammar_mask` of the tokens.

    Differentiable in params by reverse mode, and the same bits under jit and inside `jax.value_and_grad`, at any batch
    size and padding. `kernels` as in EngineConfig: those that generated, whose bits they are. On a `mesh` devices along
    "tensor" share the weights, replicas along "data" the sequences (not inside a gradient, which each takes of all,
    nor where the mesh has several processes: there each process scores all), and the bits stay. params may lie on its
    devices in any way; inside jit, where JAX moves nothing, on all of them (the `params` of an LLM with several
    replicas are those of the first). The first call for a model proves on this machine which tiles give the bits of
    generation (engine/scoring_proof.py). Where several leaves hold a copy of a key-value head, each copy has its own
    part of the head's gradient, and an optimiser has to take their sum (models/own_heads.py), as a Trainer does. Raises
    ValueError where shapes do not fit each other or params do not fit config, for a token outside the vocabulary, for a
    sequence that is longer than the model's context, and for weights that are cut over devices where no mesh is given;
    RuntimeError where no tile gives the bits of generation.
    """
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    check_scored(tokens, mask, config)
    check_sampling_mask(sampling_mask, tokens)
    check_grammar_mask(grammar_mask, tokens)
    check_fits(params, config)
    sampling = sampling_of(sampling_params, tokens.shape[0])
    slots = scoring.sampling_arrays_of(sampling, config, sampling_mask, grammar_mask)
    params, how = _where_and_how(params, config, kernels, mesh)
    logprobs, entropies = scoring.token_logprobs(params, tokens, mask, slots, entropy=entropy, **how)
    return (logprobs, entropies) if entropy else logprobs


def sampling_mask(
    params: Decoder,
    tokens: Any,
    mask: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    config: ModelConfig,
    grammar_mask: GrammarMask | None = None,
    kernels: str = "auto",
    mesh: Mesh | None = None,
) -> SamplingMask:
    """What top-k, top-p and min-p kept when `params` drew the tokens under `mask`, as numpy arrays: for `score` under
    weights that have moved since.

    Arguments are `score`'s. It costs one pass of scoring. Raises ValueError where `score` does, and where a token is
    outside of what was kept: other weights drew it.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    check_scored(tokens, mask, config)
    check_grammar_mask(grammar_mask, tokens)
    check_fits(params, config)
    sampling = sampling_of(sampling_params, tokens.shape[0])
    arrays = scoring.sampling_arrays_of(sampling, config, grammar=grammar_mask)
    params, how = _where_and_how(params, config, kernels, mesh)
    return find_sampling_mask(params, tokens, mask, arrays, **how)


def grammar_mask(
    tokens: Any,
    mask: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams],
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
) -> GrammarMask | None:
    """What structured outputs allowed at each token under `mask`, as numpy arrays, for `score`; None where there are
    none.

    It follows from tokens and grammars, whatever the weights, and costs what drawing them cost on the host. Arguments
    are `score`'s. Raises ValueError for a token that its grammar does not allow, and where `score` does for its shapes.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    check_scored(tokens, mask, config)
    return find_grammar_mask(tokens, mask, sampling_of(sampling_params, tokens.shape[0]), tokenizer, config)


def _where_and_how(
    params: Decoder, config: ModelConfig, kernels: str, mesh: Mesh | None
) -> tuple[Decoder, dict[str, Any]]:
    """The weights as a mesh has them, from wherever a trainer keeps them (differentiable); and what scores, on tiles
    that are proven to give the bits of generation on this machine.
    """
    if mesh is None:
        check_one_device(params)
    chosen = choose_for_all_replicas(kernels, config, mesh)
    if chosen.split is not None:
        params = placed(params, homes(params, config, chosen))
    return params, dict(model_config=config, kernels=chosen, tiles=scoring_tiles(config, chosen))


@dataclasses.dataclass(eq=False)
class _Kept:
    """A session whose pages and proofs are kept between calls."""

    session: Session
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # it runs one set of weights at a time
    num_calls: int = 0  # that run or wait


_kept: dict[Any, _Kept] = {}  # by settings: of the latest call, and of calls under way
_choosing = threading.Lock()


@contextlib.contextmanager
def _session(
    params: Decoder, config: ModelConfig, tokenizer: Tokenizer | None, engine: dict[str, Any]
) -> Iterator[Session]:
    """The session of the last call with these settings on these devices, or a new one with its pool beside `params`.

    One pool is kept. Those of other settings go before a new one is made, because there may be no room for two; one
    that a call uses goes after that call.
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    devices = frozenset(device for array in arrays for device in array.devices())
    settings = config, tokenizer, devices, tuple(sorted(engine.items()))
    with _choosing:  # two threads at once would build two
        for other in [other for other, kept in _kept.items() if other != settings and not kept.num_calls]:
            del _kept[other]
        if settings not in _kept:
            engine_config = idle_pools.with_room(lambda: resolve_engine_config(config, engine, params))
            _kept[settings] = _Kept(Session(config, engine_config, params, tokenizer))
        kept = _kept[settings]
        kept.num_calls += 1
    try:
        with kept.lock:
            yield kept.session
    finally:
        with _choosing:
            kept.num_calls -= 1
            if not kept.num_calls and len(_kept) > 1:
                _kept.pop(settings, None)
