"""The mixture of experts in the place of an MLP: gated experts, of which a router chooses a few for each token."""

from typing import Any

from jaxtyping import Array, Float

from jaxengine.config import ModelConfig
from jaxengine.models.parameter import Parameter
from jaxengine.ops.experts import Experts, Routing
from jaxengine.ops.kernels import Products, Stream
from jaxengine.ops.live import Live


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
    routing = Routing(model_config.num_experts_per_tok, model_config.norm_topk_prob)
    return products.add_experts(x, norm, model_config.rms_norm_eps, own, routing, live)
