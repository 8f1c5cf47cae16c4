"""From a plan to arrays: what is new in slots and block tables, in numpy, and the inputs of each step."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.device.sampling_arrays import empty_slots, write_request, write_sampling
from jaxengine.device.slot_state import SLOT_ROWS, TABLE_ENTRIES
from jaxengine.device.step_inputs import Copies, Rows, Slots
from jaxengine.host.plan import Decode, Plan
from jaxengine.host.sample import Sample
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import HISTORY_ROWS, NARROW_PREFILL, ROW_UNIT, WIDE_PREFILL
from pallas_kernels.numbers import ceil_to


class BatchBuilder:
    """Host arrays of one engine. The slot after the first max_num_seqs belongs to the probe (step_variants.py)."""

    def __init__(self, engine_config: EngineConfig) -> None:
        self.engine_config = engine_config
        self.num_slots = engine_config.max_num_seqs + 1
        self._num_written = [0] * self.num_slots  # entries of each slot's table that the device has, or is about to get
        self.host_slots = empty_slots(self.num_slots)
        self._changed_slots: list[int] = []  # that the device has not got yet
        self._tells_details = [False] * self.num_slots
        self.decode_rows = ceil_to(engine_config.max_num_seqs, ROW_UNIT)
        num_blocks = engine_config.prefill_query_blocks
        self.prefill_query_blocks = ceil_to(num_blocks, NARROW_PREFILL if num_blocks < WIDE_PREFILL else WIDE_PREFILL)
        self.prefill_rows = self.prefill_query_blocks * QUERY_BLOCK + engine_config.max_num_seqs

    # -- slots ---------------------------------------------------------------------------------------------------------

    def admit(self, sample: Sample) -> None:
        """Write a sample's sampling parameters into its slot."""
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
        tops = params.logprobs is not None or params.prompt_logprobs is not None
        self._tells_details[sample.slot] = tops or params.raw_logprobs or params.entropy
        self._changed_slots.append(sample.slot)

    @property
    def tells_details(self) -> bool:
        """Whether a request in a slot asks for more than tokens and logprobs."""
        return any(self._tells_details)

    def slot_changes(self) -> Iterator[tuple[np.ndarray, Slots]]:
        """Uploads for slot_state.write_slots: the slots that were given away since."""
        changed, self._changed_slots = self._changed_slots, []
        for first in range(0, len(changed), SLOT_ROWS):
            yield self._slot_upload(changed[first : first + SLOT_ROWS])

    def _slot_upload(self, slots: Sequence[int]) -> tuple[np.ndarray, Slots]:
        """The given slots' rows and padding."""
        which = _padded(slots, SLOT_ROWS, fill=self.num_slots)
        rows = np.minimum(which, self.num_slots - 1)
        return which, jax.tree.map(lambda whole: whole[rows], self.host_slots)

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

    @property
    def tables(self) -> np.ndarray:
        """Block tables in which every entry is the scratch page, int32 `[slots, n]`."""
        return np.zeros((self.num_slots, self.engine_config.pages_per_seq), np.int32)

    def table_changes(self, samples: Iterable[Sample]) -> Iterator[np.ndarray]:
        """Uploads for slot_state.write_tables: the pages that these samples have and their tables have not.

        While it runs, a sample's pages only grow in number.
        """
        slots, places, pages = [], [], []
        for sample in samples:
            if sample.slot < 0:
                continue  # it got a page and was preempted after all
            written, count = self._num_written[sample.slot], len(sample.pages)
            slots += [sample.slot] * (count - written)
            places += range(written, count)
            pages += sample.pages[written:]
            self._num_written[sample.slot] = count
        for first in range(0, len(slots), TABLE_ENTRIES[-1]):
            yield self._table_upload(*(each[first : first + TABLE_ENTRIES[-1]] for each in (slots, places, pages)))

    def _table_upload(self, slots: Sequence[int], places: Sequence[int], pages: Sequence[int]) -> np.ndarray:
        size = next(size for size in TABLE_ENTRIES if size >= len(slots))
        return np.stack([_padded(slots, size, fill=self.num_slots), _padded(places, size), _padded(pages, size)])

    def empty_changes(self) -> tuple[list[np.ndarray], list[tuple[np.ndarray, Slots]]]:
        """Uploads of every size that change nothing: (for slot_state.write_tables, for slot_state.write_slots)."""
        entries = [np.full((3, size), self.num_slots, np.int32) for size in TABLE_ENTRIES]
        return entries, [self._slot_upload([])]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def decode(self, decodes: Sequence[Decode]) -> Rows:
        """Rows of a decode step: each sample's last token, at its position."""
        samples, positions, _ = zip(*decodes, strict=True)
        size, slots = self.decode_rows, [sample.slot for sample in samples]
        return Rows(
            np.arange(size, dtype=np.int32),
            _padded(slots, size),
            _padded(positions, size),
            np.zeros(size, np.bool_),
            np.int32(len(slots)),
        )

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


def _padded(values: Sequence, size: int, dtype: type = np.int32, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, dtype)
    out[: len(values)] = values
    return out
