"""The decoder's ops as a chain of opaque kernels on a TPU or a Hopper GPU (pallas_kernels/chain.py). kernels.py says
what each op has to be.

A product may leave partial sums, and the next kernel adds them: so what passes from op to op is not always one array.
Gradients are XLA's, of the same expressions, with zeros in the place of rows that are not live: those may be NaN, which
no cotangent of 0 undoes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.differentiated import differentiated_as
from jaxengine.ops.experts import Experts, Routing, partial_sums
from jaxengine.ops.heads import PackedHeads
from jaxengine.ops.linear import by_leaf, dot, join_leaves, with_bias
from jaxengine.ops.live import Live
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.pallas import GPU_WIDTHS, located_blocks, sizes_of_device
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.rope import inverse_frequencies
from jaxengine.ops.xla import XlaProducts
from pallas_kernels.chain import chain_of
from pallas_kernels.chain_gpu.sizes import CHAIN
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.numbers import ceil_to
from pallas_kernels.packed_heads import Geometry, Projection
from pallas_kernels.sizes import LANES, MATMUL
from pallas_kernels.sizes_attention import ATTENTION
from sharding.leaves import ALL_HERE, Leaves, spread, tree_sum

HEAD_PARTS = 3  # bfloat16 numbers whose sum is a float32
TPU_ORDER = 1  # of a TPU's arithmetic between products: raised whenever its bits change


class Stream(NamedTuple):
    """The residual stream: x, and what the last product adds to it."""

    x: Float[Array, "R D"]
    sums: Float[Array, "leaf S R D"] | None = None
    bias: Float[Array, " D"] | None = None


class Sums(NamedTuple):
    """A projection: its splits' partial sums, its bias, and how many rows are live."""

    sums: Float[Array, "S R N"]
    bias: Float[Array, " N"] | None
    count: Int[Array, ""]


# -- what gradients are taken of ---------------------------------------------------------------------------------------


def _live(x: Float[Array, "R D"], count: Int[Array, ""]) -> Float[Array, "R D"]:
    return jnp.where(jnp.arange(x.shape[0])[:, None] < count, x, 0)


def _plain_total(stream: Stream) -> Float[Array, "R D"]:
    x = stream.x
    if stream.sums is not None:
        x = x + tree_sum(stream.sums.sum(1))
    return with_bias(x, stream.bias)


def _plain_sums(
    of: Implementation, x: Float[Array, "leaf M K"], w: Float[Array, "leaf N K"], outputs: int, count: int
) -> Float[Array, "leaf S M N"]:
    if count == 1:
        return dot(x, w)[:, None]
    split = chain_of(of).split_of(w.dtype, outputs, w.shape[2])
    x, w = (_as_splits(a, split, count) for a in (x, w))
    sums = dot(x, w)
    return sums.reshape(-1, count, *sums.shape[1:])


def _as_splits(a: Float[Array, "leaf M K"], split: int, count: int) -> Float[Array, "leaf*S M split"]:
    padded = jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % split)))
    return padded.reshape(*a.shape[:2], count, split).swapaxes(1, 2).reshape(-1, a.shape[1], split)


def _plain_finish(of: Implementation, like: Array, stream: Stream) -> Float[Array, "R D"]:
    return _plain_total(stream)


def _plain_project(
    of: Implementation, eps: float, leaves: Leaves, like: tuple, stream: Stream, norm: Array, w: Array, count: Array
):
    """Leaf by leaf, though the kernel takes all at once: a gradient's order may not follow who has which leaves."""
    x = _plain_total(stream)
    y = spread(leaves.shared(rms_norm(_live(x, count), norm, eps)), w.shape[0])
    sums = _plain_sums(of, y, w, w.shape[0] * w.shape[1], like[1].shape[0])
    return x, jnp.moveaxis(sums, 0, 2).reshape(like[1].shape)


def _plain_gated(
    of: Implementation, eps: float, leaves: Leaves, like: tuple, stream: Stream, norm: Array, w: Array, count: Array
):
    x = _plain_total(stream)
    return x, join_leaves(XlaProducts(leaves).gated(rms_norm(_live(x, count), norm, eps), w)).astype(w.dtype)


def _plain_add(of: Implementation, like: Array, y: Array, w: Array, count: Array) -> Float[Array, "leaf S M N"]:
    sums = _plain_sums(of, by_leaf(_live(y, count), w.shape[0]), w, w.shape[1], like.shape[1])
    return sums if like.shape[0] == w.shape[0] else tree_sum(sums)[None]


def _plain_routed(
    of: Implementation,
    eps: float,
    leaves: Leaves,
    routing: Routing,
    like: tuple,
    stream: Stream,
    norm: Array,
    experts: Experts,
    count: Array,
):
    x = _plain_total(stream)
    y, is_there = rms_norm(_live(x, count), norm, eps), jnp.arange(x.shape[0]) < count
    return x, partial_sums(XlaProducts(leaves), routing, y, experts, is_there)[:, None]


