"""From the logical axes that an array declares to the axes of the mesh: one table."""

from jax.sharding import PartitionSpec

RULES: dict[str, str | None] = {
    "leaf": "tensor",  # the leading axis of every matrix (sharding/leaves.py)
    "heads": "tensor",  # of pages: a leaf has its own key-value heads
    "expert": "expert",
    "vocab": None,  # the three below are cut by leaves already
    "out": None,
    "in": None,
}


def spec_of(axes: tuple[str | None, ...]) -> PartitionSpec:
    """How an array with these logical axes lies on a mesh; None is an axis that is never cut.

    Raises ValueError for an axis without a rule, and where two axes of one array would lie along one axis of the mesh.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"no rule says where the axis {unknown[0]!r} of {axes} lies: known are {', '.join(RULES)}")
    cut = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for axis in cut if axis is not None]
    twice = [axis for axis in used if used.count(axis) > 1]
    if twice:
        raise ValueError(f"two of the axes {axes} would lie along the mesh's {twice[0]!r}")
    while cut and cut[-1] is None:
        cut.pop()
    return PartitionSpec(*cut)
