"""Names of vLLM's that are not here are explained, and no name that is here is."""

import dataclasses
import inspect

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.base.vllm_names import KEYWORDS, METHODS
from jaxengine.config import EngineConfig
from jaxengine.functional import generate
from jaxengine.llm import OWN_KEYWORDS

DEFAULTS = dict(
    enforce_eager=False,
    trust_remote_code=False,
    quantization=None,
    swap_space=4,
    runner="auto",
    moe_backend="auto",
    data_parallel_rank=None,  # near to a name that is here
    mm_encoder_only=False,
)


@pytest.mark.parametrize("name, value", DEFAULTS.items())
def test_a_keyword_that_does_nothing_is_refused_with_vllms_default_too(name, value):
    with pytest.raises(TypeError, match=f"^LLM has no keyword '{name}': ") as error:
        LLM("calc", **{name: value})
    assert KEYWORDS["LLM"][name] in str(error.value)


@pytest.mark.parametrize(
    "name, instead",
    [("best_of", "cumulative_logprob"), ("logits_processors", "logit_bias"), ("max_new_tokens", "max_tokens")],
)
def test_sampling_parameters_of_others_name_ours(name, instead):
    with pytest.raises(TypeError, match=f"SamplingParams has no keyword '{name}': .*{instead}"):
        SamplingParams(**{name: 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda: EngineConfig(block_size=16),
        lambda: LLM.from_params(None, None, block_size=16),
        lambda: generate(None, [], key=None, config=None, block_size=16),
    ],
    ids=["EngineConfig", "from_params", "generate"],
)
def test_every_entrance_of_an_engines_keywords_explains_them(call):
    with pytest.raises(TypeError, match="has no keyword 'block_size': .*page_size="):
        call()


def test_a_slip_of_the_pen_still_names_the_nearest():
    with pytest.raises(TypeError, match="'max_token', did you mean 'max_tokens'"):
        SamplingParams(max_token=1)


def test_no_name_that_is_here_is_explained_away():
    sampling, engine = ({field.name for field in dataclasses.fields(cls)} for cls in (SamplingParams, EngineConfig))
    assert KEYWORDS["SamplingParams"].keys().isdisjoint(sampling)
    assert KEYWORDS["LLM"].keys().isdisjoint(engine | {*OWN_KEYWORDS, *inspect.signature(LLM).parameters})
    assert all(not hasattr(LLM, name) for name in METHODS)
