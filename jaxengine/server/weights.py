"""Routes that change the weights, from a folder on this machine's disk; they need the admin key."""

from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.server import body
from jaxengine.server.errors import ApiError, json_response
from jaxengine.server.protocol import WeightsRequest
from jaxengine.server.service import Service

NO_NCCL = (
    "weights do not come over NCCL here, which needs torch and a GPU on both sides: write them as a folder in Hugging "
    'Face format inside --weights-root, and post {"weight_dir": FOLDER} or {"update_info": {"path": FOLDER}} to '
    "/update_weights"
)
DISK_KEYS = frozenset({"path", "backend"})


async def init_weight_transfer(service: Service, http: HttpRequest) -> Response:
    form = await _form(service, http)
    if form.init_info is None:
        raise ApiError(400, 'init_info is missing: {"backend": "disk"} is the one there is', "init_info")
    if form.init_info.get("backend") != "disk" or form.init_info.keys() - DISK_KEYS:
        raise ApiError(501, NO_NCCL, "init_info", "no_nccl")
    _root(service)
    return json_response({"message": "Weight transfer initialized"})


async def start_weight_update(service: Service, http: HttpRequest) -> Response:
    """Nothing begins before the weights are there: they are taken whole, or not at all."""
    await _form(service, http)
    _root(service)
    return json_response({"message": "Weight update started"})


async def update_weights(service: Service, http: HttpRequest) -> Response:
    """Weights of a folder, all or nothing, from the next token on; `in_flight` as LLM.update_params takes it."""
    form = await _form(service, http)
    folder = form.weight_dir if form.weight_dir is not None else _path_of(form.update_info)
    how = {} if form.in_flight is None else {"in_flight": form.in_flight}
    path = _inside(_root(service), folder)
    try:
        number = await service.engine.update_params(path, **how)
    except (ValueError, TypeError, OSError) as error:
        message = str(error).replace(str(path), str(folder))  # where the root lies is not the client's to know
        raise ApiError(400, message, "weight_dir") from error
    except (RuntimeError, MemoryError) as error:
        raise ApiError(409, str(error)) from error
    service.weight_label = form.weight_version
    return json_response({"message": "Weights updated", "success": True, "version": number})


async def finish_weight_update(service: Service, http: HttpRequest) -> Response:
    """May name the weights that /update_weights brought, for /weight_info."""
    form = await _form(service, http)
    if form.weight_version is not None:
        service.weight_label = form.weight_version
    return json_response({"message": "Weight update finished"})


async def _form(service: Service, http: HttpRequest) -> WeightsRequest:
    return await body.read(http, WeightsRequest, service.config.max_body_bytes)


def _path_of(update_info: dict[str, Any] | None) -> str:
    if update_info is None:
        raise ApiError(400, "give weight_dir, or update_info with a path", "update_info")
    if update_info.keys() - DISK_KEYS or "path" not in update_info:
        raise ApiError(501, NO_NCCL, "update_info", "no_nccl")
    return update_info["path"]


def _root(service: Service) -> Path:
    root = service.config.weights_root
    if root is None:
        raise ApiError(403, "weights from disk are off: start the server with --weights-root FOLDER", code="no_root")
    return root.resolve()


def _inside(root: Path, folder: Any) -> Path:
    """The folder, which must lie in the root once every link in it is followed. Tells nothing of what is outside."""
    if not isinstance(folder, str) or not folder or "\0" in folder:
        raise ApiError(400, f"the folder must be a path, got {folder!r:.80}", "weight_dir")
    path = (root / folder).resolve()
    if not path.is_relative_to(root) or not path.is_dir():
        raise ApiError(400, "the folder must be one inside the server's --weights-root", "weight_dir", "outside_root")
    return path
