"""Where a process finds its place among those of its job."""

import pytest

from sharding.distributed import Place, found_place

JOB = {"JAX_COORDINATOR_ADDRESS": "host-0:8476", "JAX_NUM_PROCESSES": "4"}
RAY = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    "environ, place",
    [
        (JOB | {"JAX_PROCESS_ID": "3"}, Place("host-0:8476", 4, 3)),
        (JOB | {"JOB_COMPLETION_INDEX": "2"}, Place("host-0:8476", 4, 2)),
        (JOB | {"JAX_PROCESS_ID": "0", "JOB_COMPLETION_INDEX": "2"}, Place("host-0:8476", 4, 0)),
        (RAY, Place("10.0.0.1:29500", 2, 1)),
        ({"JOB_COMPLETION_INDEX": "2"}, Place()),  # a line that is not whole tells nothing
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Place()),  # JAX reads those
    ],
)
def test_place_of_an_environment(environ, place):
    assert found_place(environ) == place


def test_a_number_that_is_none_is_named():
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'first'"):
        found_place(RAY | {"RANK": "first"})
