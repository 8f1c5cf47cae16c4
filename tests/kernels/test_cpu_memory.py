"""Pages and weights in huge pages: the same numbers, at the same addresses, in other memory."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NATIVE

from jaxengine.ops.cpu_chain import MEMORY, SOME_HUGE_PAGES
from pallas_kernels.cpu import library

pytestmark = NATIVE
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAY_ASK = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system gives no huge pages to who asks"
)
SHAPE = jax.ShapeDtypeStruct((16, SOME_HUGE_PAGES // 4), np.float32)


def huge_bytes(x: jax.Array) -> int:
    """Of the array, in huge pages."""
    address, found = x.unsafe_buffer_pointer(), 0
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(each, 16) for each in area.groups())
            inside = first < address + x.nbytes and address < end
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


@MAY_ASK
def test_a_cache_begins_as_zeros_in_huge_pages():
    x = MEMORY.zeros(SHAPE)
    assert x.shape == SHAPE.shape and x.dtype == SHAPE.dtype and not np.asarray(x).any()
    assert huge_bytes(x) >= x.nbytes / 2


def test_a_small_cache_is_as_jax_makes_it():
    home = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    for shape in (jax.ShapeDtypeStruct((3, 5), np.uint16, sharding=home), SHAPE.update(sharding=home)):
        x = MEMORY.zeros(shape)
        assert x.sharding == home and x.committed and not np.asarray(x).any()


@MAY_ASK
def test_weights_move_with_their_numbers():
    weights = [jax.random.normal(jax.random.key(0), SHAPE.shape), jnp.arange(5)]
    expected, place = np.array(weights[0]), weights[0].unsafe_buffer_pointer()
    library.into_huge_pages([(place, weights[0].nbytes)]).join()
    assert weights[0].unsafe_buffer_pointer() == place and np.array_equal(weights[0], expected)
    if huge_bytes(weights[0]) == 0:
        pytest.skip("this Linux does not move memory into huge pages on demand")


def test_memory_that_is_nobodys_does_no_harm():
    """Weights may be freed while the thread is on its way to them."""
    library.into_huge_pages([(1 << 45, 64 << 20), (0, 0)]).join()
