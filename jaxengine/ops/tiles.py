"""Every tile size: how many rows a pinned region takes at a time (ops/regions.py), and how arrays are padded to whole
tiles.

The sizes are a CPU's; kernels of other devices add wider decode tiles of their own (`Kernels.wide_rows`). A row has to
have the same bits in every tile: engine/step_variants.py proves that of each of TILES before it serves.
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

# Of the head and the draw, in rows.
HEAD_TILE = 8  # in a prefill step, where few of many rows draw
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
