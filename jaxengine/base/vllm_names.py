"""Names of vLLM's (and of transformers' generate) that are not here: what there is instead, or why there is none.

A keyword from this table is a TypeError even with the value that is vLLM's default: it would do nothing here, and one
that does nothing is a surprise for whoever changes its value next.
"""

from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_GRAPHS = "every step is compiled by XLA, there are no CUDA graphs; warm_up() compiles all of them ahead"
_ONE_DEVICE = "an LLM runs on one device, in the process that made it"
_NO_SWAP = "nothing is kept on the host: what finds no page is computed again; raise num_pages"
_TEXT_ONLY = "models take text and token ids only"
_GENERATES = "models generate and score, they do not embed, classify or pool"
_NO_ADAPTERS = "adapters are not served: merge one into the weights, which update_params changes between two tokens"
_NO_SPECULATION = "there is no speculative decoding; decode_steps= runs several steps a dispatch"
_TOKENIZER = "the tokenizer is the folder's tokenizer.json, or that of tokenizer=; there are no modes"
_WEIGHTS = "weights are a folder's safetensors; LLM.from_params takes parameters from anywhere else"
_HUB = "models from the hub are found as huggingface_hub finds them: set HF_HOME, HF_TOKEN"
_END_TOKENS = (
    "generation_config.json gives end tokens, sampling is what SamplingParams say: leave it out, and give what you want"
)
_NO_BEAMS = "there is no beam search: draw n samples and take the one of the highest cumulative_logprob"

