"""Deltas: joined they are the whole output, whatever was read when, and reading or rendering changes nothing."""

import copy
import dataclasses

import numpy as np
import pytest

from checkpoints.model_folder import find_folder
from jaxengine.coordinate import Contract
from jaxengine.engine.deltas import DeltaReader
from jaxengine.engine.to_outputs import to_output
from jaxengine.host.sample import Request, Sample
from jaxengine.outputs import CompletionDelta, Logprob
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.detokenizer import detokenizer_for
from jaxengine.text.tokenizer import Tokenizer

TOKENS = Tokenizer.load(find_folder("calc"))


class Contracts:
    """Of weights that nobody asks for."""

    def of(self, versions):
        return Contract({"weights": list(versions)})


CONTRACTS = Contracts()


def request(text: str | None = None, **sampling) -> Request:
    """A request of one or more samples, with texts unless `text` is None."""
    params = SamplingParams(**sampling)
    found = Request("0", [1, 2], params, (0, 7), 0, frozenset(), 4000)
    found.samples = [Sample.of(found, index, index) for index in range(params.n)]
    for sample in found.samples if text is not None else ():
        sample.detokenizer = detokenizer_for(TOKENS, params)
    return found


def draw(sample: Sample, token: int, version: int = 0) -> None:
    """What the engine writes down of a token."""
    drawn, sampling, value = sample.drawn, sample.request.sampling, -0.25 * (1 + token % 7)
    drawn.token_ids.append(token)
    drawn.logprobs.append(value)
    drawn.versions.append(version)
    if sampling.raw_logprobs:
        drawn.raw_logprobs.append(value / 2)
    if sampling.entropy:
        drawn.entropies.append(-value)
    if sampling.logprobs is not None:
        drawn.top_logprobs.append({token: Logprob(value, 1)})
    if sample.detokenizer is not None:
        sample.detokenizer.push([token])


def end(sample: Sample) -> None:
    if sample.detokenizer is not None:
        sample.detokenizer.finish()
    sample.drawn.finish_reason = "length"


def joined(deltas: list[CompletionDelta], name: str) -> list:
    return [value for delta in deltas for value in getattr(delta, name)]


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_joined_deltas_are_the_whole_output(every):
    """A stop string that may begin holds text back, and half a character too; what is held comes with the end."""
    text = "12+30=42 é, 7*8=56 ab"
    grown = request(text, n=2, logprobs=1, raw_logprobs=True, entropy=True, stop=["abc"])
    reader, deltas = DeltaReader(grown, TOKENS), []
    for count, token in enumerate(TOKENS.encode(text), 1):
        draw(grown.samples[1], token, version=count // 4)
        if count % 3 == 0:
            draw(grown.samples[0], token)
        deltas += reader.read() if count % every == 0 else []
    for sample in grown.samples:
        end(sample)
    deltas += reader.read()
    assert reader.read() == [], "nothing is read twice"
    for whole in to_output(grown, TOKENS, CONTRACTS).outputs:
        own = [delta for delta in deltas if delta.index == whole.index]
        assert "".join(delta.text for delta in own) == whole.text != ""
        for name in ("token_ids", "logprobs"):
            assert joined(own, name) == getattr(whole, name)
        for name in ("token_logprobs", "raw_logprobs", "entropies"):
            parts = np.concatenate([getattr(delta, name) for delta in own])
            assert parts.dtype == np.float32 and parts.tobytes() == getattr(whole, name).tobytes()
        assert [delta.start for delta in own] == np.cumsum([0, *(len(d.token_ids) for d in own[:-1])]).tolist()
        spans = joined(own, "weight_versions")
        versions = [span.version for span in spans for _ in range(span.start, span.stop)]
        assert versions == grown.samples[whole.index].drawn.versions
        assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]]
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + ["length"]


@pytest.mark.parametrize("at", [1, 4, 10])
def test_two_deltas_joined_are_what_one_read_gives(at):
    text = "12+30=42 é"
    grown = request(text, logprobs=1, raw_logprobs=True, entropy=True)
    reader, whole, parts = DeltaReader(grown, TOKENS), DeltaReader(grown, TOKENS), []
    for count, token in enumerate(TOKENS.encode(text), 1):
        draw(grown.samples[0], token, version=count // 4)
        parts += reader.read() if count == at else []
    end(grown.samples[0])
    first, second, (expected,) = *parts, *reader.read(), whole.read()
    joined = dataclasses.asdict(first.followed_by(second))
    for name, value in dataclasses.asdict(expected).items():
        if isinstance(value, np.ndarray):
            assert joined[name].dtype == value.dtype and joined[name].tobytes() == value.tobytes()
        else:
            assert joined[name] == value
    nothing = first.followed_by(dataclasses.replace(second, logprobs=None, raw_logprobs=None, entropies=None))
    assert nothing.raw_logprobs is nothing.entropies is None


def test_two_readers_read_the_same():
    grown = request("")
    readers = [DeltaReader(grown, TOKENS) for _ in range(2)]
    for token in TOKENS.encode("7*8="):
        draw(grown.samples[0], token)
    assert [delta.text for reader in readers for delta in reader.read()] == ["7*8="] * 2


def test_a_reader_goes_on_after_a_recovery():
    """The engine makes another detokenizer then, which has read what was drawn."""
    grown, text = request("", stop=["abc"]), "12+30 ab = ab12"
    reader, sample, read = DeltaReader(grown, TOKENS), grown.samples[0], ""
    for token in TOKENS.encode(text):
        draw(sample, token)
        read += "".join(delta.text for delta in reader.read())
        sample.detokenizer = detokenizer_for(TOKENS, grown.sampling)
        sample.detokenizer.push(sample.drawn.token_ids)
    assert read == text


def test_without_texts_there_are_tokens():
    grown = request()
    draw(grown.samples[0], 5)
    (delta,) = DeltaReader(grown, None).read()
    assert (delta.text, delta.token_ids, delta.logprobs) == ("", [5], None)


class Counted(list):
    """A list that counts what is copied out of it."""

    copied = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Counted.copied += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self):
        Counted.copied += len(self)
        return super().__iter__()


def test_the_thousandth_token_costs_what_the_first_did(monkeypatch):
    grown = request("", logprobs=1)
    reader, sample, costs = DeltaReader(grown, TOKENS), grown.samples[0], []
    for name in ("token_ids", "logprobs", "versions", "top_logprobs"):
        setattr(sample.drawn, name, Counted())
    monkeypatch.setattr(sample.detokenizer, "_final", Counted())
    for token in TOKENS.encode("7") * 1000:
        draw(sample, token)
        Counted.copied = 0
        reader.read()
        costs.append(Counted.copied)
    assert len(set(costs)) == 1, f"the cost of a token grows: {costs[0]} at first, {costs[-1]} at last"


@pytest.mark.parametrize("ended", [False, True])
def test_rendering_changes_nothing(ended):
    """A sample whose text is held back, running or at its end, is rendered twice and goes on."""
    grown = request("", stop=["abc"])
    sample = grown.samples[0]
    for token in TOKENS.encode("1 ab"):
        draw(sample, token)
    if ended:
        end(sample)
    before = copy.deepcopy({k: v for k, v in vars(sample.detokenizer).items() if isinstance(v, (str, bool, int, list))})
    assert [to_output(grown, TOKENS, CONTRACTS).outputs[0].text for _ in range(2)] == ["1 ab" if ended else "1 "] * 2
    assert before.items() <= vars(sample.detokenizer).items()
