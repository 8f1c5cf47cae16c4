"""`jaxengine plan`: what fits on devices that are not here, and how fast it could be."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxengine.command.plan_models import planned_model
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device.needs import Needs
from jaxengine.engine.desk_plan import DeskPlan, StepPlan, desk_plan
from jaxengine.engine.roofline import Estimate, decode_estimate, prefill_estimate
from sharding.devices import FIGURES
from sharding.topology import Target, missing, target_of

CONTEXT = 8192  # tokens, where the model has as many and nothing else is asked for
NEEDS = {"plain": Needs.PLAIN, "all": Needs.ALL}


def plan(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(the table, the same ready for JSON). Raises ValueError for what cannot be planned here, with the reason."""
    target = target_of(arguments.topology)
    replicas = replicas_of(target, arguments.tensor, arguments.data)
    leaves, devices = arguments.reduction_leaves, arguments.tensor
    model_config = planned_model(arguments.model, dtype=arguments.dtype, reduction_leaves=leaves, devices=devices)
    engine_config = engine_config_of(arguments, model_config)
    context = arguments.context or engine_config.max_model_len // 2
    if context > engine_config.max_model_len:
        raise ValueError(f"context={context} is more than max_model_len={engine_config.max_model_len}")
    reason = missing(target)
    if reason:
        raise ValueError(reason)
    made = desk_plan(model_config, engine_config, target, arguments.tensor, replicas, needs=NEEDS[arguments.needs])
    estimates = estimates_of(model_config, engine_config, made, target, context)
    lines = [*_head(arguments, model_config, made), *_memory(made, engine_config), *_steps(made)]
    record = {"model": dataclasses.asdict(model_config), "engine": dataclasses.asdict(engine_config)}
    record |= {"plan": dataclasses.asdict(made), "context": context, "needs": arguments.needs}
    record["estimates"] = {
        name: dataclasses.asdict(estimate) | {"seconds": estimate.seconds, "tokens_per_second": estimate.rate}
        for name, estimate in estimates.items()
    }
    return "\n".join([*lines, *_estimates(made, estimates, target, context)]), record


def replicas_of(target: Target, tensor: int, data: int | None) -> int:
    """How many replicas of `tensor` devices; None: as many as the target has room for."""
    room = target.num_devices // tensor
    if max(1, data or 0) > room:
        asked = f"tensor={tensor}" + (f" times data={data}" if data else "")
        raise ValueError(f"{asked} asks for {tensor * (data or 1)} devices, {target} has {target.num_devices}")
    return data or room


def engine_config_of(arguments: argparse.Namespace, model_config: ModelConfig) -> EngineConfig:
    """The engine that is planned. Raises ValueError as EngineConfig does, and for a context that the model has not."""
    length = arguments.max_model_len or min(CONTEXT, model_config.context_length)
    if length > model_config.context_length:
        raise ValueError(f"max_model_len={length} is more than the {model_config.context_length} of the model")
    names = "max_num_seqs", "max_num_batched_tokens", "page_size", "gpu_memory_utilization"
    return EngineConfig(max_model_len=length, **{name: getattr(arguments, name) for name in names})


def estimates_of(
    model_config: ModelConfig, engine_config: EngineConfig, made: DeskPlan, target: Target, context: int
) -> dict[str, Estimate]:
    """Of the steps of an engine that is as full as its pages allow; none where not one request fits."""
    page_size, figures = engine_config.page_size, FIGURES[target.generation]
    batch = min(engine_config.max_num_seqs, made.requests(context, page_size))
    if not batch:
        return {}
    decode = decode_estimate(model_config, made, figures, batch=batch, context=context, page_size=page_size)
    return {"decode": decode, "prefill": prefill_estimate(model_config, made, figures, context=context)}


# -- the table ---------------------------------------------------------------------------------------------------------


def _head(arguments: argparse.Namespace, model_config: ModelConfig, made: DeskPlan) -> Iterator[str]:
    layers, compiled = model_config.num_hidden_layers, made.compiled_layers
    yield f"{arguments.model}, {layers} layers, {model_config.dtype}, reduction_leaves={model_config.reduction_leaves}"
    if model_config.key_value_copies > 1:
        heads, copies = model_config.num_key_value_heads, model_config.key_value_copies
        yield f"each of {heads} key-value heads is held {copies} times"
    yield f"{made.target}: {made.num_replicas} replica(s) of {made.degree} device(s)"
    asked = {"plain": "a temperature alone", "all": "everything"}[arguments.needs]
    yield f"steps for requests that ask for {asked}"
    yield (
        f"compiled for them in {made.seconds:.0f} s: steps of {' and '.join(map(str, compiled))} layer(s); what the "
        f"second has more than the first is multiplied for all {layers}"
    )


def _memory(made: DeskPlan, engine_config: EngineConfig) -> Iterator[str]:
    yield ""
    yield f"{'memory of each device':32}{made.memory / 1e9:10.2f} GB"
    left = made.usable - made.weights - made.slots - made.workspace
    rows = {
        f"usable ({engine_config.gpu_memory_utilization:g} of it)": made.usable,
        "weights": made.weights,
        "workspace of the widest step": made.workspace,
        "histories and token rules": made.slots,
        "left for pages": left,
    }
    for name, size in rows.items():
        yield f"  {name:30}{size / 1e9:10.2f} GB"
    if made.num_pages < 2:
        yield "  DOES NOT FIT: raise --tensor, or lower --max-num-batched-tokens or --max-num-seqs"
        return
    yield f"  {made.num_pages} pages of {made.page_bytes / 1e6:.2f} MB; requests at once, by tokens of each:"
    length = engine_config.max_model_len
    for context in (length, length // 2, length // 4):
        yield f"    {context:>8} tokens {made.requests(context, engine_config.page_size):>10} requests"


def _steps(made: DeskPlan) -> Iterator[str]:
    for step in made.steps.values():
        yield ""
        tiles = f"{step.tiles} tile(s) of {step.tile}"
        yield f"{step.kind} step of {step.rows} rows, {tiles}, layers run {step.runs} x, on each device"
        yield f"  {'workspace':30}{step.workspace / 1e9:10.3f} GB"
        yield from _collectives(step)
        kernels = ", ".join(f"{count} {name}" for name, count in step.kernels.items())
        yield f"  Pallas kernels: {kernels or 'none'}"


def _collectives(step: StepPlan) -> Iterator[str]:
    for kind, count in step.collectives.items():
        yield f"  {kind:20}{count:>8} x  {step.received[kind] / 1e9:10.3f} GB received"


def _estimates(made: DeskPlan, estimates: dict[str, Estimate], target: Target, context: int) -> Iterator[str]:
    if not estimates:
        return  # not one request fits
    figures = FIGURES[target.generation]
    yield ""
    yield (
        f"ESTIMATE, not measured: {figures.bandwidth / 1e9:.0f} GB/s of memory, {figures.flops / 1e12:.0f} Tflop/s, "
        f"{figures.link / 1e9:.0f} GB/s from neighbours; {context} tokens of context"
    )
    for name, each in estimates.items():
        parts = ", ".join(
            f"{what} {1e3 * seconds:.2f}"
            for what, seconds in (("memory", each.memory), ("flops", each.arithmetic), ("exchange", each.exchange))
        )
        yield f"  {name:8}{1e3 * each.seconds:10.2f} ms for {each.tokens} tokens ({parts})"
        yield f"  {'':8}{each.rate:10.0f} tokens/s a replica, {each.rate * made.num_replicas:.0f} in all"
