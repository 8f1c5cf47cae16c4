"""How setuptools builds the kernels and their wheel; pyproject.toml names both. The extension is optional: where
nothing compiles it, the package installs without, and library.py says what is missing.

Python never sees the library, because ctypes loads it and only XLA calls it, so one library and one wheel serve every
version of Python.

The headers are jaxlib's own, so jaxlib stands among the build requirements: pip builds in an environment of its own,
which does not see the one that it installs into. It is the oldest that the package runs with, because XLA takes
what was compiled with its own headers or older ones, and starts no CPU where a library has newer ones.
"""

import pathlib
import platform
import sys
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # setuptools loads this file by its path
from pallas_kernels.cpu.seal import FLAGS, seal


class BuildKernels(build_ext):
    """Compiles with jaxlib's headers, and seals what was built. Only setuptools' own errors leave the extension out."""

    def build_extension(self, ext: Any) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise PlatformError(f"the CPU kernels are for x86-64, this is {platform.machine()}")
        import jaxlib

        ext.include_dirs = [str(pathlib.Path(jaxlib.__file__).parent / "include")]
        ext.extra_compile_args = list(FLAGS)
        super().build_extension(ext)
        seal(pathlib.Path(self.get_ext_fullpath(ext.name)), pathlib.Path(ext.sources[0]).parent)

    def get_ext_filename(self, fullname: str) -> str:
        """library.FILE in the extension's folder, where a module's name would end in the version of Python."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Any) -> list[str]:
        """None: it is no Python module."""
        return []


class WheelOfAnyPython(bdist_wheel):
    """Tagged for the platform alone, as "py3-none-linux_x86_64"."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag
