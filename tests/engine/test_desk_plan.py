"""The arithmetic of a plan: layers that are multiplied, pages that are left, and the roofline."""

import dataclasses

import pytest

from jaxengine.config import ModelConfig
from jaxengine.device.needs import Needs
from jaxengine.engine.desk_plan import DeskPlan, step_plan
from jaxengine.engine.roofline import decode_estimate, prefill_estimate
from jaxengine.engine.step_variants import Variant
from jaxengine.ops.tiles import Tile
from sharding.collectives import Collective
from sharding.devices import Figures
from sharding.program_text import KernelCall
from sharding.topology import Compiled

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    reduction_leaves=2,
    dtype="bfloat16",
)
DEVICE = Figures("tpu", memory=10**9, bandwidth=1e9, flops=1e12, link=1e8)
GATHER = Collective("all-gather", (1, 128, 64), 1000, True)


def program(layers: int) -> Compiled:
    """As a compiler would make it of so many layers: the head has a gather and a product, a layer two and four."""
    return Compiled(
        seconds=3.0,
        argument_bytes=0,
        output_bytes=70,
        alias_bytes=50,
        workspace_bytes=100 + 10 * layers,
        calls=(KernelCall("draw"),) + (KernelCall("matmul"),) * (1 + 4 * layers),
        collectives=(GATHER,) * (1 + 2 * layers),
    )


def plan(in_one: bool = False, **changes) -> DeskPlan:
    variant = Variant("decode", Tile(1, 128), Needs.PLAIN)
    decode = step_plan(variant, 256, [program(2), program(3)], MODEL.num_hidden_layers, in_one=in_one)
    prefill = step_plan(
        variant._replace(kind="prefill"), 512, [program(2), program(3)], MODEL.num_hidden_layers, in_one=in_one
    )
    known = dict(
        target="v6e:2x2", degree=2, num_replicas=2, compiled_layers=(2, 3), seconds=6.0, memory=10**9, usable=9 * 10**8
    )
    sizes = dict(weights=400_000, slots=0, page_bytes=3200, num_pages=101)
    return DeskPlan(**known | sizes | changes, steps={"decode": decode, "prefill": prefill})


def test_layers_are_multiplied_and_the_rest_is_not():
    step = plan().steps["decode"]
    assert step.tiles == 2
    assert step.kernels == {"draw": 1, "matmul": 1 + 4 * 10}
    assert step.collectives == {"all-gather": (1 + 2 * 10) * 2}
    assert step.received == {"all-gather": (1 + 2 * 10) * 2 * 1000}
    assert step.workspace == 100 + 10 * 10 + 70 - 50


def test_a_model_of_one_layer_is_compiled_whole():
    step = step_plan(Variant("decode", Tile(1, 128), Needs.PLAIN), 128, [program(1)], 1, in_one=False)
    assert step.kernels == {"draw": 1, "matmul": 5} and step.workspace == 130


def test_requests_share_the_pages_but_for_the_scratch_page():
    assert plan().requests(context=320, page_size=32) == 10
    assert plan().requests(context=321, page_size=32) == 9
    assert plan(num_pages=-5).requests(context=320, page_size=32) == 0


def test_a_decode_step_reads_weights_once_a_tile_and_every_key():
    embedding = 256 * 64 * 2 // 2
    one = decode_estimate(MODEL, plan(), DEVICE, batch=100, context=64, page_size=32)
    assert one.memory == pytest.approx((400_000 - embedding + 100 * 64 * 100) / 1e9)
    two = decode_estimate(MODEL, plan(), DEVICE, batch=200, context=64, page_size=32)
    assert two.memory == pytest.approx(2 * one.memory)
    assert two.exchange == pytest.approx(2 * one.exchange) == pytest.approx(42 * 1000 / 1e8)


def test_layers_without_a_loop_read_and_exchange_once():
    looped, once = (
        decode_estimate(MODEL, plan(in_one), DEVICE, batch=100, context=64, page_size=32) for in_one in (False, True)
    )
    assert once.memory == looped.memory and once.exchange == 2 * looped.exchange
    full = decode_estimate(MODEL, plan(True), DEVICE, batch=256, context=64, page_size=32)
    assert full.exchange == once.exchange and full.memory - once.memory == pytest.approx(156 * 64 * 100 / 1e9)


def test_flops_are_two_for_each_weight_and_four_for_each_key():
    one = decode_estimate(MODEL, plan(), DEVICE, batch=1, context=64, page_size=32)
    layer = 2 * (64 * 96 + 64 * 64 + 64 * 64 - 64 * 32) + 2 * 3 * 64 * 128 + 4 * 64 * 64
    assert one.arithmetic == pytest.approx((10 * layer + 3 * 2 * 256 * 64) / 2 / 1e12)


def test_copies_of_a_head_are_computed_by_each_leaf_that_holds_one():
    copied = dataclasses.replace(MODEL, reduction_leaves=4)
    one, two = (prefill_estimate(config, plan(), DEVICE, context=128) for config in (MODEL, copied))
    keys_and_values = 2 * 2 * 16 * 64  # of two more heads
    assert two.arithmetic - one.arithmetic == pytest.approx(512 * 10 * 2 * keys_and_values / 2 / 1e12)


def test_of_experts_those_are_read_that_rows_take_and_a_row_computes_its_own():
    sizes = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
    mixed = dataclasses.replace(MODEL, architecture="Qwen3MoeForCausalLM", **sizes)
    dense, one, many = (
        decode_estimate(config, plan(weights=4_000_000), DEVICE, batch=batch, context=64, page_size=32)
        for config, batch in ((MODEL, 1), (mixed, 1), (mixed, 100))
    )
    expert = 10 * 3 * 64 * 128  # weights in all layers
    assert dense.memory - one.memory == pytest.approx(6 * expert * 2 / 2 / 1e9)
    assert many.memory - one.memory == pytest.approx((6 * expert * 2 / 2 + 99 * 64 * 100) / 1e9)
    assert one.arithmetic - dense.arithmetic == pytest.approx((2 * expert + 2 * 10 * 64 * 8) / 2 / 1e12)


def test_a_step_takes_the_slower_of_memory_and_flops_and_then_the_exchange():
    found = prefill_estimate(MODEL, plan(), DEVICE, context=128)
    assert found.seconds == max(found.memory, found.arithmetic) + found.exchange
    assert found.rate == 512 / found.seconds
