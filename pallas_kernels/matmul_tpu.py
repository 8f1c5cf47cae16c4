"""The matrix product's TPU body: one grid step adds one dot per row tile to a float32 sum in VMEM, in order along K."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.sizes import MatmulSizes
from pallas_kernels.tiles import tiles_of


def within(x: Array, first: Array, size: int) -> Array:
    """`x [_, depth]`, whose columns start at `first`, with zeros from column `size` on: past the end a block holds
    anything."""
    columns = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(columns < size, x, jnp.zeros_like(x))


def add_block(k: Array, x_ref, w_ref, sum_ref, sizes: MatmulSizes, inputs: int, live: Any = None) -> None:
    """sum_ref [parts, rows, columns] += the products of block k along K, one dot of fixed shape for each row tile and
    part. Tiles after the first `live` rows are left out, where that is given."""

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def cut(x):
        return x if inputs % sizes.depth == 0 else within(x, k * sizes.depth, inputs)

    for part in range(w_ref.shape[0]):
        w = cut(w_ref[part])

        def add(first: int, part: int = part, w: Array = w) -> None:
            rows = slice(first, first + sizes.rows)
            sum_ref[part, rows] += dot(cut(x_ref[rows]), w)

        for first in range(0, x_ref.shape[0], sizes.rows):
            if live is None or first == 0:
                add(first)
            else:
                pl.when(first < live)(functools.partial(add, first))


def add_leaf(leaf: Array, sum_ref, levels_ref) -> None:
    """sum_ref, which holds a leaf's sum, joins those of the leaves before: after the last leaf it holds the sum of all
    as ((l0 + l1) + (l2 + l3)) + … `levels_ref` keeps of each level of the tree what waits for its other half.
    """
    for level in range(levels_ref.shape[0]):
        low = leaf & ((2 << level) - 1)  # which leaf of the level's pair

        @pl.when(low == (2 << level) - 1)
        def _(level: int = level):
            sum_ref[...] = levels_ref[level] + sum_ref[...]

        @pl.when(low == (1 << level) - 1)
        def _(level: int = level):
            levels_ref[level] = sum_ref[...]


def _kernel(
    live_ref,
    x_ref,
    w_ref,
    bias_ref,
    residual_ref,
    out_ref,
    sum_ref,
    levels_ref=None,
    *,
    sizes: MatmulSizes,
    inputs: int,
    is_tree: bool,
) -> None:
    """`bias_ref` and `residual_ref` are None where the product has no such operand, `levels_ref` where each leaf is a
    product of its own. The products of several parts of x are added, the last first."""
    i, k = pl.program_id(1 if is_tree else 2), pl.program_id(3)
    rows, weights = x_ref.shape[1], range(w_ref.shape[0])
    for part in range(x_ref.shape[0]):
        add_block(k, x_ref.at[part], w_ref, sum_ref.at[part], sizes, inputs, live_ref[0] - i * rows)
    is_last = k == pl.num_programs(3) - 1
    if levels_ref is not None:
        leaf = pl.program_id(2)
        pl.when(is_last)(lambda: add_leaf(leaf, sum_ref, levels_ref))
        is_last = is_last & (leaf == pl.num_programs(2) - 1)

    @pl.when(is_last)
    def _():
        bias = [] if bias_ref is None else [bias_ref[part][None] for part in weights]
        for first in range(0, rows, sizes.rows):
            tile = slice(first, first + sizes.rows)
            sums = [_in_parts([sum_ref[of_x, part, tile] for of_x in range(x_ref.shape[0])]) for part in weights]
            y = finish(sums, bias, None if residual_ref is None else residual_ref[tile])
            out_ref[tile] = y.astype(out_ref.dtype)


def _in_parts(sums: list[Array]) -> Array:
    """Their sum, from the last to the first."""
    return functools.reduce(lambda total, more: more + total, sums[::-1])


def matmul_tpu(
    x: Float[Array, "M K"] | Float[Array, "leaf M K"],
    w: Float[Array, "leaf parts N K"],
    bias: Float[Array, "leaf parts N"] | None,
    residual: Float[Array, "leaf M N"] | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    live: Int[Array, ""] | None = None,
    interpret: Any = False,
) -> Float[Array, "leaf M N"]:
    """The product by blocks. As many row tiles share a fetched block of weights as M has, up to the table's number.
    Tiles after the first `live` rows are not computed, and may hold anything.

    Leaves are the outermost axis of one grid, so that a leaf's first blocks are fetched while the last leaf's are used.
    """
    return _product(x if x.ndim == 3 else x[None], w, bias, residual, sizes, out_dtype, live, interpret)


def sum_of_leaves_tpu(
    x: Float[Array, "leaf M K"],
    w: Float[Array, "leaf N K"],
    sizes: MatmulSizes,
    live: Int[Array, ""] | None,
    *,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """The sum over leaves of their products, by the tree, which stays in VMEM: the same bits as if each had been
    written out."""
    return _product(x, w[:, None], None, None, sizes, jnp.dtype(jnp.float32), live, interpret, adds="leaves")[0]


def sum_of_parts_tpu(
    x: Float[Array, "P M K"], w: Float[Array, "N K"], sizes: MatmulSizes, *, interpret: Any = False
) -> Float[Array, "M N"]:
    """The sum over the parts of x of their products with one weight, the last part's first: x_0 + (x_1 + x_2)."""
    return _product(x, w[None, None], None, None, sizes, jnp.dtype(jnp.float32), None, interpret, adds="parts")[0]


