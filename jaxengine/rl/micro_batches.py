"""The gradient of a mini-batch: the sum over its micro-batches, one after another, on however many replicas."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.ops.kernels import Kernels
from pallas_kernels.tiles import unknown_zero
from sharding.mesh import WHOLE
from sharding.replica_sums import ALONE, Terms, TermsOfReplicas


def check_shared(kernels: Kernels, micro_batches: int) -> None:
    """Raises ValueError where the replicas of the kernels' mesh cannot share so many micro-batches evenly."""
    if micro_batches % kernels.replicas:
        raise ValueError(
            f"the mesh has {kernels.replicas} replicas along 'data', which share the micro-batches of an update, and "
            f"micro_batches={micro_batches} is no multiple of them: give TrainerConfig(micro_batches="
            f"{kernels.replicas}), or a multiple (how many there are is in the bits)"
        )


def summed_gradient(kernels: Kernels, specs: Any, loss: Callable, model: Any, parts: Any) -> tuple[Any, Any]:
    """(the sum of the losses' gradients in float32; what the losses come with, arrays `[micro, …]`).

    `loss(kernels, model, part)` gives (loss of a micro-batch, arrays); `parts` are arrays `[micro, …]`. Gradients are
    added one after another, from the first micro-batch to the last. Replicas deal them out: the first n micro-batches
    go to the n replicas, then the next n, and after each turn the gradients are added in order. `specs` say how the
    model lies on a mesh.
    """
    micro_batches = jax.tree.leaves(parts)[0].shape[0]
    if kernels.replicas == 1:
        return _in_turns(ALONE, functools.partial(loss, kernels), model, parts, micro_batches)
    terms = TermsOfReplicas("data", kernels.replicas)

    def own(kernels: Kernels, model: Any, dealt: Any) -> tuple[Any, Any]:
        parts = jax.tree.map(lambda x: x[:, jax.lax.axis_index(terms.axis)], dealt)
        # Unknown when it is compiled: XLA would take a single turn out of its loop, and compile it in another way.
        turns = micro_batches // terms.replicas + unknown_zero(*(jax.tree.leaves(x)[0] for x in (model, parts)))
        return _gathered(terms, model, *_in_turns(terms, functools.partial(loss, kernels), model, parts, turns))

    dealt = jax.tree.map(lambda x: x.reshape(-1, terms.replicas, *x.shape[1:]), parts)
    # Given whole: were they cut over "data", XLA would cut what else reads them, and its sums, in the same way.
    return kernels.on_each_replica(own, specs, WHOLE, outputs=(specs, WHOLE))(model, dealt)


def _in_turns(terms: Terms, loss: Callable, model: Any, parts: Any, turns: Any) -> tuple[Any, Any]:
    """What this replica has of the sum, with one of its micro-batches in each turn."""
    _, shapes = jax.eval_shape(loss, model, jax.tree.map(lambda x: x[0], parts))
    size = jax.tree.leaves(parts)[0].shape[0]
    found = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)

    def turn(i: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
        total, found = before
        (_, others), gradient = jax.value_and_grad(loss, has_aux=True)(model, jax.tree.map(lambda x: x[i], parts))
        total = jax.tree.map(terms.add, total, gradient)
        return total, jax.tree.map(lambda whole, x: whole.at[i].set(x), found, others)

    return jax.lax.fori_loop(0, turns, turn, (jax.tree.map(terms.start, model), found))


def _gathered(terms: TermsOfReplicas, model: Any, total: Any, found: Any) -> tuple[Any, Any]:
    """What all replicas have. It comes out of a loop, as one device's sum does: XLA does not look across it, and would
    else round what reads the sum in another way (the optimiser's products and sums, for one).
    """

    def gather(*_: Any) -> tuple[Any, Any]:
        return jax.tree.map(terms.finish, total, model), jax.tree.map(terms.gathered, found)

    zero = unknown_zero(*jax.tree.leaves(total)[:1])
    blank = jax.tree.map(lambda x: jnp.full(x.shape, zero, x.dtype), jax.eval_shape(gather))
    return jax.lax.fori_loop(0, 1 + zero, gather, blank)
