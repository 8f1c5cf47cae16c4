"""Scoring takes only tiles that give the bits of generation on this machine, and none where none does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model

import jaxengine
from jaxengine import LLM, Rollout, SamplingParams
from jaxengine.engine import scoring_proof
from jaxengine.engine.scoring_proof import refused, scoring_tiles
from jaxengine.ops.in_tiles import ProductsInTiles
from jaxengine.ops.kernels import XLA
from jaxengine.ops.tiles import BASE, HEAD_ROWS, SCORING, WIDE, ScoringTiles, Tile
from jaxengine.ops.xla import XlaProducts

SINGLE = Tile(1, 1)  # XLA multiplies a single row in another order


@pytest.fixture(autouse=True)
def unproven(monkeypatch):
    monkeypatch.setattr(scoring_proof, "_refused", {})


@pytest.fixture(scope="module")
def model():
    return random_model("Qwen3", dtype="float32", num_hidden_layers=1)


@dataclasses.dataclass(frozen=True)
class RoundingProducts(XlaProducts):
    """A machine whose products of `rows` rows end one bit higher."""

    rows: int = 0

    def outputs(self, x, w):
        out = super().outputs(x, w)
        return jnp.nextafter(out, jnp.inf) if x.shape[0] == self.rows else out


def test_the_widest_tiles_hold_here(model):
    tiles = scoring_tiles(model[0], XLA)
    assert tiles == SCORING[0] == ScoringTiles(WIDE, HEAD_ROWS) and refused(model[0], XLA) == ()


@pytest.mark.parametrize("planted", [ScoringTiles(SINGLE, 8), ScoringTiles(WIDE, 1)], ids=["layers", "head"])
def test_tiles_of_other_bits_are_refused(model, planted, monkeypatch):
    monkeypatch.setattr(scoring_proof, "SCORING", (planted, *SCORING))
    lines = []
    assert scoring_tiles(model[0], XLA, lines.append) == SCORING[0]
    assert refused(model[0], XLA) == (planted,) and len(lines) == 1 and "other bits" in lines[0]


@pytest.mark.parametrize(
    "rows, holds",
    [(HEAD_ROWS, ScoringTiles(WIDE, BASE.rows)), (WIDE.rows, ScoringTiles(BASE, BASE.rows))],
    ids=["head", "layers"],
)
def test_a_machine_that_rounds_one_tile_differently(model, rows, holds):
    """The trainer's own logprobs, inside its jitted loss, are still those of generation."""
    kernels = dataclasses.replace(XLA, name=f"rounds {rows}", products=ProductsInTiles(RoundingProducts(rows=rows)))
    assert scoring_tiles(model[0], kernels) == holds


def test_nothing_is_scored_where_no_tile_holds(model, monkeypatch):
    monkeypatch.setattr(scoring_proof, "SCORING", (ScoringTiles(SINGLE, 1),))
    config, params = model
    tokens, mask = np.ones((1, 4), np.int32), np.array([[False, True, True, True]])
    with pytest.raises(RuntimeError, match="bits of generation"):
        jaxengine.score(params, tokens, mask, config=config, kernels="xla")


@pytest.mark.slow
def test_verify_names_it(model, monkeypatch):
    """A machine where nothing may be scored fails that axis, and is told about the others."""
    monkeypatch.setattr(scoring_proof, "_refused", {(model[0], XLA): len(SCORING)})
    llm = LLM.from_params(*model, num_pages=32, max_num_seqs=4, max_model_len=64, kernels="xla")
    found = llm.verify(quick=True, samples=2)
    assert {check.axis for check in found.checks if not check.holds} == {"C11"}
    assert "no way of scoring" in str(found) and all(str(tiles) in found.refused for tiles in SCORING)


def test_the_first_score_may_be_traced(model):
    """The proof computes on numbers of its own, inside jit and value_and_grad too."""
    config, params = model
    llm = LLM.from_params(config, params, num_pages=32, max_num_seqs=4, max_model_len=64, kernels="xla")
    rollout = Rollout.from_outputs(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True)))

    @jax.jit
    def loss(params):
        logprobs = jaxengine.score(params, rollout.tokens, rollout.mask, config=config, kernels="xla")
        return logprobs.sum(), logprobs

    (_, logprobs), _ = jax.value_and_grad(loss, has_aux=True)(params)
    assert np.array_equal(np.asarray(logprobs).view(np.uint32), rollout.logprobs.view(np.uint32))
    assert scoring_proof._refused == {(config, XLA): 0}
