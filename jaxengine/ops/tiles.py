"""Every tile size: how many rows a pinned region takes at a time (ops/regions.py), and how arrays are padded to whole
tiles.

The sizes of TILES are a CPU's; kernels of other devices have their own (`Kernels.own_tiles`). A row has to have the
same bits in every tile: engine/step_variants.py proves that of each before it serves.
"""

import dataclasses

from jaxengine.config import QUERY_BLOCK


@dataclasses.dataclass(frozen=True)
class Tile:
    """The shape of a step's tiles: query blocks of `tokens` tokens of one sequence, `blocks` of them to a tile."""

    tokens: int
    blocks: int

    @property
    def rows(self) -> int:
        """Tokens of a tile."""
        return self.tokens * self.blocks


# Of the layers.
BASE = Tile(tokens=1, blocks=8)  # the decode step whose bits are the definition
TILES = {
    "decode": (Tile(1, 2), BASE, Tile(1, 32)),
    "prefill": (Tile(QUERY_BLOCK, 2), Tile(QUERY_BLOCK, 8), Tile(QUERY_BLOCK, 32)),
}  # by kind of step, narrowest first
WIDE = Tile(QUERY_BLOCK, 8)  # of whole sequences (device/trunk.py)


CAPACITY = 2**30  # query blocks, more than any step can carry: a tile of the whole step


@dataclasses.dataclass(frozen=True)
class OwnTiles:
    """An implementation's own tiles, in query blocks, narrowest first; where it has none, they are TILES."""

    decode: tuple[int, ...] = ()  # the first is BASE
    prefill: tuple[int, ...] = ()

    def within(self, kind: str, capacity: int, *, are_arrays: bool) -> tuple[Tile, ...]:
        """Those for a kind of step that can carry `capacity` query blocks.

        A step of arrays of capacity loops over its tiles, which divide it. Where each tile is the whole of a step's
        arrays, the widest is capacity.
        """
        sizes = getattr(self, kind)
        if not sizes:
            return ()
        within = [blocks for blocks in sizes if blocks < capacity and (are_arrays or capacity % blocks == 0)]
        if are_arrays or capacity <= sizes[-1]:
            within.append(capacity)
        return tuple(Tile(1 if kind == "decode" else QUERY_BLOCK, blocks) for blocks in within)


# A TPU's layers run over the rows that are live, whatever the tile: a prefill step has one. Decoding's are those of the
# head and the draw, which compute all rows of a tile; its matrix unit takes 128 in the time of a few.
TPU_TILES = OwnTiles(decode=(BASE.blocks, 128, 256, 512), prefill=(CAPACITY,))

# A GPU's are sizes of arrays (`Kernels.computes_padding`). A product takes 16, 64 or 128 rows at a time, whatever there
# are (pallas_kernels/chain_gpu/sizes.py), and reads the weights for each 128.
GPU_TILES = OwnTiles(decode=(BASE.blocks, 32, 64, 128, 256, 512), prefill=(2, 8, 32, 128, 512))

# Of the head and the draw, in rows.
HEAD_TILE = 8  # in a prefill step, where few of many rows draw
CPU_HEAD_TILE = 32  # the same where decoding rows ride along, and forks of one prompt share a row of the head
WIDE_HEAD_TILE = 128  # the same where a tile costs what it takes to read the head
HEAD_ROWS = 32  # in scoring and training, as in the widest decode step


@dataclasses.dataclass(frozen=True)
class ScoringTiles:
    """The shapes of scoring's tiles; engine/scoring_proof.py says which of SCORING hold on this machine."""

    layers: Tile
    head_rows: int  # rows that the head and the draw take


SCORING = (ScoringTiles(WIDE, HEAD_ROWS), ScoringTiles(WIDE, BASE.rows), ScoringTiles(BASE, BASE.rows))  # widest first

# Query blocks that plain XLA's attention takes together, in every step: more do not stay in a CPU's cache, and with
# fewer XLA compiles the exponentials of so small an array to other bits.
ATTENTION_TILE = 8

# Lengths of the host's arrays are whole numbers of these.
ROW_UNIT = 32  # rows of a decode step: the widest decode tile that every kernel has
WIDE_PREFILL = 32  # query blocks of a prefill step that can carry so many: its widest tile
NARROW_PREFILL = 8  # query blocks of a prefill step that carries fewer
HISTORY_ROWS = 32  # blocks of histories that one upload puts into their slots

# Tokens of a history that are written together, and that the sampler counts together. A row's step costs whole blocks.
HISTORY_BLOCK = 256
