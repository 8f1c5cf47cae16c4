"""How setuptools builds the kernels; pyproject.toml names it. The extension is optional: where nothing compiles it, the
package installs without, and library.py says what is missing.

The headers are jaxlib's own, so jaxlib stands among the build requirements: pip builds in an environment of its own,
which does not see the one that it installs into. It costs an unpacking of a wheel that the install fetches anyway.
"""

import pathlib
import platform
import sys
from typing import Any

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

    def get_export_symbols(self, ext: Any) -> list[str]:
        """None: it is no Python module, ctypes loads it."""
        return []
