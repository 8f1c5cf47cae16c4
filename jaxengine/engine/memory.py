"""What weights, cache and workspace take, how large a pool fits, and what to say when memory ran out all the same."""

import bisect
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

from jaxengine.base import machine
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache
from jaxengine.engine.step_variants import variants_of
from jaxengine.models import params as model_params
from jaxengine.ops.kernels import Kernels, choose_kernels

CPU_SHARE = 0.25  # of the host's free memory, for the pool: other programs live there too
CPU_POOL = 512_000_000  # bytes of pages that a CPU's pool has at most, or as many as its model's weights take, or
# one whole context: a small model in a notebook wants no gigabytes, and num_pages gives it more
ROW_BYTES = 4
LOGIT_ROWS = 128  # of a tile that draws; of an accelerator's wider ones its compiled program says
LOGIT_COPIES = 4  # raw, penalised, processed, and what the sampler works on
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # what XLA says at once; and what it says once results are read


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device."""

    weights: int
    cache: int
    workspace: int  # activations and logits of the widest step; an estimate, but where an accelerator's pool is sized
    num_pages: int
    page_bytes: int
    available: int  # all that the device has, or what is free on the host

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        gigabytes = lambda size: f"{size / 1e9:.2f} GB"
        return (
            f"weights {gigabytes(self.weights)}, cache {gigabytes(self.cache)} ({self.num_pages} pages of "
            f"{self.page_bytes / 1e6:.2f} MB), workspace about {gigabytes(self.workspace)}, "
            f"together {gigabytes(self.total)} of {gigabytes(self.available)}"
        )


def memory_plan(model_config: ModelConfig, engine_config: EngineConfig) -> MemoryPlan:
    """The plan of an engine as configured."""
    kernels = _kernels(model_config, engine_config)
    cache = kv_cache.abstract(model_config, engine_config, kernels)
    return MemoryPlan(
        size_on_one(abstract_weights(model_config, kernels)),
        size_on_one(cache),
        _workspace(model_config, engine_config),
        engine_config.num_pages,
        bytes_of_page(model_config, engine_config, kernels),
        _device_memory()[0],
    )


def sized_pool(model_config: ModelConfig, engine_config: EngineConfig, params: Any = None) -> EngineConfig:
    """`engine` with the number of pages that memory allows, and no more than all slots can fill.

    `params` are weights that are loaded already. For an accelerator the widest steps are compiled first, so that the
    workspace is what they take and no estimate.

    Raises MemoryError naming weights, cache and workspace where not even one whole context fits, and the longest that
    does.
    """
    plan = memory_plan(model_config, dataclasses.replace(engine_config, num_pages=2))
    taken, on_cpu = _device_memory()[1], jax.local_devices()[0].platform == "cpu"
    sharing = _devices_here(engine_config)
    if on_cpu:  # all of whose devices live in the host's memory
        room = int(plan.available * CPU_SHARE) // sharing
    else:
        plan = dataclasses.replace(plan, workspace=_compiled_workspace(model_config, engine_config))
        room = (
            int(plan.available * engine_config.gpu_memory_utilization)
            - taken
            - max(0, plan.weights - _resident(params))
            - plan.workspace
        )
    num_pages = min(
        engine_config.max_num_seqs * (whole_context(engine_config) - 1) + 1,
        pages_in(room, model_config, engine_config, plan.page_bytes),
    )
    if on_cpu:
        enough = max(CPU_POOL // sharing, plan.weights) // plan.page_bytes
        num_pages = min(num_pages, max(enough, whole_context(engine_config)))
    if num_pages < whole_context(engine_config):

        def is_too_long(length: int) -> bool:
            shorter = dataclasses.replace(engine_config, max_model_len=length)
            return pages_in(room, model_config, shorter, plan.page_bytes) < whole_context(shorter)

        longest = 1 + bisect.bisect_left(range(2, engine_config.max_model_len), True, key=is_too_long)
        advice = f"max_model_len={longest} fits; or" if longest > 1 else "there is no room for any;"
        share = f"gpu_memory_utilization={engine_config.gpu_memory_utilization}"
        others = "" if on_cpu else f", {taken / 1e9:.2f} GB are in use: raise {share}"
        raise MemoryError(
            f"one context of max_model_len={engine_config.max_model_len} tokens needs "
            f"{whole_context(engine_config)} pages, {max(num_pages, 0)} fit: {plan}{others}; {advice} lower "
            "max_num_batched_tokens or max_num_seqs, or give num_pages"
        )
    return dataclasses.replace(engine_config, num_pages=num_pages)


def whole_context(engine_config: EngineConfig) -> int:
    """Pages that a pool must have for one sequence of max_model_len tokens."""
    return -(-engine_config.max_model_len // engine_config.page_size) + 1


def pages_in(room: int, model_config: ModelConfig, engine_config: EngineConfig, page_bytes: int) -> int:
    """num_pages of the largest cache that takes `room` bytes."""
    slots = size_on_one(kv_cache.abstract_slots(model_config, engine_config))
    return (room - slots) // page_bytes - engine_config.probe_pages


def _devices_here(engine_config: EngineConfig) -> int:
    """Devices of this process that an engine's replicas have."""
    if engine_config.mesh is None:
        return 1
    return sum(device.process_index == jax.process_index() for device in engine_config.mesh.devices.flat)


