"""The CPU's kernels in C++: a coordinate replays whichever instructions the processor has, or XLA may use.

Here a processor without fused multiply-adds is one where XLA was told to take AVX and no more.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CPU_BODIES, FAMILIES, NATIVE, SIZES

from jaxengine.config import ModelConfig
from jaxengine.engine.contract_digest import contract_of
from jaxengine.ops.kernels import XLA, Kernels, cpu_kernels

pytestmark = NATIVE

ROOT = Path(__file__).parents[2]
# Draws, or replays what was drawn; prints the contract's digest, and what XLA makes of a product that is added to.
RUN = """
import sys
sys.path.insert(0, "tests")
from pallas_kernels.cpu import library
folder, body = sys.argv[1:]
library.BODIES["best"] = library.BODIES[body]
import hashlib, pathlib
import jax, numpy as np
from conftest import make_llm, random_model
import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.coordinate import Coordinate
from pallas_kernels.pinned_math import exp
each = [
    dict(),
    dict(temperature=0.7, top_k=50, top_p=0.9),
    dict(min_p=0.01, temperature=1.3),
    dict(repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.7, temperature=0.9),
    dict(logit_bias={5: 3.3, 7: -1.7}, top_p=0.8, frequency_penalty=-0.1),
    dict(temperature=0.0, repetition_penalty=1.1),
    dict(allowed_token_ids=range(9), repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.7),
]
prompts = [[1, 2, 3], list(range(70)), [9] * 17, [4, 4, 5, 6, 4], [7] * 40, list(range(33)), [2, 3]]
params = [SamplingParams(max_tokens=24, ignore_eos=True, seed=i, **more) for i, more in enumerate(each)]
llm = make_llm(*random_model("Qwen3", dtype="bfloat16", hidden_size=64, num_hidden_layers=1), kernels="cpu")
kept = pathlib.Path(folder) / "drawn"
if kept.exists():
    drawn = map(Coordinate.from_json, kept.read_text().splitlines())
    differ = [i for i, coordinate in enumerate(drawn) if not llm.replay(coordinate).holds]
else:
    kept.write_text("\\n".join(o.outputs[0].coordinate.to_json() for o in llm.generate(prompts, params)))
    differ = []
rollout = Rollout.from_outputs([o for o in llm.generate(prompts, params)])
scored = jaxengine.score(llm.params, rollout.tokens, rollout.mask, params, config=llm.config, kernels="cpu")
exponentials = np.asarray(jax.jit(exp)(np.linspace(-80, 80, 10_000, dtype=np.float32)))
digests = (hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in (scored, exponentials))
print(llm.contract().digest, *digests, differ)
"""


def run(folder: Path, body: str = "best", flags: str = "") -> tuple[str, str, str, str]:
    """(contract's digest, that of logprobs, that of XLA's own exponentials, which coordinates differ)"""
    env = os.environ | dict(XLA_FLAGS=flags, JAX_ENABLE_COMPILATION_CACHE="false", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", RUN, str(folder), body]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    contract, logprobs, exponentials, differ = done.stdout.strip().splitlines()[-1].split(" ", 3)
    return contract, logprobs, exponentials, differ


@pytest.mark.slow
def test_a_coordinate_replays_with_other_instructions(tmp_path):
    first = run(tmp_path, CPU_BODIES[0])
    assert first[-1] == "[]"
    narrow = run(tmp_path, CPU_BODIES[0], "--xla_cpu_max_isa=AVX")
    assert narrow[:2] == first[:2] and narrow[-1] == "[]"
    assert narrow[2] != first[2], "XLA was to compile other code"
    for body in CPU_BODIES[1:]:
        assert run(tmp_path, body) == first


def test_the_contract_says_whether_instructions_matter(monkeypatch):
    """To XLA's own kernels they do, so that its digest is another one."""
    config = ModelConfig(**SIZES | FAMILIES["Qwen3"])

    def digest(kernels: Kernels, flags: str) -> str:
        monkeypatch.setenv("XLA_FLAGS", flags)
        return contract_of(config, kernels, "weights").digest

    assert digest(cpu_kernels(), "--xla_cpu_max_isa=AVX") == digest(cpu_kernels(), "")
    assert digest(XLA, "--xla_cpu_max_isa=AVX") != digest(XLA, "")
