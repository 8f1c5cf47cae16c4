"""How a caller wants completions drawn: SamplingParams. Plain Python, validated before anything is allocated."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jaxengine.base.arguments import flag, integer, items, real, strict_keywords
from jaxengine.base.structured_outputs import StructuredOutputsParams, structured_outputs_of

MAX_N = 16_384  # samples of one request
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1_024
MAX_STOP_TOKEN_IDS = 16  # room for them beside the model's own in the fixed array of a slot
MAX_STOPS = MAX_STOP_TOKEN_IDS + 16  # the width of that array
MAX_LOGIT_BIAS = 512
MAX_BAD_WORDS = 256  # as token ids, where a word may have two spellings
MAX_BAD_WORD_TOKENS = 8
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's limit, and the width of a fixed array of a slot
LOGIT_BIAS = "a dict from token ids to numbers"
GREEDY_BELOW = 1e-5  # a smaller temperature means greedy, as in vLLM
FLAGS = ("ignore_eos", "include_stop_str_in_output", "raw_logprobs", "entropy", "detokenize", "skip_special_tokens")
MOST = 1e6  # the largest factor that temperature and repetition_penalty may put on logits: float32 stays finite


@strict_keywords
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to draw completions; names and meanings are vLLM's wherever vLLM has them.

    `max_tokens=None` means up to the context, 0 that nothing is drawn: for `prompt_logprobs` of a prompt as long as the
    context. `truncate_prompt_tokens=k` keeps the last k tokens of the prompt, -1 as many as fit. `key` (a typed JAX
    key) or `seed` makes the request's draws its own: with n=1 the key takes the place of `fold_in(fold_in(call key,
    prompt index), sample index)`; with n>1 sample i uses `fold_in(key, i)`. `logprobs=k` returns the k likeliest tokens
    at each position, `prompt_logprobs=k` the same for the prompt, -1 for the whole vocabulary (the engine's
    max_logprobs must allow it); the logprob of each sampled token is always returned. `logprob_token_ids` names tokens
    whose logprobs stand beside those at each generated position, whatever their rank. `allowed_token_ids` rules out all
    other tokens. `bad_words` rules out the last token of a word where the completion ends with the word's other tokens;
    a request keeps them as `bad_words_token_ids`, which may be given instead. `structured_outputs` rules out all tokens
    after which the text could not follow a schema, an expression, a choice or a grammar any more; end tokens are ruled
    out until it may end. Ours alone: `raw_logprobs` also returns the sampled tokens' logprobs under the model's own
    distribution at temperature 1, `entropy` the entropy of the distribution at each token, in nats. Raises ValueError
    naming the field, the value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    max_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    min_tokens: int = 0
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = None
    key: Any = None
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    raw_logprobs: bool = False
    entropy: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        for name, low, high in (("n", 1, MAX_N), ("min_tokens", 0, None)):
            put(name, integer(name, getattr(self, name), low, high))
        for name, low, high in (
            ("max_tokens", 0, None),
            ("truncate_prompt_tokens", -1, None),
            ("logprobs", -1, None),
            ("prompt_logprobs", -1, None),
            ("seed", 0, 2**64 - 1),
        ):
            if getattr(self, name) is not None:
                put(name, integer(name, getattr(self, name), low, high))
        put("top_k", max(integer("top_k", self.top_k, -1), 0))
        put("temperature", real("temperature", self.temperature, 0.0, MOST))
        put("top_p", real("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("min_p", real("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", real("repetition_penalty", self.repetition_penalty, 1 / MOST, MOST))
        put("presence_penalty", real("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", real("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        for name in FLAGS:
            put(name, flag(name, getattr(self, name)))
        put("stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        put("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        put("bad_words_token_ids", _token_sequences("bad_words_token_ids", self.bad_words_token_ids))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        put("logprob_token_ids", _token_ids("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS))
        put("logit_bias", _logit_bias(self.logit_bias))
        put("structured_outputs", structured_outputs_of(self.structured_outputs))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty: no token could be drawn; None allows all")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be at least 1, -1 for what fits, or None, got 0")
        if self.seed is not None and self.key is not None:
            raise ValueError("give seed or key, not both: each of them alone decides the draws of the request")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need the text: leave detokenize=True or use stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias as (token id, value) pairs in order of the ids."""
        return cast(Any, self.logit_bias) or ()

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """structured_outputs, of whichever form it was given in."""
        return cast(Any, self.structured_outputs)

    @property
    def token_rules(self) -> tuple[Any, ...]:
        """What biases, allows or rules out single tokens. Where two parameters have equal ones, so have their steps."""
        return self.biases, self.allowed_token_ids, self.bad_words_token_ids

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def tells_logprobs(self) -> bool:
        """Whether each generated position has logprobs beside the drawn token's."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def has_token_rules(self) -> bool:
        return self.token_rules != ((), None, ())

    def replace(self, **changes: Any) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


def stop_token_ids(sampling: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end a sample: the request's own, and the model's unless they are ignored."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_token_ids))


def check_token_ids(sampling: SamplingParams, vocab_size: int, where: str) -> None:
    """Raises ValueError for a token outside the vocabulary and for bad words that nobody made token ids.

    The message names the field and `where` it was given.
    """
    named = {
        "logit_bias": [token for token, _ in sampling.biases],
        "stop_token_ids": sampling.stop_token_ids,
        "logprob_token_ids": sampling.logprob_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
    }
    named |= {f"bad_words_token_ids[{i}]": token_ids for i, token_ids in enumerate(sampling.bad_words_token_ids)}
    for name, token_ids in named.items():
        token = max(token_ids, default=0)
        if token >= vocab_size:
            raise ValueError(
                f"{name} of {where} names token {token} at index {token_ids.index(token)}: the vocabulary is "
                f"0 … {vocab_size - 1}"
            )
    if sampling.bad_words:
        raise ValueError(
            f"bad_words of {where} are text, and there is no tokenizer here: give bad_words_token_ids, or the sampling "
            "parameters of the output's coordinate, which has them"
        )


def _strings(name: str, given: Any, most: int) -> tuple[str, ...]:
    if isinstance(given, str):
        given = (given,)
    strings = () if given is None else items(name, given, "a string or a list of strings")
    if len(strings) > most:
        raise ValueError(f"{name} takes at most {most} strings, got {len(strings)}")
    for index, text in enumerate(strings):
        if not isinstance(text, str) or not text or len(text) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"{name}[{index}] must be a string of 1 to {MAX_STOP_CHARACTERS} characters, got {text!r:.80}"
            )
    return strings


def _token_ids(name: str, ids: Any, limit: int | None = None) -> tuple[int, ...]:
    values = () if ids is None else items(name, ids, "a list of token ids")
    if limit is not None and len(values) > limit:
        raise ValueError(f"{name} takes at most {limit} ids, got {len(values)}")
    return tuple(integer(f"{name}[{index}]", value, 0) for index, value in enumerate(values))


def _token_sequences(name: str, given: Any) -> tuple[tuple[int, ...], ...]:
    values = () if given is None else items(name, given, "a list of lists of token ids")
    if len(values) > MAX_BAD_WORDS:
        raise ValueError(f"{name} takes at most {MAX_BAD_WORDS} lists, got {len(values)}")
    sequences = tuple(_token_ids(f"{name}[{i}]", ids, MAX_BAD_WORD_TOKENS) for i, ids in enumerate(values))
    for index, token_ids in enumerate(sequences):
        if not token_ids:
            raise ValueError(f"{name}[{index}] is empty: a bad word has 1 to {MAX_BAD_WORD_TOKENS} tokens")
    return sequences


def _logit_bias(bias: Any) -> tuple[tuple[int, float], ...] | None:
    if bias is None:
        return None
    given = bias.items() if isinstance(bias, Mapping) else items("logit_bias", bias, LOGIT_BIAS)
    if len(given) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(given)}")
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in given):
        raise ValueError(f"logit_bias must be {LOGIT_BIAS}, got {bias!r:.80}")
    # JSON turns integer keys into strings, so "42" is accepted here and nowhere else.
    pairs = sorted(
        (
            integer("logit_bias key", int(k) if isinstance(k, str) and k.isdecimal() else k, 0),
            real("logit_bias value", v, -1e4, 1e4),
        )
        for k, v in given
    )
    for (token, _), (following, _) in itertools.pairwise(pairs):
        if token == following:
            raise ValueError(f"logit_bias names token {token} twice: give it one value")
    return tuple(pairs) or None
