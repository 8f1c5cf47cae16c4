"""Many small arrays as one, because each array that the host hands to a step is an upload of its own."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Layout(NamedTuple):
    """What was packed: the tree, and the shape and dtype of each of its arrays."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of arrays as one array of words, bit for bit."""

    words: Int[Array, " n"]
    layout: Layout

    def unpack(self) -> Any:
        """The pytree again, inside a jitted function."""
        structure, shapes, dtypes = self.layout
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = jnp.split(self.words, ends[:-1])
        whole = zip(parts, shapes, dtypes, strict=True)
        return jax.tree.unflatten(structure, [_typed(part, dtype).reshape(shape) for part, shape, dtype in whole])


def pack(tree: Any) -> Packed:
    """numpy arrays of bools and of numbers of four bytes, packed."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    layout = Layout(structure, tuple(x.shape for x in arrays), tuple(x.dtype for x in arrays))
    words: Any = np.concatenate([_words(x) for x in arrays])
    return Packed(words, layout)


def _words(x: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat.astype(np.int32) if flat.dtype.kind == "b" else flat.view(np.int32)


def _typed(words: Int[Array, " n"], dtype: np.dtype) -> Array:
    if dtype.kind == "b":
        return words != 0
    return words if dtype == np.int32 else jax.lax.bitcast_convert_type(words, dtype)
