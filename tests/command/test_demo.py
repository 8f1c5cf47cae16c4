"""The demo: its comparison sees every bit, and its text has the results."""

import dataclasses

import numpy as np
import pytest

from jaxengine import CompletionOutput
from jaxengine.command import demo, main
from jaxengine.contract.compare import Comparison


def test_a_verdict_says_what_differs():
    texts: list[str] = []
    good, bad = Comparison("alone", 4, 4), Comparison("among others", 3, 4, "sample 1, token 0")
    assert demo._verdict([good], texts.append) and not demo._verdict([good, bad], texts.append)
    assert texts[0].startswith("bit-equal: 4 of 4 samples alone")
    assert texts[1].startswith("BITS DIFFER: ") and "sample 1, token 0" in texts[1]


def test_tokens_are_marked_by_probability():
    logprobs = np.log(np.array([0.99, 0.6, 0.2, 0.01, 0.99], np.float32))
    sample = CompletionOutput(
        0, "", [1, 2, 3, 4, 5], logprobs, "stop", None, [], token_texts=["a", "b", "\x1b", "d", "<end>"]
    )
    assert demo.colored(sample, False) == "ab\\x1b~d!|"
    shown = demo.colored(sample, True)
    assert shown.count("\x1b[38;5;") == 5 and "\x1b[38;5;196md\x1b[0m" in shown
    unlikely = dataclasses.replace(sample, token_logprobs=np.full(5, np.nan, np.float32))
    assert demo.colored(unlikely, False).count("!") == 5


@pytest.mark.slow
def test_the_demo_holds_and_a_lost_bit_fails_it(monkeypatch, capsys):
    assert main.main(["demo", "--samples=3", "--problems=3", "--no-color"]) == 0
    assert "bit-equal: 9 of 9 samples in the same call again, 9 of 9 samples alone, 9 of 9" in capsys.readouterr().out
    monkeypatch.setattr(demo, "draw_alone", lambda llm, prompts, samples, key: [])
    assert main.main(["demo", "--samples=2", "--problems=2"]) == 1
    assert "BITS DIFFER" in capsys.readouterr().out
