"""Steps with arrays of the size of their tile: which sizes there are, which one serves, and that all have the same
bits."""

from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import bits, make_llm, random_model

from jaxengine import SamplingParams
from jaxengine.command.bench import compilations
from jaxengine.config import EngineConfig
from jaxengine.device.needs import Needs
from jaxengine.engine import step_variants
from jaxengine.engine.batch import BatchBuilder
from jaxengine.engine.step_variants import StepVariants, Variant
from jaxengine.ops.kernels import kernels_of
from jaxengine.ops.tiles import GPU_TILES, TPU_TILES, OwnTiles, Tile
from pallas_kernels.implementations import Implementation

KERNELS = kernels_of(Implementation("pallas_gpu", "Hopper"))
MODEL, _ = random_model(num_hidden_layers=1, vocab_size=250)


def sizes(kind: str, capacity: int, tiles: OwnTiles = GPU_TILES) -> list[int]:
    return [tile.blocks for tile in tiles.within(kind, capacity, are_arrays=tiles is GPU_TILES)]


@pytest.mark.parametrize(
    "kind, capacity, expected",
    [
        ("decode", 32, [8, 32]),
        ("decode", 96, [8, 32, 64, 96]),
        ("decode", 256, [8, 32, 64, 128, 256]),
        ("decode", 1024, [8, 32, 64, 128, 256, 512, 1024]),
        ("prefill", 8, [2, 8]),
        ("prefill", 512, [2, 8, 32, 128, 512]),
    ],
)
def test_the_widest_holds_capacity(kind, capacity, expected):
    assert sizes(kind, capacity) == expected


@pytest.mark.parametrize(
    "capacity, expected",
    [
        (32, [8, 32]),
        (128, [8, 128]),
        (256, [8, 128, 256]),
        (384, [8, 128, 384]),
        (640, [8, 128]),
        (1024, [8, 128, 256, 512]),
    ],
)
def test_tiles_of_a_loop_divide_capacity(capacity, expected):
    assert sizes("decode", capacity, TPU_TILES) == expected
    assert sizes("prefill", capacity, TPU_TILES) == [capacity]


class Proving(StepVariants):
    """Of 256 sequences and 8192 tokens a step, where nothing is compiled. `wrong` tiles have other bits."""

    def __init__(self, patience: int, wrong: tuple[int, ...] = ()) -> None:
        engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=8192, compile_patience=patience)
        super().__init__(MODEL, engine, KERNELS, BatchBuilder(engine, fit_the_tile=True))
        self.wrong, self.proofs = wrong, []

    def _prove(self, variant, params, cache):
        self.proofs.append(variant)
        self._proven[variant] = variant.tile.blocks not in self.wrong
        return cache

    def _compile(self, wanted, params, cache):
        """Nothing."""

    def size(self, num_blocks: int, kind: str = "decode", needs: Needs = Needs.PLAIN) -> int:
        """Query blocks of the step that serves."""
        return self.pick(kind, num_blocks, needs, None, None)[1].tile.blocks


def test_the_smallest_that_holds_the_plan_serves():
    variants = Proving(patience=0)
    assert [variants.size(n) for n in (1, 8, 9, 33, 64, 65, 129, 256)] == [8, 8, 32, 64, 64, 128, 256, 256]
    assert [variants.size(n, "prefill") for n in (1, 3, 9, 33, 129, 512)] == [2, 8, 32, 128, 512, 512]


def test_a_step_that_is_too_small_never_serves_however_patient_the_engine_is():
    variants = Proving(patience=2)
    assert variants.size(3) == 8 and variants.proofs == []  # the definition
    assert variants.size(20) == 32  # none that is ready can carry it, so nothing is waited for
    assert variants.size(200) == 256
    assert [variants.size(50) for _ in range(3)] == [256, 256, 64]  # wanted often enough
    assert variants.size(200) == 256 and variants.size(20) == 32


