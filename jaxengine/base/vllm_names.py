"""Names of vLLM's (and of transformers' generate) that are not here: what there is instead, or why there is none.

A keyword from this table is a TypeError even with the value that is vLLM's default: it would do nothing here, and one
that does nothing is a surprise for whoever changes its value next.
"""

_NOT_QUANTIZED = "weights run in dtype= and are never quantized, so that sampler and trainer round alike"
_CACHE_DTYPE = "keys and values are kept in the model's own dtype, so that sampler and trainer round alike"
_GRAPHS = "every step is compiled by XLA, there are no CUDA graphs; warm_up() compiles all of them ahead"
_REPLICAS = "data_parallel_size= makes replicas, all in one process"
_PROCESSES = (
    "start as many processes as you like, call jaxengine.distributed.initialize() in each, and then the same LLM"
)
_NO_WORKERS = "there are no workers: every process makes its own LLM"
_WHOLE_SEQUENCES = "sequences are not cut over devices: tensor_parallel_size= shares every layer"
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
_EXPERTS = "tensor_parallel_size= gives each device a part of every expert: none is placed, and no row is sent to one"
_ROUTES = "a trainer's score() takes the same experts as the sampler, bit for bit: there are no routes to replay"
_NO_STATE_LAYERS = "layers are attention over pages of keys and values: there is no recurrent state to keep"
_KERNELS = "kernels= names what computes: products, attention and the draw together"
_NOT_MEASURED = (
    "there are no metrics and traces here: `jaxengine serve` has /metrics, and jax.profiler.trace is JAX's own"
)
_LOGGING = "what is logged goes to Python's logging, under the name 'jaxengine': set levels and files there"
_NO_TRANSFER = "keys and values stay in the engine that computed them: there is no transfer between engines"
_NO_REASONING = "an LLM parses no text: `jaxengine serve --reasoning-parser think` tells what was thought apart"
_QUEUE = "max_num_seqs= bounds what runs, max_waiting= what waits"
_NO_RECOVERY = "an engine is usable after any error of a step; nothing restarts a process"
_SLEEP = "sleep(level) and wake_up(tags) move the pool and the weights as they are, and need no setting"
_NO_BEAMS = "there is no beam search: draw n samples and take the one of the highest cumulative_logprob"

