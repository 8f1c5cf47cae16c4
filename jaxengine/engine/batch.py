"""From a plan to arrays: what is new in slots and block tables, in numpy, and the inputs of each step."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.device.grammar_mask import words_of
from jaxengine.device.needs import Needs, needs_of
from jaxengine.device.sampling_arrays import (
    NO_RULES,
    WORD,
    empty_slots,
    named_ids,
    token_rules,
    write_request,
    write_sampling,
)
from jaxengine.device.slot_state import SLOT_ROWS, TABLE_ENTRIES
from jaxengine.device.step_inputs import Copies, Rows, Slots, TokenRules
from jaxengine.host.plan import Decode, Plan
from jaxengine.host.sample import Sample
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import HISTORY_BLOCK, HISTORY_ROWS, NARROW_PREFILL, ROW_UNIT, WIDE_PREFILL, Tile
from jaxengine.sampling_params import SamplingParams
from pallas_kernels.numbers import cdiv, ceil_to


class BatchBuilder:
    """Host arrays of one engine. The slot after the first max_num_seqs belongs to the probe (step_variants.py)."""

    def __init__(self, engine_config: EngineConfig, *, fit_the_tile: bool = False, packs_rows: bool = False) -> None:
        """A step's arrays have capacity; or the size of its tile, where they `fit_the_tile` (ops/tiles.py).

        `packs_rows` as in Kernels: then samples that decode have room in a prefill step.
        """
        self.engine_config, self._fit_the_tile, self.packs_rows = engine_config, fit_the_tile, packs_rows
        self.num_slots = engine_config.max_num_seqs + 1
        self._num_written = [0] * self.num_slots  # entries of each slot's table that the device has, or is about to get
        self.host_slots = empty_slots(self.num_slots)
        self._needs = np.zeros(self.num_slots, np.int8)
        self._changed_slots: list[int] = []  # that the device has not got yet
        self.decode_rows = ceil_to(engine_config.max_num_seqs, ROW_UNIT)
        num_blocks = engine_config.prefill_query_blocks
        self.prefill_query_blocks = ceil_to(num_blocks, NARROW_PREFILL if num_blocks < WIDE_PREFILL else WIDE_PREFILL)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def admit(self, sample: Sample) -> None:
        """Write a sample's sampling parameters into its slot."""
        request, params = sample.request, sample.request.sampling
        self._num_written[sample.slot], self._needs[sample.slot] = 0, needs_of(params)
        no_stop_before = sample.prompt_length + params.min_tokens if params.min_tokens and request.stop_token_ids else 0
        rules = sample.slot if params.has_token_rules or sample.is_steered else NO_RULES
        write_sampling(self.host_slots.sampling, sample.slot, params, request.stop_token_ids, rules)
        write_request(
            self.host_slots.request,
            sample.slot,
            prompt_length=sample.prompt_length,
            first_stop=min(no_stop_before, request.limit),
            limit=request.limit,
            key=request.key,
            key_folds=request.key_folds(sample.index),
            likeliest=params.tells_logprobs or params.prompt_logprobs is not None,
            named_ids=named_ids(params),
            details=params.raw_logprobs or params.entropy,
        )
        self._changed_slots.append(sample.slot)

    @property
    def tells_details(self) -> bool:
        """Whether a request in a slot asks for more than tokens and logprobs."""
        request: Any = self.host_slots.request
        return bool((request.likeliest | request.details).any())

    def needs(self, slots: Sequence[int]) -> Needs:
        """What the requests in these slots ask for."""
        return Needs(self._needs[slots].max(initial=0))

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

    def histories(self, samples: Sequence[Sample]) -> list[tuple[np.ndarray, ...]]:
        """Uploads for kv_cache.write_history that put whole sequences into their slots."""
        return history_uploads(self.num_slots, [(sample.slot, sample.token_ids) for sample in samples])

    def rules(self, samples: Sequence[Sample], vocab_size: int) -> list[tuple[np.ndarray, TokenRules]]:
        """Uploads for kv_cache.write_rules of the samples whose requests bring token rules, one a request."""
        slots: dict[int, tuple[SamplingParams, list[int]]] = {}
        for sample in samples:
            if sample.request.sampling.has_token_rules or sample.is_steered:
                slots.setdefault(id(sample.request), (sample.request.sampling, []))[1].append(sample.slot)
        return [self._rules_upload(sampling, of_request, vocab_size) for sampling, of_request in slots.values()]

    def no_rules(self, vocab_size: int) -> tuple[np.ndarray, TokenRules]:
        """An upload for kv_cache.write_rules that changes nothing."""
        return self._rules_upload(SamplingParams(), [], vocab_size)

    def _rules_upload(
        self, sampling: SamplingParams, slots: Sequence[int], vocab_size: int
    ) -> tuple[np.ndarray, TokenRules]:
        return _padded(slots, self.num_slots, fill=self.num_slots), token_rules([sampling], vocab_size)

    def allowed(self, samples: Sequence[Sample], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Uploads for kv_cache.write_allowed: what each sample's grammar lets it draw next."""
        for first in range(0, len(samples), SLOT_ROWS):
            yield self._allowed_upload(samples[first : first + SLOT_ROWS], vocab_size)

    def nothing_allowed(self, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """An upload for kv_cache.write_allowed that changes nothing."""
        return self._allowed_upload([], vocab_size)

    def _allowed_upload(self, samples: Sequence[Sample], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        words: Any = np.zeros((SLOT_ROWS, cdiv(vocab_size, WORD)), np.uint32)
        for row, sample in zip(words, samples, strict=False):
            request = sample.request
            row[:] = words_of(sample.allowed(), request.sampling, sorted(request.stop_token_ids), len(row))
        return _padded([sample.slot for sample in samples], SLOT_ROWS, fill=self.num_slots), words

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

    def num_blocks(self, kind: str, tile: Tile) -> int:
        """Query blocks of the arrays of a step on such tiles: of a decode, its rows."""
        if kind == "prefill":
            return self._blocks_of_chunks(tile) + self.packs_rows * self.decode_rows
        return tile.blocks if self._fit_the_tile else self.decode_rows

    def _blocks_of_chunks(self, tile: Tile) -> int:
        """Of a prefill's query blocks, those that prompts may fill."""
        return tile.blocks if self._fit_the_tile else self.prefill_query_blocks * (QUERY_BLOCK // tile.tokens)

    def prefill_rows(self, tile: Tile) -> int:
        """Rows that may draw or be scored: every token, and the forks of the prompts that end or what rides along."""
        size = self._blocks_of_chunks(tile) * tile.tokens + self.engine_config.max_num_seqs
        return ceil_to(size, tile.rows) if self.packs_rows else size

    def smallest(self, kind: str, tile: Tile) -> Any:
        """A step's inputs for one row, for their shapes: Rows of a decode, (blocks, rows, copies) of a prefill."""
        size = self.num_blocks(kind, tile)
        if kind == "decode":
            return rows_of(size, [0], [0], [0], [False])
        ints, nothing = (np.zeros(count, np.int32) for count in (size, self.engine_config.max_num_seqs))
        return (
            QueryBlocks(ints, ints, ints, np.int32(1), ints if self.packs_rows else None),
            rows_of(self.prefill_rows(tile), [0], [0], [0], [False]),
            Copies(nothing, nothing, np.int32(0)),
        )

    def decode(self, decodes: Sequence[Decode], tile: Tile) -> Rows:
        """Rows of a decode step: each sample's last token, at its position."""
        samples, positions, _ = zip(*decodes, strict=True)
        size, slots = self.num_blocks("decode", tile), [sample.slot for sample in samples]
        return Rows(
            np.arange(size, dtype=np.int32),
            _padded(slots, size),
            _padded(positions, size),
            np.zeros(size, np.bool_),
            np.int32(len(slots)),
        )

    def prefill(self, plan: Plan, tile: Tile, riding: Sequence[Decode] = ()) -> tuple[QueryBlocks, Rows, Copies]:
        """Inputs of a prefill step. Samples that ride along come first."""
        pieces = [(sample.slot, position, 1) for sample, position, _ in riding]
        firsts = []
        for chunk in plan.chunks:
            firsts.append(len(pieces))
            pieces += pieces_of(chunk.sample.slot, chunk.start, chunk.stop, tile.tokens)
        blocks, first_rows = self.query_blocks(pieces, tile)
        rows = [(first_rows[i], sample.slot, position, False) for i, (sample, position, _) in enumerate(riding)]
        for chunk, first in zip(plan.chunks, firsts, strict=True):
            before = first_rows[first] - chunk.start  # a chunk's rows follow each other
            rows += [(before + position, sample.slot, position, scored) for sample, position, scored in chunk.rows]
        limit = self.engine_config.max_num_seqs
        copies = Copies(
            _padded([a for a, _ in plan.copies], limit),
            _padded([b for _, b in plan.copies], limit),
            np.int32(len(plan.copies)),
        )
        return blocks, rows_of(self.prefill_rows(tile), *(zip(*rows, strict=True) if rows else ((),) * 4)), copies

    def query_blocks(self, pieces: Sequence[tuple[int, int, int]], tile: Tile) -> tuple[QueryBlocks, Sequence[int]]:
        """Blocks of (slot, start, count) each, and the row of each one's first token."""
        size, count = self.num_blocks("prefill", tile), len(pieces)
        slots, starts, counts = zip(*pieces, strict=True)
        first_rows: Sequence[int] = range(0, count * tile.tokens, tile.tokens)
        if self.packs_rows:
            first_rows = list(itertools.accumulate(counts[:-1], initial=0))
        packed = _padded(first_rows, size) if self.packs_rows else None
        of_blocks = _padded(slots, size), _padded(starts, size), _padded(counts, size)
        return QueryBlocks(*of_blocks, np.int32(count), packed), first_rows


def pieces_of(slot: int, start: int, stop: int, tokens: int) -> list[tuple[int, int, int]]:
    """(slot, start, count) of the blocks of `tokens` that tokens [start, stop) are cut into; the last may be short."""
    return [(slot, first, min(tokens, stop - first)) for first in range(start, stop, tokens)]


def history_uploads(num_slots: int, sequences: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[np.ndarray, ...]]:
    """(slots, blocks, tokens) for kv_cache.write_history from (slot, token ids) pairs, HISTORY_ROWS blocks each."""
    parts = []
    for slot, token_ids in sequences:
        for start in range(0, len(token_ids), HISTORY_BLOCK):
            parts.append((slot, start // HISTORY_BLOCK, token_ids[start : start + HISTORY_BLOCK]))
    return [_history_upload(num_slots, parts[i : i + HISTORY_ROWS]) for i in range(0, len(parts), HISTORY_ROWS)]


def _history_upload(num_slots: int, parts: Sequence[tuple[int, int, Sequence[int]]]) -> tuple[np.ndarray, ...]:
    tokens = np.zeros((HISTORY_ROWS, HISTORY_BLOCK), np.int32)
    for row, (_, _, token_ids) in zip(tokens, parts, strict=False):
        row[: len(token_ids)] = token_ids
    slots = _padded([slot for slot, _, _ in parts], HISTORY_ROWS, fill=num_slots)
    return slots, _padded([block for _, block, _ in parts], HISTORY_ROWS), tokens


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
