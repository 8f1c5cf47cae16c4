"""What hypothesis draws: a model's shape, an engine's size, and batches that run in it in changing ways."""

import dataclasses

import numpy as np
from hypothesis import strategies as st
from naive import LENGTH

from jaxengine import SamplingParams
from jaxengine.config import EngineConfig, ModelConfig, RopeConfig

LONGEST_PROMPT, MOST_TOKENS = 90, 16
ROPES = (
    RopeConfig(),
    RopeConfig(5e5, "llama3", 8.0, 32),
    RopeConfig(1e4, "linear", 4.0),
    RopeConfig(1e4, "yarn", 4.0, 32),
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests of one call, and how the host runs them."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]
    key: int
    chunk: int
    caching: bool
    overlap: bool
    held_pages: int
    held_slots: int

    def __repr__(self) -> str:  # only what differs from its default: a falsified example is read by people
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("prompts", "sampling")
        }
        defaults = SamplingParams()
        changed = [
            {
                f.name: getattr(p, f.name)
                for f in dataclasses.fields(p)
                if getattr(p, f.name) != getattr(defaults, f.name)
            }
            for p in self.sampling
        ]
        return f"Batch({fields}, {list(zip([list(p) for p in self.prompts], changed, strict=True))})"


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    engine: EngineConfig
    batches: tuple[Batch, ...]


@st.composite
def models(draw, dtype: str) -> ModelConfig:
    """Sizes that divide nothing but what they must."""
    kv_heads, vocab = draw(st.integers(1, 4)), draw(st.integers(5, 700))
    leaves = draw(st.sampled_from([n for n in (1, 2, 4) if kv_heads % n == 0 or n % kv_heads == 0]))
    flag = st.booleans()
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=vocab,
        hidden_size=draw(st.integers(8, 100)),
        intermediate_size=leaves * draw(st.integers(3, 50)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=max(kv_heads, leaves) * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(2, 20)),
        max_position_embeddings=LENGTH,
        rope=draw(st.sampled_from(ROPES)),
        tie_word_embeddings=draw(flag),
        qk_norm=draw(flag),
        qkv_bias=draw(flag),
        out_bias=draw(flag),
        eos_token_ids=draw(st.sampled_from([(), (vocab - 1,), (1, 3)])),
        reduction_leaves=leaves,
        dtype=dtype,
    )


@st.composite
def engines(draw, patience: int) -> EngineConfig:
    size = draw(st.sampled_from([16, 32, 64]))
    return EngineConfig(
        max_model_len=LENGTH,
        page_size=size,
        num_pages=draw(st.integers(LENGTH // size + 2, 60)),
        max_num_seqs=draw(st.integers(1, 40)),
        max_num_batched_tokens=draw(st.integers(16, 300)),
        decode_steps=draw(st.sampled_from([1, 1, 2, 3])),
        compile_patience=patience,
    )


@st.composite
def sampling_params(draw, vocab: int) -> SamplingParams:
    token, maybe = (
        st.integers(0, vocab - 1),
        lambda default, *values: draw(st.sampled_from([default, default, *values])),
    )
    most, roomy = draw(st.integers(1, MOST_TOKENS)), vocab >= 16  # rules and stop tokens leave something to draw
    return SamplingParams(
        max_tokens=most,
        n=draw(st.integers(1, 3)),
        temperature=draw(st.sampled_from([1.0, 0.0, 0.5, 1.5])),
        top_p=maybe(1.0, 0.95, 0.5, 0.1),
        top_k=maybe(0, 1, 2, 5, 40),
        min_p=maybe(0.0, 0.02, 0.3),
        repetition_penalty=maybe(1.0, 1.3, 0.7),
        presence_penalty=maybe(0.0, 0.5, -0.5),
        frequency_penalty=maybe(0.0, 0.5, -0.2),
        min_tokens=draw(st.integers(0, most)),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.0]), max_size=3)),
        allowed_token_ids=draw(st.none() | st.sets(token, min_size=12).map(sorted)) if roomy else None,
        bad_words_token_ids=draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4 if roomy else 0)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.lists(token, max_size=2)),
        seed=draw(st.none() | st.integers(0, 2**32 - 1)),
        **dict(raw_logprobs=True, entropy=True, logprobs=3) if draw(st.booleans()) else {},
    )


@st.composite
def batches(draw, model: ModelConfig, engine: EngineConfig) -> Batch:
    """Prompts of three sources, so that some begin alike and the prefix cache has something to find."""
    sources = [np.random.default_rng(i).integers(0, model.vocab_size, LONGEST_PROMPT).tolist() for i in range(3)]
    request = st.tuples(st.sampled_from(sources), st.integers(1, LONGEST_PROMPT), sampling_params(model.vocab_size))
    requests = draw(st.lists(request, min_size=1, max_size=5))
    spare = engine.num_pages - 1 - LENGTH // engine.page_size
    return Batch(
        prompts=tuple(tuple(source[:length]) for source, length, _ in requests),
        sampling=tuple(params for _, _, params in requests),
        key=draw(st.integers(0, 9)),
        chunk=draw(st.integers(16, max(engine.max_num_batched_tokens, 16))),
        caching=draw(st.booleans()),
        overlap=draw(st.booleans()),
        held_pages=draw(st.sampled_from([0, spare])),
        held_slots=draw(st.integers(0, engine.max_num_seqs - 1)),
    )


@st.composite
def cases(draw, dtype: str, num_batches: int, patience: int) -> Case:
    model, engine = draw(models(dtype)), draw(engines(patience))
    return Case(model, engine, tuple(draw(batches(model, engine)) for _ in range(num_batches)))
