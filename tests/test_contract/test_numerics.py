"""NUMERICS, the number in the contract for this project's own arithmetic, is raised whenever bits change.

Bits themselves differ from processor to processor, so what is held is the program that gives them: the HLO of the steps
and of scoring, before XLA compiles it. A change of it is a change of bits, unless shown otherwise. Then

    python tests/test_contract/test_numerics.py

writes the new programs down: after NUMERICS was raised; or, where `tests/test_contract/mixed_run.py` gives the digest
that it gave before the change, with the number as it is.

Of the CPU's kernels in C++ a program says only that they are called. Their bits are the same on every x86-64 processor,
so those are held beside it, with the number of their order (ops/cpu_chain.ORDER).
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HELD = Path(__file__).with_name("numerics.json")
if __name__ == "__main__":
    sys.path[:0] = [str(HELD.parents[1]), str(HELD.parents[2])]

from conftest import NATIVE, random_model, step_call  # noqa: E402  (as a script, this file has to say where it lies)

from jaxengine import SamplingParams  # noqa: E402
from jaxengine.config import EngineConfig  # noqa: E402
from jaxengine.device import kv_cache, scoring  # noqa: E402
from jaxengine.device.needs import Needs  # noqa: E402
from jaxengine.engine.contract_digest import NUMERICS  # noqa: E402
from jaxengine.models.params import abstract  # noqa: E402
from jaxengine.ops import cpu_chain, xla  # noqa: E402
from jaxengine.ops.kernels import Kernels, choose_kernels  # noqa: E402
from jaxengine.ops.tiles import SCORING  # noqa: E402
from pallas_kernels import pinned_math  # noqa: E402
from pallas_kernels.cpu import calls  # noqa: E402
from pallas_kernels.paged_attention_inputs import PagedBlocks  # noqa: E402

ENGINE = EngineConfig(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=128, num_pages=8)
MODELS = {
    "Qwen2 float32, 2 leaves": dict(family="Qwen2", dtype="float32", reduction_leaves=2),
    "Qwen3 bfloat16": dict(family="Qwen3", dtype="bfloat16"),
    "Qwen3Moe bfloat16, 2 leaves": dict(family="Qwen3Moe", dtype="bfloat16", reduction_leaves=2),
}
PROGRAMS = [
    pytest.param(model, kernels, marks=NATIVE if kernels == "cpu" else ())
    for model in MODELS
    for kernels in ("xla", "pallas_interpret", "cpu")
]


def digests(model: str, kernels_name: str) -> dict[str, str]:
    """A hash of each program's text, by what it does."""
    config, _ = random_model(**MODELS[model], num_hidden_layers=1)
    kernels, params = choose_kernels(kernels_name, config), abstract(config)
    engine = dataclasses.replace(ENGINE, kernels=kernels_name)
    cache, how = kv_cache.abstract(config, engine, kernels), dict(model_config=config, kernels=kernels)
    programs = {}
    # What is interpreted takes seconds to trace, and the step for all needs has the kernels of the others.
    all_needs = (Needs.ALL,) if kernels_name == "pallas_interpret" else Needs
    for kind, needs in itertools.product(("decode", "prefill"), all_needs):
        step, inputs, static = step_call(kind, engine, needs=needs)
        programs[f"{kind}{needs}"] = step.lower(params, cache, *inputs, **how, **static)
    arrays = scoring.sampling_arrays_of([SamplingParams()] * 2, config)
    tokens, mask = jnp.zeros((2, 70), jnp.int32), jnp.ones((2, 70), bool)
    programs["score"] = scoring.token_logprobs.lower(
        params, tokens, mask, arrays, entropy=True, tiles=SCORING[0], **how
    )
    return {name: hashlib.sha256(program.as_text().encode()).hexdigest()[:16] for name, program in programs.items()}


def held() -> dict:
    return json.loads(HELD.read_text())


# -- the CPU's kernels -------------------------------------------------------------------------------------------------


