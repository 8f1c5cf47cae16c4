"""C9 under Pallas kernels: as many devices as share the leaves, the same bits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.parametrize("degrees", [("1", "2"), ("1", "4")])
def test_devices_share_the_leaves(degrees):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    found = subprocess.run(
        [sys.executable, str(TESTS / "test_contract" / "sharded_engine.py"), *degrees],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    one, more = json.loads(found.stdout)
    assert one == more and all(len(tokens) == 4 for tokens, _ in one)
