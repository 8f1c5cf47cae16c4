"""One digest of a mixed run: families, dtypes, sampling, cache, preemption, scoring, gradients, training.

`python tests/test_contract/mixed_run.py` prints a line a part and one digest of all. Two commits whose lines are equal
on one machine compute the same bits: take it before a refactoring, and again after each step of it. There is no golden
file, because another processor or jaxlib gives other bits, which the contract allows.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxengine
from jaxengine import LLM, ModelConfig, Rollout, SamplingParams
from jaxengine.config import RopeConfig
from jaxengine.models.params import initialise
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.trainer import Trainer, TrainerConfig

SIZES = dict(
    vocab_size=700,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=2048,
)
LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 256)
MODELS = {
    "Qwen3 bfloat16": dict(architecture="Qwen3ForCausalLM", qk_norm=True, tie_word_embeddings=True, dtype="bfloat16"),
    "Qwen2 float32, 4 leaves": dict(architecture="Qwen2ForCausalLM", qkv_bias=True, reduction_leaves=4),
    "Llama float16": dict(architecture="LlamaForCausalLM", rope=LLAMA3, out_bias=True, dtype="float16"),
}
KERNELS = "xla"  # whose bits follow from every line of the ops; the CPU's own kernels have a golden test
ENGINE = dict(max_model_len=256, max_num_seqs=8, num_pages=64, page_size=16, kernels=KERNELS)
LENGTHS = (1, 2, 15, 16, 17, 33, 48, 63, 64, 65, 97)


def parts() -> Iterator[tuple[str, Any]]:
    """(name, what was computed) of each part of the run."""
    for name, changes in MODELS.items():
        config = ModelConfig(**SIZES | changes)
        params = initialise(config, jax.random.key(0), scale=0.1)
        yield from generated(name, config, params)
        yield from scored(name, config, params)
    yield from with_text()
    yield from trained()


def generated(name: str, config: ModelConfig, params: Any) -> Iterator[tuple[str, Any]]:
    """The same requests in the plain loop, overlapped, in chunks, from a pool that is too small; then continuations."""
    requests, key = mixed_requests(config), jax.random.key(11)
    llm = LLM.from_params(config, params, **ENGINE)
    outputs = llm.generate(*requests, key=key)
    yield f"{name}: plain", outputs
    yield f"{name}: again, from the cache", llm.generate(*requests, key=key)
    yield f"{name}: extended", llm.extend(outputs[1:3], SamplingParams(max_tokens=40, temperature=0.8))
    llm.update_params(jax.tree.map(lambda x: x * 1.0625, params))
    yield f"{name}: other weights", llm.generate(*requests, key=key)
    del llm
    small = dict(num_pages=26, overlap=True, decode_steps=2, max_num_batched_tokens=48)
    yield (
        f"{name}: preempted, overlapped, chunked",
        LLM.from_params(config, params, **ENGINE | small).generate(*requests, key=key),
    )


def mixed_requests(config: ModelConfig) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of adversarial lengths; greedy, sampled, cut, penalised, biased, in groups, with all that can be had."""
    rng = np.random.RandomState(3)
    prompts = [rng.randint(0, config.vocab_size, length).tolist() for length in LENGTHS]
    kinds = [
        dict(n=3),
        dict(temperature=0.0),
        dict(temperature=0.7, top_p=0.9, top_k=20),
        dict(min_p=0.02, logprobs=3),
        dict(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5),
        dict(logit_bias={5: 4.0, 7: -100.0}),
        dict(raw_logprobs=True, entropy=True, prompt_logprobs=2),
        dict(n=2, seed=5),
        dict(min_tokens=4, stop_token_ids=list(range(16))),
    ]
    return prompts, [SamplingParams(max_tokens=20 - i, **kinds[i % len(kinds)]) for i in range(len(prompts))]


def scored(name: str, config: ModelConfig, params: Any) -> Iterator[tuple[str, Any]]:
    """Logprobs, entropies, and the gradient of their sum."""
    rng = np.random.RandomState(4)
    tokens = jnp.array(rng.randint(0, config.vocab_size, (5, 71)))
    mask = jnp.array(np.arange(71) >= rng.randint(1, 60, (5, 1)))
    sampling = [
        SamplingParams(temperature=0.9, top_k=50),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=0.0),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(),
    ]
    how = dict(config=config, kernels=KERNELS)
    yield f"{name}: score", jaxengine.score(params, tokens, mask, sampling, entropy=True, **how)

    def loss(params):
        logprobs = jaxengine.score(params, tokens, mask, SamplingParams(temperature=1.1), **how)
        return jnp.where(mask, jnp.maximum(logprobs, -30.0), 0.0).sum()

    yield f"{name}: gradient", jax.jit(jax.value_and_grad(loss))(params)


