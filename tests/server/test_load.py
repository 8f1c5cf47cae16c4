"""benchmarks/load.py: what its clients count, with a server that is well and with one that is not."""

import asyncio
import dataclasses
import json
import os

import httpx
import pytest
from serving import KEY

from benchmarks import load
from benchmarks.load import Load


def loaded(served, seconds: float = 1.0, **given) -> Load:
    found = Load(served.address, "calc", KEY, clients=8, seconds=seconds, pid=os.getpid(), **given)
    asyncio.run(found.run())
    return found


def test_every_request_is_answered_or_left(served, monkeypatch):
    monkeypatch.setattr(load, "PATIENCE", 0.1)
    found = loaded(served, leaving=0.5)
    assert found.is_good and found.remaining == 0 and set(found.ends) == {"answered", "left"}, found.report()
    assert len(found.first) <= found.ends.total() and found.num_tokens > len(found.between) > len(found.first) > 0
    assert len(found.memory) > 0 and min(found.memory) > 2**20
    assert all(0 < seconds < 60 for seconds in found.first + found.between)
    report = found.report()
    assert "to the first token" in report and "server's memory in MB" in report and "lost 0" not in report


def test_a_full_queue_is_no_loss(served, monkeypatch):
    engine = served.llm.engine
    monkeypatch.setattr(engine, "engine_config", dataclasses.replace(engine.engine_config, max_waiting=1))
    found = loaded(served, seconds=0.3, leaving=0.0)
    assert found.is_good and found.ends["refused"] and found.ends["answered"], found.report()


def response(*choices: tuple[int, str | None]) -> httpx.Response:
    """A stream of chunks with so many tokens and these finish reasons."""
    chunks = [{"choices": [{"token_ids": [1] * count, "finish_reason": reason}]} for count, reason in choices]
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


@pytest.mark.parametrize("reason", [None, "abort", "stop"])
def test_a_stream_that_ends_otherwise_is_no_answer(reason):
    found = Load("", "")
    with pytest.raises(ValueError, match=f"finish reason {reason}"):
        asyncio.run(found._read(response((1, None), (2, reason)), 0.0, 9))
    assert asyncio.run(found._read(response((1, None), (2, "length")), 0.0, 9)) == 3
    assert asyncio.run(found._read(response((1, None), (2, reason)), 0.0, 2)) == 2, "the client has left before the end"
    found.losses["2 of 3 tokens and the end"] += 1
    assert not found.is_good


def test_what_a_server_loses_is_counted(served, monkeypatch):
    step, steps = served.llm.engine.step, iter(range(1, 1000))

    def broken():
        if next(steps) == 20:
            raise ArithmeticError("injected")
        return step()

    monkeypatch.setattr(served.llm.engine, "step", broken)
    found = loaded(served, seconds=0.5, leaving=0.0)
    assert not found.is_good and found.ends["lost"] == found.losses.total() > 0
    assert "the server failed with ArithmeticError" in found.report()
