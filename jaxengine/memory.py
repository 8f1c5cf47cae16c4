"""What weights, cache and workspace take, how large a pool fits, and what to say when memory ran out all the same."""
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator

import jax

from jaxengine import kv_cache
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.models import params as model_params
from jaxengine.ops.kernels import resolve

CPU_SHARE = 0.25  # of the host's free memory, for the pool: other programs live there too
DEVICE_SHARE = 0.9  # of an accelerator's memory, for everything
ROW_BYTES = 4
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # what XLA says at once; and what it says once results are read


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device."""

    weights: int
    cache: int
    workspace: int  # activations and logits of the widest step: an estimate
    num_pages: int
    page_bytes: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        gigabytes = lambda size: f"{size / 1e9:.2f} GB"
        return (f"weights {gigabytes(self.weights)}, cache {gigabytes(self.cache)} ({self.num_pages} pages of "
                f"{self.page_bytes / 1e6:.2f} MB), workspace about {gigabytes(self.workspace)}, "
                f"together {gigabytes(self.total)} of {gigabytes(self.available)}")


def memory_plan(model: ModelConfig, engine: EngineConfig) -> MemoryPlan:
    """The plan of an engine as configured."""
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    cache = kv_cache.abstract(model, engine, resolve(engine.kernels, model))
    return MemoryPlan(size(model_params.abstract(model)), size(cache), _workspace(model, engine), engine.num_pages,
                      _page_bytes(model, engine), _available())


def sized_pool(model: ModelConfig, engine: EngineConfig) -> EngineConfig:
    """`engine` with the number of pages that memory allows, and no more than all slots can fill.

    Raises MemoryError naming weights, cache and workspace where not even one whole context fits.
    """
    plan = memory_plan(model, dataclasses.replace(engine, num_pages=2))
    on_cpu = jax.devices()[0].platform == "cpu"
    budget = int(plan.available * CPU_SHARE) if on_cpu else int(plan.available * DEVICE_SHARE) - plan.weights - plan.workspace
    useful = engine.max_num_seqs * -(-engine.max_model_len // engine.page_size) + 1
    num_pages = min(useful, budget // plan.page_bytes - engine.probe_pages)
    needed = -(-engine.max_model_len // engine.page_size) + 1
    if num_pages < needed:
        raise MemoryError(f"one context of max_model_len={engine.max_model_len} tokens needs {needed} pages, "
                          f"{max(num_pages, 0)} fit: {plan}; lower max_model_len or max_num_batched_tokens, or give num_pages")
    return dataclasses.replace(engine, num_pages=num_pages)


def check_fits(model: ModelConfig, engine: EngineConfig) -> None:
    """Raises MemoryError where weights and cache are more than the whole machine has: the system would grant them, and end some process
    once they are written. An accelerator refuses by itself."""
    plan = memory_plan(model, engine)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.devices()[0].platform == "cpu" and plan.weights + plan.cache > installed:
        raise MemoryError(f"this machine has {installed / 1e9:.2f} GB of memory in all: {advice(model, engine)}")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no memory left."""
    of_device = isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or of_device


def advice(model: ModelConfig, engine: EngineConfig) -> str:
    """What memory is wanted for, and which settings want less."""
    return (f"{memory_plan(model, engine)}; lower num_pages, max_num_seqs or max_model_len for the cache, max_num_batched_tokens for the "
            f"workspace, or take a dtype smaller than {model.dtype} for the weights")


@contextlib.contextmanager
def explained(model: ModelConfig, engine: EngineConfig, doing: str) -> Iterator[None]:
    """Where memory runs out in here, MemoryError says what was wanted for what, and which setting to change."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        raise MemoryError(f"out of memory while {doing}: {advice(model, engine)}") from error


def _page_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    pools = resolve(engine.kernels, model).pools(model, 1, engine.page_size)
    return model.num_hidden_layers * sum(math.prod(pool.shape) * pool.dtype.itemsize for pool in pools)


def _workspace(model: ModelConfig, engine: EngineConfig) -> int:
    """Rows of the residual stream, projections and attention of a whole step, and the logits of one tile."""
    rows = max(engine.max_num_batched_tokens, engine.max_num_seqs)
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    return ROW_BYTES * (rows * (2 * model.hidden_size + heads) + 4 * 128 * model.padded_vocab_size)


def _available() -> int:
    """Bytes of the first device, or of the host's free memory."""
    stats = jax.devices()[0].memory_stats() if jax.devices()[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
