"""The decoder's ops as a chain of kernels in C++ (pallas_kernels/cpu). kernels.py says what each op has to be.

A row's bits depend on it alone, so no op works in tiles. Rows after the live ones are not to be read: a kernel writes
zeros to the end of the last tile of `Live.tile` rows with a live one, and nothing after it; on several devices `_add`
adds its bias to those zeros. Gradients are XLA's, of the same expressions over the live rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.differentiated import differentiated_as
from jaxengine.ops.experts import Experts, Routing
from jaxengine.ops.heads import PackedHeads
from jaxengine.ops.in_tiles import ProductsInTiles
from jaxengine.ops.linear import by_leaf, dot, join_leaves, with_bias
from jaxengine.ops.live import Live
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.pallas import located_blocks
from jaxengine.ops.pools import PLAIN_MEMORY, Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.rope import inverse_frequencies
from jaxengine.ops.xla import XlaProducts, storage_dtype
from pallas_kernels.cpu import calls, library
from pallas_kernels.draw import draw_by
from pallas_kernels.draw_reference import Draw
from pallas_kernels.wanted import Wanted
from sharding.leaves import ALL_HERE, Leaves

SOME_HUGE_PAGES = 4 << 20  # bytes; a page of those is 2 MiB
ORDER = 4  # of all sums in pallas_kernels/cpu: raised by whoever changes one, because it is in the bits


def check_model(model_config: ModelConfig) -> None:
    """Raises ValueError where the kernels do not run here, or do not take the model."""
    platform = jax.devices()[0].platform
    if platform != "cpu":
        raise ValueError(f"kernels 'cpu' run on a CPU, the first device is a {platform}: take kernels 'auto'")
    library.load()
    calls.page_shapes(1, 1, 16, model_config.head_dim, model_config.dtype)
    if model_config.reduction_leaves > calls.MOST_LEAVES:
        raise ValueError(
            f"kernels 'cpu' add up to {calls.MOST_LEAVES} leaves, got reduction_leaves="
            f"{model_config.reduction_leaves}: take kernels 'xla'"
        )


# -- what gradients are taken of ---------------------------------------------------------------------------------------


def _kept(x: Float[Array, "R D"], count: Int[Array, ""], other: float) -> Float[Array, "R D"]:
    """Rows from `count` on may hold anything, NaN too, which no cotangent of 0 would turn into 0."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < count, x, other)


def _plain_project(
    eps: float, tile: int, body: str, leaves: Leaves, like: Array, x, norm, w, bias, count
) -> Float[Array, "R N"]:
    y = join_leaves(XlaProducts(leaves).outputs(rms_norm(_kept(x, count, 1.0), norm, eps), w))
    return _kept(with_bias(y, bias), count, 0.0)


def _plain_gated(
    eps: float, tile: int, body: str, leaves: Leaves, like: Array, x, norm, w, count
) -> Float[Array, "R F"]:
    y = XlaProducts(leaves).gated(rms_norm(_kept(x, count, 1.0), norm, eps), w)
    return _kept(join_leaves(y).astype(w.dtype), count, 0.0)


def _plain_add(tile: int, body: str, leaves: Leaves, like: Array, x, y, w, bias, count) -> Float[Array, "R D"]:
    total = _kept(x, count, 0.0) + leaves.sum(dot(by_leaf(_kept(y, count, 0.0), w.shape[0]), w))
    return _kept(with_bias(total, bias), count, 0.0)


def _plain_logits(eps: float, body: str, leaves: Leaves, like: Array, x, norm, head, fresh) -> Float[Array, "t V"]:
    y = XlaProducts(leaves).outputs(rms_norm(x, norm, eps), head.astype(jnp.float32))
    return leaves.columns(join_leaves(y))


# -- the ops -----------------------------------------------------------------------------------------------------------


@differentiated_as(_plain_project, static=4)
def _project(eps: float, tile: int, body: str, leaves: Leaves, x, norm, w, bias, count) -> Float[Array, "R N"]:
    return calls.outputs(x, norm, eps, w, bias, calls.Live(count, tile), body)


@differentiated_as(_plain_gated, static=4)
def _gated(eps: float, tile: int, body: str, leaves: Leaves, x, norm, w, count) -> Float[Array, "R F"]:
    return calls.gated(x, norm, eps, w, calls.Live(count, tile), body)


@differentiated_as(_plain_add, static=3)
def _add(tile: int, body: str, leaves: Leaves, x, y, w, bias, count) -> Float[Array, "R D"]:
    if leaves == ALL_HERE:
        return calls.added(x, y, w, bias, calls.Live(count, tile), body)
    nothing = jnp.full_like(x, -0.0)  # the one number that leaves every other as it is, 0 too
    total = x + leaves.sum(calls.added(nothing, y, w, None, calls.Live(count, tile), body)[None])
    return with_bias(total, bias)


@differentiated_as(_plain_logits, static=3)
def _logits(eps: float, body: str, leaves: Leaves, x, norm, head, fresh) -> Float[Array, "t V"]:
    return leaves.columns(calls.logits(x, norm, eps, head, fresh, body))


