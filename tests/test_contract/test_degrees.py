"""C9: as many devices as share the leaves, the same bits, in generation, scoring and gradients."""

import pytest
from degrees import check, run


@pytest.mark.slow
def test_devices_share_the_leaves():
    """Two replicas of two devices that exchange their sums' columns; and eight devices, given weights that lie in
    another way than the mesh has them.
    """
    check(run("cpu", "Qwen3", "bfloat16", "8", "1", "4dx", "8f"))


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["xla", "cpu", "pallas_interpret"])
@pytest.mark.parametrize(
    ("family", "dtype", "heads"),  # of the leaves' own, or two that have copies
    [
        ("Llama", "float32", ""),
        ("Qwen2", "bfloat16", ""),
        ("Qwen3", "bfloat16", ""),
        ("Qwen3Moe", "bfloat16", ""),
        ("Qwen2", "float32", "of2"),
        ("Qwen2", "bfloat16", "of2"),
        ("Qwen3", "bfloat16", "of2"),
    ],
)
def test_every_degree(kernels, family, dtype, heads):
    by_xla = kernels == "xla" or (kernels == "cpu" and family == "Qwen3Moe")
    leaves = "16" if by_xla and dtype != "float32" else "8"  # ops/kernels.checked_for
    check(run(kernels, family, dtype, leaves + heads, "1", "2", "4", "8", "8x"))


@pytest.mark.long
@pytest.mark.parametrize(("family", "dtype"), [("Llama", "float32"), ("Qwen2", "bfloat16")])
def test_replicas_of_shared_models(family, dtype):
    """Two of four devices, and four of two."""
    check(run("cpu", family, dtype, "8", "1", "8d", "8q"))


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "dtype"), [("xla", "float32"), ("cpu", "bfloat16")])
def test_devices_share_every_expert(kernels, dtype):
    check(run(kernels, "Qwen3Moe", dtype, "8", "1", "2"))


@pytest.mark.slow
def test_sums_in_the_runtimes_order_are_refused():
    found = run("cpu", "Llama", "float32", "8", "8p")
    assert "give other bits than one" in found["8p"]["refused"]


@pytest.mark.slow
def test_devices_share_copies_of_fewer_heads():
    """Two key-value heads, held four times each: by one device, by two that have each a head, by eight."""
    check(run("cpu", "Qwen2", "bfloat16", "8of2", "1", "2", "8"))
