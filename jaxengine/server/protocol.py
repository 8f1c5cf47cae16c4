"""The bodies that routes take, field by field: OpenAI's and vLLM's names. A null field is one that is not given."""

from typing import Any

import pydantic

# What clients send that changes nothing here.
IGNORED = frozenset(
    {"user", "session_id", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"spaces_between_special_tokens"}
)
_GRAMMAR = "it is structured_outputs: {json, regex, choice or grammar} here, or response_format"
_TOOLS = "they are tools and tool_choice here"
# Fields that ask for what is not there, and why; values that ask for nothing are taken.
UNSUPPORTED = {
    "best_of": "draw n samples and choose by their logprobs",
    "use_beam_search": "draw n samples and choose by their logprobs",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "suffix": "models complete from the left",
    "guided_decoding": _GRAMMAR,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "reasoning_effort": "it is an argument of some chat templates: give it in chat_template_kwargs",
    "audio": "models take text and token ids only",
    "modalities": "models take text and token ids only",
    "features": "models take text and token ids only",
    "mm_processor_kwargs": "models take text and token ids only",
    "thinking_token_budget": "generate up to max_tokens, then go on with another prompt",
    "vllm_xargs": "there are no plugins that would read them",
    "extra_args": "there are no plugins that would read them",
    "logits_processors": "there are logit_bias, allowed_token_ids and penalties",
    "routed_experts": "a trainer here takes the same experts: there are no routes to replay",
    "return_routed_experts": "a trainer here takes the same experts: there are no routes to replay",
}


class _Form(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, protected_namespaces=())


class _Distribution(_Form):
    """What is drawn from, and what ends it: the fields whose names SGLang has too."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class Sampling(_Distribution):
    """The fields that have the names and meanings of SamplingParams."""

    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    seed: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields of SamplingParams alone, those of a form that has more."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS}


SAMPLING_FIELDS = frozenset(Sampling.model_fields)


class StreamOptions(_Form):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generating(_Form):
    """What every route that generates takes beside its sampling parameters."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_coordinate: bool | None = None
    cache_salt: str | None = pydantic.Field(None, max_length=1024)
    priority: int | None = None
    request_id: str | None = pydantic.Field(None, min_length=1, max_length=256)


class Templated(_Form):
    """Messages' way through the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class _OpenAI(Sampling, Generating):
    """What both of OpenAI's routes take."""

    response_format: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(_OpenAI):
    """POST /v1/completions. `logprobs` is a number of likeliest tokens, or true for the drawn ones' alone."""

    prompt: Any = None
    logprobs: bool | int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False  # a 0 asks for them too


class ChatRequest(_OpenAI, Templated):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class TokenSampling(Sampling):
    """`sampling_params` of /inference/v1/generate."""

    logprobs: int | None = None
    detokenize: bool | None = None


class GenerateRequest(Generating):
    """POST /inference/v1/generate: token ids in, token ids out."""

    token_ids: list[int]
    sampling_params: dict[str, Any]
    output_mode: str | None = None


class TokenizeRequest(Templated):
    """POST /tokenize: a text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Form):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class AbortRequest(_Form):
    """POST /abort_requests; without ids all."""

    request_ids: list[str] | None = None


class WeightsRequest(_Form):
    """POST /update_weights and its neighbours."""

    weight_dir: str | None = None
    update_info: dict[str, Any] | None = None
    init_info: dict[str, Any] | None = None
    is_checkpoint_format: bool | None = None
    weight_version: str | None = pydantic.Field(None, max_length=256)
    in_flight: str | None = None


class Anything(pydantic.BaseModel):
    """A body that nothing is read from."""

    reset_running_requests: bool | None = None


class SglangSampling(_Distribution):
    """`sampling_params` of SGLang's /generate."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    no_stop_trim: bool | None = None
    sampling_seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None


class SglangGenerate(_Form):
    """POST /generate."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | None = None
    return_logprob: bool | None = None
    return_coordinate: bool | None = None
    stream: bool | None = None
    rid: str | None = pydantic.Field(None, min_length=1, max_length=256)


class SglangWeights(_Form):
    """POST /update_weights_from_disk; what only says how SGLang is to load them is taken and not looked at."""

    model_path: str
    load_format: str | None = None
    weight_version: str | None = pydantic.Field(None, max_length=256)
    flush_cache: bool | None = None
    abort_all_requests: bool | None = None
