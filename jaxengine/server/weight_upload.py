"""Weights that come over HTTP: safetensors files as bodies, kept on disk until all are there."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from checkpoints.safetensors_files import TensorFolder
from checkpoints.safetensors_header import read_header
from jaxengine.async_llm import AsyncLLM
from jaxengine.engine.memory import size_on_one
from jaxengine.models.params import abstract
from jaxengine.server.errors import ApiError

BINARY = ("application/octet-stream", "application/safetensors", "application/vnd.safetensors")


class WeightUpload:
    """The files of one update. Nothing of them is read before the last one is there, and they are taken whole.

    Every method raises ApiError while another one is at work.
    """

    def __init__(self, engine: AsyncLLM, root: Path | None) -> None:
        """`root` is the folder that the files are kept in; None is the system's own for what is temporary."""
        self._engine, self._root, self._lock = engine, root, asyncio.Lock()
        self._parts: Path | None = None  # the folder of an update in parts, while one is under way

    @property
    def is_in_parts(self) -> bool:
        """Whether bodies that come are parts of one update."""
        return self._parts is not None

    async def begin(self) -> None:
        """An update in parts; what an earlier one left goes."""
        async with self._alone():
            self.drop()
            self._parts = self._new_folder()

    async def take_part(self, http: HttpRequest) -> None:
        """One body more of the update that has begun."""
        async with self._alone():
            assert self._parts is not None
            await self._receive(http, self._parts)

    async def finish(self, **how: Any) -> int | None:
        """The parts' weights from the next token on, all or nothing; returns their version. Without parts it is None.
        The files go.
        """
        async with self._alone():
            try:
                if self._parts is None or not any(self._parts.iterdir()):
                    return None
                return await self._engine.update_params(_pairs(self._parts), **how)
            finally:
                self.drop()

    async def take_whole(self, http: HttpRequest, **how: Any) -> int:
        """The weights of one body, as `finish` takes those of its parts."""
        async with self._alone():
            folder = self._new_folder()
            try:
                await self._receive(http, folder)
                return await self._engine.update_params(_pairs(folder), **how)
            finally:
                _remove(folder)

    def drop(self) -> None:
        """Forget the parts of an update that is not finished. Idempotent."""
        if self._parts is not None:
            _remove(self._parts)
        self._parts = None

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._lock.locked():
            raise ApiError(409, "another update of the weights is being read or made")
        async with self._lock:
            yield

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=".weights-", dir=self._root))

    async def _receive(self, http: HttpRequest, folder: Path) -> None:
        """One body as the folder's next file, whole or not at all. Raises ApiError where the folder would hold more
        bytes than twice the model's.
        """
        sizes = [path.stat().st_size for path in folder.iterdir()]
        path, num_bytes, most = folder / f"{len(sizes):05d}.safetensors", sum(sizes), self._most_bytes()
        try:
            with path.open("xb") as file:
                async for chunk in http.stream():
                    num_bytes += len(chunk)
                    if num_bytes > most:
                        raise ApiError(413, f"more than {most} bytes of weights, which is twice the model's")
                    file.write(chunk)
        except BaseException:  # the client left, or the server ends
            path.unlink()
            raise

    def _most_bytes(self) -> int:
        """float32 for weights in bfloat16, and room for names. The weights themselves may be asleep."""
        return 2**20 + 2 * size_on_one(abstract(self._engine.llm.config))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _pairs(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, array) of every file, each mapped into memory. Errors name no path of the server."""
    for path in sorted(folder.iterdir()):
        try:
            header = read_header(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), f"body {int(path.stem) + 1}")) from error
        with TensorFolder(folder, [header]) as tensors:
            for name in tensors.names:
                yield name, tensors.read(name)
