"""A sample that the engine ended with an error never comes to a trainer of another library."""

import types

import pytest

from jaxengine.rl.integrations.trl import TrlRollout


class Tokens:
    """What TrlRollout asks of a tokenizer of transformers."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, 258

    def __call__(self, prompts: list[str]) -> dict:
        return {"input_ids": [self._tokenizer.encode(prompt) for prompt in prompts]}


def trainer_of(llm, **generation_kwargs):
    """What TrlRollout asks of a GRPOTrainer that has taken no step, and so has no weights to give."""
    return types.SimpleNamespace(
        state=types.SimpleNamespace(global_step=None),
        args=types.SimpleNamespace(seed=0, generation_kwargs=generation_kwargs),
        accelerator=types.SimpleNamespace(process_index=0),
        processing_class=Tokens(llm.tokenizer),
        max_completion_length=8,
        **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty")),
    )


def test_trl_gets_none(calc):
    pytest.importorskip("llguidance")
    # One letter, after which neither a token nor the end is allowed.
    dead_end = {"structured_outputs": {"choice": ["7"]}, "min_tokens": 4}
    found = TrlRollout(calc)(["1+1=", "2+2="], trainer_of(calc))
    assert [len(ids) for ids in found["completion_ids"]] == [len(row) for row in found["logprobs"]]
    with pytest.raises(RuntimeError, match="structured_outputs"):
        TrlRollout(calc)(["1+1=", "2+2="], trainer_of(calc, **dead_end))
