"""What Pallas kernels take, and the end of a step by them.

kernels.py says what each op has to be; chain.py has the others.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.query_blocks import QueryBlocks
from pallas_kernels import paged_attention_inputs as inputs
from pallas_kernels.draw import draw_and_score
from pallas_kernels.draw_reference import Draw
from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.sizes import MATMUL
from pallas_kernels.truncation import kept

GPU_WIDTHS = (16, 32, 64, 128, 256)  # of heads in pages: Triton's arrays are powers of two


def check_model(implementation: Implementation, model_config: ModelConfig) -> None:
    """Raises ValueError for a model with a dtype or heads that the kernels do not take."""
    name = implementation.name
    allowed = [dtype for family, dtype in MATMUL if family == implementation.device]
    if model_config.dtype not in allowed:
        raise ValueError(
            f"kernels {name!r} take weights in {' or '.join(allowed)}, got {model_config.dtype}: give another dtype, "
            "or take kernels 'xla'"
        )
    if name in OF_A_GPU and model_config.head_dim > GPU_WIDTHS[-1]:
        raise ValueError(
            f"kernels {name!r} take heads of at most {GPU_WIDTHS[-1]}, got head_dim={model_config.head_dim}: "
            "take kernels 'xla'"
        )


def sizes_of_device(table: dict[tuple[str, str], Any], device: str) -> dict[str, Any]:
    """A device's block sizes by dtype, ready for JSON: those that are part of a sum's bits."""
    return {dtype: sizes.in_bits() for (family, dtype), sizes in table.items() if family == device}


def located_blocks(tables: Int[Array, "slots n"], blocks: QueryBlocks) -> inputs.PagedBlocks:
    return inputs.PagedBlocks(tables, blocks.slots, blocks.starts, blocks.counts, blocks.num_blocks)


@dataclasses.dataclass(frozen=True)
class PallasDraw:
    """One kernel call for all rows of a tile."""

    implementation: Implementation

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        return draw_and_score(logits, given, uniforms, implementation=self.implementation)

    def kept(
        self, logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
    ) -> Bool[Array, "t V"]:
        return kept(logits, top_k, top_p, min_p, implementation=self.implementation)