_ENGINE = {
    "quantization": _NOT_QUANTIZED,
    "quantization_config": _NOT_QUANTIZED,
    "kv_cache_dtype": _CACHE_DTYPE,
    "calculate_kv_scales": _CACHE_DTYPE,
    "enforce_eager": _GRAPHS,
    "max_seq_len_to_capture": _GRAPHS,
    "cuda_graph_sizes": _GRAPHS,
    "cudagraph_capture_sizes": _GRAPHS,
    "compilation_config": _GRAPHS,
    "attention_backend": _KERNELS,
    "attention_config": _KERNELS,
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
    "pipeline_parallel_size": "layers are not dealt out to devices: tensor_parallel_size= shares each of them",
    "distributed_executor_backend": _PROCESSES,
    "enable_expert_parallel": _EXPERTS,
    "disable_custom_all_reduce": "sums over devices are taken in one order, however their parts travel",
    "worker_cls": _NO_WORKERS,
    "worker_extension_cls": f"{_NO_WORKERS}; llm.params and update_params are what extensions are written for",
    "device": "JAX chooses the device: set JAX_PLATFORMS",
    "task": _GENERATES,
    "runner": _GENERATES,
    "convert": _GENERATES,
    "pooler_config": _GENERATES,
    "limit_mm_per_prompt": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "allowed_local_media_path": _TEXT_ONLY,
    "return_sampling_mask": "jaxengine.sampling_mask finds what was kept, TrainerConfig(keep_sampling_mask=True) too",
    "prefix_caching_hash_algo": "pages are found by one hash, and a hit compares their tokens",
    "prefix_cache_retention_interval": "a cached page stays until its room is wanted, the oldest first",
    "disable_sliding_window": "models with sliding windows are refused when they are loaded",
    "max_num_scheduled_tokens": "it is max_num_batched_tokens here",
    "max_parallel_loading_workers": "tensors are read one after another, so that a model is never in memory twice",
    "model_weights": "give the folder of the weights as model=",
    "hf_config_path": "config.json is the model folder's; hf_overrides= changes its values",
    "model_class_overrides": "model families are jaxengine/models; no other library's code runs",
    "use_tqdm_on_load": "it is progress= here",
    "weight_transfer_config": "update_params takes a pytree, a folder, or (name, array) pairs",
    "use_fp64_gumbel": "a draw is one uniform of float32 and an inverse sum in a fixed order",
    "watermark": "one page a running sample is kept back when another is admitted",
    "watermark_config": "draws follow the model's distribution and a key: nothing is marked in them",
    "tokens_only": "SamplingParams(detokenize=False) makes no text",
    "shutdown_timeout": "close() ends every request at once",
    "stream_interval": "stream() yields what each step brought",
    "optimization_level": _GRAPHS,
    "performance_mode": _GRAPHS,
    "disable_cascade_attn": _KERNELS,
    "additional_config": "there are no plug-ins that would read it",
    "io_processor_plugin": "there are no plug-ins that would read it",
    "renderer_num_workers": "chat templates are rendered in processes of their own, as many as calls at once",
    "kernel_config": _KERNELS,
    "allow_deprecated_quantization": _NOT_QUANTIZED,
    "kv_cache_dtype_skip_layers": _CACHE_DTYPE,
    "diffusion_config": _GENERATES,
    "enable_prompt_embeds": "prompts are text or token ids, so that each has a replay coordinate",
}
for _names, _hint in (
    ("moe_backend all2all_backend enable_eplb eplb_config expert_placement_strategy enable_ep_weight_filter "
     "enable_elastic_ep elastic_ep_max_dp_size", _EXPERTS),
    ("enable_return_routed_experts", _ROUTES),
    ("mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend "
     "mamba_ssu_algorithm mamba_cache_philox_rounds enable_mamba_shared_prefix_checkpoint "
     "enable_mamba_cache_stochastic_rounding use_replayssm replayssm_buffer_len gdn_prefill_backend "
     "kda_prefill_backend kda_decode_backend disable_hybrid_kv_cache_manager engram_config", _NO_STATE_LAYERS),
    ("linear_backend sparse_indexer_topk_backend ir_op_priority enable_flashinfer_autotune kv_sharing_fast_prefill "
     "swa_bounded_replay", _KERNELS),
    ("max_cudagraph_capture_size cudagraph_metrics jit_monitor_mode jit_monitor_verbose", _GRAPHS),
    ("spec_method spec_model spec_tokens per_request_spec_decode_metrics", _NO_SPECULATION),
    ("offload_backend offload_params offload_group_size offload_num_in_group offload_prefetch_step "
     "cpu_offload_params kv_offloading_backend", _NO_SWAP),
    ("master_addr master_port nnodes node_rank numa_bind numa_bind_nodes numa_bind_cpus", _PROCESSES),
    ("distributed_timeout_seconds cpu_distributed_timeout_seconds", "it is process_timeout= here"),
    ("device_ids", "give mesh=, a jax.sharding.Mesh of the devices that you choose"),
    ("data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address "
     "data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb "
     "data_parallel_backend disable_nccl_for_dp_synchronization dp_sync_interval", _REPLICAS),
    ("prefill_context_parallel_size decode_context_parallel_size dcp_comm_backend dcp_q_replicate "
     "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size enable_hc_sp", _WHOLE_SEQUENCES),
    ("enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold enable_batch_sharded_sampling "
     "enable_shm_tensor_arena ray_workers_use_nsight", _NO_WORKERS),
    ("safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size ignore_patterns "
     "model_loader_extra_config pt_load_map_location", _WEIGHTS),
    ("language_model_only allowed_media_domains enable_mm_embeds interleave_mm_strings media_io_kwargs "
     "mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb "
     "mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
     "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate "
     "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize "
     "disable_chunked_mm_input enable_mm_processor_stats ec_transfer_config ec_manager_config", _TEXT_ONLY),
    ("default_mm_loras fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules enable_tower_connector_lora "
     "specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels", _NO_ADAPTERS),
    ("long_prefill_token_threshold long_prefill_token_threshold_adaptive scheduler_reserve_full_isl "
     "prefill_schedule_interval prefix_match_unit scheduler_cls",
     "of requests that wait the lowest priority= is next, of equal ones the first; long prompts run in chunks of what "
     "max_num_batched_tokens leaves"),
    ("max_num_active_seqs max_num_queued_reqs max_num_queued_tokens", _QUEUE),
    ("profiler_config show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces kv_cache_metrics "
     "kv_cache_metrics_sample custom_histogram_buckets enable_layerwise_nvtx_tracing enable_mfu_metrics "
     "enable_trace_replay aux_output_config", _NOT_MEASURED),
    ("logging_config log_level log_config_file aggregate_engine_logging enable_logging_iteration_details "
     "fail_on_environ_validation", _LOGGING),
    ("kv_transfer_config kv_events_config", _NO_TRANSFER),
    ("reasoning_parser reasoning_parser_plugin reasoning_config", _NO_REASONING),
    ("sleep_mode_offload_cudagraph sleep_preserve_parameter_names enable_cumem_allocator enable_nccl_comm_suspend",
     _SLEEP),
    ("fault_tolerance_config enable_fault_tolerance", _NO_RECOVERY),
):  # fmt: skip
    _ENGINE |= dict.fromkeys(_names.split(), _hint)