@dataclasses.dataclass(frozen=True)
class CpuProducts:
    """The products of ops/kernels.py. `body` is no part of the bits."""

    body: str
    leaves: Leaves = ALL_HERE

    def with_leaves(self, leaves: Leaves) -> "CpuProducts":
        return dataclasses.replace(self, leaves=leaves)

    def parts(self) -> dict[str, Any]:
        return {"order": ORDER}

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live) -> Float[Array, "R D"]:
        def lookup(table: Array, ids: Array) -> Float[Array, "R D"]:
            return calls.embed(table, ids, calls.Live(live.count, live.tile), self.body)

        return self.leaves.looked_up(lookup, table, ids)

    def project(
        self,
        x: Float[Array, "R D"],
        norm: Float[Array, " D"],
        eps: float,
        w: Float[Array, "leaf N D"],
        bias: Float[Array, "leaf N"] | None,
        live: Live,
    ) -> tuple[Float[Array, "R D"], Float[Array, "R leaf*N"]]:
        return x, _project(eps, live.tile, self.body, self.leaves, x, norm, w, bias, live.count)

    def gated(
        self, x: Float[Array, "R D"], norm: Float[Array, " D"], eps: float, w: Float[Array, "leaf F2 D"], live: Live
    ) -> tuple[Float[Array, "R D"], Float[Array, "R leaf*F"]]:
        return x, _gated(eps, live.tile, self.body, self.leaves, x, norm, w, live.count)

    def add(
        self,
        x: Float[Array, "R D"],
        y: Float[Array, "R leaf*K"],
        w: Float[Array, "leaf D K"],
        bias: Float[Array, " D"] | None,
        live: Live,
    ) -> Float[Array, "R D"]:
        return _add(live.tile, self.body, self.leaves, x, y, w, bias, live.count)

    def add_experts(
        self,
        x: Float[Array, "R D"],
        norm: Float[Array, " D"],
        eps: float,
        experts: Experts,
        routing: Routing,
        live: Live,
    ) -> Float[Array, "R D"]:
        """XLA's, in its regions: there is no kernel for it yet."""
        return ProductsInTiles(XlaProducts(self.leaves)).add_experts(x, norm, eps, experts, routing, live)

    def stream(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return x

    def finish(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return x

    def logits(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        fresh: Bool[Array, " t"] | None = None,
    ) -> Float[Array, "t V"]:
        return _logits(eps, self.body, self.leaves, x, norm, head, fresh)


@dataclasses.dataclass(frozen=True)
class CpuAttention:
    """Keys and values are stored as calls.by_token reads them."""

    body: str

    def parts(self) -> dict[str, Any]:
        return {}

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        dtype = storage_dtype(jnp.dtype(model_config.dtype))  # XLA copies pages, and would widen 16-bit floats for it
        heads, width = model_config.held_key_value_heads, model_config.head_dim
        return calls.page_shapes(heads, num_pages, page_size, width, dtype)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return calls.by_token(keys, values)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Int[Array, "slots n"]:
        """All of them: kernels look up a block's own by its slot."""
        return tables

    def rows_of(self, packed: Float[Array, "R N"]) -> Float[Array, "R N"]:
        return packed

    def rotate_and_write(
        self,
        model_config: ModelConfig,
        packed: PackedHeads,
        pools: Pools,
        tables: Array,
        blocks: QueryBlocks,
        tile: int,
    ) -> tuple[Float[Array, "R H h"], Pools]:
        geometry = calls.Geometry(
            model_config.reduction_leaves,
            model_config.num_attention_heads,
            model_config.head_dim,
            model_config.rms_norm_eps,
            model_config.rope.attention_factor,
            model_config.dtype,
        )
        frequencies = jnp.asarray(inverse_frequencies(model_config.rope, model_config.head_dim))
        located = located_blocks(tables, blocks)
        norms = packed.q_norm, packed.k_norm
        q, *written = calls.rotate_and_write(
            geometry, packed.rows, norms, frequencies, *pools, located, self.body, blocks.first_rows
        )
        return q, Pools(*written)

    def attend(
        self, model_config: ModelConfig, pools: Pools, q: Float[Array, "R H h"], tables: Array, blocks: QueryBlocks
    ) -> Float[Array, "R Hh"]:
        return calls.attend(q, *pools, located_blocks(tables, blocks), model_config.dtype, self.body, blocks.first_rows)


class CpuMemory:
    """In huge pages what takes some and lies on one device."""

    def zeros(self, shape: jax.ShapeDtypeStruct) -> Array:
        if not _takes_huge_pages(shape):
            return PLAIN_MEMORY.zeros(shape)
        made = calls.zeros(jax.ShapeDtypeStruct(shape.shape, shape.dtype))
        return made if shape.sharding is None else jax.device_put(made, shape.sharding)

    def settle(self, weights: Any) -> None:
        large = [x for x in jax.tree.leaves(weights) if isinstance(x, jax.Array) and _takes_huge_pages(x)]
        if large:
            library.into_huge_pages([(x.unsafe_buffer_pointer(), x.nbytes) for x in large])


MEMORY = CpuMemory()


def _takes_huge_pages(x: Any) -> bool:
    on_one_device = x.sharding is None or len(x.sharding.device_set) == 1
    return on_one_device and x.size * x.dtype.itemsize >= SOME_HUGE_PAGES


@dataclasses.dataclass(frozen=True)
class CpuDraw:
    """One kernel call for all rows."""

    body: str

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        return draw_by(self._draw, logits, given, uniforms)

    def _draw(self, logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"]) -> Draw:
        return Draw(*calls.draw(logits, uniforms, given, self.body))

    def kept(
        self, logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
    ) -> Bool[Array, "t V"]:
        return calls.kept(logits, top_k, top_p, min_p, self.body)


@dataclasses.dataclass(frozen=True)
class CpuHeadAndDraw:
    """Logits in memory of the kernel's own, which XLA would fetch from the system anew in every step."""

    body: str

    def __call__(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        wanted: Wanted,
        vocab_size: int,
    ) -> tuple[Int[Array, " t"], Float[Array, " t"], Bool[Array, " t"]]:
        return calls.sample(x, norm, eps, head, wanted, vocab_size, self.body)
