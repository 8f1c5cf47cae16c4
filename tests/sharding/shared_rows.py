"""Run by test_shared_rows.py in a process with eight CPU devices: the end of a chain on rows that devices share, beside
the same on all rows, as JSON.

    python shared_rows.py
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)

from sharding.leaves import Leaves, RowsOfDevices  # noqa: E402
from sharding.mesh import WHOLE, Split, make_mesh  # noqa: E402

ROWS, COLUMNS = 16, 24


def end(leaves: Leaves, own_columns, marks):
    """A tree of all dtypes and ranks that answers have, from each row of logits and what belongs to it."""
    logits, marks = leaves.columns(own_columns), leaves.own_rows(marks)
    best = jnp.argmax(logits, axis=1).astype(jnp.int32)
    answers = {
        "token": best,
        "logprob": jnp.log(jnp.take_along_axis(logits, best[:, None], axis=1)[:, 0]) * marks,
        "likeliest": jax.lax.top_k(logits, 3)[0],
        "ids": jax.lax.top_k(logits, 3)[1].astype(jnp.int32),
        "words": jax.lax.bitcast_convert_type(logits[:, :2], jnp.uint32),
        "finite": jnp.isfinite(logits).all(axis=1),
        "nothing": logits[:, :0],
    }
    return leaves.all_rows(answers)


def answers(degree: int, shared: bool):
    """(answers, gradient of their floats), as bytes, and the compiled program's text."""
    split, cut = Split(make_mesh(tensor=degree)), PartitionSpec(None, "tensor")
    leaves = split.leaves.sharing_rows(ROWS) if shared else split.leaves
    assert isinstance(leaves, RowsOfDevices) == shared
    columns = jax.random.uniform(jax.random.key(0), (ROWS, COLUMNS)).at[3, 5].set(jnp.inf)
    marks = jnp.arange(ROWS, dtype=jnp.float32)

    def run(columns):
        inside = lambda own, marks: end(leaves, own, marks)
        return split.on_each(inside, (cut, WHOLE), WHOLE)(columns, marks)

    def own_gradient(own):
        """As the trainer takes it (device/scoring.py): inside, from cotangents that every device has."""
        floats = lambda own: {k: x for k, x in end(leaves, own, marks).items() if x.dtype == jnp.float32}
        out, pullback = jax.vjp(floats, own)
        return pullback(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), out))[0]

    gradient = jax.jit(split.on_each(own_gradient, (cut,), cut))(columns)
    program = jax.jit(run).lower(columns).compile().as_text()
    found = {name: np.asarray(x).tobytes() for name, x in run(columns).items()}
    return found, np.asarray(gradient).tobytes(), program


def main() -> None:
    found = {}
    for degree in (2, 4, 8):
        (own, own_gradient, program), (all_of_them, gradient, _) = answers(degree, True), answers(degree, False)
        found[degree] = {
            "differ": [name for name in all_of_them if own[name] != all_of_them[name]],
            "same gradient": own_gradient == gradient,
            "exchanges": program.count(" all-to-all("),
            "gathers": program.count(" all-gather("),
        }
    few = Split(make_mesh(tensor=8)).leaves
    found["too few"] = [count for count in range(1, 40) if few.sharing_rows(count) is few]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
