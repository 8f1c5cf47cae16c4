"""torch's scaled_dot_product_attention as a peer of ../accelerator.py, in an interpreter of its own.

It answers each line of JSON on standard input, {"sequences", "context", "chunk", "heads", "kv_heads", "head_dim",
"dtype", "window"}, with {"seconds": of one call}.

Contexts lie in a row, not in pages, and the queries are the last `chunk` tokens: the easier job.
"""

import functools
import json
import sys
import time

import peer_lines
import torch
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def seconds(
    sequences: int,
    context: int,
    chunk: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    window: int | None,
    repeats: int = 20,
) -> float:
    """The shortest of three means over `repeats` calls."""
    torch.manual_seed(0)
    make = lambda n, length: torch.randn(sequences, n, length, head_dim, device=DEVICE, dtype=getattr(torch, dtype))
    q, k, v = make(heads, chunk), make(kv_heads, context), make(kv_heads, context)
    mask = None
    if chunk > 1 or window is not None:
        distance = torch.arange(context - chunk, context, device=DEVICE)[:, None] - torch.arange(context, device=DEVICE)
        mask = (distance >= 0) & (distance < (window or context))
    run = functools.partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)
    run(), wait()
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        means.append((time.perf_counter() - start) / repeats)
    return min(means)


def main() -> None:
    write = peer_lines.own_stdout()
    write({"torch": torch.__version__, "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"})
    for line in sys.stdin:
        write({"seconds": seconds(**json.loads(line))})


if __name__ == "__main__":
    main()
