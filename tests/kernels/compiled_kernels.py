"""Libraries of the kernels that a test compiles for itself, and tests over one in a process of their own."""

import os
import pathlib
import shutil
import subprocess
import sys

import jaxlib
from conftest import CPU_BODIES

from pallas_kernels.cpu import library, seal

ROOT = pathlib.Path(__file__).parents[2]
TILES = pathlib.Path(__file__).with_name("emulated_tiles.h")
EMULATED = "-include", TILES.name  # as flags of the compiler
# The bodies of a library so compiled: AMX's wants AVX-512 for all that is no tile.
EMULATED_BODIES = tuple(
    name for name in library.BODIES if name in CPU_BODIES or (name == "amx" and "avx512" in CPU_BODIES)
)
SOURCES = sorted(path.stem for path in library.FOLDER.glob("*.cc"))
RUN = """
import pathlib, sys
from pallas_kernels.cpu import library
library.FOLDER = pathlib.Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-n", "0", "-x", "-vv", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def copy_sources(folder: pathlib.Path) -> None:
    """The kernels' own, and the emulated tiles."""
    for source in [*library.FOLDER.glob("*.cc"), *library.FOLDER.glob("*.h"), TILES]:
        shutil.copy(source, folder)


def plant(folder: pathlib.Path, file: str, line: str, right: str, wrong: str) -> None:
    """A mistake in the one place of a file that holds `line`: there, what is right becomes what is wrong."""
    text = (folder / file).read_text()
    assert text.count(line) == 1 and right in line
    (folder / file).write_text(text.replace(line, line.replace(right, wrong)))


def compile_sources(folder: pathlib.Path, *names: str, flags: tuple[str, ...]) -> None:
    """Object files of the folder's sources, one compiler at a time: each takes a gigabyte."""
    how = (*seal.FLAGS, "-fPIC", "-w", *flags, f"-I{pathlib.Path(jaxlib.__file__).parent / 'include'}")
    for name in names:
        subprocess.run(["g++", *how, "-c", f"{name}.cc", "-o", f"{name}.o"], cwd=folder, check=True)


def link(folder: pathlib.Path, *flags: str) -> None:
    """The folder's library, of its object files and sealed with its sources."""
    built = folder / library.FILE
    objects = (f"{name}.o" for name in SOURCES)
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", built], cwd=folder, check=True)
    seal.seal(built, folder)


def run_tests(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """pytest with these arguments, over the folder's library."""
    command = [sys.executable, "-c", RUN, str(folder), *arguments]
    env = os.environ | environment | dict(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
