"""Every array and number that the CPU's kernels are given is compared with what they read and write, before they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES

from pallas_kernels.cpu import calls, library

ROWS, TOKENS, HEADS, WIDTH, VOCABULARY = 4, 16, 2, 24, 256


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return array(*shape, dtype="int32")


KEYS, VALUES = calls.page_shapes(HEADS, 3, 16, WIDTH, jnp.uint16)
BLOCKS = dict(tables=ints(4, 2), slots=ints(2), starts=ints(2), counts=ints(2), first_rows=ints(0), num_blocks=ints())
Q = array(2 * TOKENS, 4, WIDTH)
PRODUCT = dict(eps=np.float32(1e-6), tile=8, rounds=True)
FRESH = dict(fresh=array(0, dtype="bool"), count=ints())
# Operands, results, and numbers of each op, under the names that a refusal calls them by.
OPS = {
    "product": (
        dict(x=array(ROWS, 40), norm=array(40), w=array(2, 8, 40), bias=array(16), residual=array(0)) | FRESH,
        dict(y=array(ROWS, 16)),
        PRODUCT | dict(form=calls.PLAIN),
    ),
    "gated product": (
        dict(x=array(ROWS, 40), norm=array(40), w=array(2, 8, 40), bias=array(0), residual=array(0)) | FRESH,
        dict(y=array(ROWS, 8)),
        PRODUCT | dict(form=calls.GATED),
    ),
    "added product": (
        dict(x=array(ROWS, 80), norm=array(0), w=array(2, 8, 40), bias=array(8), residual=array(ROWS, 8)) | FRESH,
        dict(y=array(ROWS, 8)),
        PRODUCT | dict(form=calls.ADDED),
    ),
    "embed": (dict(table=array(10, 40), ids=ints(ROWS), count=ints()), dict(y=array(ROWS, 40)), dict(tile=8)),
    "heads": (
        dict(packed=array(2 * TOKENS, 8 * WIDTH), q_norm=array(WIDTH), k_norm=array(WIDTH))
        | dict(frequencies=array(WIDTH // 2), **BLOCKS, keys=KEYS, values=VALUES),
        dict(q=Q, keys=KEYS, values=VALUES),
        dict(leaves=2, eps=np.float32(0), rope_factor=np.float32(1), scale=np.float32(1), type=2),
    ),
    "attend": (
        dict(q=Q, **BLOCKS, keys=KEYS, values=VALUES),
        dict(y=array(2 * TOKENS, 4 * WIDTH, dtype="bfloat16")),
        dict(type=2),
    ),
    "draw": (
        dict(logits=array(ROWS, VOCABULARY), uniforms=array(ROWS, 2), given=ints(ROWS)),
        dict(tokens=ints(ROWS), logprobs=array(ROWS), highs=array(ROWS), log_masses=array(ROWS)),
        {},
    ),
    "kept": (
        dict(logits=array(ROWS, VOCABULARY), top_k=ints(ROWS), top_p=array(ROWS), min_p=array(ROWS)),
        dict(mask=array(ROWS, VOCABULARY, dtype="bool")),
        {},
    ),
    "sample": (
        dict(x=array(ROWS, 40), norm=array(40), head=array(2, 128, 40), fresh=array(ROWS, dtype="bool"))
        | dict(live=array(ROWS, dtype="bool"), temperatures=array(ROWS), top_k=ints(ROWS), top_p=array(ROWS))
        | dict(min_p=array(ROWS), given=ints(ROWS), uniforms=array(ROWS, 2)),
        dict(tokens=ints(ROWS), logprobs=array(ROWS), finite=array(ROWS, dtype="bool")),
        dict(eps=np.float32(1e-6), vocabulary=VOCABULARY),
    ),
}


def call(op: str, **wrong) -> None:
    """The op over zeros, with other shapes or numbers in the places of some."""
    operands, results, numbers = ({name: wrong.get(name, x) for name, x in part.items()} for part in OPS[op])
    places = {list(operands).index(name): list(results).index(name) for name in results if name in operands}
    zeros = (jnp.zeros(x.shape, x.dtype) for x in operands.values())
    numbers = {name: np.int64(x) if type(x) is int else x for name, x in numbers.items()}
    out = calls._call(op.split()[-1], tuple(results.values()), BODIES[0], places)(*zeros, **numbers)
    jax.block_until_ready(out)


@pytest.mark.parametrize("op", OPS)
def test_what_fits_is_taken(op):
    assert {name.split()[-1] for name in OPS} | {"zeros"} == set(library.OPS)
    call(op)


# Sizes that others are compared with, so that a refusal names one of those; a table may be of any width.
NAMED = {
    ("w", "product"): "x",
    ("table", "embed"): "y",
    ("ids", "embed"): "y",
    ("logits", "kept"): "mask",
    ("x", "sample"): "head",
}
LONGER = [(op, name) for op, parts in OPS.items() for name in parts[0] | parts[1] if name != "tables"]


@pytest.mark.parametrize("op, name", LONGER, ids=map(" ".join, LONGER))
def test_an_array_that_is_longer_is_refused(op, name):
    operands, results, _ = OPS[op]
    right, kind = (operands | results)[name], op.split()[-1]
    wrong = array(*right.shape[:-1], (right.shape or (1,))[-1] + 1, dtype=right.dtype)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kind}: {NAMED.get((name, kind), name)}: "):
        call(op, **{name: wrong})


@pytest.mark.parametrize(
    "op, name, wrong",
    [
        ("product", "x", array(ROWS * 40)),
        ("product", "x", array(ROWS, 40, dtype="int16")),
        ("product", "norm", array(40, dtype="int8")),
        ("product", "w", array(16, 40)),
        ("product", "w", array(2, 8, 40, dtype="int8")),
        ("product", "w", array(3, 8, 40)),
        ("product", "w", array(256, 8, 40)),
        ("product", "w", array(2, 8, 0)),
        ("gated product", "w", array(2, 9, 40)),
        ("product", "y", array(ROWS, 16, dtype="float16")),
        ("product", "tile", 0),
        ("product", "form", 3),
        ("gated product", "fresh", array(ROWS, dtype="bool")),
        ("embed", "table", array(400)),
        ("embed", "table", array(0, 40)),
        ("embed", "table", array(10, 40, dtype="int32")),
        ("embed", "tile", 0),
        ("heads", "q", array(2 * TOKENS, 4 * WIDTH)),
        ("heads", "k_norm", array(WIDTH, dtype="int8")),
        ("heads", "leaves", 0),
        ("heads", "leaves", 3),
        ("attend", "q", array(2 * TOKENS, 3, WIDTH)),
        ("attend", "y", array(2 * TOKENS, 4 * WIDTH)),
        ("draw", "logits", array(ROWS * VOCABULARY)),
        ("draw", "logits", array(ROWS, 0)),
        ("draw", "uniforms", array(0)),
        ("kept", "logits", array(ROWS * VOCABULARY)),
        ("sample", "x", array(ROWS * 40)),
        ("sample", "norm", array(40, dtype="int8")),
        ("sample", "head", array(256, 40)),
        ("sample", "head", array(2, 128, 40, dtype="int8")),
        ("sample", "head", array(2, 129, 40)),
        ("sample", "vocabulary", 0),
        ("sample", "vocabulary", VOCABULARY + 1),
        *(
            (op, name, wrong)
            for op in ("heads", "attend")
            for name, wrong in [
                ("tables", ints(8)),
                ("tables", ints()),
                ("slots", ints(0)),
                ("keys", array(*KEYS.shape[1:], dtype="uint16")),
                ("keys", array(*KEYS.shape)),
                ("keys", array(3, HEADS, WIDTH, 0, dtype="uint16")),
                ("keys", array(3, HEADS, 257, 16, dtype="uint16")),
                ("keys", array(3, 0, WIDTH, 16, dtype="uint16")),
                ("values", array(2, *VALUES.shape[1:], dtype="uint16")),
                ("values", array(*VALUES.shape, dtype="uint8")),
                ("type", 3),
            ]
        ),
    ],
)
def test_another_shape_type_or_number_is_refused(op, name, wrong):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{op.split()[-1]}: {name}: "):
        call(op, **{name: wrong})
