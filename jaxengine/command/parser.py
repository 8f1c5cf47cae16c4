"""The parser of the command line. Options of sampling and engine are the fields of SamplingParams and EngineConfig."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxengine.command import commands
from jaxengine.command.options import add_fields, count, group, token_ids
from jaxengine.command.workloads import KINDS, PEERS
from jaxengine.config import DTYPES, PROFILES, EngineConfig
from jaxengine.sampling_params import SamplingParams

LLM_DEFAULTS = {
    "max_model_len": "default: the model's own",
    "num_pages": "default: what memory allows",
    "max_num_batched_tokens": "default: 512 on a CPU, 8192 elsewhere",
}
BENCH_DEFAULTS = LLM_DEFAULTS | {
    name: "default: room for the workloads" for name in ("max_model_len", "max_num_seqs", "num_pages")
}
DEMO = "Sample arithmetic with the model that ships, and draw every sample again, bit for bit."
VERIFY = "Run the contract on this machine with a model: every axis, every bit."
SERVE = "Serve a model over HTTP, by OpenAI's routes and vLLM's."
PLAN = "Say what fits on devices that are not here, and how fast it could be: compiled for them, nothing is run."
BENCH = "Measure tokens per second of decoding and of groups, and a first token's time while others are decoded."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser, whose result has in `command` the function that runs it."""
    whole = _Parser(prog="jaxengine", description="A bitwise-deterministic LLM inference engine.", allow_abbrev=False)
    group = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(_command(group, "demo", commands.run_demo, DEMO))
    _add_generate(_command(group, "generate", commands.run_generate, "Complete prompts."))
    _add_serve(_command(group, "serve", commands.run_serve, SERVE))
    _add_verify(_command(group, "verify", commands.run_verify, VERIFY))
    _add_bench(_command(group, "bench", commands.run_bench, BENCH))
    _add_plan(_command(group, "plan", commands.run_plan, PLAN))
    return whole


