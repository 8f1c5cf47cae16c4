"""Imports point down only, the host half knows no jax, and importing the package touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxengine

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up; a module may import its own floor and those below.
FLOORS = [
    ["pallas_kernels", "sharding", "checkpoints"],
    [
        "jaxengine.base.arguments",
        "jaxengine.base.arguments",
        "jaxengine.base.pytree",
        "jaxengine.config",
        "jaxengine.sampling_params",
        "jaxengine.outputs",
        "jaxengine.coordinate",
        "jaxengine.device.step_inputs",
        "jaxengine.base.keys",
        "jaxengine.base.machine",
    ],
    [
        "jaxengine.ops",
        "jaxengine.device.sampler",
        "jaxengine.device.kv_cache",
        "jaxengine.text.tokenizer",
        "jaxengine.text.detokenizer",
        "jaxengine.text.chat_template",
        "jaxengine.text.template_code",
        "jaxengine.text.control_tokens",
        "jaxengine.text.chat_messages",
        "jaxengine.base.progress",
    ],
    ["jaxengine.models"],
    [
        "jaxengine.host.sample",
        "jaxengine.host.page_pool",
        "jaxengine.host.scheduler",
        "jaxengine.device.sampling_arrays",
        "jaxengine.contract.compare",
        "jaxengine.engine.to_outputs",
        "jaxengine.host.admission",
        "jaxengine.engine.collect",
    ],
    [
        "jaxengine.engine.batch",
        "jaxengine.device.steps",
        "jaxengine.engine.step_variants",
        "jaxengine.engine.memory",
        "jaxengine.engine.page_checksums",
        "jaxengine.contract",
    ],
    ["jaxengine.engine.weights", "jaxengine.engine"],
    ["jaxengine.engine.runner"],
    [
        "jaxengine.device.trunk",
        "jaxengine.device.scoring",
        "jaxengine.rl.calc.arithmetic",
        "jaxengine.rl.calc.train",
        "jaxengine.rl.rollout",
        "jaxengine.rl.rewards.bounded",
        "jaxengine.rl.rewards.reward_worker",
        "jaxengine.rl.rewards.isolation",
        "jaxengine.rl.rewards.reward_functions",
        "jaxengine.rl.rewards.math_reward",
        "jaxengine.rl.rewards.program_supervisor",
        "jaxengine.rl.rewards.program_check",
        "jaxengine.rl.rewards",
        "jaxengine.rl.loops.calculator",
        "jaxengine.rl.loops.tools",
        "jaxengine.rl.advantages",
        "jaxengine.rl.losses",
        "jaxengine.rl.metrics",
        "jaxengine.rl.critic",
        "jaxengine.rl.trainer",
    ],
    [
        "jaxengine.contract.report",
        "jaxengine.contract.verify",
        "jaxengine.llm",
        "jaxengine.functional",
        "jaxengine.rl.integrations.nnx_policy",
        "jaxengine.rl.integrations.tunix_rollout",
        "jaxengine.rl.loops.loop",
        "jaxengine.rl.calc.learn",
    ],
    [
        "jaxengine.command.demo",
        "jaxengine.command.records",
        "jaxengine.command.workloads",
        "jaxengine.command.peer",
        "jaxengine.command.bench_models",
        "jaxengine.command.bench",
        "jaxengine.command.options",
        "jaxengine.command.commands",
        "jaxengine.command.parser",
        "jaxengine.command.main",
        "jaxengine.__main__",
    ],
]
HOST_HALF = ["keywords", "values", "request", "sequence", "block_manager", "scheduler"]
FILES = [
    p
    for folder in ("jaxengine", "pallas_kernels", "sharding", "checkpoints")
    for p in sorted((ROOT / folder).rglob("*.py"))
]


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int | None:
    found = [
        (len(name), level)
        for level, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def home_of(name: str) -> str:
    """The module that an import comes from: the face passes other modules' names on."""
    package, _, rest = name.partition(".")
    return f"jaxengine.{jaxengine._HOMES[rest]}" if package == "jaxengine" and rest in jaxengine._HOMES else name


def imports_of(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    own = floor_of(module)
    if module in ("jaxengine", "jaxengine.rl"):
        return  # the face names everything, lazily
    assert own is not None, f"{module} stands on no floor: put it on one in this test"
    for name in imports_of(path):
        other = floor_of(home_of(name))
        assert other is None or other <= own, f"{module} (floor {own}) imports {name} (floor {other})"


@pytest.mark.parametrize("name", HOST_HALF)
def test_the_host_half_knows_no_jax(name):
    imports = imports_of(ROOT / "jaxengine" / f"{name}.py")
    assert not any(module.split(".")[0] in ("jax", "jaxlib", "numpy") for module in imports)


def test_jit_stands_in_one_place():
    inside = [module_of(p) for p in FILES if "jax.jit" in p.read_text() and not module_of(p).startswith("jaxengine.rl")]
    assert inside == ["jaxengine.device.steps"]


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
