"""The device, in plain Python.

It takes the arrays that the real steps take and keeps, for every offset of every page, what belongs there.

A key-value pair depends on the weights and on every token up to its own, so a page holds a hash of just that. Whoever
attends to a position reads it through the block table that the host sent, and everything it reads must be the hash of
its own tokens. This module stands in for `steps`, `kv_cache` and `slot_state` in the engine, and `StepVariants` for the
compiled steps.
"""

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from model import UNKNOWN, draw, link, root, score, turn

from jaxengine.config import QUERY_BLOCK, EngineConfig
from jaxengine.device.needs import Needs
from jaxengine.device.sampling_arrays import empty_slots
from jaxengine.device.step_inputs import Copies, RowOutputs, Rows, Slots
from jaxengine.engine.batch import BatchBuilder
from jaxengine.engine.step_variants import Variant
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import HISTORY_BLOCK, Tile

GARBAGE = -1  # what a query block writes after its last token, and what was never written


class Fault(Exception):
    """An error of the device, or an interrupt. The engine has to be usable after it."""


@dataclasses.dataclass
class Fuse:
    """A fault in the device call after `calls` others.

    Before or after its work, with or without the donated buffers.
    """

    calls: int
    after: bool
    lose: bool
    no_memory: bool

    def blow(self, cache: "Cache") -> None:
        cache.lost = self.lose
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED") if self.no_memory else Fault("the device failed")


