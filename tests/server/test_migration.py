"""The migration guide: its Python runs, in order, and the names it gives are there."""

import pathlib
import re
import runpy

import pytest
from serving import ADMIN, KEY

import jaxengine
from jaxengine import LLM
from jaxengine.base.vllm_names import KEYWORDS, METHODS
from jaxengine.server.app import ROUTES
from jaxengine.server.settings import REASONING_PARSERS, TOOL_PARSERS

GUIDE = pathlib.Path(jaxengine.__file__).parent / "MIGRATION.md"
TEXT = GUIDE.read_text()


def test_its_python_runs(served, tmp_path):
    pytest.importorskip("llguidance")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks))
    found = runpy.run_path(str(script), {"BASE_URL": served.address, "KEY": KEY, "ADMIN_KEY": ADMIN})
    found["client"].close()
    assert len(blocks) == 4 and 0 < len(found["choice"]["token_ids"]) <= 8


def test_its_routes_are_there():
    paths = {line.split()[1] for line in ROUTES}
    named = {path.split("?")[0] for path in re.findall(r"[`\"](/[a-z_/0-9]+)", TEXT)}
    assert named and named <= paths


def test_its_absent_names_are_explained():
    """What it calls another name is a TypeError or an AttributeError that says so."""
    for name in ("block_size", "num_gpu_blocks_override", "num_scheduler_steps", "async_scheduling", "enforce_eager"):
        assert f"`{name}`" in TEXT and name in KEYWORDS["LLM"]
    for name in ("collective_rpc", "load_weights", "reset_prefix_cache"):
        assert name in TEXT and name in METHODS and not hasattr(LLM, name)


def test_its_parsers_are_the_server_s():
    for name in (*TOOL_PARSERS, *REASONING_PARSERS):
        assert name == "auto" or f"{name}`" in TEXT