def _plain_logits(
    of: Implementation, eps: float, leaves: Leaves, like: Array, x: Array, norm: Array, head: Array
) -> Float[Array, "t V"]:
    y = XlaProducts(leaves).outputs(rms_norm(x, norm, eps), head.astype(jnp.float32))
    return leaves.columns(join_leaves(y))


# -- the ops -----------------------------------------------------------------------------------------------------------


@differentiated_as(_plain_finish, static=1)
def _finish(of: Implementation, stream: Stream) -> Float[Array, "R D"]:
    return chain_of(of).total(*stream)


@differentiated_as(_plain_project, static=3)
def _project(
    of: Implementation, eps: float, leaves: Leaves, stream: Stream, norm: Array, w: Array, count: Array
) -> tuple[Array, Array]:
    x, y = chain_of(of).settle(*stream, norm, eps, w.dtype, live=count)
    return x, chain_of(of).outputs(y[0], w.reshape(-1, w.shape[-1]), count)


@differentiated_as(_plain_gated, static=3)
def _gated(
    of: Implementation, eps: float, leaves: Leaves, stream: Stream, norm: Array, w: Array, count: Array
) -> tuple[Array, Array]:
    x, y = chain_of(of).settle(*stream, norm, eps, w.dtype, live=count)
    return x, chain_of(of).gated(y[0], w, count)


@differentiated_as(_plain_add, static=1)
def _add(of: Implementation, y: Array, w: Array, count: Array) -> Float[Array, "leaf S M N"]:
    return chain_of(of).summed(y.astype(w.dtype), w, count)


@dataclasses.dataclass(frozen=True)
class _ExpertProducts:
    """Those of ops/experts.py, by kernels that have no gradient."""

    implementation: Implementation
    leaves: Leaves

    def scores(self, y: Float[Array, "t D"], router: Float[Array, "E D"]) -> Float[Array, "t E"]:
        return chain_of(self.implementation).finished(y[None], router)

    def grouped(
        self, x: Float[Array, "leaf M K"], w: Float[Array, "leaf E N K"], sizes: Int[Array, " E"], *, gated: bool
    ) -> Float[Array, "leaf M R"]:
        return grouped_matmul(x, w, sizes, gated=gated, implementation=self.implementation)


@differentiated_as(_plain_routed, static=4)
def _routed(
    of: Implementation,
    eps: float,
    leaves: Leaves,
    routing: Routing,
    stream: Stream,
    norm: Array,
    experts: Experts,
    count: Array,
) -> tuple[Array, Array]:
    x, y = chain_of(of).settle(*stream, norm, eps, experts.router.dtype, live=count)
    is_there = jnp.arange(x.shape[0]) < count
    return x, partial_sums(_ExpertProducts(of, leaves), routing, y[0], experts, is_there)[:, None]


@differentiated_as(_plain_logits, static=3)
def _logits(of: Implementation, eps: float, leaves: Leaves, x: Array, norm: Array, head: Array) -> Float[Array, "t V"]:
    parts = HEAD_PARTS if head.dtype == jnp.bfloat16 else 1
    _, y = chain_of(of).settle(x, None, None, norm, eps, head.dtype, parts)
    return leaves.columns(chain_of(of).finished(y, head.reshape(-1, head.shape[-1])))


