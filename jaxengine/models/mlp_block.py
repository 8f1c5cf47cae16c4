"""The gated MLP, SwiGLU. Shazeer 2020, arXiv:2002.05202."""

from jaxtyping import Array, Float

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.models.parameter import split_by_inputs, split_by_outputs
from jaxengine.ops.kernels import Products, Stream
from jaxengine.ops.live import Live


@pytree
class Mlp:
    """F inner values."""

    gate_up: Array  # [leaf, 2F / leaf, D]: gates, then ups
    down: Array  # [leaf, D, F / leaf]


def declare(model_config: ModelConfig) -> Mlp:
    """The declarations of its parameters, in its own shape."""
    inner = model_config.intermediate_size
    return Mlp(gate_up=split_by_outputs(model_config, 2 * inner), down=split_by_inputs(model_config, inner))


def add_mlp(
    model_config: ModelConfig, products: Products, mlp: Mlp, norm: Float[Array, " D"], x: Stream, live: Live
) -> Stream:
    """The residual stream after the MLP."""
    x, inner = products.gated(x, norm, model_config.rms_norm_eps, mlp.gate_up, live)
    return products.add(x, inner, mlp.down, None, live)