def with_text() -> Iterator[tuple[str, Any]]:
    """The model that ships: text, stop strings, chat, streams, a replay."""
    llm = LLM("calc", progress=False, max_model_len=128, max_num_seqs=8, num_pages=64, kernels=KERNELS)
    sampling = SamplingParams(n=4, max_tokens=16, stop=["5", "77"], logprobs=2)
    outputs = llm.generate(["12+30=", "7*8=", "(3+4)*5="], sampling, key=jax.random.key(2))
    yield "calc: text", [(s.text, s.token_texts) for output in outputs for s in output.outputs]
    yield "calc: bits", outputs
    yield (
        "calc: chat",
        llm.chat([{"role": "user", "content": "12+30="}], SamplingParams(max_tokens=8), key=jax.random.key(3)),
    )
    yield (
        "calc: stream",
        [
            output.outputs[0].text
            for output in llm.stream("9*9=", SamplingParams(max_tokens=8), key=jax.random.key(4), cumulative=True)
        ],
    )
    yield "calc: replay", [str(llm.replay(sample.coordinate)) for sample in outputs[1].outputs]
    functional = jaxengine.generate(
        llm.params, ["1+1="], sampling, key=jax.random.key(5), config=llm.config, tokenizer=llm.tokenizer, **ENGINE
    )
    yield "calc: functional", functional
    yield "calc: rollout", dataclasses.astuple(Rollout.from_outputs(outputs, length=40))[:4]


def trained() -> Iterator[tuple[str, Any]]:
    """Two updates of GRPO, and two of PPO with its critic."""
    config = ModelConfig(
        **SIZES | dict(architecture="Qwen3ForCausalLM", qk_norm=True, dtype="bfloat16", num_hidden_layers=1)
    )
    params = initialise(config, jax.random.key(6), scale=0.1)
    sampling = SamplingParams(n=4, max_tokens=12, temperature=0.9, top_k=200, entropy=True)
    prompts = [[1, 2, 3], [4, 5], [6] * 9, [7] * 17]
    for algorithm in ("grpo", "ppo"):
        trainer = Trainer(
            config, optax.adamw(1e-3), TrainerConfig(ALGORITHMS[algorithm], sampling, mini_batches=2), kernels=KERNELS
        )
        state = trainer.start(params, jax.random.key(8))
        outputs = jaxengine.generate(
            trainer.policy(state), prompts, sampling, key=jax.random.key(9), config=config, **ENGINE
        )
        rewards = np.array(
            [np.mean([t % 2 for t in s.token_ids]) for output in outputs for s in output.outputs], np.float32
        )
        state, updates = trainer.train(state, Rollout.from_outputs(outputs, length=32), rewards)
        yield f"{algorithm}: state", state
        yield f"{algorithm}: metrics", updates


def digest(value: Any) -> str:
    """A hash of every token, bit and text."""
    hashed = hashlib.sha256()
    for word in words(value):
        hashed.update(word + b"\0")
    return hashed.hexdigest()[:16]


def words(value: Any) -> Iterator[bytes]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from words(item)
    elif isinstance(value, dict):
        for key in value:
            yield from words((str(key), value[key]))
    elif isinstance(value, jaxengine.RequestOutput):
        yield from words((value.prompt_token_ids, value.prompt_logprobs, value.outputs))
    elif isinstance(value, jaxengine.CompletionOutput):
        yield from words(
            (
                value.token_ids,
                value.token_logprobs,
                value.finish_reason,
                value.stop_reason,
                value.logprobs,
                value.raw_logprobs,
                value.entropies,
                value.text,
                [(span.version, span.start, span.stop) for span in value.weight_versions],
            )
        )
    elif isinstance(value, jaxengine.Logprob):
        yield from words((np.float64(value.logprob), value.rank, value.decoded_token))
    elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(np.asarray(value)).tobytes()
    elif value is None or isinstance(value, (str, int, float)):
        yield repr(value).encode()
    else:
        yield from words(jax.tree.leaves(value))


def main() -> None:
    lines = []
    for name, value in parts():
        lines.append(f"{digest(value)}  {name}")
        print(lines[-1], flush=True)
    print(f"{digest(lines)}  all {len(lines)} parts")


if __name__ == "__main__":
    main()
