"""How the kernels are built and packed; nothing is compiled here."""

import pathlib
import platform
import tomllib

from setuptools import Distribution, Extension

from pallas_kernels.cpu import library
from pallas_kernels.cpu.build import BuildKernels

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
(EXTENSION,) = SETUPTOOLS["ext-modules"]


def test_the_library_is_built_where_it_is_looked_for():
    assert ROOT / BuildKernels(Distribution()).get_ext_filename(EXTENSION["name"]) == library.FOLDER / library.FILE


def test_every_source_is_compiled_and_packed():
    """A source distribution without a header does not compile, and a library is compared with all that are there."""
    assert sorted(EXTENSION["sources"]) == sorted(str(path.relative_to(ROOT)) for path in library.FOLDER.glob("*.cc"))
    sources = {path for path in library.FOLDER.iterdir() if path.is_file() and path.suffix not in (".py", ".so")}
    packed = (library.FOLDER.parent.glob(pattern) for pattern in SETUPTOOLS["package-data"]["pallas_kernels"])
    assert set().union(*packed) == sources


def test_the_headers_are_the_oldest_jaxlibs():
    """XLA refuses a library with newer headers than its own, and then has no CPU at all."""
    (runs_with,) = (each for each in PYPROJECT["project"]["dependencies"] if each.startswith("jaxlib"))
    _, headers, _ = PYPROJECT["build-system"]["requires"]
    assert headers.partition(";")[0] == runs_with.replace(">=", "==")


def test_another_processor_installs_without(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    extension = Extension(EXTENSION["name"], EXTENSION["sources"], optional=EXTENSION["optional"])
    build = BuildKernels(Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(tmp_path)
    build.ensure_finalized()
    build.run()
    assert "for x86-64, this is aarch64" in caplog.text and not any(tmp_path.rglob("*.so"))
