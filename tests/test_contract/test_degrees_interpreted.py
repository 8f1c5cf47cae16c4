"""C9 with interpreted kernels, in a file of its own because a file is one process's, and these take minutes."""

import pytest
from degrees import check, run


@pytest.mark.long
def test_the_gpu_s_chain_gathers_small_sums_and_exchanges_large_ones():
    check(run("pallas_gpu_interpret", "Qwen3", "bfloat16", "8", "1", "4", "4x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "family", "dtype"),
    [
        # XLA compiles what the interpreter makes of a TPU's chain for ten minutes
        pytest.param("pallas_interpret", "Llama", "float32", marks=pytest.mark.long),
        ("pallas_gpu_interpret", "Qwen3", "bfloat16"),
    ],
)
def test_interpreted_devices_share_the_leaves(kernels, family, dtype):
    check(run(kernels, family, dtype, "8", "1", "4"))
