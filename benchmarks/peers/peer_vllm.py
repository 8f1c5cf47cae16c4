"""vLLM as a peer of `jaxengine bench`: sampling at temperature 1, every prompt with its own number of new tokens.

FOLDER holds a model, or config.json alone: then the weights are vLLM's dummies. It answers tasks (peer_lines.py).
"""

import functools
import os
import pathlib
import time

import peer_lines

# Read when vLLM is imported: one process, whose end is the engine's end; 4 GB of cache where it runs on a CPU; nothing
# sent or fetched.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def open_model(folder: str, dtype: str, max_model_len: int):
    import vllm

    has_weights = any(pathlib.Path(folder).glob("*.safetensors"))
    return vllm.LLM(
        model=folder,
        dtype=dtype,
        load_format="auto" if has_weights else "dummy",
        max_model_len=max_model_len,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
    )


def exact_length(length: int, **more):
    import vllm

    return vllm.SamplingParams(
        temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False, **more
    )


def seconds(llm, prompts: peer_lines.Prompts, lengths: list[int], logprobs: bool) -> float:
    """Wall time of one call of generate."""
    params = [exact_length(n, logprobs=0 if logprobs else None) for n in lengths]
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    spent = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    return spent


def token_times(
    llm, prompts: peer_lines.Prompts, lengths: list[int], late: list[int], before: int
) -> list[list[float]]:
    """When the engine's steps gave each token out."""
    from vllm.sampling_params import RequestOutputKind

    def add(index: int, prompt: list[int], length: int) -> None:
        params = exact_length(length, output_kind=RequestOutputKind.DELTA)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)

    times, sent = [[] for _ in range(len(prompts) + 1)], None
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        add(index, prompt, length)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            times[int(output.request_id)] += [time.perf_counter()] * len(output.outputs[0].token_ids)
        if sent is None and all(len(own) >= before for own in times[:-1]):
            sent = time.perf_counter()
            add(len(prompts), late, 1)
    return [[at - sent for at in own] for own in times]


def main() -> None:
    arguments = peer_lines.parser(__doc__).parse_args()
    write = peer_lines.own_stdout()
    llm = open_model(arguments.folder, arguments.dtype, arguments.max_model_len)
    import torch
    import vllm

    versions = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "max_num_batched_tokens": str(llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens),
    }
    workloads = ["decode", "group", "first-token"]
    peer_lines.serve(workloads, versions, write, functools.partial(seconds, llm), functools.partial(token_times, llm))


if __name__ == "__main__":
    main()