class Cache:
    """Pages and histories."""

    def __init__(self, config: EngineConfig) -> None:
        self.page_size, self.lost = config.page_size, False
        self.pages = [[GARBAGE] * config.page_size for _ in range(config.num_pages)]
        self.history = [[UNKNOWN] * config.max_model_len for _ in range(config.max_num_seqs + 1)]
        self._states: list[tuple[int, list[int]]] = [
            (0, []) for _ in self.history
        ]  # of the history, as far as they were wanted

    def set_history(self, slot: int, tokens: list[int]) -> None:
        self.history[slot], self._states[slot] = tokens, (0, [])

    def append(self, slot: int, position: int, token: int) -> None:
        self.history[slot][position] = token
        del self._states[slot][1][position:]

    def own_states(self, slot: int, version: int, stop: int) -> list[int]:
        """The states of the slot's own tokens [0, stop): what it may read, and what it writes."""
        last, states = self._states[slot]
        state = states[-1] if states else root(version)
        if states and last != version and stop > len(states):
            state = turn(
                state, version
            )  # the slot's pages were kept when the weights changed: a new sequence has a new history
        self._states[slot] = (version if stop > len(states) else last), states
        for token in self.history[slot][len(states) : stop]:
            assert token != UNKNOWN, "the token to run is not known"
            states.append(state := link(state, token))
        return states[:stop]

    def write(self, table: list[int], start: int, values: list[int]) -> None:
        page, offset = table[start // self.page_size], start % self.page_size
        assert page != 0, f"position {start} has no page"
        self.pages[page][offset : offset + len(values)] = values

    def read(self, table: list[int], position: int) -> list[int]:
        """Everything that `position` attends to."""
        values: list[int] = []
        for page in table[: position // self.page_size + 1]:
            values += self.pages[page]
        return values[: position + 1]


def empty_cache(model: Any, config: EngineConfig, kernels: Any, beside: Any) -> Cache:
    """In place of kv_cache.empty_cache."""
    return Cache(config)


def is_lost(cache: Cache) -> bool:
    """In place of kv_cache.is_lost."""
    return cache.lost


def rebuild(cache: Cache, model: Any, config: EngineConfig, kernels: Any) -> Cache:
    """In place of kv_cache.rebuild."""
    return Cache(config)


def write_history(cache: Cache, slots: np.ndarray, blocks: np.ndarray, tokens: np.ndarray) -> Cache:
    """In place of kv_cache.write_history."""
    for slot, block, row in zip(slots.tolist(), blocks.tolist(), tokens.tolist(), strict=True):
        if slot < len(cache.history):
            start = block * HISTORY_BLOCK
            cache.set_history(slot, (cache.history[slot][:start] + row)[: len(cache.history[slot])])
    return cache


@dataclasses.dataclass
class SlotState:
    """In place of slot_state.SlotState, from which a step reads what was written and nothing else."""

    tables: np.ndarray
    slots: Slots


def empty_state(num_slots: int, pages_per_seq: int, home: None) -> SlotState:
    """In place of slot_state.empty_state."""
    return SlotState(np.zeros((num_slots, pages_per_seq), np.int32), empty_slots(num_slots))


def write_tables(state: SlotState, entries: np.ndarray) -> SlotState:
    """In place of slot_state.write_tables."""
    slots, places, pages = entries[:, entries[0] < len(state.tables)]
    state.tables[slots, places] = pages
    return state


def write_slots(state: SlotState, which: np.ndarray, rows: Slots) -> SlotState:
    """In place of slot_state.write_slots."""
    real = which < len(state.tables)
    for whole, new in zip(jax.tree.leaves(state.slots), jax.tree.leaves(rows), strict=True):
        whole[which[real]] = new[real]
    return state


class StepVariants:
    """In place of the compiled steps. `params` is the version of the weights.

    A `trusting` device draws from whatever it reads, right or wrong, as a real one does: then the answers alone tell.
    """

    def __init__(self, model: Any, config: EngineConfig, kernels: Any, report: Any = None) -> None:
        self.batch = BatchBuilder(config)
        self.config, self.trusting, self.tokens_per_block = config, False, QUERY_BLOCK
        self.fuse: Fuse | None = None
        self.rows_until_nan = -1

    def forget_expected(self) -> None:
        """There is no proof to forget."""

    def pick(
        self, kind: str, num_blocks: int, needs: Needs, params: int, cache: Cache, before: Any
    ) -> tuple[Cache, Variant]:
        return cache, Variant(kind, Tile(self.tokens_per_block if kind == "prefill" else 1, 8), needs)

    def run_decode(self, params: int, cache: Cache, tables: np.ndarray, slots: Slots, rows: Rows, variant: Variant):
        out, count = Answers(self.config.decode_steps, len(rows.slots)), int(rows.num_rows)
        lanes = list(enumerate(zip(rows.slots[:count].tolist(), rows.positions[:count].tolist(), strict=True)))
        with self._fault(cache):
            for step in range(self.config.decode_steps):
                live = [
                    (lane, slot, at + step) for lane, (slot, at) in lanes if at + step + 1 < slots.request.limit[slot]
                ]
                for _, slot, at in live:
                    cache.write(tables[slot].tolist(), at, cache.own_states(slot, params, at + 1)[at:])
                states = [self._attend(cache, tables, slot, params, at) for _, slot, at in live]
                for (lane, slot, at), state in zip(live, states, strict=True):
                    self._draw(cache, slots, slot, at, state, out, (step, lane))
        return cache, out.rows()

    def run_prefill(
        self,
        params: int,
        cache: Cache,
        tables: np.ndarray,
        slots: Slots,
        blocks: QueryBlocks,
        rows: Rows,
        copies: Copies,
        variant: Variant,
    ):
        out, count, tile = Answers(len(rows.slots)), int(rows.num_rows), variant.tile
        with self._fault(cache):
            owners = self._write_blocks(params, cache, tables, blocks, tile)
            ends = {slot: start + size - 1 for slot, start, size in owners}
            for slot, end in ends.items():
                self._attend(cache, tables, slot, params, end)
            firsts = self._first_rows(blocks, tile)[: len(owners)]
            hidden = [
                self._hidden(cache, tables, params, owners, firsts, index) for index in rows.indices[:count].tolist()
            ]
            for source, target in zip(
                copies.sources[: copies.num_copies], copies.targets[: copies.num_copies], strict=True
            ):
                cache.pages[target] = list(cache.pages[source])
            for lane, (slot, at, scored) in enumerate(
                zip(rows.slots[:count], rows.positions[:count], rows.scored[:count], strict=True)
            ):
                cache.own_states(int(slot), params, int(at) + 1)  # a fork's, whose pages these weights wrote
                answer = self._score if scored else self._draw
                answer(cache, slots, int(slot), int(at), hidden[lane], out, lane)
        return cache, out.rows()

    def _write_blocks(
        self, params: int, cache: Cache, tables: np.ndarray, blocks: QueryBlocks, tile: Tile
    ) -> list[tuple[int, int, int]]:
        """All blocks are written before one is read; returns their slots, starts and counts."""
        owners = [tuple(map(int, owner)) for owner in zip(blocks.slots, blocks.starts, blocks.counts, strict=True)][
            : blocks.num_blocks
        ]
        for slot, start, size in owners:
            values = cache.own_states(slot, params, start + size)[start:]
            padding = 0 if self.batch.packs_rows else tile.tokens - size
            cache.write(tables[slot].tolist(), start, values + [GARBAGE] * padding)
        return owners

    def _first_rows(self, blocks: QueryBlocks, tile: Tile) -> list[int]:
        """Of each block, as the layers compute them."""
        if blocks.first_rows is None:
            return list(range(0, len(blocks.slots) * tile.tokens, tile.tokens))
        return blocks.first_rows.tolist()

    def _hidden(
        self, cache: Cache, tables: np.ndarray, params: int, owners: list, firsts: list[int], index: int
    ) -> int:
        """The state of one row of the layers."""
        block = bisect.bisect_right(firsts, index) - 1
        slot, start, size = owners[block]
        offset = index - firsts[block]
        assert offset < size, "a row that is no token's is read"
        return self._attend(cache, tables, slot, params, start + offset)

    def _attend(self, cache: Cache, tables: np.ndarray, slot: int, params: int, position: int) -> int:
        """The state at a position, from all that its block table leads to."""
        found, own = cache.read(tables[slot].tolist(), position), cache.own_states(slot, params, position + 1)
        if found == own:
            return own[-1]
        wrong = [mine == other for mine, other in zip(own, found, strict=True)].index(False)
        assert self.trusting, f"position {position} reads what is not its own, at {wrong}"
        return hash(tuple(found))

    def _draw(self, cache: Cache, slots: Slots, slot: int, at: int, state: int, out: "Answers", lane: Any) -> None:
        token, logprob = draw(state, slots.request.key[slot].tolist(), slots.request.key_folds[slot].tolist())
        cache.append(slot, at + 1, token)
        out.tokens[lane], out.logprobs[lane] = token, logprob
        self.rows_until_nan -= 1
        out.finite[lane] = self.rows_until_nan != 0

    def _score(self, cache: Cache, slots: Slots, slot: int, at: int, state: int, out: "Answers", lane: Any) -> None:
        token = cache.history[slot][at + 1]
        out.tokens[lane], out.logprobs[lane] = token, score(state, token)

    @contextlib.contextmanager
    def _fault(self, cache: Cache) -> Iterator[None]:
        fuse, self.fuse = self.fuse, None
        if fuse is not None and fuse.calls > 0:
            self.fuse, fuse = dataclasses.replace(fuse, calls=fuse.calls - 1), None
        if fuse is not None and not fuse.after:
            fuse.blow(cache)
        yield
        if fuse is not None:
            fuse.blow(cache)


class Answers:
    """A step's results while they are filled in."""

    def __init__(self, *shape: int) -> None:
        self.tokens, self.logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.finite = np.ones(shape, bool)

    def rows(self) -> RowOutputs:
        nothing = self.tokens[..., None][..., :0]
        return RowOutputs(
            self.tokens,
            self.logprobs,
            self.logprobs,
            self.logprobs,
            self.tokens,
            nothing,
            nothing,
            nothing,
            self.finite,
        )
