"""From a plan to arrays: the host's mirror of slots and block tables, in numpy, and the inputs of each step."""
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.device.sampling_arrays import empty_slots, write_slot
from jaxengine.device.step_inputs import Blocks, Copies, Rows, SlotParams
from jaxengine.host.sample import Sequence
from jaxengine.host.scheduler import Chunk, Plan

HISTORY_ROWS = 8  # sequences that one upload puts into their slots
WIDE_PREFILL = 32  # blocks of the widest prefill tile: a step that can carry so many carries whole tiles
ROW_UNIT = 32  # row arrays are whole numbers of the widest decode tile that every kernel has


class BatchBuilder:
    """Host arrays of one engine. The last slot behind max_num_seqs belongs to the probe (programs.py)."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.num_slots = config.max_num_seqs + 1
        self.tables = np.zeros((self.num_slots, config.pages_per_seq), np.int32)
        self._num_written = np.zeros(self.num_slots, np.int64)  # pages of each slot's row that are up to date
        self.host_slots = empty_slots(self.num_slots)
        self._device_slots: Any = None
        self.decode_rows = _round_up(config.max_num_seqs, ROW_UNIT)
        self.prefill_blocks = _round_up(config.prefill_blocks, 8 if config.prefill_blocks < WIDE_PREFILL else WIDE_PREFILL)
        self.prefill_rows = self.prefill_blocks * QUERY_BLOCK + config.max_num_seqs

    # -- slots -----------------------------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """Write a sequence's sampling parameters into its slot."""
        request, params = sequence.request, sequence.request.params
        self._num_written[sequence.slot] = 0
        write_slot(
            self.host_slots, sequence.slot, params, request.stop_token_ids, prompt_length=sequence.prompt_length,
            first_stop=min(sequence.prompt_length + params.min_tokens, request.limit) if params.min_tokens else 0, limit=request.limit,
            key=request.key, key_folds=request.key_folds(sequence.index),
            num_logprobs=max(-1 if asked is None else asked for asked in (params.logprobs, params.prompt_logprobs)) + 1,
            details=params.raw_logprobs or params.entropy)
        self._device_slots = None

    def device_slots(self) -> SlotParams:
        """The slots' parameters on the device; uploaded when one changed."""
        if self._device_slots is None:
            self._device_slots = jax.device_put(jax.tree.map(np.copy, self.host_slots))
        return self._device_slots

    def histories(self, sequences: Seq[Sequence]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(slots, tokens) uploads that put whole sequences into their slots."""
        uploads = []
        for first in range(0, len(sequences), HISTORY_ROWS):
            slots = np.full(HISTORY_ROWS, self.num_slots, np.int32)
            tokens = np.zeros((HISTORY_ROWS, self.config.max_model_len), np.int32)
            for row, sequence in enumerate(sequences[first : first + HISTORY_ROWS]):
                slots[row] = sequence.slot
                tokens[row, : len(sequence.token_ids)] = sequence.token_ids
            uploads.append((slots, tokens))
        return uploads

    def sync_tables(self, sequences: Seq[Sequence]) -> np.ndarray:
        """Block tables, the given sequences' rows brought up to date. While it runs, a sequence's pages only grow in number."""
        for sequence in sequences:
            written, count = self._num_written[sequence.slot], len(sequence.pages)
            if written < count:
                self.tables[sequence.slot, written:count] = sequence.pages[written:]
                self._num_written[sequence.slot] = count
        return self.tables.copy()  # the device may still be reading the last step's

    # -- steps -----------------------------------------------------------------------------------------------------------------

    def decode(self, sequences: Seq[Sequence], positions: Seq[int]) -> Rows:
        """Rows of a decode step: each sequence's last token, at the given position."""
        return rows_of(self.decode_rows, range(len(sequences)), [s.slot for s in sequences], positions, [False] * len(sequences))

    def prefill(self, plan: Plan, tokens_per_block: int) -> tuple[Blocks, Rows, Copies]:
        """Inputs of a prefill step, with blocks of `tokens_per_block` tokens."""
        slots, starts, counts = [], [], []
        indices, row_slots, positions, scored = [], [], [], []
        for chunk in plan.chunks:
            first_row = len(slots) * tokens_per_block
            for start in range(chunk.start, chunk.stop, tokens_per_block):
                slots.append(chunk.sequence.slot)
                starts.append(start)
                counts.append(min(tokens_per_block, chunk.stop - start))
            for sequence, position, is_scored in wanted_rows(chunk):
                indices.append(first_row + position - chunk.start)
                row_slots.append(sequence.slot)
                positions.append(position)
                scored.append(is_scored)
        capacity = self.prefill_blocks * (QUERY_BLOCK // tokens_per_block)
        blocks = Blocks(_padded(slots, capacity), _padded(starts, capacity), _padded(counts, capacity), np.int32(len(slots)))
        rows = rows_of(self.prefill_rows, indices, row_slots, positions, scored)
        limit = self.config.max_num_seqs
        copies = Copies(_padded([a for a, _ in plan.copies], limit), _padded([b for _, b in plan.copies], limit),
                        np.int32(len(plan.copies)))
        return blocks, rows, copies


def wanted_rows(chunk: Chunk) -> list[tuple[Sequence, int, bool]]:
    """(sequence, position, scored) of a chunk's rows, in the order in which the step answers them."""
    rows = []
    if chunk.sequence.scores_prompt:
        rows += [(chunk.sequence, position, True) for position in range(chunk.start, min(chunk.stop, chunk.sequence.prompt_length - 1))]
    if chunk.is_last:
        rows += [(sequence, chunk.stop - 1, False) for sequence in (chunk.sequence, *chunk.forks)]
    return rows


def rows_of(size: int, indices: Seq[int], slots: Seq[int], positions: Seq[int], scored: Seq[bool]) -> Rows:
    """Rows padded to `size`."""
    return Rows(_padded(indices, size), _padded(slots, size), _padded(positions, size), _padded(scored, size, np.bool_),
                np.int32(len(slots)))


def _padded(values: Seq, size: int, dtype: type = np.int32) -> np.ndarray:
    out = np.zeros(size, dtype)
    out[: len(values)] = values
    return out


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

