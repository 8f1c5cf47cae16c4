"""From a plan to arrays: the host's mirror of slots and block tables, in numpy, and the inputs of each step."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.device.sampling_arrays import empty_slots, write_request, write_sampling
from jaxengine.device.step_inputs import Copies, Rows, Slots
from jaxengine.host.plan import Decode, Plan
from jaxengine.host.sample import Sample
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import HISTORY_ROWS, NARROW_PREFILL, ROW_UNIT, WIDE_PREFILL


class BatchBuilder:
    """Host arrays of one engine. The last slot behind max_num_seqs belongs to the probe (programs.py)."""

    def __init__(self, engine_config: EngineConfig) -> None:
        self.engine_config = engine_config
        self.num_slots = engine_config.max_num_seqs + 1
        self.tables = np.zeros((self.num_slots, engine_config.pages_per_seq), np.int32)
        self._num_written = np.zeros(self.num_slots, np.int64)  # pages of each slot's row that are up to date
        self.host_slots = empty_slots(self.num_slots)
        self._device_slots: Any = None
        self.decode_rows = _round_up(engine_config.max_num_seqs, ROW_UNIT)
        self.prefill_query_blocks = _round_up(
            engine_config.prefill_query_blocks,
            NARROW_PREFILL if engine_config.prefill_query_blocks < WIDE_PREFILL else WIDE_PREFILL,
        )
        self.prefill_rows = self.prefill_query_blocks * QUERY_BLOCK + engine_config.max_num_seqs

    # -- slots -----------------------------------------------------------------------------------------------------------------

    def admit(self, sample: Sample) -> None:
        """Write a sequence's sampling parameters into its slot."""
        request, params = sample.request, sample.request.sampling
        self._num_written[sample.slot] = 0
        write_sampling(self.host_slots.sampling, sample.slot, params, request.stop_token_ids)
        write_request(
            self.host_slots.request,
            sample.slot,
            prompt_length=sample.prompt_length,
            first_stop=min(sample.prompt_length + params.min_tokens, request.limit) if params.min_tokens else 0,
            limit=request.limit,
            key=request.key,
            key_folds=request.key_folds(sample.index),
            num_logprobs=max(-1 if asked is None else asked for asked in (params.logprobs, params.prompt_logprobs)) + 1,
            details=params.raw_logprobs or params.entropy,
        )
        self._device_slots = None

    def device_slots(self) -> Slots:
        """The slots' parameters on the device; uploaded when one changed."""
        if self._device_slots is None:
            self._device_slots = jax.device_put(jax.tree.map(np.copy, self.host_slots))
        return self._device_slots

    def histories(self, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(slots, tokens) uploads that put whole sequences into their slots."""
        uploads = []
        for first in range(0, len(samples), HISTORY_ROWS):
            slots = np.full(HISTORY_ROWS, self.num_slots, np.int32)
            tokens = np.zeros((HISTORY_ROWS, self.engine_config.max_model_len), np.int32)
            for row, sample in enumerate(samples[first : first + HISTORY_ROWS]):
                slots[row] = sample.slot
                tokens[row, : sample.num_tokens] = sample.token_ids
            uploads.append((slots, tokens))
        return uploads

    def sync_tables(self, samples: Sequence[Sample]) -> np.ndarray:
        """Block tables, the given sequences' rows brought up to date. While it runs, a sequence's pages only grow in number."""
        for sample in samples:
            written, count = self._num_written[sample.slot], len(sample.pages)
            if written < count:
                self.tables[sample.slot, written:count] = sample.pages[written:]
                self._num_written[sample.slot] = count
        return self.tables.copy()  # the device may still be reading the last step's

    # -- steps -----------------------------------------------------------------------------------------------------------------

    def decode(self, decodes: Sequence[Decode]) -> Rows:
        """Rows of a decode step: each sample's last token, at its position."""
        slots, positions = [decode.sample.slot for decode in decodes], [decode.position for decode in decodes]
        return rows_of(self.decode_rows, range(len(decodes)), slots, positions, [False] * len(decodes))

    def prefill(self, plan: Plan, tokens_per_block: int) -> tuple[QueryBlocks, Rows, Copies]:
        """Inputs of a prefill step, with blocks of `tokens_per_block` tokens."""
        slots, starts, counts = [], [], []
        indices, row_slots, positions, scored = [], [], [], []
        for chunk in plan.chunks:
            first_row = len(slots) * tokens_per_block
            for start in range(chunk.start, chunk.stop, tokens_per_block):
                slots.append(chunk.sample.slot)
                starts.append(start)
                counts.append(min(tokens_per_block, chunk.stop - start))
            for sample, position, is_scored in chunk.rows:
                indices.append(first_row + position - chunk.start)
                row_slots.append(sample.slot)
                positions.append(position)
                scored.append(is_scored)
        capacity = self.prefill_query_blocks * (QUERY_BLOCK // tokens_per_block)
        blocks = QueryBlocks(
            _padded(slots, capacity), _padded(starts, capacity), _padded(counts, capacity), np.int32(len(slots))
        )
        rows = rows_of(self.prefill_rows, indices, row_slots, positions, scored)
        limit = self.engine_config.max_num_seqs
        copies = Copies(
            _padded([a for a, _ in plan.copies], limit),
            _padded([b for _, b in plan.copies], limit),
            np.int32(len(plan.copies)),
        )
        return blocks, rows, copies


def rows_of(
    size: int, indices: Sequence[int], slots: Sequence[int], positions: Sequence[int], scored: Sequence[bool]
) -> Rows:
    """Rows padded to `size`."""
    return Rows(
        _padded(indices, size),
        _padded(slots, size),
        _padded(positions, size),
        _padded(scored, size, np.bool_),
        np.int32(len(slots)),
    )


def _padded(values: Sequence, size: int, dtype: type = np.int32) -> np.ndarray:
    out = np.zeros(size, dtype)
    out[: len(values)] = values
    return out


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
