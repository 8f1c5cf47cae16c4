"""What top-k, top-p and min-p keep of a vocabulary."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.truncation_gpu import kept_gpu
from pallas_kernels.truncation_reference import kept_reference


def kept(
    logits: Float[Array, "t V"],
    top_k: Int[Array, " t"],
    top_p: Float[Array, " t"],
    min_p: Float[Array, " t"],
    *,
    implementation: Implementation,
) -> Bool[Array, "t V"]:
    """What top-k, then top-p, then min-p keep of each row of float32 logits (truncation_reference.py says how ties are
    broken). A row's answer depends on that row alone.

    A TPU's own compiler keeps the order of the reference's sums, inside the caller's region.
    """
    if implementation.name not in OF_A_GPU:
        return kept_reference(logits, top_k, top_p, min_p)
    return kept_gpu(logits, top_k, top_p, min_p, interpret=implementation.is_interpreted)
