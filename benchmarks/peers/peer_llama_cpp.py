"""llama.cpp as a peer of `jaxengine bench`: temperature 1, every sequence with the same number of new tokens.

FOLDER holds a Qwen3, or config.json alone (peer_gguf.py, which needs the package `gguf`). It answers tasks
(peer_lines.py). All sequences are decoded in one batch, each with a cache of its own.
"""

import ctypes
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import llama_cpp
import numpy as np
import peer_gguf
import peer_lines

THREADS = len(os.sched_getaffinity(0))
ERROR = 4  # GGML_LOG_LEVEL_ERROR
CELLS = 256  # a sequence's cache is a multiple of it
Draw = Callable[[llama_cpp.llama_context_p, int], int]  # the next token, from the logits of a row of the last batch


def open_model(folder: str, dtype: str) -> llama_cpp.llama_model_p:
    with tempfile.TemporaryDirectory() as place:  # the file stays mapped after its name is gone
        path = str(pathlib.Path(place, "model.gguf"))
        peer_gguf.write(folder, dtype, path)
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not open {folder}: its reason is above")
    return model


def open_context(model: llama_cpp.llama_model_p, sequences: int, tokens: int) -> llama_cpp.llama_context_p:
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = sequences
    params.n_ctx = sequences * (-(-tokens // CELLS) * CELLS)
    params.n_threads = params.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    return context


def complete(context: llama_cpp.llama_context_p, prompts: peer_lines.Prompts, new: int, draw: Draw) -> list[list[int]]:
    """`new` tokens after each prompt."""
    size = llama_cpp.llama_n_batch(context)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    rows = [
        (token, position, sequence, position + 1 == len(prompt))
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    drawn: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(rows), size):
        step(context, batch, rows[start : start + size], draw, drawn)
    for _ in range(new - 1):
        rows = [
            (own[-1], len(prompt) + len(own) - 1, sequence, True)
            for sequence, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))
        ]
        step(context, batch, rows, draw, drawn)
    llama_cpp.llama_batch_free(batch)
    return drawn


def step(
    context: llama_cpp.llama_context_p,
    batch: llama_cpp.llama_batch,
    rows: list[tuple[int, int, int, bool]],
    draw: Draw,
    drawn: list[list[int]],
) -> None:
    """Compute rows of (token, position, sequence, whether it is followed by a draw), and draw."""
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, is_last) in enumerate(rows):
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, is_last
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
    code = llama_cpp.llama_decode(context, batch)
    assert code == 0, code
    for index, (_, _, sequence, is_last) in enumerate(rows):
        if is_last:
            drawn[sequence].append(draw(context, index))


def greedy(context: llama_cpp.llama_context_p, row: int) -> int:
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    logits = llama_cpp.llama_get_logits_ith(context, row)
    return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())


def seconds(model: llama_cpp.llama_model_p, prompts: peer_lines.Prompts, lengths: list[int], logprobs: bool) -> float:
    """Wall time of prompts and draws; the cache is made before."""
    assert not logprobs
    (new,) = set(lengths)
    context = open_context(model, len(prompts), len(prompts[0]) + new)
    sampler = llama_cpp.llama_sampler_init_dist(0)  # temperature 1, nothing cut off
    start = time.perf_counter()
    drawn = complete(context, prompts, new, functools.partial(llama_cpp.llama_sampler_sample, sampler))
    spent = time.perf_counter() - start
    assert [len(own) for own in drawn] == lengths
    llama_cpp.llama_sampler_free(sampler)
    llama_cpp.llama_free(context)
    return spent


def main() -> None:
    arguments = peer_lines.parser(__doc__).parse_args()  # each task's cache is as large as it wants it
    write = peer_lines.own_stdout()
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = open_model(arguments.folder, arguments.dtype)
    versions = {"llama_cpp": version("llama_cpp_python"), "threads": str(THREADS)}
    versions["system"] = llama_cpp.llama_print_system_info().decode()
    peer_lines.serve(["decode"], versions, write, functools.partial(seconds, model))


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Nothing but errors."""
    if level == ERROR:
        print(text.decode(), end="")


if __name__ == "__main__":
    main()
