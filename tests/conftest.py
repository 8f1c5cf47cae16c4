"""Shared by all tests: small random models, and bits."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from compilation_cache import share_compiled_code

from checkpoints.model_folder import find_folder
from jaxengine import LLM
from jaxengine.config import EngineConfig, ModelConfig, RopeConfig
from jaxengine.device import steps
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.packed import pack
from jaxengine.engine import scoring_proof, step_variants
from jaxengine.engine.batch import BatchBuilder
from jaxengine.models import own_heads
from jaxengine.models.params import Decoder, initialise, path_name
from jaxengine.ops.tiles import BASE, TILES, WIDE
from jaxengine.text.tokenizer import Tokenizer
from pallas_kernels.cpu import library

SIZES = dict(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
)
FAMILIES = {
    "Qwen3": dict(architecture="Qwen3ForCausalLM", qk_norm=True, tie_word_embeddings=True),
    "Qwen2": dict(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "Llama": dict(architecture="LlamaForCausalLM", rope=RopeConfig(5e5, "llama3", 8.0, 256)),
    "Qwen3Moe": dict(
        architecture="Qwen3MoeForCausalLM",
        qk_norm=True,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
}
# The one shape of engines that tests share: another number of pages, slots or tokens is four to six programs more.
# A test that wants less room takes it with `engine.adjusted(held_pages=, held_slots=, max_num_batched_tokens=)`.
ENGINE = dict(max_model_len=512, max_num_seqs=32, num_pages=400)
# In the place of step_variants.TILES: what engines of that shape compile (scoring takes the same prefill tile), and
# what a test compiles that proves all tiles of an engine and need not prove six.
ONE_TILE = {"decode": (BASE,), "prefill": (WIDE,)}
FEW_TILES = ONE_TILE | {"decode": TILES["decode"][:2]}
# The bodies of the CPU's kernels that this processor has, and why it has none.
try:
    CPU_BODIES, NO_CPU_KERNELS = library.load(), ""
except library.KernelsMissingError as error:
    CPU_BODIES, NO_CPU_KERNELS = (), str(error)
NATIVE = pytest.mark.skipif(not CPU_BODIES, reason=NO_CPU_KERNELS)
LONG_FIRST = "test_contract", "rl", "models", "simulation", "equivalence", "kernels", "faults", "engine"
MAPS = Path("/proc/self/maps")
MANY_MAPS = 25_000  # Linux ends a process that asks for more than 65,530


class Held(dict):
    """No tiles of scoring refused for any model, as if the widest were proven.

    A proof compiles two programs for each model, and tests score many models, each against what it generated. The proof
    has tests of its own, which begin without this (tests/engine/test_scoring_proof.py).
    """

    def __contains__(self, model: object) -> bool:
        return True

    def __missing__(self, model: object) -> int:
        return 0


scoring_proof._refused = Held()
share_compiled_code()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT, which tests of Ctrl-C send


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peer-python",
        metavar="PATH",
        default=sys.executable,
        help="the interpreter whose installed peers of `jaxengine bench` are run (default: this one)",
    )


@pytest.hookimpl(optionalhook=True)  # where xdist is
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a worker keeps one and a half cores busy and takes up to 6 GB for compiled code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(max(2, cores - 1), memory // 6_000_000_000))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders whose files take long come first, so that no process is left alone with one at the end."""
    order = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


@pytest.fixture(autouse=True)
def compiled_code_fits():
    """XLA on CPU maps a few hundred pieces of memory for each program, and a long suite has hundreds of programs."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


def run_script(path: str, *arguments: str) -> Any:
    """What a script under tests/ prints last, read as JSON: it runs in a process of its own, with other devices."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, str(tests / path), *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def random_model(family: str = "Qwen3", **changes) -> tuple[ModelConfig, Decoder]:
    """A random model of a family, wide enough in its weights that logits differ clearly."""
    config = ModelConfig(**SIZES | FAMILIES[family] | changes)
    params = initialise(config, jax.random.key(0), scale=0.1)
    if config.qkv_bias:  # zeros would not show a bias that is left out
        keys = iter(jax.random.split(jax.random.key(1), 1000))

        def filled(path, x):
            return jax.random.normal(next(keys), x.shape).astype(x.dtype) if "bias" in path_name(path) else x

        params = jax.tree_util.tree_map_with_path(filled, params)
        params = own_heads.with_copies(config, own_heads.weights_once(config, params))  # copies are equal
    return config, params


