"""The kernels as functions of JAX arrays. None is differentiable: jaxengine/ops/cpu_chain.py says what gradients are
taken of.

`body` is one of library.BODIES, "best" unless a test forces another. Rows from `count` on are not computed; what they
hold is zero up to the end of the last tile of `tile` rows with a live one, and undefined after it.

Each of B query blocks has R / B rows; or, where `first_rows` are given, those from its first row to the next block's,
of which it fills as many as it has tokens. Rows of a block that are no token get zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cpu import library
from pallas_kernels.numbers import ceil_to
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.wanted import Wanted

PLAIN, GATED, ADDED = range(3)  # Form in ops.h
TYPES = ("float32", "float16", "bfloat16")  # Type in common.h
WIDEST_HEAD, LANES, MOST_LEAVES = 256, 16, 128


class Live(NamedTuple):
    """How many rows there are to compute, and in which tiles zeros follow them."""

    count: Int[Array, ""]
    tile: int


class Geometry(NamedTuple):
    """Of a model's heads: how a projection is packed, normalised and rotated."""

    leaves: int
    queries: int  # heads of all leaves
    width: int
    eps: float
    rope_factor: float
    dtype: str


def outputs(
    x: Float[Array, "R K"],
    norm: Float[Array, " K"] | None,
    eps: float,
    w: Float[Array, "leaf N K"],
    bias: Float[Array, "leaf N"] | None,
    live: Live,
    body: str = "best",
) -> Float[Array, "R leaf*N"]:
    """rms_norm(x), rounded to the weights' dtype, times w.T, and the bias, for every leaf's outputs."""
    like = jax.ShapeDtypeStruct((x.shape[0], w.shape[0] * w.shape[1]), jnp.float32)
    return _product(like, x, norm, eps, w, bias, None, live, body, form=PLAIN)


