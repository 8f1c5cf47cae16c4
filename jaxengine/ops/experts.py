"""A mixture of experts: which experts a row goes to, and the sum of what they make of it.

Shazeer et al. 2017, arXiv:1701.06538; softmax before the choice as in Qwen3-MoE. Experts' inner values are cut into
leaves as an MLP's are, so that devices share every expert and no row travels. A row's sum over its experts is taken
leaf by leaf, the likeliest expert first, before the tree adds the leaves: what the row's bits depend on.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.ops.regions import no_gradient
from pallas_kernels.pinned_math import exp, rounded
from sharding.leaves import Leaves, spread, tree_sum


class Routing(NamedTuple):
    """How a model chooses. Hashable, so that a jitted step can hold it."""

    experts_per_row: int
    renormalises: bool  # whether the weights of a row's experts add up to 1


@pytree
class Experts:
    """The weights of E experts with F inner values each."""

    router: Array  # [E, D], on every device
    gate_up: Array  # [leaf, E, 2F / leaf, D]: of each expert gates, then ups
    down: Array  # [leaf, E, D, F / leaf]


class ExpertProducts(Protocol):
    """What an implementation multiplies with. A row's bits depend on it and the weights alone; sums are float32."""

    @property
    def leaves(self) -> Leaves:
        """Who has the leaves."""
        ...

    def scores(self, y: Float[Array, "t D"], router: Float[Array, "E D"]) -> Float[Array, "t E"]:
        """y @ router.T, on every device."""
        ...

    def grouped(
        self, x: Float[Array, "leaf M K"], w: Float[Array, "leaf E N K"], sizes: Int[Array, " E"], *, gated: bool
    ) -> Float[Array, "leaf M R"]:
        """pallas_kernels.grouped_matmul for every leaf that is here."""
        ...


def partial_sums(
    products: ExpertProducts, routing: Routing, y: Float[Array, "t D"], experts: Experts, is_there: Bool[Array, " t"]
) -> Float[Array, "leaf t D"]:
    """Each leaf's part of the weighted sum over a row's experts. No expert is read for the rows that are not there."""
    own, leaves = experts.gate_up.shape[0], products.leaves
    weights, chosen = _routes(products.scores(y, experts.router), routing)
    flat = jnp.where(is_there, chosen, experts.router.shape[0]).reshape(-1)  # sorted to the end, and in no group
    order = jnp.argsort(flat, stable=True)
    places = jnp.argsort(order)
    sizes = (flat[:, None] == jnp.arange(experts.router.shape[0])).sum(0, dtype=jnp.int32)
    rows = jnp.concatenate([spread(leaves.shared(y), own)] * routing.experts_per_row, axis=1)
    inner = products.grouped(_permuted(rows, order, places), experts.gate_up, sizes, gated=True)
    out = _permuted(products.grouped(inner, experts.down, sizes, gated=False), places, order)
    out = out.reshape(own, routing.experts_per_row, *y.shape)
    nothing = (chosen < 0).astype(jnp.uint32)[..., None]
    parts = rounded(out * spread(leaves.shared(weights), own)[..., None], nothing)
    return functools.reduce(jnp.add, [parts[:, choice] for choice in range(routing.experts_per_row)])


def _routes(scores: Float[Array, "t E"], routing: Routing) -> tuple[Float[Array, "k t"], Int[Array, "k t"]]:
    """(weights, experts) of each row, the likeliest first; of two that are equally likely, the lower number first.

    Sums are element-wise additions, because a compiler's own reductions may follow the number of rows.
    """
    likelihoods = exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    taken, chosen = jax.lax.top_k(likelihoods, routing.experts_per_row)
    total = functools.reduce(jnp.add, list(taken.T)) if routing.renormalises else _over_experts(likelihoods)
    return taken.T * (1.0 / total), chosen.T


def _over_experts(x: Float[Array, "t E"]) -> Float[Array, " t"]:
    size = 1 << max(x.shape[1] - 1, 0).bit_length()
    return tree_sum(jnp.pad(x, ((0, 0), (0, size - x.shape[1]))).T)


@jax.custom_vjp
def _permuted(x: Float[Array, "leaf M K"], order: Int[Array, " M"], places: Int[Array, " M"]) -> Array:
    """`x[:, order]`, where `places` is the inverse of the order: the gradient gathers too."""
    return x[:, order]


_permuted.defvjp(
    lambda x, order, places: (x[:, order], (order, places)),
    lambda saved, cotangent: (cotangent[:, saved[1]], *map(no_gradient, saved)),
)
