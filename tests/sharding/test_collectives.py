"""What devices exchange, read from lines as the TPU's and the GPU's compilers write them."""

import pytest

from sharding.collectives import Collective, collectives_of
from sharding.topology import target_of

LOOP = 'metadata={op_name="jit(step)/shard_map/while/body/all_gather" stack_frame_id=216}'
STRAIGHT = LOOP.replace("while/body/", "")
EIGHT, FOUR = "replica_groups={{0,1,2,3,4,5,6,7}}", "replica_groups={{0,1,2,3}}"
LINES = {
    f"  %a.6 = f32[1,128,8192]{{2,1,0:T(8,128)}} all-gather(%x), channel_id=2, {EIGHT}, dimensions={{2}}, {LOOP}": (
        Collective("all-gather", (1, 128, 8192), 128 * 8192 * 4 * 7 // 8, True)
    ),
    f"  %psum = u32[32,64]{{1,0}} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%region, {STRAIGHT}": (
        Collective("all-reduce", (32, 64), 2 * 32 * 64 * 4 * 3 // 4, False)
    ),
    f"  %s = (bf16[2,64]{{1,0}}, bf16[8,64]{{1,0}}) all-gather-start(%x), {FOUR}, {STRAIGHT}": (
        Collective("all-gather", (8, 64), 8 * 64 * 2 * 3 // 4, False)
    ),
    f"  %e = f32[1,128,8,1024]{{3,1,0,2}} all-to-all(%x), {EIGHT}, dimensions={{2}}, {LOOP}": (
        Collective("all-to-all", (1, 128, 8, 1024), 128 * 8192 * 4 * 7 // 8, True)
    ),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_a_line(line):
    assert collectives_of(line) == (LINES[line],)


def test_the_end_of_an_asynchronous_one_is_not_counted_again():
    assert collectives_of("  %d = f32[8,64]{1,0} all-gather-done(%s), metadata={}") == ()


def test_a_loop_over_tiles_runs_once_a_tile():
    layers = Collective("all-gather", (1, 512, 64), 1, True)
    assert layers.times(rows=512, tiles=16) == 16
    assert layers._replace(in_loop=False).times(rows=512, tiles=16) == 1
    assert layers._replace(shape=(1, 8, 64)).times(rows=512, tiles=16) == 1


@pytest.mark.parametrize("text", ["v5p:2x2x4", "v6e:4x4", "v5e:16x16", "h100:1", "h100:8", "h100:32"])
def test_a_target_is_called_as_it_was_asked_for(text):
    assert str(target_of(text)) == text


@pytest.mark.parametrize(("text", "devices"), [("v5p:2x2x4", 16), ("v5e:16x16", 256), ("h100:8", 8), ("h100:16", 16)])
def test_its_devices_are_counted(text, devices):
    assert target_of(text).num_devices == devices


@pytest.mark.parametrize(
    "text", ["v9:2x2", "v5p", "v5p:2x2", "v6e:2x2x1", "v6e:0x4", "h100", "h100:0", "h100:12", "h100:2x4"]
)
def test_other_topologies_are_refused(text):
    with pytest.raises(ValueError, match=text):
        target_of(text)
