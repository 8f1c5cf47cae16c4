"""Reading what a GPU's compiled program starts."""

import pytest

from sharding.gpu_program import parse, read

LISTING = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | next=002 (1)] chain_embed grid: [64, 1, 1]
    002: kCustomKernel [prev=001 (1) | next=005 (1)] chain_settle__1 grid: [64, 1, 1]  shared_memory: 4096 bytes
    005: kConditional  [prev=002 (1) | next=006 (1)]
      false_branch:
        003: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      true_branch:
        004: kCopy [source | sink] copy
    006: kCustomKernel [prev=005 (1) | sink] draw grid: [1, 1, 1]
007: kWhile [prev=000 (1) | next=009 (1)]
  body:
    008: kCustomKernel [source | sink] chain_gated grid: [1, 1, 1]
009: kCopy [prev=007 (1) | sink] copy
"""


def test_what_is_started():
    program = parse(LISTING)
    assert program.pieces == 3 and program.steered == program.conditionals == 1
    assert program.straight == ("chain_embed", "chain_settle", "draw", "copy") and program.launches == 7
    assert [(thunk.symbol, thunk.shared) for thunk in program.thunks[1:3]] == [
        ("chain_embed", 0),
        ("chain_settle__1", 4096),
    ]
    assert str(program).startswith("3 pieces, 1 steered by the host, 1 conditionals, 4 kernels in a row")


def test_a_collective_is_started_once():
    lines = (
        "000: kAsyncStart [source | next=002 (1)] stream=communication_stream[0],",
        "    001: kAllGather [source | sink]",
        "002: kAsyncDone [prev=000 (1) | sink] async_id=37",
    )
    program = parse("\n".join(lines))
    assert program.launches == 1 and program.straight == ("kAllGather",)


def test_the_last_state_that_was_written_counts(tmp_path):
    """XLA writes the second file where its last passes changed something."""
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text("001: kCopy [source | sink] copy\n")
    assert read(str(tmp_path)).straight == ("copy",)
    (tmp_path / "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt").write_text(LISTING)
    assert read(str(tmp_path)) == parse(LISTING)


def test_a_folder_without_a_program(tmp_path):
    with pytest.raises(FileNotFoundError, match="XLA wrote about no GPU program"):
        read(str(tmp_path))
