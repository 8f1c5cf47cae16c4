"""Plans by the devices' own compilers, and that their multiplied layers are those of a whole model."""

import dataclasses

import machines
import pytest

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.engine.desk_plan import compiled, desk_plan, kernels_for, step_plan
from jaxengine.engine.memory import whole_context
from jaxengine.engine.step_variants import Variant
from jaxengine.ops.tiles import Tile
from sharding.topology import TARGETS

pytestmark = pytest.mark.aot
target = machines.target
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=1024,
    reduction_leaves=4,
    dtype="bfloat16",
)
ENGINE = EngineConfig(max_num_seqs=128, max_model_len=512, max_num_batched_tokens=512)
DEGREE = 4


@pytest.mark.parametrize("target", ["v6e", "h100"], indirect=True, ids=machines.NAMES.get)
def test_a_plan_is_that_of_the_whole_model(target):
    plan = desk_plan(MODEL, ENGINE, TARGETS[target], DEGREE, num_replicas=1)
    engine = dataclasses.replace(ENGINE, num_pages=whole_context(ENGINE))
    mesh, kernels = kernels_for(MODEL, TARGETS[target], DEGREE)
    for kind, tile in (("decode", Tile(1, 128)), ("prefill", Tile(16, 32))):
        found = plan.steps[kind]
        variant = Variant(kind, tile, needs=0)
        program = compiled(mesh, kernels, engine, variant, MODEL)
        whole = step_plan(variant, found.rows, [program], MODEL.num_hidden_layers, in_one=kernels.in_one)
        assert (found.kernels, found.collectives, found.received) == (whole.kernels, whole.collectives, whole.received)
        assert found.workspace == pytest.approx(whole.workspace, rel=0.02)
        assert sum(found.received.values()) > 0 and sum(found.kernels.values()) > 4 * MODEL.num_hidden_layers
    assert plan.num_pages > 1000
