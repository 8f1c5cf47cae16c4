"""What the commands of the command line do with the parsed arguments; each returns its exit code.

jax is imported when a command runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxengine.command.options import given_fields, sampling_params
from jaxengine.command.records import records
from jaxengine.config import EngineConfig
from jaxengine.sampling_params import SamplingParams


def run_demo(arguments: argparse.Namespace) -> int:
    from jaxengine.command.demo import demo

    holds = demo(
        arguments.model,
        samples=arguments.samples,
        problems=arguments.problems,
        seed=arguments.seed,
        color=sys.stdout.isatty() if arguments.color is None else arguments.color,
        say=functools.partial(print, flush=True),
    )
    return 0 if holds else 1


def run_generate(arguments: argparse.Namespace) -> int:
    if not arguments.prompts:
        raise ValueError("no prompt: give --prompt or --prompt-token-ids")
    params = sampling_params(arguments)
    if arguments.stream and params.n > 1:
        raise ValueError(f"--stream shows one sample of a prompt: n must be 1, got {params.n}")
    if not arguments.distributed:
        return _generate(arguments, params)
    import jax

    from jaxengine import distributed

    distributed.initialize()
    with distributed.draining(), open(os.devnull, "w") as nowhere:
        is_first = jax.process_index() == 0
        with contextlib.nullcontext() if is_first else contextlib.redirect_stdout(nowhere):
            return _generate(arguments, params, tensor_parallel_size=jax.device_count())


def _generate(arguments: argparse.Namespace, params: SamplingParams, **devices: int) -> int:
    from jaxengine.base.keys import seeded

    llm = _open_llm(arguments, reduction_leaves=arguments.reduction_leaves, **devices)
    prompts, key = _prompts(llm, arguments), seeded(arguments.call_seed)
    show = functools.partial(_completion, as_text=llm.tokenizer is not None and params.detokenize)
    if arguments.stream:
        reasons = _stream(llm, prompts, params, key, show)
    else:
        outputs = llm.generate(prompts, params, key=key)
        for line in map(json.dumps, records(outputs)) if arguments.json else _text_lines(outputs, show):
            print(line)
        reasons = [sample.finish_reason for output in outputs for sample in output.outputs]
    return 1 if "error" in reasons else 0


def _open_llm(arguments: argparse.Namespace, **more: Any) -> Any:
    from jaxengine.llm import LLM

    engine = given_fields(arguments, EngineConfig)
    return LLM(arguments.model, dtype=arguments.dtype, progress=arguments.progress, **engine, **more)


def _stream(llm: Any, prompts: list[Any], params: SamplingParams, key: Any, show: Callable[[Any], str]) -> list[str]:
    """Print the prompts' completions one after the other; returns how each ended. Keys are those of one call for
    all."""
    from jaxengine.host.admission import own_key

    reasons = []
    for index, prompt in enumerate(prompts):
        own = params.replace(key=own_key(key, params, index, 0), seed=None)
        reasons.append(_print_growing(llm, prompt, own, show))
    return reasons


def _prompts(llm: Any, arguments: argparse.Namespace) -> list[Any]:
    if not arguments.chat:
        return arguments.prompts
    if not all(isinstance(prompt, str) for prompt in arguments.prompts):
        raise ValueError("--chat takes messages as text: give --prompt, not --prompt-token-ids")
    if llm.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so there is no chat: leave --chat out and give --prompt-token-ids"
        )
    prompts = []
    for prompt in arguments.prompts:
        ids = llm.tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        prompts.append({"prompt": prompt, "prompt_token_ids": ids})
    return prompts


def _print_growing(llm: Any, prompt: Any, params: SamplingParams, show: Callable[[Any], str]) -> str:
    """Print one prompt's completion as it grows; returns how it ended."""
    reason, separator = "", ""
    for delta in llm.stream(prompt, params):
        for new in delta.outputs:  # of one sample
            print(separator + show(new), end="", flush=True)
            separator, reason = "" if llm.tokenizer is not None and params.detokenize else " ", new.finish_reason
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
            figures = f"{len(sample.token_ids)} tokens, logprob {sample.cumulative_logprob:.4f}"
            yield f"{show(sample)}  [{sample.finish_reason}, {figures}]"


