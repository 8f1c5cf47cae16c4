"""Ordered reductions over leaves.

The hidden, head and vocabulary axes of the weights are cut into `reduction_leaves` equal slices, which are the leading
axis of every weight. Each partial result is computed per leaf at one shape, and partial sums are added here, in one
balanced binary tree in float32. A device that owns a run of leaves owns a subtree, so the order does not depend on how
many devices share the work.
"""

from jaxtyping import Array, Float


def tree_sum(partials: Float[Array, "leaf ..."]) -> Float[Array, "..."]:
    """Sum over the leading axis (a power of two long) as ((p0 + p1) + (p2 + p3)) + …"""
    while partials.shape[0] > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]
