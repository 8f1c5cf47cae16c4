"""Models with random weights of known shapes, and engines with room for long contexts."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxengine import LLM
from jaxengine.command.bench_models import SHAPES
from jaxengine.config import ModelConfig
from jaxengine.engine import step_variants
from jaxengine.models.params import Decoder, initialise
from jaxengine.ops.tiles import BASE, WIDE
from pallas_kernels.numbers import cdiv

TINY = dict(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    dtype="float32",
)
PAGE = 32
SHARE = 0.8  # of the device's memory, for weights and pages
LONGEST = 8192 + PAGE
# (sequences, context) of decode steps, those of one tile together: what is wanted first comes first.
DECODES = ((16, 1024), (16, 8192), (64, 1024), (64, 8192), (256, 1024), (256, 8192), (1, 1024), (1, 8192))
TINY_DECODES = ((8, 64), (8, 96), (40, 96))
ROOM = dict(max_model_len=LONGEST, max_num_seqs=256, max_num_batched_tokens=8192, page_size=PAGE, compile_patience=0)
TINY_ROOM = dict(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128, page_size=PAGE, num_pages=40)
TINY_TILES = {"decode": (BASE,), "prefill": (WIDE,)}  # compiling is what a tiny run costs


def model_config(name: str, tiny: bool, **changes: Any) -> ModelConfig:
    return dataclasses.replace(SHAPES[name], **(TINY if tiny else {}) | changes)


def open_llm(name: str, tiny: bool, *, engine: dict[str, Any] | None = None, **changes: Any) -> LLM:
    """An LLM of a shape of `jaxengine bench`, with room for as many of DECODES as fit unless `engine` says what room.

    The same room in every stage, so that what one compiled the next finds in the cache of compiled code. A tiny one has
    always the same.
    """
    config = model_config(name, tiny, **changes)
    params = initialise(config, jax.random.key(0))
    if not tiny:
        return LLM.from_params(config, params, **engine or ROOM | dict(num_pages=num_pages(config)))
    with mock.patch.object(step_variants, "TILES", TINY_TILES):
        return LLM.from_params(config, params, **TINY_ROOM)


def num_pages(config: ModelConfig) -> int:
    """Of the largest of DECODES that fits, and one for scratch."""
    limit = (jax.devices()[0].memory_stats() or {})["bytes_limit"]
    fitting = (SHARE * limit - weight_bytes(config)) // (PAGE * token_bytes(config))
    wanted = [batch * cdiv(context, PAGE) + 1 for batch, context in DECODES]
    return max([pages for pages in wanted if pages <= fitting] or [LONGEST // PAGE + 1])


def weight_bytes(config: ModelConfig) -> int:
    return nbytes(jax.eval_shape(lambda: initialise(config, jax.random.key(0))))


def token_bytes(config: ModelConfig) -> int:
    """Keys and values of one token in all layers."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * np.dtype(config.dtype).itemsize


def read_bytes(params: Decoder) -> int:
    """Of the weights, what a step reads: of an embedding that is not the head too, a few rows."""
    return nbytes(params) - (0 if params.head is None else nbytes(params.embed))


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
