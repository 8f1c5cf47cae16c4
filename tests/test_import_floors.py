"""Imports point down only, the host half knows no jax, and importing the package touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxengine

ROOT = pathlib.Path(__file__).parent.parent
# Folder or file -> (its floor, the packages that it may not import). A module imports its own folder and lower floors.
FLOORS = {
    "pallas_kernels": (0, ()),
    "pallas_kernels.cpu": (1, ()),
    "sharding": (0, ()),
    "checkpoints": (0, ()),
    "jaxengine.base": (1, ()),
    "jaxengine.distributed": (2, ()),
    "jaxengine.config": (2, ("jax", "numpy")),
    "jaxengine.sampling_params": (2, ("jax", "numpy")),
    "jaxengine.coordinate": (3, ("jax",)),
    "jaxengine.outputs": (4, ("jax",)),
    "jaxengine.text": (5, ("jax", "numpy")),
    "jaxengine.host": (6, ("jax", "numpy")),
    "jaxengine.ops": (7, ()),
    "jaxengine.models": (8, ()),
    "jaxengine.device": (9, ()),
    "jaxengine.engine": (10, ()),
    "jaxengine.rl": (11, ()),
    "jaxengine.contract": (12, ()),
    "jaxengine.llm": (13, ()),
    "jaxengine.functional": (13, ()),
    "jaxengine.async_llm": (14, ()),
    "jaxengine.rl.loops": (14, ()),
    "jaxengine.rl.integrations": (14, ()),
    "jaxengine.rl.calc": (15, ()),
    "jaxengine.server": (16, ()),
    "jaxengine.command": (17, ()),
    "jaxengine.__main__": (18, ()),
}
JAX = {"jax": ("jax", "jaxlib", "jaxtyping", "flax", "optax"), "numpy": ("numpy", "ml_dtypes")}
PACKAGES = ("jaxengine", "pallas_kernels", "sharding", "checkpoints")
FILES = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
JITTED = ("jaxengine.device", "jaxengine.rl")  # where jax.jit may stand


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def home_of(module: str) -> str | None:
    """The line of FLOORS that a module stands on: the longest that begins its name."""
    lines = [line for line in FLOORS if module == line or module.startswith(line + ".")]
    return max(lines, key=len, default=None)


def behind_the_face(name: str) -> str:
    """The module that an import comes from: the package's own __init__ passes other modules' names on."""
    package, _, rest = name.partition(".")
    return f"jaxengine.{jaxengine._HOMES[rest]}" if package == "jaxengine" and rest in jaxengine._HOMES else name


def imports_of(path: pathlib.Path) -> set[str]:
    """Every import of a file: at its top, inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    if module == "jaxengine":
        return  # the face names everything, and imports it when it is asked for
    home = home_of(module)
    assert home is not None, f"{module} stands on no floor: give its folder a line in this test"
    floor, forbidden = FLOORS[home]
    packages = [package for name in forbidden for package in JAX[name]]
    for name in imports_of(path):
        other = home_of(behind_the_face(name))
        points_down = other is None or other == home or FLOORS[other][0] < floor
        assert points_down, f"{module} (floor {floor}) imports {name} (floor {FLOORS[other or ''][0]})"
        assert name.split(".")[0] not in packages, f"{module} imports {name}, and {home} does without"


def test_no_circle():
    """Within a folder too: following imports from a file never leads back to it."""
    modules = {module_of(path): path for path in FILES}
    arrows = {
        module: {behind_the_face(name) for name in imports_of(path)} & modules.keys()
        for module, path in modules.items()
    }
    arrows["jaxengine"] = set()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle of imports: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for other in arrows[module] - {module}:
            visit(other, (*trail, module))
        done.add(module)

    for module in modules:
        visit(module, ())


def test_every_line_is_a_folder_or_a_file():
    homes = {home_of(module_of(path)) for path in FILES}
    assert homes - {None} == FLOORS.keys()


def test_jit_stands_in_few_places():
    modules = [module_of(path) for path in FILES if "jax.jit" in path.read_text()]
    assert [module for module in modules if not module.startswith(JITTED)] == []


def test_import_touches_no_device():
    code = "import jaxengine; jaxengine.SamplingParams(); import jax; assert not jax._src.xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_file_of_the_users_that_hides_ours_is_named(tmp_path):
    (tmp_path / "sharding.py").write_text("mine = 1\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\nimport jaxengine"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1 and "sharding.py, which hides the package of the same name" in found.stderr


def test_a_folder_of_the_users_does_no_harm(tmp_path):
    """Training runs leave a folder `checkpoints` in the working directory; it is no package."""
    (tmp_path / "checkpoints").mkdir()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport jaxengine, checkpoints.key_table"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