def gated(
    x: Float[Array, "R K"],
    norm: Float[Array, " K"],
    eps: float,
    w: Float[Array, "leaf F2 K"],
    live: Live,
    body: str = "best",
) -> Float[Array, "R leaf*F"]:
    """silu(gate) · up of rms_norm(x), in the weights' dtype. A leaf's weights are its gates, then its ups."""
    like = jax.ShapeDtypeStruct((x.shape[0], w.shape[0] * w.shape[1] // 2), w.dtype)
    return _product(like, x, norm, eps, w, None, None, live, body, form=GATED)


def added(
    x: Float[Array, "R D"],
    y: Float[Array, "R leaf*K"],
    w: Float[Array, "leaf D K"],
    bias: Float[Array, " D"] | None,
    live: Live,
    body: str = "best",
) -> Float[Array, "R D"]:
    """x + y @ w.T, summed over leaves by the tree, + bias."""
    return _product(jax.ShapeDtypeStruct(x.shape, jnp.float32), y, None, 0.0, w, bias, x, live, body, form=ADDED)


def logits(
    x: Float[Array, "t D"],
    norm: Float[Array, " D"],
    eps: float,
    head: Float[Array, "leaf V D"],
    fresh: Bool[Array, " t"] | None = None,
    body: str = "best",
) -> Float[Array, "t V"]:
    """rms_norm(x) @ head.T in float32: what is normalised is not rounded.

    A row that is not `fresh` is not read, and gets the logits of the last one before it that is; row 0 always is.
    """
    like = jax.ShapeDtypeStruct((x.shape[0], head.shape[0] * head.shape[1]), jnp.float32)
    live = Live(jnp.int32(x.shape[0]), 1)
    return _product(like, x, norm, eps, head, None, None, live, body, form=PLAIN, rounds=False, fresh=fresh)


def _product(
    like: Any,
    x: Array,
    norm: Array | None,
    eps: float,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    live: Live,
    body: str,
    form: int,
    rounds: bool = True,
    fresh: Array | None = None,
) -> Array:
    given = x, _or_empty(norm), w, _or_empty(bias), _or_empty(residual), _or_all(fresh), _int32(live.count)
    return _call("product", like, body)(
        *given, form=np.int64(form), rounds=rounds, eps=np.float32(eps), tile=np.int64(live.tile)
    )


def embed(
    table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live, body: str = "best"
) -> Float[Array, "R D"]:
    """Rows of the table in float32."""
    flat = table.reshape(-1, table.shape[-1])
    like = jax.ShapeDtypeStruct((ids.shape[0], flat.shape[1]), jnp.float32)
    return _call("embed", like, body)(flat, _int32(ids), _int32(live.count), tile=np.int64(live.tile))


def page_shapes(heads: int, num_pages: int, page_size: int, width: int, dtype: Any) -> tuple[Any, Any]:
    """Shapes of a layer's keys `[P, K, p/16, 16h]` and values `[P, K, p/2, 2h]`, as `by_token` reads them.

    Tokens of keys come in groups of 16, rows of values are padded to whole lanes.

    Raises ValueError for heads that are wider than the kernels take, or of an odd width.
    """
    if width > WIDEST_HEAD or width % 2:
        raise ValueError(
            f"kernels 'cpu' take heads of an even width of at most {WIDEST_HEAD}, got head_dim={width}: "
            "take kernels 'xla'"
        )
    keys = jax.ShapeDtypeStruct((num_pages, heads, page_size // LANES, LANES * width), dtype)
    return keys, jax.ShapeDtypeStruct((num_pages, heads, page_size // 2, 2 * ceil_to(width, LANES)), dtype)


def by_token(keys: Any, values: Any) -> tuple[Any, Any]:
    """Pages as `[P, p, K, h]`, of arrays of NumPy or JAX.

    What attention sums over is stored in pairs: keys as `[P, K, p/16, h/2, 16, 2]`, values as `[P, K, p/2, h, 2]`.
    """
    pages, heads, size, width = keys.shape[0], keys.shape[1], LANES * keys.shape[2], keys.shape[3] // LANES
    keys = keys.reshape(pages, heads, -1, width // 2, LANES, 2).transpose(0, 2, 4, 1, 3, 5)
    values = values.reshape(pages, heads, size // 2, -1, 2).transpose(0, 2, 4, 1, 3)
    return keys.reshape(pages, size, heads, width), values.reshape(pages, size, heads, -1)[..., :width]


def rotate_and_write(
    geometry: Geometry,
    packed: Float[Array, "R N"],
    norms: tuple[Array | None, Array | None],
    frequencies: Float[Array, " half"],
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    body: str = "best",
    first_rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "R H h"], Array, Array]:
    """(queries times log2(e) / sqrt(h), keys, values): the blocks' keys and values are written into their pages."""
    q = jax.ShapeDtypeStruct((packed.shape[0], geometry.queries, geometry.width), jnp.float32)
    first = 10
    call = _call("heads", (q, _like(keys), _like(values)), body, {first: 1, first + 1: 2})
    given = packed, *map(_or_empty, norms), frequencies, *_arrays(blocks, first_rows), keys, values
    return call(
        *given,
        leaves=np.int64(geometry.leaves),
        eps=np.float32(geometry.eps),
        rope_factor=np.float32(geometry.rope_factor),
        scale=np.float32(np.log2(np.e) * geometry.width**-0.5),
        type=np.int64(TYPES.index(geometry.dtype)),
    )


def attend(
    q: Float[Array, "R H h"],
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    dtype: Any,
    body: str = "best",
    first_rows: Int[Array, " B"] | None = None,
) -> Float[Array, "R Hh"]:
    """Causal attention of `rotate_and_write`'s queries over their sequences' pages, in `dtype`, the pages' own."""
    like = jax.ShapeDtypeStruct((q.shape[0], q.shape[1] * q.shape[2]), dtype)
    which = np.int64(TYPES.index(jnp.dtype(dtype).name))
    return _call("attend", like, body)(q, *_arrays(blocks, first_rows), keys, values, type=which)


def draw(
    logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"], body: str = "best"
) -> tuple[Array, Array, Array, Array]:
    """(tokens, logprobs, largest logits, log masses), as draw_reference.Draw has them."""
    number = jax.ShapeDtypeStruct(given.shape, jnp.float32)
    return _call("draw", (jax.ShapeDtypeStruct(given.shape, jnp.int32), number, number, number), body)(
        logits, uniforms, _int32(given)
    )


def kept(
    logits: Float[Array, "t V"],
    top_k: Int[Array, " t"],
    top_p: Float[Array, " t"],
    min_p: Float[Array, " t"],
    body: str = "best",
) -> Bool[Array, "t V"]:
    """What top-k, then top-p, then min-p keep, as truncation_reference.kept_reference defines it."""
    return _call("kept", jax.ShapeDtypeStruct(logits.shape, jnp.bool_), body)(logits, _int32(top_k), top_p, min_p)


def sample(
    x: Float[Array, "t D"],
    norm: Float[Array, " D"],
    eps: float,
    head: Float[Array, "leaf V D"],
    wanted: Wanted,
    vocab_size: int,
    body: str = "best",
) -> tuple[Int[Array, " t"], Float[Array, " t"], Bool[Array, " t"]]:
    """(tokens, logprobs, whether logits and logprob are finite) of the live rows; of the others (0, 0, True).

    The bits are those of `logits`, divided by the temperature, cut by `kept`, and drawn from by `draw`; columns from
    vocab_size on are -inf.
    """
    t = x.shape[0]
    like = (
        jax.ShapeDtypeStruct((t,), jnp.int32),
        jax.ShapeDtypeStruct((t,), jnp.float32),
        jax.ShapeDtypeStruct((t,), jnp.bool_),
    )
    wanted = wanted._replace(fresh=_or_all(wanted.fresh), top_k=_int32(wanted.top_k), given=_int32(wanted.given))
    call = _call("sample", like, body)
    return call(x, norm, head, *wanted, eps=np.float32(eps), vocabulary=np.int64(vocab_size))


def zeros(like: Any) -> Array:
    """Zeros in huge pages, where the system has some and they take a few of them."""
    library.load()
    return jax.ffi.ffi_call("jaxengine_zeros", like)()


def _call(op: str, like: Any, body: str, aliases: dict[int, int] | None = None) -> Any:
    library.load()
    call = jax.ffi.ffi_call(f"jaxengine_{op}", like, input_output_aliases=aliases or {})

    def with_body(*arrays: Array, **how: Any) -> Any:
        return call(*arrays, **how, body=np.int64(library.BODIES[body]))

    return with_body


def _arrays(blocks: PagedBlocks, first_rows: Array | None) -> tuple[Array, ...]:
    first_rows = jnp.zeros(0, jnp.int32) if first_rows is None else first_rows
    numbers = blocks.tables, blocks.slots, blocks.starts, blocks.counts, first_rows, blocks.num_blocks
    return tuple(map(_int32, numbers))


def _int32(x: Array) -> Array:
    """Sums of integers are int64 under jax_enable_x64."""
    return x if x.dtype == jnp.int32 else x.astype(jnp.int32)


def _like(x: Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _or_empty(x: Array | None) -> Array:
    return jnp.zeros(0, jnp.float32) if x is None else x


def _or_all(fresh: Array | None) -> Array:
    return jnp.zeros(0, jnp.bool_) if fresh is None else fresh
