"""How long a step takes at best, an estimate: the slower of memory and arithmetic, and after it what devices exchange.

Nothing here was measured. It leaves out launches, padding, everything element-wise, and how far kernels stay from a
device's figures; exchanged bytes are counted as if nothing ran beside them.
"""

import dataclasses

from jaxengine.config import ModelConfig
from jaxengine.engine.desk_plan import DeskPlan
from sharding.devices import Figures

HEAD_PARTS = 3  # products of the head, whose float32 rows are three bfloat16 numbers each


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a step, on each device: seconds of each of the three, and tokens of the step on one replica."""

    memory: float
    arithmetic: float
    exchange: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic) + self.exchange

    @property
    def rate(self) -> float:
        """Tokens a second of one replica."""
        return self.tokens / self.seconds


def decode_estimate(
    model_config: ModelConfig, plan: DeskPlan, figures: Figures, *, batch: int, context: int, page_size: int
) -> Estimate:
    """A decode step of `batch` sequences that each attend to `context` tokens.

    Every run of the layers reads the weights, and exchanges all of its rows, idle ones included.
    """
    step, share = plan.steps["decode"], 1 / plan.degree
    runs = min(step.runs, -(-batch // step.tile))
    read = runs * _read_weights(model_config, plan, batch) + batch * context * plan.page_bytes / page_size
    flops = share * batch * (_layer_flops(model_config, context) + HEAD_PARTS * _head_flops(model_config))
    received = step.all_received * runs / step.runs
    return Estimate(read / figures.bandwidth, flops / figures.flops, received / figures.link, batch)


def prefill_estimate(model_config: ModelConfig, plan: DeskPlan, figures: Figures, *, context: int) -> Estimate:
    """A full prefill step of prompts of `context` tokens, whose tokens attend to half of that on average."""
    step, share = plan.steps["prefill"], 1 / plan.degree
    read = step.runs * _read_weights(model_config, plan, step.rows)
    flops = share * step.rows * _layer_flops(model_config, context // 2)
    return Estimate(read / figures.bandwidth, flops / figures.flops, step.all_received / figures.link, step.rows)


def _read_weights(model_config: ModelConfig, plan: DeskPlan, rows: int) -> float:
    """Bytes of a device's weights that a step of so many rows reads: of an embedding that is no head, only a few rows;
    of experts, those that rows would take if each were as likely as the others.
    """
    item, width = 4 if model_config.dtype == "float32" else 2, model_config.hidden_size
    table = 0 if model_config.tie_word_embeddings else model_config.padded_vocab_size * width
    idle = 0.0
    if model_config.num_experts:
        experts = model_config.num_hidden_layers * model_config.num_experts * 3 * width * model_config.inner_size
        idle = experts * (1 - model_config.num_experts_per_tok / model_config.num_experts) ** rows
    return plan.weights - (table + idle) * item / plan.degree


def _layer_flops(model_config: ModelConfig, keys: int) -> int:
    """Of one token in all layers: a product takes two for each weight, attention four for each key and head's value."""
    width, heads = model_config.hidden_size, model_config.num_attention_heads
    projections = (2 * heads + 2 * model_config.held_key_value_heads) * model_config.head_dim
    inner = 3 * model_config.inner_size * (model_config.num_experts_per_tok or 1) + model_config.num_experts
    weights = width * (projections + inner)
    return model_config.num_hidden_layers * (2 * weights + 4 * heads * model_config.head_dim * keys)


def _head_flops(model_config: ModelConfig) -> int:
    return 2 * model_config.padded_vocab_size * model_config.hidden_size
