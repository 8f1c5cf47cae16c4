"""Whether arrays are sequences that can be scored."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxengine.config import ModelConfig
from jaxengine.device.grammar_mask import GrammarMask
from jaxengine.device.sampling_mask import SamplingMask


def check_scored(tokens: Any, mask: Any, config: ModelConfig) -> None:
    """Raises ValueError where tokens and mask are no batch of sequences, or a sequence is longer than the context.

    Values are looked at where they are known. Inside jit they are not, so that T has to be within the context there.
    """
    if tokens.ndim != 2 or tokens.shape != mask.shape or 0 in tokens.shape:
        raise ValueError(f"tokens and mask must have one shape [B, T], got {list(tokens.shape)} and {list(mask.shape)}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or mask.dtype != bool:
        raise ValueError(f"tokens must be integers and mask booleans, got {tokens.dtype} and {mask.dtype}")
    if isinstance(tokens, Tracer) or isinstance(mask, Tracer):
        return check_length(tokens.shape[1], config, "inside jit, where T counts, padding included")
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    lengths = np.where(mask, np.arange(1, mask.shape[1] + 1), 0).max(1)
    check_length(int(lengths.max()), config, f"tokens[{int(lengths.argmax())}] up to its last token under the mask")
    is_read = np.arange(tokens.shape[1]) < lengths[:, None]  # what comes after a row's last token is padding
    wrong = is_read & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, position = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"tokens[{row}, {position}] is {int(tokens[row, position])}, and a row is read up to its last token under "
            f"the mask: the vocabulary is 0 … {config.vocab_size - 1}"
        )
    if mask[:, 0].any():
        raise ValueError(
            f"mask[{int(mask[:, 0].argmax())}, 0] is True: the first token has nothing before it that could predict it"
        )


def check_length(length: int, config: ModelConfig, what: str) -> None:
    """Raises ValueError for a sequence of so many tokens that `generate` refuses it too."""
    context = config.context_length
    if length > context:
        raise ValueError(
            f"a sequence of {length} tokens ({what}) is longer than the model's context of {context} "
            f"(max_position_embeddings={config.max_position_embeddings}, rope {config.rope.kind}): cut it, or leave "
            f"the mask False after {context} tokens"
        )


def check_sampling_mask(sampling_mask: SamplingMask | None, tokens: Any) -> None:
    """Raises ValueError where a sampling mask is not that of sequences of this shape."""
    if sampling_mask is not None:
        _check_shapes("sampling_mask", "counts", sampling_mask.counts, "ids [B, N]", sampling_mask.ids, tokens)


def check_grammar_mask(grammar_mask: GrammarMask | None, tokens: Any) -> None:
    """Raises ValueError where a grammar mask is not that of sequences of this shape."""
    if grammar_mask is not None:
        _check_shapes("grammar_mask", "rows", grammar_mask.rows, "words [B, M, words]", grammar_mask.words, tokens)


def _check_shapes(mask: str, place: str, each: Any, form: str, shared: Any, tokens: Any) -> None:
    """Of a mask's two arrays `each` has an entry a token, and `shared`, whose name and axes are `form`, what the tokens
    of a sequence have in common.
    """
    first, second = each.shape, shared.shape
    if first != tokens.shape or len(second) != form.count(",") + 1 or second[0] != first[0]:
        raise ValueError(
            f"{mask} must have {place} of the tokens' shape {list(tokens.shape)} and {form}, "
            f"got {list(first)} and {list(second)}"
        )