_SAMPLING = {
    "best_of": "draw n samples and choose by cumulative_logprob",
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "logits_processors": "no code of callers runs between logits and draw: there are logit_bias and penalties",
    "output_kind": "generate and chat return whole outputs, stream() deltas, and with cumulative=True growing ones",
    "extra_args": "there are no plugins that would read them",
    "spaces_between_special_tokens": "tokens are joined as the tokenizer's decoder joins them",
    "flat_logprobs": "token_logprobs is a flat array already",
    "prompt_logprob_token_ids": "score() gives the logprob of any token that you put into the sequence",
    "prompt_logprob_start": "prompt_logprobs are those of the whole prompt",
    "stream_interval": "stream() yields what each step brought",
    "skip_clone": "parameters are frozen, and never copied",
    "output_text_buffer_length": "a stream holds back what may become a stop string, and nothing else",
    "watermarking": "draws follow the model's distribution and a key: nothing is marked in them",
    "routed_experts_prompt_start": _ROUTES,
    "trace_decode_token_ids": "score() gives the logprobs of any tokens",
    "skip_reading_prefix_cache": "a cache_salt of its own in a prompt's dict reads no other prompt's pages",
    "thinking_token_budget": "generate up to max_tokens, then go on with LLM.extend or another prompt",
    "repetition_detection": "end it with stop strings, or lower it with repetition_penalty",
    "priority": "it is an argument of generate() and stream()",
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
_PUSHED = (
    "update_params takes all new weights at once: a pytree, a folder, or (name, array) pairs that are read as they come"
)
METHODS = {
    "llm_engine": "it is LLM.engine here; `abort`, `pause` and `resume` are methods of LLM",
    "model_config": "it is LLM.config here",
    "from_engine_args": "give the keywords to LLM",
    "collective_rpc": f"{_NO_WORKERS}; read llm.params, and change them with update_params",
    "apply_model": f"{_NO_WORKERS}; read llm.params, and change them with update_params",
    "get_world_size": "it is jax.process_count() for processes, and llm.engine_config.mesh for devices",
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
    "enqueue_chat": "call chat from several threads: their requests run in one batch",
    "reset_mm_cache": _TEXT_ONLY,
    "reset_encoder_cache": _TEXT_ONLY,
    "release_kv_cache_memory": 'sleep() gives the pool back, and wake_up(["weights"]) the weights alone',
    "init_weight_transfer_engine": _PUSHED,
    "shutdown_weight_transfer_engine": _PUSHED,
    "start_weight_update": _PUSHED,
    "start_draft_weight_update": _PUSHED,
    "finish_weight_update": _PUSHED,
    "update_weight_version": "update_params(params, version=…) gives it",
    "get_weight_version": "it is LLM.weights_version here",
    "enqueue": "call generate or stream from several threads: their requests run in one batch",
    "wait_for_completion": "call generate or stream from several threads: their requests run in one batch",
}