def _command(group: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = group.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=shows_defaults)
    parser.set_defaults(command=run)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="calc", help="a name, a folder or a hub id")
    parser.add_argument("--samples", type=count, default=8, help="samples of each problem")
    parser.add_argument("--problems", type=count, default=6, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the key")
    parser.add_argument(
        "--color", action=argparse.BooleanOptionalAction, help="color the tokens (on a terminal, unless said otherwise)"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a folder or a hub id")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT", help="a prompt; give it again for more"
    )
    parser.add_argument(
        "--prompt-token-ids", dest="prompts", action="append", type=token_ids, metavar="1,2,3", help="one as token ids"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each --prompt is a user's message, put through the model's chat template"
    )
    parser.add_argument(
        "--call-seed",
        type=int,
        default=0,
        help="sample i of prompt p draws with fold_in(fold_in(key(CALL_SEED), p), i)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="the same command runs in each process of a job, and all devices share the model: the place is found in "
        "the environment (jaxengine.distributed), process 0 prints, SIGTERM is heeded after the last token",
    )
    _add_leaves(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="a JSON object a sample, one a line; null is an infinite logprob"
    )
    form.add_argument("--stream", action="store_true", help="text as it grows, a prompt after the other; the same bits")
    add_fields(parser.add_argument_group("sampling", "the fields of SamplingParams"), SamplingParams)
    _add_engine(parser, LLM_DEFAULTS)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a folder or a hub id")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at; others than this machine's own take a key"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    parser.add_argument("--served-model-name", help="what clients call the model (default: the model's own name)")
    parser.add_argument("--api-key", help="the key that every route asks for, /health excepted")
    parser.add_argument(
        "--admin-key", help="the key of routes that pause and change the engine (default: they are off)"
    )
    parser.add_argument(
        "--weights-root", type=Path, metavar="FOLDER", help="weights may be read from folders inside it (default: none)"
    )
    parser.add_argument("--max-body-bytes", type=count, default=16 * 1024 * 1024, help="of one HTTP request")
    parser.add_argument("--max-open-requests", type=count, default=1024, help="HTTP requests at once; more get 429")
    parser.add_argument("--max-samples", type=count, default=4096, help="prompts times n of one HTTP request")
    parser.add_argument("--warm-up", action="store_true", help="compile every step before the first request")
    parser.add_argument(
        "--tool-call-parser", default="auto", help="the form of tool calls: hermes, llama3_json; auto: by the template"
    )
    parser.add_argument(
        "--reasoning-parser", default="auto", help="think tells thoughts apart, none does not; auto: by the template"
    )
    parser.add_argument("--drain-seconds", type=count, default=30, help="how long requests go on after SIGTERM")
    parser.add_argument(
        "--profile", choices=list(PROFILES), default="serving", help="defaults of the engine's settings"
    )
    _add_engine(parser, LLM_DEFAULTS | {"max_waiting": "samples; more get 429; the profile's"})


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a folder or a hub id")
    parser.add_argument(
        "--quick", action="store_true", help="fewer samples and requests: less than a minute on the model that ships"
    )
    parser.add_argument(
        "--samples",
        type=count,
        help="samples of one prompt at temperature 0 and at 1 (default: 1000, 100 with --quick)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random traffic")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write contract and checks there")
    _add_engine(parser, LLM_DEFAULTS)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="qwen3-0.6b-shape", help="random weights of that shape; or a name, a folder or a hub id"
    )
    parser.add_argument(
        "--batch", type=count, nargs="+", default=[1, 8, 32, 64], help="batch sizes of the decode workload"
    )
    parser.add_argument(
        "--prompt-tokens", type=count, nargs="+", default=[128], help="of each prompt of decode; with every batch size"
    )
    parser.add_argument(
        "--groups", type=group, nargs="+", default=[(8, 8)], metavar="PxS", help="prompts x samples of each of group"
    )
    parser.add_argument("--workloads", nargs="+", choices=KINDS, default=KINDS[:2], help="what to measure")
    parser.add_argument("--repeats", type=count, default=3, help="runs that count; the median is reported")
    parser.add_argument("--peer", choices=sorted(PEERS), help="another engine to measure in turns with this one")
    parser.add_argument(
        "--peer-python", metavar="PATH", default=sys.executable, help="the interpreter that has the peer installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every figure there")
    _add_leaves(parser)
    _add_engine(parser, BENCH_DEFAULTS, dtype="bfloat16")


def _add_leaves(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reduction-leaves",
        type=count,
        help="parts of every long sum, so the most devices that can share the model; it is in the bits; None: what "
        "the key-value heads allow, up to 8, or as many as devices that share it",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="llama-3-70b, qwen3-32b, qwen3-8b or qwen3-30b-a3b; a config.json, a folder with one, or a hub id"
    )
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:2x2x4, v6e:4x4, h100:8, …")
    parser.add_argument("--tensor", type=count, default=1, help="devices that share one replica's weights")
    parser.add_argument("--data", type=count, help="replicas (default: as many as the topology has room for)")
    _add_leaves(parser)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: the file's")
    parser.add_argument("--max-model-len", type=count, help="tokens (default: the model's own, at most 8192)")
    parser.add_argument("--max-num-seqs", type=count, default=256, help="requests at once")
    parser.add_argument("--max-num-batched-tokens", type=count, default=8192, help="of a prefill step")
    parser.add_argument("--page-size", type=count, default=32, help="tokens of a page")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="of a device's memory")
    parser.add_argument(
        "--needs",
        choices=("plain", "all"),
        default="plain",
        help="requests with a temperature alone; or with everything, whose steps take long to compile for a TPU",
    )
    parser.add_argument("--context", type=count, help="tokens of a request that estimates take (default: half)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def _add_engine(parser: argparse.ArgumentParser, defaults: Mapping[str, str], dtype: str = "auto") -> None:
    group = parser.add_argument_group(
        "engine", "room and habits: the fields of EngineConfig; only dtype and kernels change bits"
    )
    group.add_argument("--dtype", choices=("auto", *DTYPES), default=dtype, help="auto: the file's")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show long work on standard error"
    )
    add_fields(group, EngineConfig, defaults)
