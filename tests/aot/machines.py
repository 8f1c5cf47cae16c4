"""The machines that programs are compiled for where there is none of them: fixtures of the tests beside this file.

Run in environments of their own: `pytest -m aot -k tpu` with jax[tpu], `-k gpu` with jax[cuda13]
(sharding/topology.py says what it needs).
"""

from collections.abc import Callable

import pytest
from jax.sharding import Mesh

from pallas_kernels.implementations import Implementation, choose
from sharding.topology import TARGETS, Compiled, mesh_of, missing

NAMES = {name: f"{'tpu' if target.platform == 'tpu' else 'gpu'}-{name}" for name, target in TARGETS.items()}


@pytest.fixture(scope="module", params=TARGETS, ids=NAMES.get)
def target(request) -> str:
    reason = missing(TARGETS[request.param])
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def mesh(target) -> Mesh:
    return mesh_of(TARGETS[target])


@pytest.fixture(scope="module")
def kernels(target, mesh) -> Implementation:
    """The target's own implementation."""
    name = "pallas_gpu" if TARGETS[target].platform == "cuda" else "pallas_tpu"
    return choose(name, mesh.devices.flat[0].device_kind)


@pytest.fixture
def report(target, request, capsys) -> Callable[[Compiled], Compiled]:
    """Prints what a compiled program takes, past pytest's capture, and returns it."""

    def show(compiled: Compiled) -> Compiled:
        with capsys.disabled():
            print(f"\n{target} {request.node.name}: {compiled}", end="")
        return compiled

    return show
