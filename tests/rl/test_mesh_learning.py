"""A GRPO run has the same bits wherever its trainer and its sampler lie."""

import pytest
from conftest import run_script


def run(*arguments: str) -> list[list[dict]]:
    return run_script("rl/mesh_learning.py", *arguments)


@pytest.mark.slow
def test_a_run_has_one_devices_curve_on_a_mesh():
    """The trainer on eight devices, the sampler on two replicas of four: other degrees, so weights travel each time.
    And both on the replicas.
    """
    one = run("1x1", "1x1")[0]
    assert one == run("1x8", "2x4")[0] == run("2x4", "2x4")[0]
    for iteration in one:
        first = iteration["updates"][0]
        assert (first["ratio_mean"], first["ratio_max"], first["max_delta"]) == (1.0, 1.0, 0.0)
    assert one[-1]["reward"] > one[0]["reward"] + 0.3
    assert len({iteration["state"] for iteration in one}) == len(one)
