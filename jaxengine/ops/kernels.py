"""Which code computes the decoder's ops: chosen once, by name, when an engine is made or sequences are scored.

"xla" is plain XLA (ops/xla.py), "pallas_tpu" and "pallas_gpu" are the devices' kernels (ops/pallas.py), "pallas_interpret" is the TPU's on
any machine, slowly. Each has its own bits, so the name is part of the contract; the layout of the KV cache belongs to it too.
"""

import functools
import logging
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig, check_kernels
from jaxengine.device.step_inputs import QueryBlocks
from jaxengine.ops.pallas import Pallas
from jaxengine.ops.xla import Xla
from pallas_kernels import implementations
from pallas_kernels.draw_reference import Draw

XLA = Xla()
OF_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
log = logging.getLogger("jaxengine")


class Kernels(Protocol):
    """The decoder's ops, as a hashable that jitted steps hold."""

    @property
    def name(self) -> str:
        """As EngineConfig.kernels says it, never "auto"."""
        ...

    @property
    def wide_rows(self) -> tuple[int, ...]:
        """Rows to a tile of decode steps wider than those that all kernels have (programs.py)."""
        ...

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Rows of the embedding in float32."""
        ...

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        """x @ w.T for every leaf's outputs (vLLM: column parallel), added in float32. x is rounded to the weights' dtype first."""
        ...

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        """silu(gate) · up of a leaf's outputs: gates, then ups."""
        ...

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        """Sum over leaves of x @ w.T, in the fixed order of the tree (vLLM: row parallel)."""
        ...

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        """A token of each row and its logprob under softmax(logits): given ≥ 0 is scored, else one is drawn.

        Without uniforms all are given.
        """
        ...

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Shapes and dtypes of one layer's keys and values."""
        ...

    def as_pages(self, k: Float[Array, "B r K h"], v: Float[Array, "B r K h"]) -> tuple[Array, Array]:
        """Blocks of r tokens as B pages of r: the same bits as they lie in pools."""
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
        """Causal attention of the blocks over their sequences' pages, in the model's dtype. The same bits whatever else is attended."""
        ...


@functools.cache
def choose_kernels(name: str, model_config: ModelConfig) -> Kernels:
    """The kernels of that name for a model on the first device; logged.

    "auto" is the device's own, or "xla", with a warning that says why, where they do not take this device or model; on a CPU it is "xla".
    Raises ValueError for an unknown name, and for a name given that the device or the model does not fit.
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
    kernels = Pallas(implementations.choose(name))
    kernels.check(model_config)
    return kernels
