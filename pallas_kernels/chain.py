"""The chain's kernels by one set of names: a Hopper GPU's (chain_gpu) and a TPU's (chain_tpu).

A product leaves partial sums `[leaf, S, M, N]`, which the next kernel adds: a GPU's those of each leaf and split, a
TPU's one, because it adds them itself. The first `live` rows are computed, others may hold anything; a GPU computes
all.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chain_gpu import attend as gpu_attend
from pallas_kernels.chain_gpu import heads as gpu_heads
from pallas_kernels.chain_gpu import product as gpu_product
from pallas_kernels.chain_gpu import residual as gpu_residual
from pallas_kernels.chain_gpu.sizes import chain_sizes, split_of
from pallas_kernels.chain_tpu import heads as tpu_heads
from pallas_kernels.chain_tpu import residual as tpu_residual
from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.matmul_tpu import matmul_tpu, sum_of_leaves_tpu, sum_of_parts_tpu
from pallas_kernels.packed_heads import Geometry, Projection
from pallas_kernels.paged_attention_inputs import PagedBlocks, Pages, Scoring
from pallas_kernels.paged_attention_tpu import attention_of_scaled
from pallas_kernels.sizes import matmul_sizes
from pallas_kernels.sizes_attention import attention_sizes

Sums = Float[Array, "leaf S M N"]


@dataclasses.dataclass(frozen=True)
class GpuChain:
    device: str
    interpret: bool

    def embed(self, table: Float[Array, "V D"], ids: Int[Array, " M"]) -> Float[Array, "M D"]:
        """Rows of the table in float32."""
        return gpu_residual.embed(table, ids, interpret=self.interpret)

    def total(self, x: Array, sums: Sums | None, bias: Array | None, live: Array | None = None) -> Float[Array, "M D"]:
        """x with the sums and the bias added."""
        return gpu_residual.total(x, sums, bias, interpret=self.interpret)

    def settle(
        self,
        x: Float[Array, "M D"],
        sums: Sums | None,
        bias: Float[Array, " D"] | None,
        norm: Float[Array, " D"],
        eps: float,
        dtype: Any,
        parts: int = 1,
        live: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "M D"], Float[Array, "parts M D"]]:
        """(`total`, its norm in `dtype`, or as so many numbers of `dtype` whose sum it is)."""
        return gpu_residual.settle(x, sums, bias, norm, eps, dtype, parts, interpret=self.interpret)

    def outputs(
        self, x: Float[Array, "M K"], w: Float[Array, "N K"], live: Int[Array, ""] | None = None
    ) -> Float[Array, "S M N"]:
        """The splits' partial sums of x @ w.T."""
        return gpu_product.outputs(x[None], w, chain_sizes(self.device, w.dtype), interpret=self.interpret)

    def finished(self, x: Float[Array, "P M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
        """Σ_p x[p] @ w.T, with nothing left to add."""
        return gpu_product.finished(x, w, chain_sizes(self.device, w.dtype), interpret=self.interpret)

    def summed(
        self, x: Float[Array, "M leaf*K"], w: Float[Array, "leaf N K"], live: Int[Array, ""] | None = None
    ) -> Sums:
        """The partial sums of each leaf's own columns of x times its w."""
        return gpu_product.summed(x, w, chain_sizes(self.device, w.dtype), interpret=self.interpret)

    def gated(
        self, x: Float[Array, "M K"], w: Float[Array, "leaf F2 K"], live: Int[Array, ""] | None = None
    ) -> Float[Array, "M leaf*F"]:
        """silu(gate) · up in the weights' dtype, by leaves' columns. A leaf has its gates, then its ups."""
        return gpu_product.gated(x, w, chain_sizes(self.device, w.dtype), interpret=self.interpret)

    def split_of(self, dtype: Any, outputs: int, inputs: int) -> int:
        """How much of K one partial sum covers."""
        return split_of(chain_sizes(self.device, dtype), outputs, inputs)

    def kv_tile(self, dtype: Any, width: int) -> int:
        """Keys that attention takes at a time."""
        return chain_sizes(self.device, dtype).kv_tile

    def rotate_and_write(
        self, geometry: Geometry, projection: Projection, keys: Array, values: Array, blocks: PagedBlocks
    ) -> tuple[Float[Array, "R H h"], Array, Array]:
        """(queries for `attend`, the pools with the blocks' keys and values)."""
        return gpu_heads.rotate_and_write(geometry, projection, keys, values, blocks, interpret=self.interpret)

    def attend(
        self, q: Float[Array, "R H h"], keys: Array, values: Array, blocks: PagedBlocks
    ) -> Float[Array, "R H*h"]:
        """What the queries attend to, in the pools' dtype."""
        sizes = chain_sizes(self.device, keys.dtype)
        return gpu_attend.attend(q, keys, values, blocks, sizes, interpret=self.interpret)


@dataclasses.dataclass(frozen=True)
class TpuChain:
    """The same on a TPU. `interpret` may be the parameters of the interpreter that knows a TPU's memory."""

    device: str
    interpret: Any

    def embed(self, table: Float[Array, "V D"], ids: Int[Array, " M"]) -> Float[Array, "M D"]:
        return table[ids].astype(jnp.float32)  # a copy, which XLA does at the memory's speed

    def total(self, x: Array, sums: Sums | None, bias: Array | None, live: Array | None = None) -> Float[Array, "M D"]:
        return tpu_residual.total(x, _of_one_split(sums), bias, live, interpret=self.interpret)

    def settle(
        self,
        x: Float[Array, "M D"],
        sums: Sums | None,
        bias: Float[Array, " D"] | None,
        norm: Float[Array, " D"],
        eps: float,
        dtype: Any,
        parts: int = 1,
        live: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "M D"], Float[Array, "parts M D"]]:
        sums = _of_one_split(sums)
        return tpu_residual.settle(x, sums, bias, norm, eps, dtype, parts, live, interpret=self.interpret)

    def outputs(
        self, x: Float[Array, "M K"], w: Float[Array, "N K"], live: Int[Array, ""] | None = None
    ) -> Float[Array, "S M N"]:
        sizes, dtype = matmul_sizes(self.device, w.dtype, *w.shape), jnp.dtype(jnp.float32)
        return matmul_tpu(x, w[None, None], None, None, sizes, dtype, live=live, interpret=self.interpret)

    def finished(self, x: Float[Array, "P M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
        return sum_of_parts_tpu(x, w, matmul_sizes(self.device, w.dtype, *w.shape), interpret=self.interpret)

    def summed(
        self, x: Float[Array, "M leaf*K"], w: Float[Array, "leaf N K"], live: Int[Array, ""] | None = None
    ) -> Sums:
        own = x.reshape(x.shape[0], w.shape[0], -1).swapaxes(0, 1)
        sizes = matmul_sizes(self.device, w.dtype, *w.shape[1:])
        return sum_of_leaves_tpu(own, w, sizes, live, interpret=self.interpret)[None, None]

    def gated(
        self, x: Float[Array, "M K"], w: Float[Array, "leaf F2 K"], live: Int[Array, ""] | None = None
    ) -> Float[Array, "M leaf*F"]:
        leaves, both, inputs = w.shape
        sizes = matmul_sizes(self.device, w.dtype, both // 2, inputs, 2)
        parts = w.reshape(leaves, 2, -1, inputs)
        y = matmul_tpu(x, parts, None, None, sizes, w.dtype, live=live, interpret=self.interpret)
        return y.swapaxes(0, 1).reshape(x.shape[0], -1)

    def split_of(self, dtype: Any, outputs: int, inputs: int) -> int:
        return inputs

    def kv_tile(self, dtype: Any, width: int) -> int:
        return attention_sizes(self.device, dtype, width).kv_tile

    def rotate_and_write(
        self, geometry: Geometry, projection: Projection, keys: Array, values: Array, blocks: PagedBlocks
    ) -> tuple[Float[Array, "R H h"], Array, Array]:
        return tpu_heads.rotate_and_write(geometry, projection, keys, values, blocks, interpret=self.interpret)

    def attend(
        self, q: Float[Array, "R H h"], keys: Array, values: Array, blocks: PagedBlocks
    ) -> Float[Array, "R H*h"]:
        sizes, done = attention_sizes(self.device, keys.dtype, keys.shape[3]), Scoring(scale=1.0)
        q = q.reshape(blocks.starts.shape[0], -1, *q.shape[1:])
        pages, how = Pages(keys, values), dict(interpret=self.interpret)
        out = attention_of_scaled(q, pages, blocks, None, done, sizes, keys.dtype, **how)
        return out.reshape(out.shape[0] * out.shape[1], -1)


def _of_one_split(sums: Sums | None) -> Float[Array, "leaf M N"] | None:
    return None if sums is None else sums[:, 0]


def chain_of(of: Implementation) -> GpuChain | TpuChain:
    """The chain of an implementation."""
    return (GpuChain if of.name in OF_A_GPU else TpuChain)(of.device, of.is_interpreted)