def _product(
    x: Float[Array, "X M K"],
    w: Float[Array, "leaf parts N K"],
    bias: Array | None,
    residual: Array | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    live: Int[Array, ""] | None,
    interpret: Any,
    adds: str = "",
) -> Float[Array, "leaf M N"]:
    """X is 1 where leaves share the rows, else a leaf's own or, where it `adds` "parts", those of one row."""
    (many, m, inputs), (leaves, parts, outputs, _) = x.shape, w.shape
    rows = sizes.rows * min(sizes.shared_tiles, pl.cdiv(m, sizes.rows))
    is_tree = adds == "leaves"
    sizes_of = leaves, pl.cdiv(outputs, sizes.columns), tiles_of(m if live is None else live, rows)
    of_rows = "parallel" if live is None else "arbitrary"  # a length that is known at run time is one core's
    kinds = "arbitrary" if is_tree else "parallel", "parallel", of_rows

    def ordered(leaf: Any, j: Any, i: Any) -> tuple:
        """The grid's outer axes: rows after columns, so that a block of all inputs' weights is fetched once; leaves
        before both, or, where they are added, after them."""
        return (j, i, leaf) if is_tree else (leaf, j, i)

    def at(place: Callable) -> Callable:
        """An index map, of the leaf, the block of columns, that of rows, and that of inputs."""

        def index(*ids):
            first, second, third, k = ids[:4]
            return place(*((third, first, second) if is_tree else (first, second, third)), k)

        return index

    together = many if adds == "parts" else 1
    of_x = pl.BlockSpec((together, rows, sizes.depth), at(lambda leaf, j, i, k: (leaf if many > together else 0, i, k)))
    of_w = pl.BlockSpec((None, parts, sizes.columns, sizes.depth), at(lambda leaf, j, i, k: (leaf, 0, j, k)))
    of_bias = pl.BlockSpec((None, parts, sizes.columns), at(lambda leaf, j, i, k: (leaf, 0, j)))
    of_out = pl.BlockSpec((None, rows, sizes.columns), at(lambda leaf, j, i, k: (0 if is_tree else leaf, i, j)))
    sums = together, parts, rows, sizes.columns
    scratch = [pltpu.VMEM(sums, jnp.float32)]
    if is_tree and leaves > 1:
        scratch.append(pltpu.VMEM((leaves.bit_length() - 1, *sums), jnp.float32))
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, inputs=inputs, is_tree=is_tree),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*ordered(*sizes_of), pl.cdiv(inputs, sizes.depth)),
            in_specs=[of_x, of_w, None if bias is None else of_bias, None if residual is None else of_out],
            out_specs=of_out,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((1 if is_tree else leaves, m, outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*ordered(*kinds), "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        name="matmul_tpu",
        interpret=interpret,
    )(jnp.full(1, m if live is None else live, jnp.int32), x, w, bias, residual)
