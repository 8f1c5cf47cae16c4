"""The compiled kernels: found beside this file, checked before they are loaded, made known to XLA once."""

import ctypes
import functools
import logging
import pathlib
import platform
import threading

import jax

from pallas_kernels.cpu import seal

FOLDER = pathlib.Path(__file__).parent
FILE = "_kernels.so"  # as build.py names it
OPS = ("product", "embed", "heads", "attend", "draw", "kept", "sample", "zeros")
OTHER_BITS = 16  # jaxengine_bodies() in bodies.cc
BODIES = {"best": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx": 4}  # BodyName in ops.h
log = logging.getLogger("jaxengine")
REBUILD = "run `pip install .` (or `pip install -e .`) again with a C++ compiler, or take kernels 'xla'"


class KernelsMissingError(ValueError):
    """The CPU's kernels cannot be used here, and why."""


@functools.cache
def load(path: pathlib.Path | None = None) -> tuple[str, ...]:
    """Load and register the kernels; the bodies that this processor has, narrowest first. Once a process.

    A body is left out, and that is logged, where its products have not AVX2's bits on this processor.

    `path` is for tests. Raises KernelsMissingError where there is no library, where it is damaged or not made of these
    sources, and where the processor has not even AVX2.
    """
    path = path or FOLDER / FILE
    check_file(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissingError(f"the CPU kernels at {path} do not load ({error}): {REBUILD}") from error
    found = library.jaxengine_bodies()
    bodies = tuple(name for name, number in BODIES.items() if found >> number & 1)
    for name, number in BODIES.items():
        if found >> OTHER_BITS + number & 1:
            log.warning("the CPU kernels do without %s: its products have other bits here than AVX2's", name)
    if not bodies:
        raise KernelsMissingError("the CPU kernels want a processor with AVX2, FMA and F16C: take kernels 'xla'")
    for op in OPS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxengine_{op}"))
        jax.ffi.register_ffi_target(f"jaxengine_{op}", handler, platform="cpu")
    return bodies


def into_huge_pages(memory: list[tuple[int, int]]) -> threading.Thread:
    """Move memory, (address, bytes) pairs, into huge pages where the system has some: by the thread returned."""
    load()
    move = ctypes.CDLL(str(FOLDER / FILE)).jaxengine_into_huge_pages
    move.argtypes, move.restype = (ctypes.c_void_p, ctypes.c_size_t), None

    def move_all() -> None:
        for address, size in memory:
            move(address, size)

    thread = threading.Thread(target=move_all, name="jaxengine-huge-pages", daemon=True)
    thread.start()
    return thread


def check_file(path: pathlib.Path) -> None:
    """Raises KernelsMissingError for a file that is not there, not whole, or of other sources.

    A loader would map a damaged file and the process would die of it, so bytes are compared before.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise KernelsMissingError(f"the CPU kernels are for x86-64, this is {platform.machine()}: take kernels 'xla'")
    if not path.is_file():
        raise KernelsMissingError(f"the CPU kernels were not built ({path} is not there): {REBUILD}")
    if not seal.is_whole(path):
        raise KernelsMissingError(f"the CPU kernels at {path} are damaged, or no file of ours: {REBUILD}")
    if not seal.is_of(path, FOLDER):
        raise KernelsMissingError(f"the CPU kernels at {path} were built from other sources: {REBUILD}")
