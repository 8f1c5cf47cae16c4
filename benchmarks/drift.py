"""How far bfloat16 drifts from float32: sampled logprobs against a plain float32 forward pass, at long contexts.

    python benchmarks/drift.py [--length 4096 16384 40960] [--scale 0.05]

The model is random (normal weights of deviation `scale`, 2 layers of width 64). Its norms make it as decided as a
trained model: attention picks few tokens, because an average over all would hide any error, and the output picks few
tokens too (see the entropies). A prompt of random tokens is completed at temperature 1. The reference is
jaxengine/models/plain.py on the same weights, cast to float32. KL is estimated without bias, and never below 0, from d
= log p_ref - log p as the mean of e^d - 1 - d: Schulman, "Approximating KL Divergence", 2020, k3.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine import LLM, SamplingParams
from jaxengine.config import ModelConfig, RopeConfig
from jaxengine.models import plain
from jaxengine.models.params import Decoder, initialise

LENGTHS = (4096, 16_384, 40_960)
STEP = 256  # tokens of a prefill
LIMIT = 1e-3  # of KL, in nats
SCALE = 0.05
NEW = 256  # tokens of a completion
PEAKED, DECIDED = 2.0, 6.0  # weights of the norms of queries and keys, and of the last norm


@dataclasses.dataclass(frozen=True)
class Drift:
    """Differences of logprobs in nats, over sampled tokens."""

    length: int
    tokens: int
    mean: float  # of |d|
    largest: float
    kl: float
    entropy: float  # mean, in nats


def small_llm(length: int, scale: float = SCALE) -> LLM:
    """A random bfloat16 model that a CPU can run at 40,000 tokens, with room for two sequences of `length` and
    completions."""
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=length + NEW,
        rope=RopeConfig(1e6),
        qk_norm=True,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    weights = {"q_norm": PEAKED, "k_norm": PEAKED, "norm": DECIDED}

    def scaled(path, x):
        return x * weights.get(path[-1].name, 1.0) if hasattr(path[-1], "name") else x

    params = jax.tree_util.tree_map_with_path(scaled, initialise(config, jax.random.key(0), scale))
    return LLM.from_params(
        config,
        params,
        page_size=64,
        num_pages=2 * length // 64 + 8,
        max_num_seqs=8,
        max_num_batched_tokens=STEP,
        compile_patience=10**6,
    )


@functools.partial(jax.jit, static_argnames=("config", "count"))
def plain_logprobs(config: ModelConfig, params: Decoder, tokens: jax.Array, count: int) -> jax.Array:
    """float32 logprobs of the last `count` of the tokens."""
    logits = plain.logits(config, params, tokens)[-count - 1 : -1]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[-count:, None], axis=-1)[:, 0]


def drift(length: int, scale: float = SCALE) -> Drift:
    """Sample after a prompt of `length` tokens, and compare."""
    llm = small_llm(length, scale)
    prompt = np.random.default_rng(0).integers(0, llm.config.vocab_size, length).tolist()
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=NEW, entropy=True), key=jax.random.key(0))
    sample = output.outputs[0]
    reference = plain_logprobs(llm.config, llm.params, jnp.array(prompt + sample.token_ids), NEW)
    off = (np.asarray(reference) - sample.token_logprobs).astype(np.float64)
    kl, entropy = np.mean(np.expm1(off) - off), np.mean(sample.entropies)
    return Drift(length, off.size, float(np.abs(off).mean()), float(np.abs(off).max()), float(kl), float(entropy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--scale", type=float, default=SCALE)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, scale {arguments.scale}, limit of KL {LIMIT}")
    print("| context | tokens | mean difference | largest | KL | entropy |\n|---|---|---|---|---|---|")
    for length in arguments.length:
        d = drift(length, arguments.scale)
        figures = f"{d.mean:.1e} | {d.largest:.1e} | {d.kl:.1e} | {d.entropy:.1f}"
        print(f"| {d.length} | {d.tokens} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
