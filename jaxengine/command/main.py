"""The command line: `jaxengine demo`, `generate`, `verify` and `bench`. It parses and prints; the work is done elsewhere.

Options for sampling and for the engine are made from the fields of SamplingParams and EngineConfig. What a user gets wrong ends with one
line on standard error and code 2, an interrupt with code 130. jax is imported once a command runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxengine.command.options import add_fields, count, given_fields, sampling_params, token_ids
from jaxengine.command.workloads import PEERS
from jaxengine.config import DTYPES, EngineConfig
from jaxengine.coordinate import Coordinate
from jaxengine.sampling_params import SamplingParams

USER_ERRORS = (ValueError, TypeError, OSError, MemoryError, NotImplementedError)
LLM_DEFAULTS = {
    "max_model_len": "default: the model's own",
    "num_pages": "default: what memory allows",
    "max_num_batched_tokens": "default: 512 on a CPU, 8192 elsewhere",
}
BENCH_DEFAULTS = LLM_DEFAULTS | {
    name: "default: room for the workloads" for name in ("max_model_len", "max_num_seqs", "num_pages")
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = argparse.Namespace(traceback=False)
    try:
        _parser().parse_args(argv, arguments)
        return arguments.command(arguments)
    except SystemExit as stop:  # argparse's own end, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone: `jaxengine generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if arguments.traceback:
            raise
        print(f"jaxengine: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


# -- commands' options -------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxengine", description="A bitwise-deterministic LLM inference engine.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(
        _command(
            commands,
            "demo",
            _demo,
            "Sample arithmetic with the model that ships, and draw every sample again, bit for bit.",
        )
    )
    _add_generate(_command(commands, "generate", _generate, "Complete prompts."))
    _add_verify(
        _command(commands, "verify", _verify, "Run the contract on this machine with a model: every axis, every bit.")
    )
    _add_bench(_command(commands, "bench", _bench, "Measure tokens per second of the decode and group workloads."))
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=shows_defaults)
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
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="a JSON object a sample, one a line; null stands for an infinite logprob"
    )
    form.add_argument("--stream", action="store_true", help="text as it grows, a prompt after the other; the same bits")
    add_fields(parser.add_argument_group("sampling", "the fields of SamplingParams"), SamplingParams)
    _add_engine(parser, LLM_DEFAULTS)


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
        "--workloads", nargs="+", choices=["decode", "group"], default=["decode", "group"], help="what to measure"
    )
    parser.add_argument("--repeats", type=count, default=3, help="runs that count; the median is reported")
    parser.add_argument("--peer", choices=sorted(PEERS), help="another engine to measure in turns with this one")
    parser.add_argument(
        "--peer-python", metavar="PATH", default=sys.executable, help="the interpreter that has the peer installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every figure there")
    _add_engine(parser, BENCH_DEFAULTS, dtype="bfloat16")


def _add_engine(parser: argparse.ArgumentParser, defaults: Mapping[str, str], dtype: str = "auto") -> None:
    group = parser.add_argument_group(
        "engine", "room and habits: the fields of EngineConfig; only dtype and kernels change bits"
    )
    group.add_argument("--dtype", choices=("auto", *DTYPES), default=dtype, help="auto: the file's")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show long work on standard error"
    )
    add_fields(group, EngineConfig, defaults)


# -- commands ------------------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from jaxengine.command.demo import demo

    color = sys.stdout.isatty() if arguments.color is None else arguments.color
    say = lambda text: print(text, flush=True)
    holds = demo(
        arguments.model,
        samples=arguments.samples,
        problems=arguments.problems,
        seed=arguments.seed,
        color=color,
        say=say,
    )
    return 0 if holds else 1


def _generate(arguments: argparse.Namespace) -> int:
    if not arguments.prompts:
        raise ValueError("no prompt: give --prompt or --prompt-token-ids")
    params = sampling_params(arguments)
    if arguments.stream and params.n > 1:
        raise ValueError(f"--stream shows one sample of a prompt: n must be 1, got {params.n}")
    from jaxengine.base.keys import seeded
    from jaxengine.host.admission import own_key
    from jaxengine.llm import LLM

    llm = LLM(
        arguments.model, dtype=arguments.dtype, progress=arguments.progress, **given_fields(arguments, EngineConfig)
    )
    prompts, key = _prompts(llm, arguments), seeded(arguments.call_seed)
    show = functools.partial(_completion, as_text=llm.tokenizer is not None and params.detokenize)
    if arguments.stream:
        own = [
            params.replace(key=own_key(key, params, index, 0), seed=None) for index in range(len(prompts))
        ]  # as in a call of all
        reasons = [_print_growing(llm, *each, show) for each in zip(prompts, own, strict=True)]
    else:
        outputs = llm.generate(prompts, params, key=key)
        for line in (
            (json.dumps(record) for record in records(outputs)) if arguments.json else _text_lines(outputs, show)
        ):
            print(line)
        reasons = [sample.finish_reason for output in outputs for sample in output.outputs]
    return 1 if "error" in reasons else 0


def _prompts(llm: Any, arguments: argparse.Namespace) -> list[Any]:
    if not arguments.chat:
        return arguments.prompts
    if not all(isinstance(prompt, str) for prompt in arguments.prompts):
        raise ValueError("--chat takes messages as text: give --prompt, not --prompt-token-ids")
    if llm.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so there is no chat: leave --chat out and give --prompt-token-ids"
        )
    ids = [
        llm.tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in arguments.prompts
    ]
    return [
        {"prompt": prompt, "prompt_token_ids": tokens} for prompt, tokens in zip(arguments.prompts, ids, strict=True)
    ]


def _print_growing(llm: Any, prompt: Any, params: SamplingParams, show: Callable[[Any], str]) -> str:
    """Print one prompt's completion as it grows; returns how it ended."""
    shown, reason = 0, ""
    for output in llm.stream(prompt, params):
        text, reason = show(output.outputs[0]), output.outputs[0].finish_reason
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    return reason


