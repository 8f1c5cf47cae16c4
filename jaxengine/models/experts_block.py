"""The mixture of experts in the place of an MLP: gated experts, of which a router chooses a few for each token."""

from typing import Any

from jaxtyping import Array, Float

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.models.parameter import Parameter
from jaxengine.ops import experts
from jaxengine.ops.experts import Routing
from jaxengine.ops.kernels import Products, Stream
from jaxengine.ops.live import Live


@pytree
class Experts:
    """E experts with F inner values each."""

    router: Array  # [E, D], on every device
    gate_up: Array  # [leaf, E, 2F / leaf, D]: of each expert gates, then ups
    down: Array  # [leaf, E, D, F / leaf]


def declare(model_config: ModelConfig) -> Experts:
    """The declarations of its parameters, in its own shape."""
    leaves, width, dtype = model_config.reduction_leaves, model_config.hidden_size, model_config.dtype
    count, inner = model_config.num_experts, model_config.inner_size // leaves
    router: Any = Parameter((count, width), dtype, (None, None))
    gate_up: Any = Parameter((leaves, count, 2 * inner, width), dtype, ("leaf", "expert", "out", None))
    down: Any = Parameter((leaves, count, width, inner), dtype, ("leaf", "expert", None, "in"))
    return Experts(router, gate_up, down)


def add_experts(
    model_config: ModelConfig, products: Products, own: Experts, norm: Float[Array, " D"], x: Stream, live: Live
) -> Stream:
    """The residual stream after the experts."""
    weights = experts.Experts(own.router, own.gate_up, own.down)
    routing = Routing(model_config.num_experts_per_tok, model_config.norm_topk_prob)
    return products.add_experts(x, norm, model_config.rms_norm_eps, weights, routing, live)
