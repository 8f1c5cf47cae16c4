"""`jaxengine plan` where no accelerator's compiler is asked: models, refusals, the table."""

import dataclasses
import json
from unittest import mock

import pytest

from jaxengine.command import main
from jaxengine.command.parser import parser
from jaxengine.command.plan import plan, replicas_of
from jaxengine.command.plan_models import NAMED, planned_model
from jaxengine.engine.desk_plan import DeskPlan, StepPlan
from sharding.topology import target_of

WORDS = ["plan", "llama-3-70b", "--topology", "v5p:2x2x4", "--tensor", "8"]
SIZES = {
    "llama-3-70b": 70.6e9,
    "qwen3-32b": 32.8e9,
    "qwen3-8b": 8.2e9,
    "qwen3-30b-a3b": 30.5e9,
}  # parameters, as their cards say
STEP = StepPlan("decode", 256, 128, 2, 2, 10**8, {"matmul": 321}, {"all-gather": 642}, {"all-gather": 10**9})
MADE = DeskPlan("v5p:2x2x4", 8, 2, (2, 3), 6.0, 102 * 10**9, 90 * 10**9, 17 * 10**9, 10**8, 1_310_720, 50_001, {
    "decode": STEP, "prefill": dataclasses.replace(STEP, kind="prefill", rows=8192, tile=512, tiles=16, runs=16)
})  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_has_the_size_that_its_card_says(name):
    config = planned_model(name.upper(), dtype="auto", reduction_leaves=1)
    projections = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    inner = 3 * config.inner_size * max(1, config.num_experts) + config.num_experts
    layer = config.hidden_size * (projections + inner)
    parameters = config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size
    assert parameters == pytest.approx(SIZES[name], rel=0.005)
    assert config.dtype == "bfloat16" and config.reduction_leaves == 1


def test_a_file_is_read_and_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NAMED["qwen3-8b"]))
    expected = planned_model("qwen3-8b", dtype="float32", reduction_leaves=4)
    for model in (tmp_path, tmp_path / "config.json"):
        assert planned_model(str(model), dtype="float32", reduction_leaves=4) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_experts": 128}, "num_experts=128: of this architecture no experts are computed"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"num_key_value_heads": 6, "num_attention_heads": 6}, "reduction_leaves=4 does not divide"),
    ],
)
def test_other_models_are_refused(tmp_path, change, text):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(NAMED["qwen3-8b"] | change))
    with pytest.raises(ValueError, match=text):
        planned_model(str(file), dtype="auto", reduction_leaves=4)


def test_replicas_fill_the_topology_unless_said_otherwise():
    assert replicas_of(target_of("v6e:4x4"), 8, None) == 2
    assert replicas_of(target_of("v6e:4x4"), 8, 1) == 1
    for tensor, data in ((32, None), (8, 3)):
        with pytest.raises(ValueError, match="v6e:4x4 has 16"):
            replicas_of(target_of("v6e:4x4"), tensor, data)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--max-model-len", "9000"], "max_model_len=9000"),
        (["--context", "8193"], "context=8193"),
        (["--page-size", "24"], "page_size"),
        (["--tensor", "16", "--reduction-leaves", "128"], "reduction_leaves=128 does not divide"),
    ],
)
def test_a_wrong_setting_ends_with_a_line(capsys, words, text):
    assert main.main([*WORDS, *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("topology", "package"), [("v5p:2x2x4", r"jax\[tpu\]"), ("h100:8", r"jax\[cuda13\]")])
def test_without_the_compiler_the_package_is_named(topology, package):
    arguments = parser().parse_args([*WORDS, "--topology", topology])
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ValueError, match=package):
        plan(arguments)


def planned(made: DeskPlan, *words: str) -> tuple[str, dict]:
    """The command's answer when the compilers' part is `made`."""
    with (
        mock.patch("jaxengine.command.plan.missing", return_value=None),
        mock.patch("jaxengine.command.plan.desk_plan", return_value=made) as compilers,
    ):
        answer = plan(parser().parse_args([*WORDS, *words]))
    assert compilers.call_args.args[3:] == (8, 2)
    return answer


def test_the_table_has_memory_collectives_kernels_and_an_estimate():
    table, record = planned(MADE, "--context", "2048")
    fields = [line.split() for line in table.splitlines()]
    assert ["weights", "17.00", "GB"] in fields and ["left", "for", "pages", "72.80", "GB"] in fields
    assert ["8192", "tokens", "195", "requests"] in fields  # 50,000 pages, 256 each
    assert ["all-gather", "642", "x", "1.000", "GB", "received"] in fields
    assert "321 matmul" in table and "ESTIMATE" in table
    decode = record["estimates"]["decode"]
    assert decode["tokens"] == 256 and decode["exchange"] == pytest.approx(1e9 / 180e9)
    assert json.loads(json.dumps(record))["plan"]["num_pages"] == 50_001


def test_what_does_not_fit_is_said_and_not_estimated():
    table, record = planned(dataclasses.replace(MADE, num_pages=-3))
    assert "DOES NOT FIT" in table and record["estimates"] == {}


def test_a_model_with_fewer_heads_than_devices_has_copies_of_them(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(NAMED["qwen3-8b"] | {"num_key_value_heads": 4}))
    read = lambda **how: planned_model(str(file), dtype="auto", **how)
    assert [read(reduction_leaves=None, devices=n).reduction_leaves for n in (1, 8)] == [4, 8]
    with pytest.raises(ValueError, match=r"64 devices cannot share .* num_attention_heads=32; .* 1, 2, 4, 8, 16, 32$"):
        read(reduction_leaves=None, devices=64)
    with (
        mock.patch("jaxengine.command.plan.missing", return_value=None),
        mock.patch("jaxengine.command.plan.desk_plan", return_value=MADE) as compilers,
    ):
        table, record = plan(parser().parse_args(["plan", str(file), *WORDS[2:]]))
    assert compilers.call_args.args[0].held_key_value_heads == 8
    assert "each of 4 key-value heads is held 2 times" in table and record["model"]["reduction_leaves"] == 8
