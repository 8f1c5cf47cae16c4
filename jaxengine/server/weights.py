"""Routes that change the weights, from a folder on this machine's disk or from bodies; they need the admin key."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.server import body
from jaxengine.server.errors import ApiError, json_response
from jaxengine.server.protocol import WeightsRequest
from jaxengine.server.service import Service
from jaxengine.server.weight_upload import BINARY

NO_NCCL = (
    "weights do not come over NCCL here, which needs torch and a GPU on both sides: write them as a folder in Hugging "
    'Face format inside --weights-root, and post {"weight_dir": FOLDER} or {"update_info": {"path": FOLDER}} to '
    "/update_weights; or post safetensors files to it, as application/octet-stream"
)
BACKENDS = ("disk", "http")
DISK_KEYS = frozenset({"path", "backend"})


async def init_weight_transfer(service: Service, http: HttpRequest) -> Response:
    form = await _form(service, http)
    if form.init_info is None:
        raise ApiError(400, 'init_info is missing: {"backend": "disk"} or {"backend": "http"}', "init_info")
    backend = form.init_info.get("backend")
    if backend not in BACKENDS or form.init_info.keys() - DISK_KEYS:
        raise ApiError(501, NO_NCCL, "init_info", "no_nccl")
    if backend == "disk":
        _root(service)
    return json_response({"message": "Weight transfer initialized"})


async def start_weight_update(service: Service, http: HttpRequest) -> Response:
    """Bodies that follow are parts of one update, which /finish_weight_update makes: whole, or not at all."""
    await _form(service, http)
    await service.upload.begin()
    return json_response({"message": "Weight update started"})


async def update_weights(service: Service, http: HttpRequest) -> Response:
    """Weights of a folder, all or nothing, from the next token on; `in_flight` as LLM.update_params takes it.

    A binary body is a safetensors file under Hugging Face's names: the whole update, or between /start_weight_update
    and /finish_weight_update a part of it.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip() in BINARY:
        return await _uploaded(service, http)
    form = await _form(service, http)
    folder = form.weight_dir if form.weight_dir is not None else _path_of(form.update_info)
    number = await from_disk(service, folder, form.in_flight, form.weight_version)
    return json_response({"message": "Weights updated", "success": True, "version": number})


async def from_disk(service: Service, folder: Any, in_flight: str | None, label: str | None) -> int:
    """The weights of a folder inside the root run from the next token on; returns their version. Raises ApiError."""
    path = _inside(_root(service), folder)
    with _refusals("weight_dir"):
        try:
            number = await service.engine.update_params(path, **_how(in_flight))
        except (ValueError, TypeError, OSError) as error:  # where the root lies is not the client's to know
            raise ValueError(str(error).replace(str(path), str(folder))) from error
    service.weight_label = label
    return number


async def _uploaded(service: Service, http: HttpRequest) -> Response:
    if service.upload.is_in_parts:
        await service.upload.take_part(http)
        return json_response({"message": "Weights received"})
    with _refusals("update_info"):
        number = await service.upload.take_whole(http, **_how(http.query_params.get("in_flight")))
    service.weight_label = http.query_params.get("weight_version")
    return json_response({"message": "Weights updated", "success": True, "version": number})


async def finish_weight_update(service: Service, http: HttpRequest) -> Response:
    """Takes the weights that came in parts; may name those that /update_weights brought, for /weight_info."""
    form = await _form(service, http)
    with _refusals("update_info"):
        number = await service.upload.finish(**_how(form.in_flight))
    if number is not None or form.weight_version is not None:
        service.weight_label = form.weight_version
    more = {} if number is None else {"version": number}
    return json_response({"message": "Weight update finished"} | more)


def _how(in_flight: str | None) -> dict[str, str]:
    return {} if in_flight is None else {"in_flight": in_flight}


@contextlib.contextmanager
def _refusals(param: str) -> Iterator[None]:
    """Weights that are wrong are 400, those that cannot be taken now 409. An OSError is the server's own: 500."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param) from error
    except (RuntimeError, MemoryError) as error:
        raise ApiError(409, str(error)) from error


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