def _kernels(model_config: ModelConfig, engine_config: EngineConfig) -> Kernels:
    return choose_kernels(engine_config.kernels, model_config, engine_config.mesh)


def abstract_weights(model_config: ModelConfig, kernels: Kernels) -> Any:
    """Their shapes and dtypes, and where they lie on a mesh."""
    shapes = model_params.abstract(model_config)
    if kernels.split is None:
        return shapes
    homes = model_params.shardings(model_config, kernels.split)
    return jax.tree.map(lambda x, home: x.update(sharding=home), shapes, homes)


def size_on_one(tree: Any) -> int:
    """Bytes of all arrays, on each device of those that share them."""
    return sum(math.prod(_on_one(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _on_one(x: Any) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def _resident(params: Any) -> int:
    """Bytes of the weights that are on the first device, and so among those in use."""
    shards = (
        shard for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for shard in leaf.addressable_shards
    )
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.local_devices()[0])


def check_fits(model_config: ModelConfig, engine_config: EngineConfig) -> None:
    """Raises MemoryError where weights and cache are more than the whole machine has.

    The system would grant them, and end some process once they are written. An accelerator refuses by itself.
    """
    plan = memory_plan(model_config, engine_config)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_each = plan.weights + plan.cache
    if jax.devices()[0].platform == "cpu" and _devices_here(engine_config) * on_each > installed:
        raise MemoryError(
            f"this machine has {installed / 1e9:.2f} GB of memory in all: {advice(model_config, engine_config)}"
        )


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no memory left."""
    of_device = isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or of_device


def advice(model_config: ModelConfig, engine_config: EngineConfig) -> str:
    """What memory is wanted for, and which settings want less."""
    return (
        f"{memory_plan(model_config, engine_config)}; lower num_pages, max_num_seqs or max_model_len for the cache, "
        f"max_num_batched_tokens for the workspace, or take a dtype smaller than {model_config.dtype} for the weights"
    )


@contextlib.contextmanager
def explained(model_config: ModelConfig, engine_config: EngineConfig, doing: str) -> Iterator[None]:
    """Where memory runs out in here, MemoryError says what was wanted for what, and which setting to change."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        raise MemoryError(f"out of memory while {doing}: {advice(model_config, engine_config)}") from error


def bytes_of_page(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> int:
    """Bytes of one page in all layers, on each device of those that share it."""
    pools = kernels.pools(model_config, 1, engine_config.page_size)
    return model_config.num_hidden_layers * size_on_one(pools)


def _workspace(model_config: ModelConfig, engine_config: EngineConfig) -> int:
    """Rows of the residual stream, projections and attention of a whole step, the logits of one tile, and the likeliest
    tokens of each row.
    """
    rows = max(engine_config.max_num_batched_tokens, engine_config.max_num_seqs)
    heads = (2 * model_config.num_attention_heads + 2 * model_config.held_key_value_heads) * model_config.head_dim
    likeliest = 2 * engine_config.num_likeliest(model_config.vocab_size)  # ids and logprobs
    return ROW_BYTES * (
        rows * (2 * model_config.hidden_size + heads + likeliest)
        + LOGIT_COPIES * LOGIT_ROWS * model_config.padded_vocab_size
    )


def _compiled_workspace(model_config: ModelConfig, engine_config: EngineConfig) -> int:
    """What the widest steps take on the first device, of a pool of one context."""
    kernels = _kernels(model_config, engine_config)
    engine_config = dataclasses.replace(engine_config, num_pages=whole_context(engine_config))
    variants = variants_of(model_config, engine_config, kernels)
    cache = kv_cache.abstract(model_config, engine_config, kernels)
    with explained(model_config, engine_config, "compiling the widest steps"):
        return variants.workspace(abstract_weights(model_config, kernels), cache)


def _device_memory() -> tuple[int, int]:
    """(bytes of the first device, those of them in use); of a CPU (the host's free memory, 0)."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (
        (stats["bytes_limit"], stats.get("bytes_in_use", 0))
        if stats and "bytes_limit" in stats
        else (machine.free_memory(), 0)
    )
