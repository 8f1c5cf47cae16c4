"""Weights that come over HTTP: safetensors files as bodies, kept on disk until all are there."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from starlette.requests import Request as HttpRequest

from checkpoints.tensor_file import read_tensors
from jaxengine.async_llm import AsyncLLM
from jaxengine.server.errors import ApiError

BINARY = ("application/octet-stream", "application/safetensors", "application/vnd.safetensors")


class WeightUpload:
    """The files of one update. Nothing of them is read before the last one is there, and they are taken whole."""

    def __init__(self, engine: AsyncLLM, root: Path | None) -> None:
        """`root` is the folder that the files are kept in; None is the system's own for what is temporary."""
        self._engine, self._root, self._lock = engine, root, asyncio.Lock()
        self._folder: Path | None = None
        self._num_bytes = 0

    @property
    def has_begun(self) -> bool:
        return self._folder is not None

    @property
    def has_files(self) -> bool:
        return self._num_bytes > 0

    def begin(self) -> None:
        """An update of several files; what an earlier one left goes."""
        self.drop()
        self._folder = Path(tempfile.mkdtemp(prefix=".weights-", dir=self._root))

    def drop(self) -> None:
        """Forget the files. Idempotent."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._num_bytes = None, 0

    async def take(self, http: HttpRequest) -> None:
        """One body as a file. Raises ApiError for more bytes than twice the model's, and while another one comes."""
        if self._lock.locked():
            raise ApiError(409, "another body of weights is being read")
        async with self._lock:
            if self._folder is None:
                self.begin()
            assert self._folder is not None
            path = self._folder / f"{len(list(self._folder.iterdir())):05d}.safetensors"
            most = self._most_bytes()
            with path.open("xb") as file:
                async for chunk in http.stream():
                    self._num_bytes += len(chunk)
                    if self._num_bytes > most:
                        self.drop()
                        raise ApiError(413, f"more than {most} bytes of weights, which is twice the model's")
                    file.write(chunk)

    async def apply(self, **how: Any) -> int:
        """The files' weights from the next token on, all or nothing; returns their version. The files go."""
        async with self._lock:
            assert self._folder is not None
            try:
                return await self._engine.update_params(_pairs(self._folder), **how)
            finally:
                self.drop()

    def _most_bytes(self) -> int:
        """float32 for weights in bfloat16, and room for names."""
        return 2**20 + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(self._engine.llm.params))


def _pairs(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, array) of every file, of which one is in memory at a time. Errors name no path of the server."""
    for path in sorted(folder.iterdir()):
        try:
            tensors, _ = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"body {int(path.stem) + 1} is truncated, corrupt or no safetensors file") from error
        yield from tensors.items()