def numbers(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Multiples of 1/1024 between -4 and 4: exact, and the same on every machine."""
    whole = np.random.RandomState(seed).randint(-4096, 4097, shape)
    return (whole / 1024).astype(np.float32).astype(jnp.dtype(dtype))


def kernel_digests() -> dict[str, str]:
    """A hash of what each kernel gives, by its name and the type of its weights."""
    found, live = {}, calls.Live(jnp.int32(11), 8)
    for dtype in ("bfloat16", "float16", "float32"):
        x, norm, w = numbers(0, 11, 72), numbers(1, 72, dtype=dtype), numbers(2, 2, 34, 72, dtype=dtype)
        inner, residual = numbers(3, 11, 144, dtype=dtype), numbers(4, 11, 34)
        found[f"outputs {dtype}"] = calls.outputs(x, norm, 1e-6, w, None, live)
        found[f"gated {dtype}"] = calls.gated(x, norm, 1e-6, w, live)
        found[f"added {dtype}"] = calls.added(residual, inner, w, None, live)
        found[f"logits {dtype}"] = calls.logits(x, norm, 1e-6, w)
        found[f"attention {dtype}"] = attended(dtype)
    logits = numbers(5, 6, 1024)
    uniforms = np.linspace(0.05, 0.95, 12, dtype=np.float32).reshape(6, 2)
    found["draw"] = calls.draw(logits, uniforms, np.full(6, -1, np.int32))
    settings = np.full(6, 100, np.int32), np.linspace(0.2, 1, 6, dtype=np.float32), np.full(6, 0.05, np.float32)
    found["kept"] = calls.kept(logits, *settings)
    return {name: hashed(out) for name, out in found.items()}


def attended(dtype: str) -> list[jax.Array]:
    """70 tokens of one sequence, in blocks of 16: the queries, and what they attend to."""
    rows, norm = numbers(6, 80, 8 * 32), numbers(7, 32, dtype=dtype)
    storage = jnp.float32 if dtype == "float32" else jnp.uint16
    keys, values = (jnp.zeros(x.shape, x.dtype) for x in calls.page_shapes(2, 3, 32, 32, storage))
    starts = jnp.arange(0, 80, 16, dtype=jnp.int32)
    blocks = PagedBlocks(
        jnp.array([[2, 0, 1]]), jnp.zeros(5, jnp.int32), starts, jnp.minimum(70 - starts, 16), jnp.int32(5)
    )
    geometry = calls.Geometry(1, 4, 32, 1e-6, 1.0, dtype)
    frequencies = numbers(8, 16)
    q, keys, values = calls.rotate_and_write(geometry, rows, (norm, norm), frequencies, keys, values, blocks)
    return [q, calls.attend(q, keys, values, blocks, dtype)]


def hashed(out: Any) -> str:
    content = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(out))
    return hashlib.sha256(content).hexdigest()[:16]


@NATIVE
def test_the_cpus_kernels_have_the_bits_of_their_order():
    expected = held()["cpu kernels"]
    assert expected["order"] == cpu_chain.ORDER, f"write the bits of ORDER={cpu_chain.ORDER} down: python {__file__}"
    assert kernel_digests() == expected["bits"], "raise ORDER in ops/cpu_chain.py"


# -- programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, kernels", PROGRAMS, ids=lambda name: name.replace(" ", "-"))
def test_programs_are_those_of_the_number(model, kernels):
    programs = held()["programs"].get(jax.__version__)
    if programs is None:
        pytest.skip(f"no programs are held for jax {jax.__version__}")
    assert held()["numerics"] == NUMERICS, f"write the programs of NUMERICS={NUMERICS} down: python {__file__}"
    assert digests(model, kernels) == programs[f"{model}, {kernels}"], (
        "raise NUMERICS, unless bits are shown to be equal"
    )


def test_the_version_that_is_tested_is_held():
    """The oldest jax that the project takes, which its environments have, is never skipped."""
    assert {"0.10.2"} <= held()["programs"].keys()


def with_wide_head(*which, choose=choose_kernels) -> Kernels:
    """In the place of choose_kernels."""
    return dataclasses.replace(choose(*which), head_tile=16)


PLANTED = {
    "a coefficient": lambda patch: patch.setattr(
        pinned_math, "COEFFICIENTS", np.nextafter(np.float32(pinned_math.COEFFICIENTS), np.float32(2)).tolist()
    ),
    "the order of a sum": lambda patch: patch.setattr(pinned_math, "SUM_BLOCK", pinned_math.SUM_BLOCK // 2),
    "a tile of attention": lambda patch: patch.setattr(xla, "ATTENTION_TILE", xla.ATTENTION_TILE // 2),
    "a tile of the head": lambda patch: patch.setattr(sys.modules[__name__], "choose_kernels", with_wide_head),
}


@pytest.mark.slow  # because all compiled code of the process goes, so that programs are traced again
@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_a_change_of_bits_is_seen(plant, monkeypatch):
    before = digests("Qwen3 bfloat16", "xla")
    jax.clear_caches()  # of traces
    plant(monkeypatch)
    try:
        assert digests("Qwen3 bfloat16", "xla") != before
    finally:
        jax.clear_caches()


def main() -> None:
    programs = held()["programs"] if HELD.exists() and held()["numerics"] == NUMERICS else {}
    each = [param.values for param in PROGRAMS]
    programs[jax.__version__] = {f"{model}, {kernels}": digests(model, kernels) for model, kernels in each}
    bits = {"order": cpu_chain.ORDER, "bits": kernel_digests()}
    HELD.write_text(json.dumps({"numerics": NUMERICS, "programs": programs, "cpu kernels": bits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