def test_a_step_that_does_more_serves_meanwhile_where_it_holds_the_plan():
    variants = Proving(patience=1)
    assert variants.size(20, needs=Needs.ALL) == 32
    assert variants.pick("decode", 20, Needs.PLAIN, None, None)[1] == Variant("decode", Tile(1, 32), Needs.ALL)
    assert variants.pick("decode", 60, Needs.PLAIN, None, None)[1] == Variant("decode", Tile(1, 64), Needs.PLAIN)
    assert variants.pick("decode", 20, Needs.PLAIN, None, None)[1] == Variant("decode", Tile(1, 32), Needs.PLAIN)


def test_a_wider_one_serves_for_one_of_other_bits_or_none():
    variants = Proving(patience=0, wrong=(32, 64, 256))
    assert [variants.size(n) for n in (8, 20, 64, 100)] == [8, 128, 128, 128]
    with pytest.raises(RuntimeError, match="decode step that holds 129 query blocks gives other bits"):
        variants.size(129)
    assert {variant.tile.blocks for variant in variants.refused} == {32, 64, 256}
    variants.warm_up(None, None)  # nothing is to be compiled in the place of those


def test_how_many_there_are():
    variants = Proving(patience=0)
    variants.warm_up(None, None)
    number = (len(sizes("decode", 256)) + len(sizes("prefill", 512))) * len(Needs)
    assert len(variants._proven) == number == 30  # with the definition, which is proven by itself
    assert [variant.tile.blocks for variant in variants.widest(Needs.ALL)] == [256, 512]


def test_arrays_have_the_size_of_the_tile():
    batch = Proving(patience=0).batch
    assert batch.smallest("decode", Tile(1, 32)).slots.shape == (32,)
    blocks, rows, _ = batch.smallest("prefill", Tile(16, 8))
    assert blocks.starts.shape == (8,) and rows.slots.shape == (8 * 16 + 256,)
    sample = SimpleNamespace(slot=3)
    decodes = [(sample, position, 1) for position in range(9)]
    assert batch.decode(decodes, Tile(1, 32)).slots.tolist() == [3] * 9 + [0] * 23


@pytest.mark.slow  # interpreted
def test_bits_are_those_of_the_definition():
    """Mixed requests in steps of several sizes, each request alone in the smallest; after warm_up nothing is compiled
    again."""
    config, params = random_model(num_hidden_layers=1, vocab_size=250)
    how = dict(max_model_len=128, num_pages=120, max_num_batched_tokens=512, kernels="pallas_gpu_interpret")
    llm = make_llm(config, params, compile_patience=0, **how)
    assert llm.engine.kernels.computes_padding
    with compilations() as names, mock.patch.object(step_variants, "Needs", [Needs.ALL]):
        llm.warm_up()
    found = Counter(name for name in names if "_step" in name)
    assert found == {"jit(decode_step)": 2, "jit(prefill_step)": 3} and not llm.engine.step_variants.refused
    prompts = [[(7 * i + j) % 250 for j in range(length)] for i, length in enumerate((1, 3, 17, 90, 40, 5, 64, 100))]
    prompts += prompts[:4]
    sampling = [SamplingParams(max_tokens=5 + i % 4 * 3, seed=i, top_k=(0, 20)[i % 2], entropy=True) for i in range(12)]
    ran, run = set(), StepVariants._run

    def seen(self, variant, *rest):
        ran.add((variant.kind, variant.tile.blocks))
        return run(self, variant, *rest)

    with mock.patch.object(StepVariants, "_run", seen), compilations() as names:
        together = bits(llm.generate(prompts, sampling))
        assert ran == {("decode", 8), ("decode", 32), ("prefill", 32)}
        ran.clear()
        with llm.engine.adjusted(enable_prefix_caching=False):
            alone = [bits(llm.generate([prompt], own))[0] for prompt, own in zip(prompts, sampling, strict=True)]
        assert ran == {("decode", 8), ("prefill", 2), ("prefill", 8)}
    assert together == alone and not [name for name in names if "_step" in name]