def make_llm(config: ModelConfig, params: Decoder, **engine) -> LLM:
    """An engine of the shape that tests share, but for `engine`; one with a `compile_patience` has all tiles."""
    tiles = step_variants.TILES if "compile_patience" in engine else ONE_TILE
    with mock.patch.object(step_variants, "TILES", tiles):
        return LLM.from_params(config, params, **ENGINE | engine)


def step_call(
    kind: str, engine: EngineConfig, num_steps: int = 1, needs: Needs = Needs.ALL
) -> tuple[Callable, tuple, dict]:
    """A jitted step of eight rows or query blocks, its arguments after params and cache, and its static arguments."""
    step, tile, more = {
        "decode": (steps.decode_step, BASE, dict(num_steps=num_steps)),
        "prefill": (steps.prefill_step, WIDE, {}),
    }[kind]
    batch = BatchBuilder(engine)
    slots = jax.tree.map(np.copy, batch.host_slots)
    how = dict(tile=tile, needs=needs, max_logprobs=20)
    return step, (batch.tables, slots, pack(batch.smallest(kind, tile))), how | more


def pool_bytes(cache: Cache) -> int:
    """The size of one layer's keys or values: a step that copies what it should update in place needs as much again."""
    return min(x.size * x.dtype.itemsize for x in (*cache.keys, *cache.values))


def bits(outputs) -> list[tuple]:
    """What must not move: tokens, the bits of their logprobs, and how each sample ended."""
    return [
        (s.token_ids, s.token_logprobs.tobytes(), s.finish_reason, s.stop_reason) for o in outputs for s in o.outputs
    ]


@pytest.fixture(scope="session")
def tiny() -> LLM:
    """One small engine that tests share; they leave it as they found it.

    Its head is not the embedding, so that a row of the embedding can be poisoned.
    """
    return make_llm(*random_model(tie_word_embeddings=False))


@pytest.fixture(scope="session")
def tiny_with_text(tiny) -> LLM:
    """The shared engine's model, so that nothing is compiled again, with texts for its first 259 tokens."""
    return make_llm(tiny.config, tiny.params, tokenizer=Tokenizer.load(find_folder("calc")))


@pytest.fixture(scope="session")
def calc() -> LLM:
    """The model that ships, in the shape that tests share."""
    with mock.patch.object(step_variants, "TILES", ONE_TILE):
        return LLM("calc", progress=False, **ENGINE)


@pytest.fixture(scope="session")
def weights_root(tmp_path_factory) -> Path:
    """The folder that the shared server may read weights from."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def shared_server(calc, weights_root):
    from serving import ADMIN, KEY, running  # tests/server/serving.py: what it needs, other tests do without

    keys = dict(api_key=KEY, admin_key=ADMIN, weights_root=weights_root)
    with running(calc, max_body_bytes=100_000, max_samples=500, **keys) as found:
        yield found


@pytest.fixture
def served(shared_server):
    """One server over one engine; whatever a test sends it, no request and no held page stays."""
    yield shared_server
    shared_server.wait_until(shared_server.is_idle)
    shared_server.llm.engine.scheduler.page_pool.check_integrity([])


@pytest.fixture
def learner(calc, tmp_path):
    """A server of its own, because its weights change."""
    from serving import ADMIN, KEY, running

    (tmp_path / "root").mkdir()
    llm = make_llm(calc.config, calc.params, tokenizer=calc.tokenizer)
    with running(llm, api_key=KEY, admin_key=ADMIN, weights_root=tmp_path / "root") as found:
        yield found
    llm.close()
