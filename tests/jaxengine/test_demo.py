"""The demo: its comparison sees every bit, and its text says what was found."""
import dataclasses

import numpy as np
import pytest

from jaxengine import CompletionOutput, cli, demo


def samples(count: int = 4, tokens: int = 4) -> list[CompletionOutput]:
    rng = np.random.RandomState(0)
    return [CompletionOutput(i, "", rng.randint(0, 9, tokens).tolist(), -rng.rand(tokens).astype(np.float32), "length", None, [])
            for i in range(count)]


def test_comparing_sees_every_bit():
    drawn = samples()
    assert demo.compare("again", drawn, samples()).holds
    logprobs, token_ids = drawn[2].token_logprobs.copy(), drawn[2].token_ids
    logprobs.view(np.uint32)[3] ^= 1
    for change in (dict(token_logprobs=logprobs), dict(token_ids=[*token_ids[:3], 9]),
                   dict(token_ids=token_ids[:3], token_logprobs=drawn[2].token_logprobs[:3])):
        found = demo.compare("again", drawn, [*drawn[:2], dataclasses.replace(drawn[2], **change), drawn[3]])
        assert not found.holds and str(found).startswith("3 of 4 samples again; first difference: sample 2, ")
    assert not demo.compare("again", drawn, drawn[:3]).holds and not demo.compare("again", drawn[:3], drawn).holds


def test_comparing_tells_the_sign_of_zero():
    zero, minus = (dataclasses.replace(samples()[0], token_logprobs=np.array([x] * 4, np.float32)) for x in (0.0, -0.0))
    assert not demo.compare("again", [zero], [minus]).holds


def test_a_verdict_says_what_differs():
    said: list[str] = []
    good, bad = demo.Comparison("alone", 4, 4), demo.Comparison("among others", 3, 4, "sample 1, token 0")
    assert demo._verdict([good], said.append) and not demo._verdict([good, bad], said.append)
    assert said[0].startswith("bit-equal: 4 of 4 samples alone") and said[1].startswith("BITS DIFFER: ") and "sample 1, token 0" in said[1]


def test_tokens_are_marked_by_probability():
    logprobs = np.log(np.array([0.99, 0.6, 0.2, 0.01, 0.99], np.float32))
    sample = CompletionOutput(0, "", [1, 2, 3, 4, 5], logprobs, "stop", None, [], token_texts=["a", "b", "\x1b", "d", "<end>"])
    assert demo.colored(sample, False) == "ab\\x1b~d!|"
    shown = demo.colored(sample, True)
    assert shown.count("\x1b[38;5;") == 5 and "\x1b[38;5;196md\x1b[0m" in shown
    assert demo.colored(dataclasses.replace(sample, token_logprobs=np.full(5, np.nan, np.float32)), False).count("!") == 5


@pytest.mark.slow
def test_the_demo_holds_and_a_lost_bit_fails_it(monkeypatch, capsys):
    assert cli.main(["demo", "--samples=3", "--problems=3", "--no-color"]) == 0
    assert "bit-equal: 9 of 9 samples in the same call again, 9 of 9 samples alone, 9 of 9" in capsys.readouterr().out
    monkeypatch.setattr(demo, "draw_alone", lambda llm, prompts, samples, key: [])
    assert cli.main(["demo", "--samples=2", "--problems=2"]) == 1
    assert "BITS DIFFER" in capsys.readouterr().out
