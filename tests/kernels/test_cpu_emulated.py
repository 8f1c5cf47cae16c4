"""The AMX body where no processor has AMX: the kernels' tests over a library whose tile instructions are C++.

And that the library offers no body whose instructions give other bits than AVX2's.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest
from compiled_kernels import (
    EMULATED,
    EMULATED_BODIES,
    ROOT,
    SOURCES,
    TILES,
    compile_sources,
    copy_sources,
    link,
    plant,
    run_tests,
)

pytestmark = [
    pytest.mark.slow,  # compiles all kernels
    pytest.mark.skipif(shutil.which("g++") is None, reason="wants g++"),
    pytest.mark.skipif(
        "amx" not in EMULATED_BODIES, reason="wants AVX-512, which the AMX body computes all but tiles with"
    ),
]
LOAD = """
import logging, pathlib, sys
from pallas_kernels.cpu import library
logging.basicConfig()
library.FOLDER = pathlib.Path(sys.argv[1])
print(*library.load())
"""


def load(folder: pathlib.Path) -> tuple[list[str], str]:
    """The bodies that a folder's library offers, and what is logged about it."""
    done = subprocess.run([sys.executable, "-c", LOAD, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("emulated")
    copy_sources(folder)
    compile_sources(folder, *SOURCES, flags=EMULATED)
    link(folder)
    return folder


def test_the_amx_body_has_the_same_bits(emulated):
    """Where a test names no body, as the one against float64, the last one runs."""
    offered, logged = load(emulated)
    assert offered == [*EMULATED_BODIES] and "do without" not in logged
    tests = (f"tests/kernels/test_cpu_{name}.py" for name in ("product", "attention", "attention_order"))
    done = run_tests(emulated, *tests, "-k", "amx or float64 or order")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-5000:]


ONE_CHAIN = TILES.name, "chains[n][parity] = std::fma(a, b, chains[n][parity])", "[parity]", "[0]"
RUNNING = TILES.name, "total[n] += chains[n][0] + chains[n][1]", "+= chains", "= total[n] + chains"
SUBNORMALS = TILES.name, "_mm_setcsr(0x1f80 | 0x8000 | 0x0040)", " | 0x0040", ""
SWAPPED = "dots.h", "_mm512_set4_epi32(0x0b0a0f0e, 0x09080d0c, 0x03020706, 0x01000504)", "0b0a0f0e", "0f0e0b0a"


@pytest.mark.parametrize(
    "body, mistake",
    [
        pytest.param("amx", ONE_CHAIN, id="even and odd members in one chain"),
        pytest.param("amx", RUNNING, id="each added to the running sum"),
        pytest.param("amx", SUBNORMALS, id="subnormals that are read"),
        pytest.param("avx512_bf16", SWAPPED, id="the later input of two first"),
    ],
)
def test_a_body_of_other_bits_is_left_out(emulated, tmp_path, body, mistake):
    if body not in EMULATED_BODIES:
        pytest.skip(f"this processor has no {body}")
    shutil.copytree(emulated, tmp_path, dirs_exist_ok=True)
    plant(tmp_path, *mistake)
    compile_sources(tmp_path, f"body_{body}", flags=EMULATED)
    link(tmp_path)
    offered, logged = load(tmp_path)
    assert offered == [name for name in EMULATED_BODIES if name != body]
    assert logged.count("do without") == 1 and f"do without {body}" in logged
