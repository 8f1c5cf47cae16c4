"""The kernels' tests over a library that watches every access (gcc's address and undefined-behaviour sanitizers)."""

import os
import pathlib
import shutil
import subprocess
import sys

import jaxlib
import pytest
from conftest import CPU_BODIES, NATIVE

from pallas_kernels.cpu import library, seal

pytestmark = [
    NATIVE,
    pytest.mark.long,  # compiles all kernels, and runs their tests many times slower
    pytest.mark.skipif(shutil.which("g++") is None, reason="wants g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is Linux's"),
]
SOURCES = sorted(path.stem for path in library.FOLDER.glob("*.cc"))
WATCHED = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
HOW = *seal.FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", "-fPIC", *WATCHED
TESTS = "attention", "product", "draw", "truncation", "adversarial", "arguments"
ROOT = pathlib.Path(__file__).parents[2]
RUN = """
import pathlib, sys
from pallas_kernels.cpu import library
library.FOLDER = pathlib.Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-n", "0", "-x", "-vv", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def compiled(folder: pathlib.Path, *names: str) -> None:
    """Object files of the folder's sources, one compiler at a time: each takes a gigabyte."""
    include = f"-I{pathlib.Path(jaxlib.__file__).parent / 'include'}"
    for name in names:
        subprocess.run(["g++", *HOW, include, "-w", "-c", f"{name}.cc", "-o", f"{name}.o"], cwd=folder, check=True)


def linked(folder: pathlib.Path) -> None:
    built = folder / library.FILE
    subprocess.run(
        ["g++", "-shared", *WATCHED, *(f"{name}.o" for name in SOURCES), "-o", built], cwd=folder, check=True
    )
    seal.seal(built, folder)


def run(folder: pathlib.Path, *tests: str) -> subprocess.CompletedProcess:
    """Tests over the folder's library. Leaks are not looked for: Python and jaxlib keep what they have to the end."""
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    watched = dict(
        LD_PRELOAD=" ".join(map(str.strip, found)), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1"
    )
    command = [sys.executable, "-c", RUN, str(folder), *tests]
    env = os.environ | watched | dict(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("watched")
    for source in [*library.FOLDER.glob("*.cc"), *library.FOLDER.glob("*.h")]:
        shutil.copy(source, folder)
    compiled(folder, *SOURCES)
    linked(folder)
    return folder


@pytest.mark.timeout(1800)
def test_every_access_is_inside(watched):
    done = run(watched, *(f"tests/kernels/test_cpu_{name}.py" for name in TESTS))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-5000:]


PLANTED = {
    "a read after the end": (
        "draw.h",
        "for (int64_t i = 16; i < d.vocabulary; i += 16) top",
        "i < d.vocabulary",
        "i <= d.vocabulary",
    ),
    "a write after the end": ("embed.h", "(e.zeros_to - e.live) * e.width", "e.live)", "e.live + 1)"),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_overrun_is_seen(watched, tmp_path, name):
    file, line, right, wrong = PLANTED[name]
    shutil.copytree(watched, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert text.count(line) == 1
    (tmp_path / file).write_text(text.replace(line, line.replace(right, wrong)))
    widest = CPU_BODIES[-1]  # the one that runs where a test names none
    compiled(tmp_path, f"body_{widest}")
    linked(tmp_path)
    tests = "tests/kernels/test_cpu_draw.py", "tests/kernels/test_cpu_product.py"
    done = run(tmp_path, *tests, "-k", f"{widest} or embedding")
    assert done.returncode and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
