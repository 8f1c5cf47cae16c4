"""Run by test_several_processes.py: one process of several that share a model. Prints its answers as JSON."""

import json
import os
import signal
import sys

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jaxengine

COUNT, INDEX, PORT = map(int, sys.argv[1:4])
jax.config.update("jax_num_cpu_devices", 1)
if COUNT > 1:
    jaxengine.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX, timeout=10)
    jaxengine.distributed.initialize(process_id=INDEX)  # again is nothing

from conftest import bits, make_llm, random_model  # noqa: E402

from jaxengine import SamplingParams  # noqa: E402
from jaxengine.engine import engine as engine_module  # noqa: E402
from sharding.mesh import on_host  # noqa: E402

SMALL = dict(
    vocab_size=250,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=1,
    reduction_leaves=4,
)
ROOM = dict(max_model_len=128, max_num_seqs=4, num_pages=12, max_num_batched_tokens=32, compile_patience=1_000_000)
PROMPTS = [list(range(3)), list(range(40, 57)), list(range(200, 240))]
PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True, logprobs=1)
DTYPES = sys.argv[5:]
DATA = 2 if "replicas" in sys.argv[4] else 1  # of the processes' devices, each half has a replica
TROUBLE_AT = 8  # the step at which something happens to the last process


def make(dtype: str, **engine) -> jaxengine.LLM:
    config, params = random_model("Qwen3", dtype=dtype, **SMALL)
    shape = dict(tensor_parallel_size=COUNT // DATA, data_parallel_size=DATA)
    return make_llm(config, params, kernels="cpu", **shape, **ROOM | engine)


def over_all_processes(llm: jaxengine.LLM):
    """The weights as a trainer of all processes may have them: every matrix cut along its last axis."""
    if COUNT == 1:
        return llm.params
    mesh = jax.make_mesh((COUNT,), ("fsdp",))

    def spread(x):
        home = NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))
        return jax.make_array_from_callback(x.shape, home, on_host(x).__getitem__)

    return jax.tree.map(spread, llm.params)


def answers(llm: jaxengine.LLM) -> dict:
    """Of two calls with an update between them, the second with cached prefixes and the overlapped loop."""
    first = llm.generate(PROMPTS, PARAMS, key=jax.random.key(0))
    llm.update_params(over_all_processes(llm))
    with llm.engine.adjusted(overlap=True):
        second = llm.generate(PROMPTS[::-1], PARAMS, key=jax.random.key(1))
    rollout = jaxengine.Rollout.from_outputs(first)
    scored = llm.score(rollout.tokens, rollout.mask)
    return {
        "generated": [[list(ids), logprobs.hex()] for ids, logprobs, *_ in bits([*first, *second])],
        "scored": scored.tobytes().hex(),
        "equal": scored.tobytes() == rollout.logprobs.tobytes(),
        "contract": llm.contract().digest,
        "likeliest": str([sample.logprobs for output in second for sample in output.outputs]),
    }


def trouble(kind: str) -> None:
    """What happens to this process as it plans a certain step."""
    record, steps = engine_module.record, iter(range(1_000_000))

    def troubled(plan):
        if next(steps) == TROUBLE_AT:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "fails":
                raise OSError("a planted failure")
            if kind == "corrupted":
                sample, position, count = plan.decodes[0]
                plan.decodes[0] = type(plan.decodes[0])(sample, position - 1, count)
        return record(plan)

    engine_module.record = troubled


def main(kind: str) -> None:
    if kind in ("bits", "replicas"):
        print(json.dumps({dtype: answers(make(dtype)) for dtype in DTYPES}))
        return
    if kind == "verified":
        found = make("float32", max_num_seqs=8, num_pages=40).verify(quick=True)
        print(json.dumps({check.axis: check.holds for check in found.checks if check.axis in ("C9", "C10")}))
        print(found.holds)
        return
    llm = make("float32", process_timeout=5)
    llm.generate(PROMPTS, PARAMS, key=jax.random.key(0))  # compiles
    print("ready", flush=True)
    if INDEX == COUNT - 1:
        trouble(kind)
    key = jax.random.key(INDEX if kind == "other key" else 0)
    llm.generate(PROMPTS, PARAMS, key=key)
    print("returned", flush=True)


if __name__ == "__main__":
    main(sys.argv[4])