_ENGINE = {
    "quantization": "weights run in dtype= and are never quantized, so that sampler and trainer round alike",
    "quantization_config": "weights run in dtype= and are never quantized, so that sampler and trainer round alike",
    "kv_cache_dtype": "keys and values are kept in the model's own dtype, so that sampler and trainer round alike",
    "calculate_kv_scales": "keys and values are kept in the model's own dtype, so that sampler and trainer round alike",
    "enforce_eager": _GRAPHS,
    "max_seq_len_to_capture": _GRAPHS,
    "cuda_graph_sizes": _GRAPHS,
    "cudagraph_capture_sizes": _GRAPHS,
    "compilation_config": _GRAPHS,
    "attention_backend": "kernels= names what computes: products, attention and the draw together",
    "attention_config": "kernels= names what computes: products, attention and the draw together",
    "block_size": "it is page_size= here, and does not change a bit",
    "num_gpu_blocks_override": "it is num_pages= here, page 0 included",
    "kv_cache_memory_bytes": "num_pages= is the size of the cache; memory_plan() says what it takes",
    "swap_space": _NO_SWAP,
    "cpu_offload_gb": _NO_SWAP,
    "kv_offloading_size": _NO_SWAP,
    "preemption_mode": _NO_SWAP,
    "enable_chunked_prefill": "prompts are always prefilled in chunks, of at most max_num_batched_tokens",
    "num_scheduler_steps": "it is decode_steps= here",
    "async_scheduling": "it is overlap= here",
    "scheduling_policy": "generate() takes priority=, of which a lower one is served first",
    "disable_log_stats": "nothing is logged; num_cached_tokens is in every output",
    "trust_remote_code": "no code of a model folder ever runs",
    "model_impl": "model families are jaxengine/models; no other library's code runs",
    "config_format": "a model is a folder in Hugging Face format",
    "load_format": _WEIGHTS,
    "download_dir": _HUB,
    "hf_token": _HUB,
    "code_revision": "no code of a model folder ever runs",
    "tokenizer_mode": _TOKENIZER,
    "tokenizer_revision": _TOKENIZER,
    "skip_tokenizer_init": "token ids need no tokenizer; SamplingParams(detokenize=False) makes no text",
    "chat_template": "give it to chat(), which takes one for each call",
    "served_model_name": "it is an option of `jaxengine serve`",
    "generation_config": _END_TOKENS,
    "override_generation_config": _END_TOKENS,
    "logprobs_mode": "token_logprobs are those of the distribution that was drawn from (vLLM's processed_logprobs); "
    "SamplingParams(raw_logprobs=True) adds the model's own",
    "logits_processors": "no code of callers runs between logits and draw: SamplingParams has logit_bias and penalties",
    "enable_sleep_mode": "there is no mode to enable: sleep() needs none",
    "enable_lora": _NO_ADAPTERS,
    "max_loras": _NO_ADAPTERS,
    "max_lora_rank": _NO_ADAPTERS,
    "speculative_config": _NO_SPECULATION,
    "speculative_model": _NO_SPECULATION,
    "num_speculative_tokens": _NO_SPECULATION,
    "pipeline_parallel_size": _ONE_DEVICE,
    "distributed_executor_backend": _ONE_DEVICE,
    "enable_expert_parallel": _ONE_DEVICE,
    "disable_custom_all_reduce": _ONE_DEVICE,
    "worker_cls": _ONE_DEVICE,
    "worker_extension_cls": f"{_ONE_DEVICE}: llm.params and update_params are what extensions are written for",
    "device": "JAX chooses the device: set JAX_PLATFORMS",
    "task": _GENERATES,
    "runner": _GENERATES,
    "convert": _GENERATES,
    "pooler_config": _GENERATES,
    "limit_mm_per_prompt": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "allowed_local_media_path": _TEXT_ONLY,
}
_SAMPLING = {
    "best_of": "draw n samples and choose by cumulative_logprob",
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "logits_processors": "no code of callers runs between logits and draw: there are logit_bias and penalties",
    "output_kind": "generate and chat return whole outputs, stream() returns growing ones",
    "extra_args": "there are no plugins that would read them",
    "spaces_between_special_tokens": "tokens are joined as the tokenizer's decoder joins them",
    "flat_logprobs": "token_logprobs is a flat array already",
    "logprob_token_ids": "score() gives the logprob of any token that you put into the sequence",
    "prompt_logprob_token_ids": "score() gives the logprob of any token that you put into the sequence",
    "skip_reading_prefix_cache": "a cache_salt of its own in a prompt's dict reads no other prompt's pages",
    "thinking_token_budget": "generate up to max_tokens, then go on with LLM.extend or another prompt",
    "repetition_detection": "end it with stop strings, or lower it with repetition_penalty",
    "priority": "it is an argument of generate()",
    "lora_request": _NO_ADAPTERS,
    "add_special_tokens": "it stands in the prompt: {'prompt': …, 'add_special_tokens': False}",
    "prompt_token_ids": "it stands in the prompt: {'prompt_token_ids': […]}",
    "max_new_tokens": "it is max_tokens here",
    "max_completion_tokens": "it is max_tokens here",
    "max_length": "max_tokens counts the completion alone; the engine's max_model_len bounds both together",
    "do_sample": "temperature=0 takes the likeliest token, any other draws",
    "num_return_sequences": "it is n here",
    "eos_token_id": "it is stop_token_ids here, beside the model's own end tokens",
    "stop_sequences": "it is stop here",
    "logprobs_mode": "token_logprobs are those that were drawn from; raw_logprobs=True adds the model's own",
}
KEYWORDS = {"SamplingParams": _SAMPLING}
KEYWORDS |= dict.fromkeys(("LLM", "LLM.from_params", "generate", "EngineConfig"), _ENGINE)
METHODS = {
    "llm_engine": "it is LLM.engine here; `abort`, `pause` and `resume` are methods of LLM",
    "model_config": "it is LLM.config here",
    "from_engine_args": "give the keywords to LLM",
    "collective_rpc": f"{_ONE_DEVICE}: read llm.params, and change them with update_params",
    "apply_model": f"{_ONE_DEVICE}: read llm.params, and change them with update_params",
    "get_world_size": _ONE_DEVICE,
    "load_weights": "it is update_params here",
    "update_weights": "it is update_params here",
    "encode": f"{_GENERATES}; the tokenizer's encode is llm.get_tokenizer().encode",
    "embed": _GENERATES,
    "classify": _GENERATES,
    "reward": _GENERATES,
    "beam_search": _NO_BEAMS,
    "reset_prefix_cache": "pages of earlier weights are never read, so none has to be reset; prompts with a cache_salt "
    "read only their own, and enable_prefix_caching=False reads none",
    "set_tokenizer": "give it to LLM as tokenizer=",
    "start_profile": "jax.profiler.trace is JAX's own",
    "stop_profile": "jax.profiler.trace is JAX's own",
    "get_metrics": "there are no metrics; num_cached_tokens is in every output",
    "enqueue": "call generate or stream from several threads: their requests run in one batch",
    "wait_for_completion": "call generate or stream from several threads: their requests run in one batch",
}


class _Absent:
    """An attribute that is not there, and what to take instead: hasattr says False."""

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner.__name__, name

    def __get__(self, instance: Any, owner: type | None = None) -> NoReturn:
        raise AttributeError(f"{self._owner} has no {self._name!r}: {self._hint}", name=self._name, obj=instance)


def explains_absent_methods(cls: type[T]) -> type[T]:
    """Class decorator for LLM: names of METHODS that it does not have are explained."""
    for name, hint in METHODS.items():
        if name not in vars(cls):
            absent = _Absent(hint)
            absent.__set_name__(cls, name)
            setattr(cls, name, absent)
    return cls
