"""From an engine's keywords to its EngineConfig.

Defaults of the device, the implementation by name, a pool sized from memory.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxengine.base.arguments import integer
from jaxengine.config import PROFILES, EngineConfig, ModelConfig
from jaxengine.engine import memory
from jaxengine.engine.lockstep import START
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from sharding.distributed import least
from sharding.mesh import make_mesh, processes_of, with_all_axes

CPU_TOKENS, DEVICE_TOKENS = 512, 8192  # default budget of a step
MESH_KEYWORDS = "tensor_parallel_size", "data_parallel_size"
ENGINE_KEYWORDS = (*(field.name for field in dataclasses.fields(EngineConfig)), *MESH_KEYWORDS, "profile")


def resolve_engine_config(
    model_config: ModelConfig, given: dict[str, Any], params: Decoder | None = None
) -> EngineConfig:
    """EngineConfig from keywords; None means the default, that of `profile` where one is given.
    `tensor_parallel_size` and `data_parallel_size` make a mesh.

    The pool is sized from memory, where `params` may be already, unless num_pages is given. Raises ValueError for what
    is no setting, MemoryError where the pool has no room.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given = profile_defaults(given.pop("profile", None)) | given
    given |= _mesh([given.pop(name, None) for name in MESH_KEYWORDS], given.get("mesh"))
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
        patience = max(int(engine_config.process_timeout), START)  # the others may still load their weights
        num_pages = least(engine_config.num_pages, processes_of(engine_config.mesh), patience)  # one pool in all
        engine_config = dataclasses.replace(engine_config, num_pages=num_pages)
    memory.check_fits(model_config, engine_config)
    return engine_config


def _mesh(sizes: list[Any], mesh: Mesh | None) -> dict[str, Any]:
    """The mesh that numbers of devices or the caller ask for; nothing for one device."""
    tensor, data = (
        1 if size is None else integer(name, size, 1) for name, size in zip(MESH_KEYWORDS, sizes, strict=True)
    )
    if mesh is None:
        return {"mesh": make_mesh(tensor=tensor, data=data)} if tensor * data > 1 else {}
    mesh = with_all_axes(mesh)
    for axis, size in (("tensor", tensor), ("data", data)):
        if size not in (1, mesh.shape[axis]):
            raise ValueError(f"{axis}_parallel_size={size}, and the mesh has {mesh.shape[axis]}: give one of them")
    return {"mesh": mesh}


def sharing_devices(given: dict[str, Any]) -> int:
    """Devices that share the weights, by the keywords of `resolve_engine_config`. Raises ValueError as that does."""
    mesh = _mesh([given.get(name) for name in MESH_KEYWORDS], given.get("mesh")).get("mesh")
    return 1 if mesh is None else mesh.shape["tensor"]


def profile_defaults(profile: Any) -> dict[str, Any]:
    """The defaults of a profile; of None none. Raises ValueError for one that is not in PROFILES."""
    if profile is None:
        return {}
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))} or None, got {profile!r:.40}")
    return PROFILES[profile]


def profile_line(profile: str, engine_config: EngineConfig) -> str:
    """What a profile's settings are in an engine, those that were given apart included."""
    settings = ", ".join(f"{name}={getattr(engine_config, name)}" for name in PROFILES[profile])
    return f"profile {profile}: {settings}"
