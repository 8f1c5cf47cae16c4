"""Configuration: small, frozen, resolved once. ModelConfig says what is computed, EngineConfig with what room."""

import dataclasses
import math
from typing import Any, Literal

from jaxengine.base.arguments import flag, integer, nearest, real, strict_keywords
from pallas_kernels.implementations import PLATFORMS
from pallas_kernels.sizes import VOCAB_BLOCK

QUERY_BLOCK = 16  # tokens of one sequence that prefill keeps together; page sizes and chunk starts are multiples of it
PROBE_TOKENS = 128  # tokens on which a step's tile is proven before it serves (engine/step_variants.py)
KERNELS = ("auto", *PLATFORMS, "cpu")  # ops/kernels.py says what they are
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "reduction_leaves",
)  # of a ModelConfig
OF_EXPERTS = "num_experts", "num_experts_per_tok", "moe_intermediate_size"  # all 0 where a model has none
DTYPES = ("float32", "float16", "bfloat16")  # of weights
DEFAULT_LEAVES = 8  # that a model has where its heads allow them and no other number is asked for: devices of one host
KV_TILE = 64  # keys that attention takes in one step of its online softmax: fixed, whatever the page size


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind` is Hugging Face's rope_type; the other numbers are its parameters."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@strict_keywords
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's architecture, in Hugging Face's words.

    `reduction_leaves` fixes the order of sums (see sharding/leaves.py); `with_leaves()` are those that LLM takes. Where
    there are more leaves than key-value heads, several leaves hold the same head: each has its own copy of the head's
    weights, and its own pages. Parameters hold the copies, which are to be equal; files and optimisers have each head
    once (models/hugging_face.py, models/own_heads.py).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    num_experts: int = 0  # in the place of every layer's MLP; intermediate_size is then nobody's
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    reduction_leaves: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        for name in SIZES:
            put(name, integer(name, getattr(self, name), 1))
        for name in OF_EXPERTS:
            put(name, integer(name, getattr(self, name), 1 if self.num_experts else 0))
        if self.num_experts and self.dtype == "float16":
            raise ValueError("a mixture of experts takes dtype bfloat16 or float32, got float16")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        for name in ("tie_word_embeddings", "qk_norm", "qkv_bias", "out_bias", "norm_topk_prob"):
            put(name, flag(name, getattr(self, name)))
        put("rms_norm_eps", real("rms_norm_eps", self.rms_norm_eps, 0.0))
        if self.bos_token_id is not None:
            put("bos_token_id", integer("bos_token_id", self.bos_token_id, 0))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.80}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        wrong = self._unfit(self.reduction_leaves)
        if wrong:
            powers = [1 << exponent for exponent in range(self.num_attention_heads.bit_length())]
            possible = ", ".join(str(count) for count in powers if not self._unfit(count))
            raise ValueError(f"reduction_leaves={self.reduction_leaves} {wrong}; this model can have {possible}")
        if self.reduction_leaves & (self.reduction_leaves - 1):
            raise ValueError(f"reduction_leaves must be a power of two, got {self.reduction_leaves}")

    def _unfit(self, leaves: int) -> str:
        """Why the model cannot be cut into so many leaves, nothing where it can."""
        queries, heads = self.num_attention_heads, self.num_key_value_heads
        if heads % leaves and (leaves % heads or queries % leaves):
            return (
                f"does not divide num_key_value_heads={heads}, and is no multiple of them that divides "
                f"num_attention_heads={queries}"
            )
        if self.inner_size % leaves:
            return f"does not divide {'moe_' if self.num_experts else ''}intermediate_size={self.inner_size}"
        return ""

    @property
    def inner_size(self) -> int:
        """Inner values of a layer's MLP, or of each of its experts."""
        return self.moe_intermediate_size if self.num_experts else self.intermediate_size

    def with_leaves(self, count: int | None = None, devices: int = 1) -> "ModelConfig":
        """The same with `count` leaves.

        None: as many as the model can be cut into without copies of heads, up to DEFAULT_LEAVES, or one for each of the
        `devices` that are to share it, where they are more.
        The most by default, so that a model that was sampled on one device trains on eight without other bits.
        """
        most = math.gcd(self.num_key_value_heads, self.inner_size, DEFAULT_LEAVES)
        if count is not None or devices <= most:
            return dataclasses.replace(self, reduction_leaves=most if count is None else count)
        try:
            return dataclasses.replace(self, reduction_leaves=devices)
        except ValueError as error:
            raise ValueError(f"{devices} devices cannot share the model, a leaf or more each: {error}") from None

    def share(self, degree: int) -> "ModelConfig":
        """The part of the model that each of `degree` devices has, which share its leaves."""
        inner = "moe_intermediate_size" if self.num_experts else "intermediate_size"
        return dataclasses.replace(
            self,
            num_attention_heads=self.num_attention_heads // degree,
            num_key_value_heads=self.held_key_value_heads // degree,
            reduction_leaves=self.reduction_leaves // degree,
            **{inner: self.inner_size // degree},
        )

    @property
    def key_value_copies(self) -> int:
        """Leaves that hold the same key-value head."""
        return max(1, self.reduction_leaves // self.num_key_value_heads)

    @property
    def held_key_value_heads(self) -> int:
        """Key-value heads that all leaves hold, copies counted: those that are computed and have pages."""
        return self.num_key_value_heads * self.key_value_copies

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head that a leaf holds."""
        return self.num_attention_heads // self.held_key_value_heads

    @property
    def context_length(self) -> int:
        """Positions that the rope reaches.

        Some configurations with yarn have stretched max_position_embeddings already, and model cards leave it as it
        was: the larger counts. Those with llama3 have, those with linear have not, as vLLM reads them.
        """
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        return int(self.max_position_embeddings * (self.rope.factor if self.rope.kind == "linear" else 1.0))

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up so that every leaf holds whole blocks.

        The rows from vocab_size on are zeros and never drawn.
        """
        unit = self.reduction_leaves * VOCAB_BLOCK
        return -(-self.vocab_size // unit) * unit


@strict_keywords
@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Room and habits of an engine. Nothing in here but `kernels` changes a bit of any output."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    page_size: int = 32
    num_pages: int = 1024  # page 0 is scratch, so two are the least
    gpu_memory_utilization: float = 0.9  # of an accelerator's memory, what others use included: how the pool is sized
    enable_prefix_caching: bool = True
    decode_steps: int = 1  # decode steps that one dispatch runs
    overlap: bool = True  # schedule the next step before the last one's tokens are known
    max_logprobs: int = 20  # a request may ask for; -1: the whole vocabulary, and every step makes room for it
    compile_patience: int = 16  # steps that a better fitting tile is wanted before it is compiled
    max_waiting: int = 100_000
    page_checksums: bool = (
        False  # find pages that a fault has changed, after every step (engine/page_checksums.py); slow
    )
    compilation_cache: bool = True  # keep compiled steps in the user's cache folder (base/compiled_code.py)
    kernels: str = "auto"  # which code computes: one of KERNELS, whose bits differ; "auto" is the device's own
    process_timeout: int = 60  # seconds that one of several processes may stay behind or silent before all end
    mesh: Any = None  # the jax.sharding.Mesh on which devices share the weights (sharding/mesh.py); None: one device

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", QUERY_BLOCK),
            ("max_model_len", 2),
            ("page_size", None),
            ("num_pages", 2),
            ("decode_steps", 1),
            ("max_logprobs", -1),
            ("compile_patience", 0),
            ("max_waiting", 1),
            ("process_timeout", 1),
        ):
            put(name, integer(name, getattr(self, name), least))
        put(
            "gpu_memory_utilization",
            real("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, open_low=True),
        )
        for name in ("enable_prefix_caching", "overlap", "page_checksums", "compilation_cache"):
            put(name, flag(name, getattr(self, name)))
        if self.max_logprobs == 0:
            raise ValueError("max_logprobs must be at least 1, or -1 for the whole vocabulary, got 0")
        allowed = [size for size in range(QUERY_BLOCK, KV_TILE + 1, QUERY_BLOCK) if KV_TILE % size == 0]
        if self.page_size not in allowed:
            raise ValueError(f"page_size must be one of {allowed}, got {self.page_size}")
        check_kernels(self.kernels)
        if self.mesh is not None and not hasattr(self.mesh, "axis_names"):  # without importing jax
            raise ValueError(f"mesh must be a jax.sharding.Mesh, got {self.mesh!r:.80}")

    @property
    def pages_per_seq(self) -> int:
        """Width of a block table: whole KV tiles that hold max_model_len tokens."""
        return -(-self.max_model_len // KV_TILE) * (KV_TILE // self.page_size)

    @property
    def probe_pages(self) -> int:
        """Pages after num_pages that belong to the probe."""
        return -(-min(PROBE_TOKENS, self.max_model_len) // self.page_size)

    def num_likeliest(self, vocab_size: int) -> int:
        """Likeliest tokens that a step tells of a row, at most."""
        return vocab_size if self.max_logprobs == -1 else min(self.max_logprobs, vocab_size)

    @property
    def prefill_query_blocks(self) -> int:
        """Query blocks that one prefill step can carry."""
        return self.max_num_batched_tokens // QUERY_BLOCK


# What a profile takes in the place of EngineConfig's own defaults. Room and speed, never a bit. Rollouts want many
# tokens a second, however long one of them waits; a service wants little time between a request's tokens, an early
# refusal instead of a long queue, and no request that waits while a better fitting step is compiled.
PROFILES: dict[str, dict[str, int | bool]] = {
    "rl": dict(max_num_seqs=256, max_waiting=100_000, compile_patience=16),
    "serving": dict(max_num_seqs=64, max_waiting=8_192, compile_patience=256),
}


def check_kernels(name: str) -> None:
    """Raises ValueError for a name that is none of KERNELS."""
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {name!r}{nearest(str(name), KERNELS)}")
