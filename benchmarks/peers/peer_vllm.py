"""vLLM as a peer of `jaxengine bench`: sampling at temperature 1, every prompt with its own number of new tokens.

FOLDER holds a model, or config.json alone: then the weights are vLLM's dummies. It answers tasks (peer_lines.py).
"""

import argparse
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


def open_model(folder: str, dtype: str):
    import vllm

    has_weights = any(pathlib.Path(folder).glob("*.safetensors"))
    return vllm.LLM(
        model=folder,
        dtype=dtype,
        load_format="auto" if has_weights else "dummy",
        max_model_len=2048,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
    )


def seconds(llm, prompts: peer_lines.Prompts, lengths: list[int], logprobs: bool) -> float:
    """Wall time of one call of generate."""
    import vllm

    params = [
        vllm.SamplingParams(
            temperature=1.0,
            max_tokens=n,
            min_tokens=n,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if logprobs else None,
        )
        for n in lengths
    ]
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    spent = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    write = peer_lines.own_stdout()
    llm = open_model(arguments.folder, arguments.dtype)
    import torch
    import vllm

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": str(torch.get_num_threads())}
    peer_lines.serve(["decode", "group"], versions, functools.partial(seconds, llm), write)


if __name__ == "__main__":
    main()
