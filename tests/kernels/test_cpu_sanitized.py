"""The kernels' tests over a library that watches every access (gcc's address and undefined-behaviour sanitizers).

What a tile instruction touches nobody would see, so those are emulated.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest
from compiled_kernels import EMULATED, EMULATED_BODIES, SOURCES, compile_sources, copy_sources, link, plant, run_tests
from conftest import NATIVE

pytestmark = [
    NATIVE,
    pytest.mark.long,  # compiles all kernels, and runs their tests many times slower
    pytest.mark.skipif(shutil.which("g++") is None, reason="wants g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is Linux's"),
]
WATCHED = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
FLAGS = "-O1", "-g1", "-fno-omit-frame-pointer", *WATCHED, *EMULATED
TESTS = "attention", "attention_order", "product", "draw", "truncation", "sample", "adversarial", "arguments"


def run(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Tests over the folder's library. Leaks are not looked for: Python and jaxlib keep what they have to the end."""
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    watched = dict(
        LD_PRELOAD=" ".join(map(str.strip, found)), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1"
    )
    return run_tests(folder, *arguments, **watched)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("watched")
    copy_sources(folder)
    compile_sources(folder, *SOURCES, flags=FLAGS)
    link(folder, *WATCHED)
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
    "a tile of weights after the end": (
        "tiles.h",
        "if (group.count == WIDTH && inputs - k >= DEPTH)",
        "group.count == WIDTH && ",
        "",
    ),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_overrun_is_seen(watched, tmp_path, name):
    widest = EMULATED_BODIES[-1]  # the one that runs where a test names none
    if "tile" in name and widest != "amx":
        pytest.skip("wants AVX-512, which the AMX body computes all but tiles with")
    shutil.copytree(watched, tmp_path, dirs_exist_ok=True)
    plant(tmp_path, *PLANTED[name])
    compile_sources(tmp_path, f"body_{widest}", flags=FLAGS)
    link(tmp_path, *WATCHED)
    tests = "tests/kernels/test_cpu_draw.py", "tests/kernels/test_cpu_product.py"
    done = run(tmp_path, *tests, "-k", f"{widest} or embedding")
    assert done.returncode and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