def _completion(sample: Any, as_text: bool) -> str:
    """The text, fit for a terminal where it goes to one; or the token ids."""
    from jaxengine.command.demo import printable

    if not as_text:
        return " ".join(map(str, sample.token_ids))
    return printable(sample.text, keep="\n\t") if sys.stdout.isatty() else sample.text


def _text_lines(outputs: Any, show: Callable[[Any], str]) -> Iterable[str]:
    for output in outputs:
        yield f"== {output.prompt if output.prompt is not None else output.prompt_token_ids}"
        for sample in output.outputs:
            yield f"{show(sample)}  [{sample.finish_reason}, {len(sample.token_ids)} tokens, logprob {sample.cumulative_logprob:.4f}]"


def records(outputs: Any) -> Iterable[dict[str, Any]]:
    """A JSON-ready dict for every sample: its request's fields, then its own. A float32 reads back as the same bits."""
    fields_of = lambda value: {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for output in outputs:
        request = {name: value for name, value in fields_of(output).items() if name not in ("outputs", "finished")}
        for sample in output.outputs:
            yield _plain(request | fields_of(sample))


def _plain(value: Any) -> Any:
    """Arrays as lists, dataclasses as dicts, floats that JSON does not know as None."""
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Coordinate):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verify(arguments: argparse.Namespace) -> int:
    """Exit code 1 where an axis fails."""
    from jaxengine.llm import LLM

    if arguments.json:
        arguments.json.touch()  # a place that cannot be written is told now
    llm = LLM(
        arguments.model, dtype=arguments.dtype, progress=arguments.progress, **given_fields(arguments, EngineConfig)
    )
    found = llm.verify(quick=arguments.quick, samples=arguments.samples, seed=arguments.seed)
    print(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    return 0 if found else 1


def _bench(arguments: argparse.Namespace) -> int:
    from jaxengine.command import bench

    if arguments.json:
        arguments.json.touch()  # a place that cannot be written is told now, not after the measuring
    engine = {"max_num_seqs": max(bench.ENGINE["max_num_seqs"], *arguments.batch)} | given_fields(
        arguments, EngineConfig
    )
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if arguments.progress else (lambda text: None)
    llm = bench.open_model(arguments.model, dtype=arguments.dtype, progress=arguments.progress, **engine)
    where = bench.machine()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{arguments.model}, {llm.config.dtype}, {llm.engine_config}", flush=True)
    decode = [bench.Decode(batch) for batch in arguments.batch] if "decode" in arguments.workloads else []
    workloads = decode + ([bench.Group()] if "group" in arguments.workloads else [])
    with contextlib.ExitStack() as stack:
        peers = [_peer(stack, llm, arguments)] if arguments.peer else []
        for peer in peers:
            print(f"{peer.name}: {', '.join(f'{name} {value}' for name, value in peer.versions.items())}", flush=True)
        results = bench.measure([bench.Ours(llm), *peers], workloads, arguments.repeats, say)
    print(bench.table(results))
    if arguments.json:
        versions = {peer.name: peer.versions for peer in peers}
        arguments.json.write_text(
            json.dumps(bench.record(llm, arguments.model, where, results, versions), indent=2) + "\n"
        )
    return 0


def _peer(stack: contextlib.ExitStack, llm: Any, arguments: argparse.Namespace) -> Any:
    """The peer asked for, on the same model, or on random weights of the same shape."""
    from checkpoints.model_folder import find_folder
    from jaxengine.command import bench

    if arguments.model in bench.SHAPES:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench.write_config(folder, llm.config)
    else:
        folder = find_folder(arguments.model)
    peer = bench.Peer(arguments.peer, arguments.peer_python, str(folder), llm.config.dtype, llm.config.vocab_size)
    stack.callback(peer.close)
    return peer


if __name__ == "__main__":
    sys.exit(main())
