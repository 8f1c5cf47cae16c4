"""From an engine's keywords to its EngineConfig.

Defaults of the device, the implementation by name, a pool sized from memory.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxengine.base.arguments import integer
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.engine import memory
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from sharding.distributed import least
from sharding.mesh import make_mesh, processes_of, with_all_axes

CPU_TOKENS, DEVICE_TOKENS = 512, 8192  # default budget of a step
ENGINE_KEYWORDS = (*(field.name for field in dataclasses.fields(EngineConfig)), "tensor_parallel_size")


def resolve_engine_config(
    model_config: ModelConfig, given: dict[str, Any], params: Decoder | None = None
) -> EngineConfig:
    """EngineConfig from keywords; None means the default. `tensor_parallel_size` makes a mesh of so many devices.

    The pool is sized from memory, where `params` may be already, unless num_pages is given. Raises ValueError for what
    is no setting, MemoryError where the pool has no room.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given |= _mesh(given.pop("tensor_parallel_size", None), given.get("mesh"))
    on_cpu = jax.devices()[0].platform == "cpu"
    given.setdefault("max_model_len", model_config.context_length)
    given.setdefault("max_num_batched_tokens", CPU_TOKENS if on_cpu else DEVICE_TOKENS)
    given["kernels"] = choose_kernels(given.get("kernels", "auto"), model_config, given.get("mesh")).name
    engine_config = EngineConfig(**given)
    if engine_config.max_model_len > model_config.context_length:
        rope = model_config.rope
        raise ValueError(
            f"max_model_len={engine_config.max_model_len} is more than the {model_config.context_length} positions of "
            f"the model (max_position_embeddings={model_config.max_position_embeddings}, rope {rope.kind} with factor "
            f"{rope.factor:g}); to stretch it, give LLM hf_overrides={{'rope_parameters': {{'rope_type': 'yarn', "
            "'factor': …}}"
        )
    if "num_pages" not in given:
        engine_config = memory.sized_pool(model_config, engine_config, params)
        num_pages = least(engine_config.num_pages, processes_of(engine_config.mesh))  # one pool in all processes
        engine_config = dataclasses.replace(engine_config, num_pages=num_pages)
    memory.check_fits(model_config, engine_config)
    return engine_config


def _mesh(tensor: Any, mesh: Mesh | None) -> dict[str, Any]:
    """The mesh that a number of devices or the caller asks for; nothing for one device."""
    tensor = 1 if tensor is None else integer("tensor_parallel_size", tensor, 1)
    if mesh is None:
        return {} if tensor == 1 else {"mesh": make_mesh(tensor=tensor)}
    mesh = with_all_axes(mesh)
    if tensor not in (1, mesh.shape["tensor"]):
        raise ValueError(f"tensor_parallel_size={tensor}, and the mesh has {mesh.shape['tensor']}: give one of them")
    return {"mesh": mesh}
