"""transformers' generate as a peer of `jaxengine bench`: temperature 1, every row with the same number of new tokens.

FOLDER holds a model, or config.json alone: then the weights are random, normal as transformers makes them. With --batch
it runs the decode workload by itself and prints a line of JSON a batch; without, it answers tasks (peer_lines.py).
"""

import functools
import pathlib
import random
import time

import peer_lines
import torch
import transformers


def open_model(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    if any(pathlib.Path(folder).glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def seconds(model: torch.nn.Module, prompts: peer_lines.Prompts, lengths: list[int], logprobs: bool = False) -> float:
    """Wall time of one call of generate."""
    assert not logprobs
    (new,) = set(lengths)  # one length for all rows: it has no other
    start = time.perf_counter()
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        eos_token_id=None,
    )
    out = out.cpu()  # waits for the device
    spent = time.perf_counter() - start
    assert out.shape == (len(prompts), len(prompts[0]) + new), out.shape
    return spent


def decode_rate(model: torch.nn.Module, batch: int) -> float:
    """Tokens per second of the decode workload: 32 new tokens (16 from a batch of 64) against one, after a warm-up."""
    new = 16 if batch >= 64 else 32
    draw = lambda: [[random.randrange(model.config.vocab_size) for _ in range(128)] for _ in range(batch)]
    for _ in range(2):
        one, all_of_them = (seconds(model, draw(), [count] * batch) for count in (1, new))
    return batch * (new - 1) / (all_of_them - one)


def main() -> None:
    parser = peer_lines.parser(__doc__)  # the room is as large as each task wants it
    parser.add_argument("--batch", type=int, nargs="+", help="run the decode workload at these batch sizes")
    arguments = parser.parse_args()
    write = peer_lines.own_stdout()
    transformers.logging.set_verbosity_error()
    model = open_model(arguments.folder, getattr(torch, arguments.dtype))
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    if not arguments.batch:
        peer_lines.serve(["decode"], versions, write, functools.partial(seconds, model))
    for batch in arguments.batch or ():
        rate = round(decode_rate(model, batch), 1)
        write({"workload": f"decode B={batch}", "tokens_per_second": rate, "versions": versions})


if __name__ == "__main__":
    main()
