"""The decoder's ops as a chain of opaque kernels on a Hopper GPU (pallas_kernels/chain_gpu). kernels.py says what each
op has to be.

A product leaves its splits' partial sums, and the next kernel adds them: so what passes from op to op is not always one
array. Gradients are XLA's, of the same expressions.
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
from jaxengine.ops.pallas import PallasAttention, located_blocks, sizes_of_device
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.rope import inverse_frequencies
from jaxengine.ops.xla import XlaProducts
from pallas_kernels.chain_gpu import attend, heads, product, residual
from pallas_kernels.chain_gpu.sizes import CHAIN, ChainSizes, chain_sizes, split_of
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import Implementation
from sharding.leaves import ALL_HERE, Leaves, spread, tree_sum

HEAD_PARTS = 3  # bfloat16 numbers whose sum is a float32


class Stream(NamedTuple):
    """The residual stream: x, and what the last product adds to it."""

    x: Float[Array, "R D"]
    sums: Float[Array, "leaf S R D"] | None = None
    bias: Float[Array, " D"] | None = None


class Sums(NamedTuple):
    """A projection: its splits' partial sums, and its bias."""

    sums: Float[Array, "S R N"]
    bias: Float[Array, " N"] | None


# -- what gradients are taken of ---------------------------------------------------------------------------------------


def _plain_total(stream: Stream) -> Float[Array, "R D"]:
    x = stream.x
    if stream.sums is not None:
        x = x + tree_sum(stream.sums.sum(1))
    return with_bias(x, stream.bias)


def _plain_sums(
    x: Float[Array, "leaf M K"], w: Float[Array, "leaf N K"], split: int, count: int
) -> Float[Array, "leaf S M N"]:
    if count == 1:
        return dot(x, w)[:, None]
    x, w = (_as_splits(a, split, count) for a in (x, w))
    sums = dot(x, w)
    return sums.reshape(-1, count, *sums.shape[1:])


def _as_splits(a: Float[Array, "leaf M K"], split: int, count: int) -> Float[Array, "leaf*S M split"]:
    padded = jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % split)))
    return padded.reshape(*a.shape[:2], count, split).swapaxes(1, 2).reshape(-1, a.shape[1], split)


def _plain_finish(of: Implementation, like: Array, stream: Stream) -> Float[Array, "R D"]:
    return _plain_total(stream)


def _plain_project(of: Implementation, eps: float, leaves: Leaves, like: tuple, stream: Stream, norm: Array, w: Array):
    """Leaf by leaf, though the kernel takes all at once: a gradient's order may not follow who has which leaves."""
    x, split = _plain_total(stream), split_of(_sizes(of, w), w.shape[0] * w.shape[1], w.shape[2])
    y = spread(leaves.shared(rms_norm(x, norm, eps)), w.shape[0])
    sums = _plain_sums(y, w, split, like[1].shape[0])
    return x, jnp.moveaxis(sums, 0, 2).reshape(like[1].shape)


def _plain_gated(of: Implementation, eps: float, leaves: Leaves, like: tuple, stream: Stream, norm: Array, w: Array):
    x = _plain_total(stream)
    return x, join_leaves(XlaProducts(leaves).gated(rms_norm(x, norm, eps), w)).astype(w.dtype)


def _plain_add(of: Implementation, like: Array, y: Array, w: Array) -> Float[Array, "leaf S M N"]:
    return _plain_sums(by_leaf(y, w.shape[0]), w, split_of(_sizes(of, w), *w.shape[1:]), like.shape[1])


def _plain_routed(
    of: Implementation,
    eps: float,
    leaves: Leaves,
    routing: Routing,
    like: tuple,
    stream: Stream,
    norm: Array,
    experts: Experts,
    is_there: Array,
):
    x = _plain_total(stream)
    y = rms_norm(jnp.where(is_there[:, None], x, 1.0), norm, eps)  # padding may be NaN, which no cotangent of 0 undoes
    return x, partial_sums(XlaProducts(leaves), routing, y, experts, is_there)[:, None]


def _plain_logits(
    of: Implementation, eps: float, leaves: Leaves, like: Array, x: Array, norm: Array, head: Array
) -> Float[Array, "t V"]:
    y = XlaProducts(leaves).outputs(rms_norm(x, norm, eps), head.astype(jnp.float32))
    return leaves.columns(join_leaves(y))


def _sizes(of: Implementation, w: Array) -> ChainSizes:
    return chain_sizes(of.device, w.dtype)


# -- the ops -----------------------------------------------------------------------------------------------------------


@differentiated_as(_plain_finish, static=1)
def _finish(of: Implementation, stream: Stream) -> Float[Array, "R D"]:
    return residual.total(*stream, interpret=of.is_interpreted)


@differentiated_as(_plain_project, static=3)
def _project(
    of: Implementation, eps: float, leaves: Leaves, stream: Stream, norm: Array, w: Array
) -> tuple[Array, Array]:
    x, y = residual.settle(*stream, norm, eps, w.dtype, interpret=of.is_interpreted)
    return x, product.outputs(y, w.reshape(-1, w.shape[-1]), _sizes(of, w), interpret=of.is_interpreted)


@differentiated_as(_plain_gated, static=3)
def _gated(
    of: Implementation, eps: float, leaves: Leaves, stream: Stream, norm: Array, w: Array
) -> tuple[Array, Array]:
    x, y = residual.settle(*stream, norm, eps, w.dtype, interpret=of.is_interpreted)
    return x, product.gated(y[0], w, _sizes(of, w), interpret=of.is_interpreted)


