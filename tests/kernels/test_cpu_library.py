"""The compiled kernels as a file, and on other numbers of threads."""

import logging
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import FAMILIES, SIZES

from jaxengine import LLM
from jaxengine.config import ModelConfig
from jaxengine.ops.kernels import XLA, choose_kernels
from pallas_kernels.cpu import library, seal

BUILT = library.FOLDER / library.FILE
ROOT = pathlib.Path(__file__).parents[2]
is_built = pytest.mark.skipif(not BUILT.exists(), reason=f"{BUILT} was not built: no C++ compiler at install?")


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(library.KernelsMissingError) as found:
        library.load(path)
    assert "take kernels 'xla'" in str(found.value) and str(path) in str(found.value)
    return str(found.value)


def test_one_that_is_not_there(tmp_path):
    assert "were not built" in refusal(tmp_path / "none.so")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library at all" * 100])
def test_one_that_is_no_library(tmp_path, content):
    (tmp_path / "other.so").write_bytes(content)
    assert "damaged, or no file of ours" in refusal(tmp_path / "other.so")


@is_built
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_one_that_is_damaged(tmp_path, damage):
    """A loader would map the cut one, and the process would die at a page that is not there."""
    content = bytearray(BUILT.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    (tmp_path / "damaged.so").write_bytes(content)
    assert "damaged, or no file of ours" in refusal(tmp_path / "damaged.so")


@is_built
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
@pytest.mark.parametrize("body", [name for name in library.BODIES if name != "best"])
def test_that_memory_is_asked_for(body):
    """Compilers take a function that only asks for lines for one without effects, and once dropped all calls of it."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(BUILT)]
    functions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    names = [f.partition(">:")[0] for f in functions if "prefetcht1" in f]
    for takes in "Group", "Ahead":  # of weights and of pages, what comes next
        assert [name for name in names if f"{len(body)}{body}" in name and takes in name], f"{body} asks for no {takes}"


@is_built
def test_one_of_other_sources(tmp_path):
    sources = tmp_path / "sources"
    shutil.copytree(library.FOLDER, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    assert seal.is_of(BUILT, sources)
    with open(sources / "product.h", "a") as file:
        file.write("// another order\n")
    assert not seal.is_of(BUILT, sources)
    other = tmp_path / "other.so"
    shutil.copy(BUILT, other)
    seal.seal(other, sources)
    assert "built from other sources" in refusal(other)


def test_where_there_are_none_a_name_is_refused_and_auto_is_not(monkeypatch, caplog):
    def missing(path=None):
        raise library.KernelsMissingError("the CPU kernels were not built: take kernels 'xla'")

    monkeypatch.setattr(library, "load", missing)
    choose_kernels.cache_clear()  # another test may have had the model's
    with pytest.raises(ValueError, match="were not built: take kernels 'xla'"):
        LLM("calc", kernels="cpu", progress=False)
    config = ModelConfig(**SIZES | FAMILIES["Qwen3"])
    with caplog.at_level(logging.WARNING, "jaxengine"):
        assert choose_kernels.__wrapped__("auto", config) is XLA
    assert len(caplog.records) == 1 and "'xla' in the place of 'cpu'" in caplog.text and "were not built" in caplog.text


# Every op, on as many threads as NPROC says; a context that is long enough to be shared among them.
RUN = """
import hashlib, sys
sys.path[:0] = ["tests/kernels", "tests"]
import numpy as np
from test_cpu_attention import Case as Attention
from test_cpu_product import Case as Product
from pallas_kernels.cpu import calls
digest = hashlib.sha256()
for dtype in ("bfloat16", "float32"):
    for y in Product(dtype, 4, 100, 37).whole.values():
        digest.update(y.tobytes())
found = Attention(lengths=(2300,), heads=1, queries=2, width=16).prefilled()
digest.update(np.stack([found[place] for place in sorted(found)]).tobytes())
logits = np.random.default_rng(0).normal(size=(5, 1024)).astype(np.float32)
for y in calls.draw(logits, np.full((5, 2), 0.4, np.float32), np.full(5, -1, np.int32)):
    digest.update(np.asarray(y).tobytes())
settings = np.full(5, 50, np.int32), np.full(5, 0.7, np.float32), np.full(5, 0.1, np.float32)
digest.update(np.asarray(calls.kept(logits, *settings)))
print(digest.hexdigest())
"""


@is_built
def test_threads_make_no_difference():
    found = set()
    for threads in (1, 2, 4):
        env = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", RUN], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.split()[-1])
    assert len(found) == 1