@dataclasses.dataclass(frozen=True)
class ChainProducts:
    """The products of ops/kernels.py."""

    implementation: Implementation
    leaves: Leaves = ALL_HERE

    def with_leaves(self, leaves: Leaves) -> "ChainProducts":
        return dataclasses.replace(self, leaves=leaves)

    def parts(self) -> dict[str, Any]:
        device = self.implementation.device
        if self.implementation.name in OF_A_GPU:
            return {"device": device, "chain": sizes_of_device(CHAIN, device)}
        return {"device": device, "order": TPU_ORDER, "matmul": sizes_of_device(MATMUL, device)}

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live) -> Stream:
        def lookup(table: Array, ids: Array) -> Float[Array, "R D"]:
            flat = table.reshape(-1, table.shape[-1])
            return chain_of(self.implementation).embed(flat, ids)

        return Stream(self.leaves.looked_up(lookup, table, ids))

    def project(
        self,
        x: Stream,
        norm: Float[Array, " D"],
        eps: float,
        w: Float[Array, "leaf N D"],
        bias: Float[Array, "leaf N"] | None,
        live: Live,
    ) -> tuple[Stream, Sums]:
        total, sums = _project(self.implementation, eps, self.leaves, x, norm, w, live.count)
        return Stream(total), Sums(sums, None if bias is None else bias.reshape(-1), live.count)

    def gated(
        self, x: Stream, norm: Float[Array, " D"], eps: float, w: Float[Array, "leaf F2 D"], live: Live
    ) -> tuple[Stream, Float[Array, "R leaf*F"]]:
        total, inner = _gated(self.implementation, eps, self.leaves, x, norm, w, live.count)
        return Stream(total), inner

    def add(
        self,
        x: Stream,
        y: Float[Array, "R leaf*K"],
        w: Float[Array, "leaf D K"],
        bias: Float[Array, " D"] | None,
        live: Live,
    ) -> Stream:
        return Stream(x.x, self._of_all(_add(self.implementation, y, w, live.count)), bias)

    def add_experts(
        self, x: Stream, norm: Float[Array, " D"], eps: float, experts: Experts, routing: Routing, live: Live
    ) -> Stream:
        total, sums = _routed(self.implementation, eps, self.leaves, routing, x, norm, experts, live.count)
        return Stream(total, self._of_all(sums))

    def _of_all(self, sums: Float[Array, "leaf S R N"]) -> Float[Array, "parts S R N"]:
        """Every device's sums, as one split of each, or their sum."""
        if self.leaves == ALL_HERE:
            return sums
        return self.leaves.to_add(self._sum(sums), lambda own: self._sum(own[:, None]))[:, None]

    def _sum(self, sums: Float[Array, "leaf S R N"]) -> Float[Array, "R N"]:
        if sums.shape[:2] == (1, 1):
            return sums[0, 0]
        nothing = jnp.full(sums.shape[2:], -0.0, jnp.float32)  # the one number that leaves every other as it is, 0 too
        return _finish(self.implementation, Stream(nothing, sums))

    def stream(self, x: Float[Array, "R D"]) -> Stream:
        return Stream(x)

    def finish(self, x: Stream) -> Float[Array, "R D"]:
        return x.x if x.sums is None else _finish(self.implementation, x)

    def logits(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        fresh: Bool[Array, " t"] | None = None,
    ) -> Float[Array, "t V"]:
        return _logits(self.implementation, eps, self.leaves, x, norm, head)


@dataclasses.dataclass(frozen=True)
class ChainAttention:
    """From the projection to what was attended. Keys and values are laid out alike, `[P, K, p, width]`; where the
    device wants rows wider than a head, the rest is 0.
    """

    implementation: Implementation

    def parts(self) -> dict[str, Any]:
        if self.implementation.name in OF_A_GPU:
            return {}
        return {"attention": sizes_of_device(ATTENTION, self.implementation.device)}

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Raises ValueError for a page size that does not divide the kernel's tile of keys."""
        dtype, width = jnp.dtype(model_config.dtype), self._width(model_config.head_dim)
        tile = chain_of(self.implementation).kv_tile(dtype, width)
        if tile % page_size:
            raise ValueError(
                f"kernels {str(self.implementation)!r} take {tile} keys of this model at a time, and whole pages: "
                f"page_size must divide that, got {page_size}"
            )
        pool: Any = jax.ShapeDtypeStruct((num_pages, model_config.held_key_value_heads, page_size, width), dtype)
        return pool, pool

    def _width(self, head_dim: int) -> int:
        if self.implementation.name in OF_A_GPU:
            return next(width for width in GPU_WIDTHS if width >= head_dim)
        return ceil_to(head_dim, LANES)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Int[Array, "slots n"]:
        """All of them: kernels look up a block's own by its slot."""
        return tables

    def rows_of(self, packed: Sums) -> Float[Array, "R N"]:
        return _live(with_bias(packed.sums.sum(0), packed.bias), packed.count)

    def rotate_and_write(
        self,
        model_config: ModelConfig,
        packed: PackedHeads,
        pools: Pools,
        tables: Array,
        blocks: QueryBlocks,
        tile: int,
    ) -> tuple[Float[Array, "R H h"], Pools]:
        frequencies = jnp.asarray(inverse_frequencies(model_config.rope, model_config.head_dim))
        projection = Projection(packed.rows.sums, packed.rows.bias, packed.q_norm, packed.k_norm, frequencies)
        geometry = Geometry(
            model_config.num_attention_heads,
            model_config.held_key_value_heads,
            model_config.head_dim,
            model_config.reduction_leaves,
            model_config.rms_norm_eps,
            model_config.rope.attention_factor,
        )
        located = located_blocks(tables, blocks)
        q, *written = chain_of(self.implementation).rotate_and_write(geometry, projection, *pools, located)
        return q, Pools(*written)

    def attend(
        self, model_config: ModelConfig, pools: Pools, q: Float[Array, "R H h"], tables: Array, blocks: QueryBlocks
    ) -> Float[Array, "R Hh"]:
        return chain_of(self.implementation).attend(q, *pools, located_blocks(tables, blocks))
