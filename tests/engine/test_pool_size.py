"""The pool is sized from what is free, and the plan says what is really taken."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from conftest import make_llm

from jaxengine import LLM
from jaxengine.base import machine
from jaxengine.config import EngineConfig
from jaxengine.engine import memory
from jaxengine.ops.tiles import WIDE

ENGINE = EngineConfig(max_num_seqs=4, max_model_len=512, num_pages=2)
TAKEN = 300_000_000
WORKSPACE = 7_000_000


def sizes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Accelerator:
    """Where the arrays of this process lie."""

    platform = "gpu"

    def __init__(self, limit: int, in_use: int) -> None:
        self.memory_stats = lambda: {"bytes_limit": limit, "bytes_in_use": in_use}

    def __eq__(self, other) -> bool:
        return other.platform == "cpu"


def accelerator(monkeypatch, limit: int, in_use: int = 0) -> None:
    """A device of so much memory, on which the widest steps take WORKSPACE."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator(limit, in_use)])
    monkeypatch.setattr(memory, "_compiled_workspace", lambda *given: WORKSPACE)


def test_the_plan_is_what_the_arrays_take(tiny):
    plan, cache = tiny.memory_plan(), tiny.engine.cache
    assert (plan.weights, plan.cache) == (
        sizes(tiny.params),
        sizes(cache),
    ) and plan.num_pages == tiny.engine_config.num_pages
    pages = plan.num_pages + tiny.engine_config.probe_pages
    assert (
        plan.page_bytes * pages == sizes((cache.keys, cache.values)) == plan.cache - sizes((cache.history, cache.rules))
    )
    assert (
        plan.total == plan.weights + plan.cache + plan.workspace
        and plan.workspace > 4 * 8 * tiny.config.padded_vocab_size
    )


def cache_bytes(tiny, engine: EngineConfig) -> int:
    return memory.memory_plan(tiny.config, engine).cache


@pytest.mark.parametrize("share, in_use", [(0.9, 0), (0.9, TAKEN), (0.5, TAKEN)])
def test_an_accelerators_pool_fills_what_others_leave(share, in_use, tiny, monkeypatch):
    """A page more would be too many."""
    limit, engine = 10**9, dataclasses.replace(ENGINE, gpu_memory_utilization=share, max_num_seqs=10_000)
    accelerator(monkeypatch, limit, in_use)
    plan = memory.memory_plan(tiny.config, engine)
    free = int(limit * share) - in_use - plan.weights - WORKSPACE
    sized = memory.sized_pool(tiny.config, engine)
    assert free - plan.page_bytes < cache_bytes(tiny, sized) <= free


def test_devices_of_a_cpus_mesh_share_the_hosts_memory(tiny, monkeypatch):
    """Where free memory decides, where CPU_POOL does, and where all is more than is installed."""
    engine = dataclasses.replace(ENGINE, max_num_seqs=500)
    for free in (1_200_000_000, 10**12):
        monkeypatch.setattr(memory, "_devices_here", lambda config: 1)
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        alone = memory.sized_pool(tiny.config, engine).num_pages
        monkeypatch.setattr(memory, "_devices_here", lambda config: 4)
        assert abs(memory.sized_pool(tiny.config, engine).num_pages - alone / 4) < 0.1 * alone / 4
    monkeypatch.setattr(memory, "_devices_here", lambda config: 10**6)
    with pytest.raises(MemoryError, match="of memory in all"):
        memory.check_fits(tiny.config, dataclasses.replace(engine, num_pages=100))


def test_the_workspace_of_an_accelerator_is_that_of_its_compiled_steps(tiny):
    """No estimate: what XLA says of the widest steps, which grows with the rows that they take."""
    few, many = (dataclasses.replace(ENGINE, max_num_batched_tokens=n, kernels="xla") for n in (64, 512))
    one_layer = dataclasses.replace(tiny.config, num_hidden_layers=1)
    found = [memory._compiled_workspace(one_layer, engine) for engine in (few, many)]
    logits = WIDE.rows * tiny.config.padded_vocab_size * 4
    assert found[0] < found[1] and logits / 2 < found[1] < 20 * logits


def test_weights_that_are_there_count_once(tiny, monkeypatch):
    engine, weights = dataclasses.replace(ENGINE, max_num_seqs=10_000), sizes(tiny.params)
    pages = []
    for in_use, params in ((0, None), (weights, tiny.params), (weights, jax.tree.map(np.asarray, tiny.params))):
        accelerator(monkeypatch, 10**9, in_use)
        pages.append(memory.sized_pool(tiny.config, engine, params).num_pages)
    assert pages[0] == pages[1] > pages[2], "the last ones are on the host, and others' are on the device"


def test_no_more_pages_than_all_slots_fill(tiny, monkeypatch):
    accelerator(monkeypatch, 10**12)
    assert memory.sized_pool(tiny.config, ENGINE).num_pages == 4 * 512 // 32 + 1


def test_a_hosts_pool_takes_its_share_of_what_is_free(tiny, monkeypatch):
    engine = dataclasses.replace(ENGINE, max_num_seqs=10_000)
    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    plan = memory.memory_plan(tiny.config, engine)
    assert 10**9 // 4 - plan.page_bytes < cache_bytes(tiny, memory.sized_pool(tiny.config, engine)) <= 10**9 // 4


@pytest.mark.parametrize("length", [512, 131_072])
def test_a_small_models_pool_on_a_host_is_no_gigabytes(tiny, monkeypatch, length):
    """But a whole context always has room."""
    engine = dataclasses.replace(ENGINE, max_num_seqs=10_000 * 512 // length, max_model_len=length)
    monkeypatch.setattr(machine, "free_memory", lambda: 10**12)
    sized, page = memory.sized_pool(tiny.config, engine), memory.memory_plan(tiny.config, engine).page_bytes
    most = max(memory.CPU_POOL, sizes(tiny.params), (length // 32 + 1) * page)
    assert most - page < sized.num_pages * page <= most


def test_what_does_not_fit_names_the_longest_context_that_does(tiny, monkeypatch):
    """Also where histories and token rules alone, a row a slot, are too much."""
    monkeypatch.setattr(machine, "free_memory", lambda: 24_000_000)
    engine = dict(max_num_seqs=300, max_model_len=4096)
    with pytest.raises(
        MemoryError,
        match=r"one context of max_model_len=4096 tokens needs 129 pages, \d+ fit: weights .*; "
        r"max_model_len=\d+ fits; or lower .*, or give num_pages",
    ) as found:
        LLM.from_params(tiny.config, tiny.params, **engine)
    longest = int(re.search(r"max_model_len=(\d+) fits", str(found.value))[1])
    make = lambda length: memory.sized_pool(tiny.config, EngineConfig(**engine | dict(max_model_len=length)))
    assert make(longest).max_model_len == longest
    with pytest.raises(MemoryError, match=f"max_model_len={longest} fits"):
        make(longest + 1)
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="there is no room for any; lower"):
        make(64)
    accelerator(monkeypatch, 10**9, 10**9)
    with pytest.raises(
        MemoryError, match=r"1.00 GB are in use: raise gpu_memory_utilization=0.9; there is no room for any"
    ):
        make(64)


@pytest.mark.parametrize("share", [0, 1.5, "much"])
def test_a_share_of_memory_is_one(share, tiny):
    with pytest.raises(ValueError, match="gpu_memory_utilization must be"):
        make_llm(tiny.config, tiny.params, gpu_memory_utilization=share)
