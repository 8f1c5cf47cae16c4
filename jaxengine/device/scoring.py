"""Scoring: the float32 logprobs of given tokens, in the meaning that sampling gives the word, with the bits that `generate` reported.

The head and the sampler's distribution run in a pinned region over the rows that are asked for alone, wherever they stand.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import KV_TILE, ModelConfig
from jaxengine.device import sampler
from jaxengine.device.sampling_arrays import empty_slots, write_slot
from jaxengine.device.step_inputs import SamplingArrays
from jaxengine.device.trunk import WIDE, hidden_states
from jaxengine.models import decoder, plain
from jaxengine.models.decoder import Tile
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.regions import over_tiles
from jaxengine.sampling_params import SamplingParams, stop_token_ids
from pallas_kernels.tiles import unknown_zero

BATCH_TOKENS = 8192  # that one call scores, padding included, where a caller has more
HEAD_ROWS = 32  # rows of the head to a tile, as in the widest decode step


def check_scored(tokens: Any, mask: Any, config: ModelConfig) -> None:
    """Raises ValueError where tokens and mask are no batch of sequences. Values are looked at where they are known: not inside jit."""
    if tokens.ndim != 2 or tokens.shape != mask.shape or 0 in tokens.shape:
        raise ValueError(f"tokens and mask must have one shape [B, T], got {list(tokens.shape)} and {list(mask.shape)}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or mask.dtype != bool:
        raise ValueError(f"tokens must be integers and mask booleans, got {tokens.dtype} and {mask.dtype}")
    if isinstance(tokens, Tracer) or isinstance(mask, Tracer):
        return
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    wrong = mask & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, position = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"tokens[{row}, {position}] is {int(tokens[row, position])} under the mask: the vocabulary is "
            f"0 … {config.vocab_size - 1}"
        )
    if mask[:, 0].any():
        raise ValueError(
            f"mask[{int(mask[:, 0].argmax())}, 0] is True: the first token has nothing before it that could predict it"
        )


def sampling_arrays_of(params: Sequence[SamplingParams], model_config: ModelConfig) -> SamplingArrays:
    """Sampling parameters of B sequences. `prompt_length` is left at 0 and `first_stop` at min_tokens: the mask says the rest."""
    slots = empty_slots(len(params))
    for i, each in enumerate(params):
        write_slot(slots, i, each, stop_token_ids(each, model_config.eos_token_ids), first_stop=each.min_tokens)
    return slots


@functools.partial(jax.jit, static_argnames=("model_config", "kernels", "entropy", "tile"))
def token_logprobs(
    params: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    slots: SamplingArrays,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    entropy: bool = False,
    tile: Tile = WIDE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """(logprobs, entropies if asked) of the tokens under `mask`, each at its own position, 0 elsewhere. Differentiable in params.

    A run of tokens under the mask is a completion, and all that stands before it its prompt. What stands behind the last token under
    the mask is never read; nothing predicts the first token, which is 0 too.
    """
    x, tokens = trunk(params, tokens, mask, model_config=model_config, kernels=kernels, tile=tile)
    return head_logprobs(params, x, tokens, mask, slots, model_config=model_config, kernels=kernels, entropy=entropy)


def trunk(
    params: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile = WIDE,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"]]:
    """(residual stream behind the last layer, as far as tokens under `mask` are predicted by it; tokens, those that are none as 0)."""
    tokens = jnp.where((tokens >= 0) & (tokens < model_config.vocab_size), tokens, 0).astype(jnp.int32)
    wanted = mask.at[:, 0].set(False)
    lengths = jnp.where(wanted, jnp.arange(tokens.shape[1]), 0).max(
        -1
    )  # the last token is predicted, and needs no forward pass of its own
    return hidden_states(model_config, kernels, params, tokens, lengths, tile), tokens


def head_logprobs(
    params: Decoder,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    slots: SamplingArrays,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """token_logprobs from what `trunk` gives: a critic shares the trunk (critic.py)."""
    batch, length = tokens.shape
    where, wanted = jnp.arange(length), mask.at[:, 0].set(False)
    begins = mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    prompts = jax.lax.cummax(jnp.where(begins, where, 0), axis=1)

    order = jnp.argsort(~wanted.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -order.shape[0] % HEAD_ROWS))
    sequences, positions = order // length, order % length
    rows = (x[sequences, jnp.maximum(positions - 1, 0)], sequences, positions, prompts.reshape(-1)[order])
    weights = (params.norm, params.output_head, _opaque(slots, params, tokens), tokens)
    body = functools.partial(_row_scores, model_config, kernels, entropy)
    found = over_tiles(body, HEAD_ROWS, weights, rows, wanted.sum(dtype=jnp.int32) + unknown_zero(params.norm, tokens))
    placed = [
        jnp.where(wanted, each[jnp.argsort(order[: batch * length])].reshape(batch, length), 0.0) for each in found
    ]
    return placed[0], placed[1] if entropy else None


def _row_scores(
    model_config: ModelConfig, kernels: Kernels, entropy: bool, weights: tuple, rows: tuple
) -> tuple[Float[Array, " t"], ...]:
    norm, head, slots, tokens = weights
    x, sequences, positions, prompts = rows
    row: SamplingArrays = jax.tree.map(lambda a: a[sequences], slots)
    row = dataclasses.replace(
        row, prompt_length=prompts, first_stop=jnp.where(row.first_stop > 0, prompts + row.first_stop, 0)
    )
    logits = decoder.logits(model_config, kernels, norm, head, x)
    _, drawn_from = sampler.distribution(logits, row, tokens, sequences, positions, jnp.zeros(x.shape[0], bool))
    out = kernels.draw_and_score(drawn_from, tokens[sequences, positions])
    return (out.logprobs, sampler.entropy(out.all_logprobs(drawn_from))) if entropy else (out.logprobs,)


def _opaque(slots: SamplingArrays, params: Decoder, tokens: Array) -> SamplingArrays:
    """The same parameters as numbers of run time: XLA divides by a constant in another way than by a number it does not know."""
    zero = unknown_zero(params.norm, tokens)
    return jax.tree.map(lambda x: jnp.where(zero == 0, x, jnp.zeros_like(x)), slots)


def in_batches(
    params: Decoder, tokens: np.ndarray, mask: np.ndarray, slots: SamplingArrays, **how
) -> tuple[np.ndarray, np.ndarray | None]:
    """token_logprobs over batches of bounded size, as numpy arrays. Shapes are powers of two, so that few of them are ever compiled."""
    length = max(_power_of_two(tokens.shape[1]), KV_TILE)
    rows = max(min(BATCH_TOKENS // length, _power_of_two(tokens.shape[0])), 1)
    found = []
    for first in range(0, tokens.shape[0], rows):
        cut = lambda x, first=first: _padded(x[first : first + rows], rows)
        widen = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
        found.append(token_logprobs(params, widen(cut(tokens)), widen(cut(mask)), jax.tree.map(cut, slots), **how))
    joined = lambda parts: np.concatenate([np.asarray(x) for x in parts])[: tokens.shape[0], : tokens.shape[1]]
    logprobs, entropies = zip(*found, strict=True)
    return joined(logprobs), None if entropies[0] is None else joined(entropies)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnames="model_config")
def plain_logprobs(params: Decoder, tokens: Int[Array, " T"], *, model_config: ModelConfig) -> Float[Array, " T"]:
    """Of each token, 0 for the first, under a plain float32 forward pass (models/plain.py): what drift is measured against."""
    logprobs = jax.nn.log_softmax(plain.logits(model_config, params, tokens[:-1]))
    return jnp.pad(jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0], (1, 0))
