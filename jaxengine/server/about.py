"""Routes that only tell: health, models, metrics, and what clients ask before they begin."""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine import __version__
from jaxengine.server.errors import ApiError, json_response
from jaxengine.server.service import Service


async def health(service: Service, http: HttpRequest) -> Response:
    """200 while the engine's thread is there and its last step went well."""
    if service.engine.error is not None:
        raise ApiError(503, f"the engine's last step failed: {type(service.engine.error).__name__}")
    return json_response({"status": "ok"})


async def models(service: Service, http: HttpRequest) -> Response:
    model = {
        "id": service.config.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "jaxengine",
        "root": service.config.model_name,
        "parent": None,
        "max_model_len": service.max_model_len,
    }
    return json_response({"object": "list", "data": [model]})


async def metrics(service: Service, http: HttpRequest) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def version(service: Service, http: HttpRequest) -> Response:
    return json_response({"version": __version__})


async def world_size(service: Service, http: HttpRequest) -> Response:
    return json_response({"world_size": 1})


async def server_info(service: Service, http: HttpRequest) -> Response:
    """What trainers read before they begin, under vLLM's names; `contract` is what bits depend on."""
    llm = service.llm
    mesh = llm.engine_config.mesh
    data, tensor = (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["tensor"])
    vllm_config = {
        "model_config": {
            "model": service.config.model_name,
            "dtype": f"torch.{llm.config.dtype}",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": service.max_model_len,
            "max_logprobs": llm.engine_config.max_logprobs,
        },
        "weight_transfer_config": {"backend": "disk"},
        "lora_config": None,
        "parallel_config": {"data_parallel_size": data, "tensor_parallel_size": tensor},
    }
    contract = await asyncio.to_thread(llm.contract)
    return json_response({"vllm_config": vllm_config, "contract": contract.parts, "digest": contract.digest})


async def weight_info(service: Service, http: HttpRequest) -> Response:
    """What the last update called its weights; `version` is the number that every token carries."""
    number = service.llm.weights_version
    name = service.weights_name if service.weight_label or number else "default"
    contract = await asyncio.to_thread(service.llm.contract)
    return json_response({"weight_version": name, "version": number, "digest": contract.digest})


async def is_paused(service: Service, http: HttpRequest) -> Response:
    return json_response({"is_paused": service.llm.is_paused})


async def is_sleeping(service: Service, http: HttpRequest) -> Response:
    return json_response({"is_sleeping": service.llm.is_sleeping})
