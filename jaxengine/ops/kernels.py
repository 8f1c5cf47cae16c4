"""Which code computes the decoder's ops: chosen once, by name, when an engine is made or sequences are scored.

"xla" is plain XLA (ops/xla.py), "pallas_tpu" and "pallas_gpu" are the devices' kernels (ops/pallas.py),
"pallas_interpret" runs the TPU's on any machine, slowly. Each has its own bits, so the name is part of the contract;
the layout of the KV cache belongs to it too.

An implementation is three small classes, one for each protocol below; ops/sharded.py wraps any three for a mesh.
"""

import dataclasses
import functools
import logging
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig, check_kernels
from jaxengine.ops import pallas, xla
from jaxengine.ops.query_blocks import QueryBlocks
from pallas_kernels import implementations
from pallas_kernels.draw_reference import Draw
from pallas_kernels.implementations import Implementation

OF_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
log = logging.getLogger("jaxengine")


class Products(Protocol):
    """Matrix products of the rows of one tile.

    Weights carry the leaf axis first (sharding/leaves.py); sums are float32.
    """

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Rows of the embedding in float32."""
        ...

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        """x @ w.T for every leaf's outputs (vLLM: column parallel). x is rounded to the weights' dtype first."""
        ...

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        """silu(gate) · up of a leaf's outputs: gates, then ups."""
        ...

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        """Sum over leaves of x @ w.T, in the fixed order of the tree (vLLM: row parallel)."""
        ...


class Attention(Protocol):
    """Pages of keys and values, and attention over them.

    A pool is one layer's keys, or its values: all pages `[P, …]`.
    """

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Shapes and dtypes of one layer's keys and values."""
        ...

    def as_pages(self, k: Float[Array, "B r K h"], v: Float[Array, "B r K h"]) -> tuple[Array, Array]:
        """Blocks of r tokens as B pages of r tokens: the same bits as they lie in pools."""
        ...

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Pools, or pages of them, as `[P, p, K, _]`; jax's or numpy's."""
        ...

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Array:
        """A step's block tables as `write` and `attend` take them."""
        ...

    def write(
        self,
        keys: Array,
        values: Array,
        k: Float[Array, "B r K h"],
        v: Float[Array, "B r K h"],
        tables: Array,
        blocks: QueryBlocks,
    ) -> tuple[Array, Array]:
        """The pools with k and v of each block in the page that its table names. Copies bits, so it needs no pinning.

        A block lies in one page: block starts are multiples of r and page sizes too.
        """
        ...

    def attend(
        self,
        model_config: ModelConfig,
        keys: Array,
        values: Array,
        q: Float[Array, "B r H h"],
        tables: Array,
        blocks: QueryBlocks,
    ) -> Float[Array, "B r Hh"]:
        """Causal attention of the blocks over their sequences' pages, in the model's dtype.

        A block's bits do not depend on what else is attended.
        """
        ...


class DrawKernel(Protocol):
    """The end of a step: a token of each row, and its logprob."""

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        """A token of each row and its logprob under softmax(logits): where given ≥ 0 that token, else one that is
        drawn.

        Without uniforms all are given. Draw holds tokens (int32), logprobs, and per row the largest logit and the
        logarithm of the sum of exponentials after it is subtracted (float32, all `[t]`): `Draw.all_logprobs(logits)` is
        `[t, V]`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The decoder's ops. Hashable, so that a jitted step can hold it as a static argument."""

    name: str  # as in EngineConfig.kernels, never "auto"
    products: Products
    attention: Attention
    draw: DrawKernel
    wide_rows: tuple[
        int, ...
    ] = ()  # rows of decode tiles wider than those that all kernels have (engine/step_variants.py)

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON: the contract holds it."""
        return {"name": self.name} | self.products.parts() | self.attention.parts()


XLA = Kernels("xla", xla.XlaProducts(), xla.XlaAttention(), xla.XlaDraw())


def kernels_of(implementation: Implementation) -> Kernels:
    """A device's own kernels."""
    own = (
        pallas.PallasProducts(implementation),
        pallas.PallasAttention(implementation),
        pallas.PallasDraw(implementation),
    )
    return Kernels(implementation.name, *own, wide_rows=pallas.WIDE_ROWS)


@functools.cache
def choose_kernels(name: str, model_config: ModelConfig) -> Kernels:
    """The kernels of that name for a model on the first device; logged.

    "auto" is the device's own, or "xla", with a warning that says why, where they do not take this device or model; on
    a CPU it is "xla". Raises ValueError for an unknown name, and for a name given that the device or the model does not
    fit.
    """
    check_kernels(name)
    if name != "auto":
        return _named(name, model_config)
    wanted = OF_PLATFORM.get(jax.devices()[0].platform, "xla")
    try:
        return _named(wanted, model_config)
    except ValueError as error:
        log.warning("kernels: 'xla' in the place of %r: %s", wanted, error)
        return _named("xla", model_config)


def _named(name: str, model_config: ModelConfig) -> Kernels:
    if name == "xla":
        log.info("kernels: xla")
        return XLA
    implementation = implementations.choose(name)
    pallas.check_model(implementation, model_config)
    return kernels_of(implementation)
