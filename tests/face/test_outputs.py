"""What a notebook shows of outputs."""

import html
import math
import re

import numpy as np
import pytest

from jaxengine.outputs import CompletionOutput, RequestOutput, RequestOutputs, VersionSpan


def completion(texts: list[str] | None, logprobs: list[float], text: str | None = None) -> CompletionOutput:
    return CompletionOutput(
        0,
        "".join(texts or []) if text is None else text,
        list(range(len(logprobs))),
        np.array(logprobs, np.float32),
        "stop",
        None,
        [VersionSpan(0, 0, len(logprobs))],
        token_texts=texts,
    )


def request(*samples: CompletionOutput, prompt: str | None = "p", request_id: str = "0") -> RequestOutput:
    return RequestOutput(request_id, prompt, [1, 2, 3], list(samples), True)


def spans(page: str) -> list[str]:
    return re.findall(r"<span [^>]*>(.*?)</span>", page, re.DOTALL)


def test_one_span_a_token_with_its_text():
    texts = ["4", "2", " <b>", "\n", "&amp;", ""]
    assert [html.unescape(s) for s in spans(completion(texts, [-0.1] * 6)._repr_html_())] == texts


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "</span>q", "'\"><img src=x onerror=alert(1)>", "</code></div>q"]
)
def test_text_is_escaped_everywhere(text):
    sample = completion([text], [-1.0])
    page = RequestOutputs([request(sample, prompt=text, request_id=text)])._repr_html_()
    assert page.count(html.escape(text)) == 3 and text not in page


def test_a_sample_without_token_texts_shows_its_text():
    page = completion(None, [-0.5, -0.5], text="<i>")._repr_html_()
    assert spans(page) == ["&lt;i&gt;"]


def test_color_says_probability():
    page = completion(["a", "b", "c"], [0.0, math.log(0.5), -20.0])._repr_html_()
    assert re.findall(r"hsl\((\d+),", page) == ["120", "60", "0"]
    assert "logprob -0.693, probability 0.500" in page


@pytest.mark.parametrize("logprob", [-math.inf, math.inf, math.nan])
def test_logprobs_that_are_no_numbers_have_a_form(logprob):
    page = completion(["a", "b"], [logprob, -0.1])._repr_html_()
    assert spans(page) == ["a", "b"] and re.findall(r"hsl\((\w+),", page)[0] == "0"


def test_rounding_above_zero_is_certainty():
    assert "hsl(120," in completion(["a"], [1e-6])._repr_html_()


def test_an_unfinished_and_empty_sample_has_a_form():
    sample = CompletionOutput(0, "", [], np.zeros(0, np.float32), None, None, [], token_texts=[])
    assert "None" in sample._repr_html_() and sample.cumulative_logprob == 0.0


def test_a_request_shows_prompt_and_every_sample():
    page = request(completion(["x"], [-1.0]), completion(["y", "z"], [-1.0, -2.0]))._repr_html_()
    assert "<b>p</b>" in page and spans(page) == ["x", "y", "z"]
    assert "<b>3 tokens</b>" in request(prompt=None)._repr_html_()


def test_a_list_of_outputs_is_a_list_with_a_form():
    outputs = RequestOutputs(request(completion([str(i)], [-1.0])) for i in range(25))
    page = outputs._repr_html_()
    assert isinstance(outputs, list) and len(outputs) == 25
    assert spans(page) == [str(i) for i in range(20)] and "and 5 more" in page
    assert "more" not in RequestOutputs(outputs[:20])._repr_html_() and RequestOutputs()._repr_html_() == ""


def test_cumulative_logprob_is_summed_in_float64():
    values = np.full(1000, 0.1, np.float32)
    assert completion(None, values.tolist()).cumulative_logprob == float(values.astype(np.float64).sum())