def run_serve(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        from jaxengine.server.serve import server, tune_interpreter
        from jaxengine.server.settings import ServerConfig
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'jaxengine[server]'") from error
    from jaxengine.async_llm import AsyncLLM

    named = ("host", "port", "api_key", "admin_key", "weights_root", "max_body_bytes", "max_open_requests")
    named = (*named, "max_samples", "drain_seconds", "tool_call_parser", "reasoning_parser")
    more = {name: getattr(arguments, name) for name in named}
    config = ServerConfig(model_name=arguments.served_model_name or arguments.model, **more)
    engine = given_fields(arguments, EngineConfig)
    how = dict(dtype=arguments.dtype, progress=arguments.progress, profile=arguments.profile)
    llm = AsyncLLM(arguments.model, **how, **engine)
    if arguments.warm_up:
        llm.llm.warm_up()
    tune_interpreter()
    print(f"serving {config.model_name} at http://{config.host}:{config.port}", file=sys.stderr, flush=True)
    server(llm, config).run()
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Exit code 1 if an axis fails."""
    if arguments.json:
        arguments.json.touch()  # so that a file that cannot be written ends the command now, not after the checks
    verification = _open_llm(arguments).verify(quick=arguments.quick, samples=arguments.samples, seed=arguments.seed)
    print(verification)
    if arguments.json:
        arguments.json.write_text(json.dumps(verification.to_json(), indent=2) + "\n")
    return 0 if verification else 1


def run_bench(arguments: argparse.Namespace) -> int:
    from jaxengine.command import bench

    if arguments.json:
        arguments.json.touch()  # so that a file that cannot be written ends the command now, not after the measuring
    workloads = bench_workloads(arguments)
    room = bench.room(workloads)
    engine: dict[str, Any] = room | given_fields(arguments, EngineConfig)
    say = functools.partial(print, file=sys.stderr, flush=True) if arguments.progress else bench.say_nothing
    engine["reduction_leaves"] = arguments.reduction_leaves
    llm = bench.open_model(arguments.model, dtype=arguments.dtype, progress=arguments.progress, **engine)
    where = bench.machine()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{arguments.model}, {llm.config.dtype}, {llm.engine_config}", flush=True)
    with contextlib.ExitStack() as stack:
        peers = [_peer(stack, llm, arguments)] if arguments.peer else []
        for peer in peers:
            print(f"{peer.name}: {', '.join(f'{name} {value}' for name, value in peer.versions.items())}", flush=True)
        results = bench.measure([bench.Ours(llm), *peers], workloads, arguments.repeats, say)
    print(bench.table(results))
    if arguments.json:
        versions = {peer.name: peer.versions for peer in peers}
        record = bench.record(llm, arguments.model, where, results, versions)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def bench_workloads(arguments: argparse.Namespace) -> list[Any]:
    from jaxengine.command import bench

    of_each_kind = {
        "decode": [bench.Decode(batch, tokens) for tokens in arguments.prompt_tokens for batch in arguments.batch],
        "group": [bench.Group(prompts, samples) for prompts, samples in arguments.groups],
        "first-token": [bench.FirstToken()],
    }
    return [workload for kind, own in of_each_kind.items() if kind in arguments.workloads for workload in own]


def run_plan(arguments: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # devices are described: those that are here stay others'
    from jaxengine.command.plan import plan

    if arguments.json:
        arguments.json.touch()  # so that a file that cannot be written ends the command now, not after compiling
    table, record = plan(arguments)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _peer(stack: contextlib.ExitStack, llm: Any, arguments: argparse.Namespace) -> Any:
    """The peer that the arguments name, on the same model, or on random weights of the same shape."""
    from checkpoints.model_folder import find_folder
    from jaxengine.command import bench

    if arguments.model in bench.SHAPES:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench.write_config(folder, llm.config)
    else:
        folder = find_folder(arguments.model)
    context = llm.engine_config.max_model_len
    peer = bench.Peer(
        arguments.peer, arguments.peer_python, str(folder), llm.config.dtype, llm.config.vocab_size, context
    )
    stack.callback(peer.close)
    return peer
