"""Prefill of one long prompt, against the peak of a bf16 product."""

import functools
import random
import statistics
import time
from collections.abc import Iterator

from accelerator_stages import here, models
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine import LLM, SamplingParams
from jaxengine.command.workloads import random_prompts
from jaxengine.config import ModelConfig

TOKENS, TINY_TOKENS = 8192, 60
SHAPES = ("qwen3-0.6b-shape", "qwen3-8b-shape")
REPEATS = 3


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    return [Measurement(name, functools.partial(measured, name, tiny)) for name in (SHAPES[:1] if tiny else SHAPES)]


def measured(name: str, tiny: bool) -> Iterator[Row]:
    tokens = TINY_TOKENS if tiny else TOKENS
    with models.open_llm(name, tiny) as llm:
        prefill_seconds(llm, tokens, seed=0)  # compiles
        spent = statistics.median(prefill_seconds(llm, tokens, seed) for seed in range(1, REPEATS + 1))
        yield {
            "kernels": llm.engine_config.kernels,
            "tokens": tokens,
            "ms": spent * 1e3,
            "tokens/s": tokens / spent,
            "share of peak": flops(llm.config, tokens) / spent / here.matmul_peak(tiny),
        }


def prefill_seconds(llm: LLM, tokens: int, seed: int) -> float:
    """Of a prompt that no other call had, to its first token."""
    (prompt,) = random_prompts(random.Random(seed), 1, tokens, llm.config.vocab_size)
    start = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return time.perf_counter() - start


def flops(config: ModelConfig, tokens: int) -> float:
    """Of the layers' products, and of causal attention; the head is for one token alone."""
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    attention = 4 * heads * tokens / 2
    return config.num_hidden_layers * tokens * (2 * weights + attention)