@differentiated_as(_plain_add, static=1)
def _add(of: Implementation, y: Array, w: Array) -> Float[Array, "leaf S M N"]:
    return product.summed(y.astype(w.dtype), w, _sizes(of, w), interpret=of.is_interpreted)


@dataclasses.dataclass(frozen=True)
class _ExpertProducts:
    """Those of ops/experts.py, by kernels that have no gradient."""

    implementation: Implementation
    leaves: Leaves

    def scores(self, y: Float[Array, "t D"], router: Float[Array, "E D"]) -> Float[Array, "t E"]:
        of = self.implementation
        return product.finished(y[None], router, _sizes(of, router), interpret=of.is_interpreted)

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
    is_there: Array,
) -> tuple[Array, Array]:
    x, y = residual.settle(*stream, norm, eps, experts.router.dtype, interpret=of.is_interpreted)
    return x, partial_sums(_ExpertProducts(of, leaves), routing, y[0], experts, is_there)[:, None]


@differentiated_as(_plain_logits, static=3)
def _logits(of: Implementation, eps: float, leaves: Leaves, x: Array, norm: Array, head: Array) -> Float[Array, "t V"]:
    parts = HEAD_PARTS if head.dtype == jnp.bfloat16 else 1
    _, y = residual.settle(x, None, None, norm, eps, head.dtype, parts, interpret=of.is_interpreted)
    own = product.finished(y, head.reshape(-1, head.shape[-1]), _sizes(of, head), interpret=of.is_interpreted)
    return leaves.columns(own)


@dataclasses.dataclass(frozen=True)
class ChainProducts:
    """The products of ops/kernels.py."""

    implementation: Implementation
    leaves: Leaves = ALL_HERE

    def with_leaves(self, leaves: Leaves) -> "ChainProducts":
        return dataclasses.replace(self, leaves=leaves)

    def parts(self) -> dict[str, Any]:
        device = self.implementation.device
        return {"device": device, "chain": sizes_of_device(CHAIN, device)}

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live) -> Stream:
        def lookup(table: Array, ids: Array) -> Float[Array, "R D"]:
            flat = table.reshape(-1, table.shape[-1])
            return residual.embed(flat, ids, interpret=self.implementation.is_interpreted)

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
        total, sums = _project(self.implementation, eps, self.leaves, x, norm, w)
        return Stream(total), Sums(sums, None if bias is None else bias.reshape(-1))

    def gated(
        self, x: Stream, norm: Float[Array, " D"], eps: float, w: Float[Array, "leaf F2 D"], live: Live
    ) -> tuple[Stream, Float[Array, "R leaf*F"]]:
        total, inner = _gated(self.implementation, eps, self.leaves, x, norm, w)
        return Stream(total), inner

    def add(
        self,
        x: Stream,
        y: Float[Array, "R leaf*K"],
        w: Float[Array, "leaf D K"],
        bias: Float[Array, " D"] | None,
        live: Live,
    ) -> Stream:
        return Stream(x.x, self._of_all(_add(self.implementation, y, w)), bias)

    def add_experts(
        self, x: Stream, norm: Float[Array, " D"], eps: float, experts: Experts, routing: Routing, live: Live
    ) -> Stream:
        is_there = jnp.arange(x.x.shape[0]) < live.count
        total, sums = _routed(self.implementation, eps, self.leaves, routing, x, norm, experts, is_there)
        return Stream(total, self._of_all(sums))

    def _of_all(self, sums: Float[Array, "leaf S R N"]) -> Float[Array, "parts S R N"]:
        """Every device's sums, as one split of each, or their sum."""
        if self.leaves == ALL_HERE:
            return sums
        return self.leaves.to_add(self._sum(sums), lambda own: self._sum(own[:, None]))[:, None]

    def _sum(self, sums: Float[Array, "leaf S R N"]) -> Float[Array, "R N"]:
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
class ChainAttention(PallasAttention):
    """Pools as those of the other kernels; from the projection to what was attended in three kernels."""

    def parts(self) -> dict[str, Any]:
        return {}

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        dtype, width = jnp.dtype(model_config.dtype), self._width(model_config.head_dim)
        tile = chain_sizes(self.implementation.device, dtype).kv_tile
        if tile % page_size:
            raise ValueError(
                f"the GPU's kernels take {tile} keys at a time, and whole pages: got page_size={page_size}"
            )
        pool: Any = jax.ShapeDtypeStruct((num_pages, model_config.held_key_value_heads, page_size, width), dtype)
        return pool, pool

    def rows_of(self, packed: Sums) -> Float[Array, "R N"]:
        return with_bias(packed.sums.sum(0), packed.bias)

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
        projection = heads.Projection(packed.rows.sums, packed.rows.bias, packed.q_norm, packed.k_norm, frequencies)
        geometry = heads.Geometry(
            model_config.num_attention_heads,
            model_config.held_key_value_heads,
            model_config.head_dim,
            model_config.reduction_leaves,
            model_config.rms_norm_eps,
            model_config.rope.attention_factor,
        )
        located = located_blocks(tables, blocks)
        q, *written = heads.rotate_and_write(
            geometry, projection, *pools, located, interpret=self.implementation.is_interpreted
        )
        return q, Pools(*written)

    def attend(
        self, model_config: ModelConfig, pools: Pools, q: Float[Array, "R H h"], tables: Array, blocks: QueryBlocks
    ) -> Float[Array, "R Hh"]:
        located = located_blocks(tables, blocks)
        sizes = chain_sizes(self.implementation.device, pools.keys.dtype)
        return attend.attend(q, *pools, located, sizes, interpret=self.implementation.is_interpreted)
