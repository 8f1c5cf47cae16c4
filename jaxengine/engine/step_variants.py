"""Step variants: which compiled step serves a plan, and the proof that it may.

A step is compiled for a few tile shapes. The bits of BASE, the decode step on tiles of eight rows, are the definition.
A wider or narrower tile serves only after it has answered PROBE_TOKENS random tokens, with the engine's own weights and
program, with the same bits: logprobs, the likeliest tokens at every position, keys and values of every layer. Where one
bit differs the base tile serves instead (fail closed).
"""

import concurrent.futures
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxengine.base import machine
from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import PROBE_TOKENS, QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.device import kv_cache, steps
from jaxengine.device.kv_cache import Cache
from jaxengine.device.packed import pack
from jaxengine.device.step_inputs import Copies, RowOutputs
from jaxengine.engine.batch import BatchBuilder, history_uploads, rows_of
from jaxengine.engine.collect import begin_copies
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import BASE, TILES, Tile


class StepVariants:
    """The compiled steps of one engine, a variant for each tile, compiled at first use and proven before they serve."""

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        kernels: Kernels,
        batch: BatchBuilder,
        report: Report = say_nothing,
    ) -> None:
        self.model_config, self.engine_config, self.kernels = model_config, engine_config, kernels
        self.batch, self.report = batch, report
        self._max_logprobs = engine_config.num_likeliest(model_config.vocab_size)
        wide = tuple(Tile(1, rows) for rows in kernels.wide_rows if batch.decode_rows % rows == 0)
        self._tiles = {
            "decode": TILES["decode"] + wide,
            "prefill": tuple(t for t in TILES["prefill"] if t.blocks <= batch.prefill_query_blocks),
        }
        self._proven: dict[tuple[str, Tile], bool] = {("decode", BASE): True}
        self._times_wanted: Counter[tuple[str, Tile]] = Counter()
        self._expected: list[np.ndarray] | None = None
        self._compiled: set[tuple[str, Tile]] = set()

    @property
    def refused(self) -> list[tuple[str, Tile]]:
        """Steps whose bits differed from the base tile's on this machine."""
        return [step for step, is_proven in self._proven.items() if not is_proven]

    def forget_expected(self) -> None:
        """Other weights run from now on, so the base step's answers under the old ones are no measure any more.

        Proofs stay good: whether XLA adds in the same order depends on shapes alone.
        """
        self._expected = None

    # -- serving -------------------------------------------------------------------------------------------------------

    def pick(self, kind: str, num_blocks: int, params: Decoder, cache: Cache) -> tuple[Cache, Tile]:
        """The tile for a step over num_blocks query blocks: the narrowest that holds them, or the widest.

        One that is not compiled yet has to be wanted compile_patience times while another can serve: compiling takes
        longer than the last steps of a batch, in which few rows are left.
        """
        tiles = self._tiles[kind]
        wanted = next((tile for tile in tiles if tile.blocks >= num_blocks), tiles[-1])
        if (kind, wanted) not in self._proven:
            self._times_wanted[kind, wanted] += 1
            ready = [tile for tile in tiles if self._proven.get((kind, tile))]
            if ready and self._times_wanted[kind, wanted] <= self.engine_config.compile_patience:
                distances = [abs(tile.blocks - wanted.blocks) for tile in ready]
                return cache, ready[distances.index(min(distances))]
            cache, self._proven[kind, wanted] = self._prove(kind, wanted, params, cache)
        return cache, wanted if self._proven[kind, wanted] else BASE

    def warm_up(self, params: Decoder, cache: Cache) -> Cache:
        """Compile and prove every step that can serve."""
        self._compile([(kind, tile) for kind, tiles in self._tiles.items() for tile in tiles], params, cache)
        for kind, tiles in self._tiles.items():
            for tile in tiles:
                if (kind, tile) not in self._proven:
                    cache, self._proven[kind, tile] = self._prove(kind, tile, params, cache)
            if not all(self._proven[kind, tile] for tile in tiles):
                cache, _ = self._probe(kind, BASE, params, cache)
        return cache

    def base_logprobs(self, params: Decoder, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """(the probe's tokens int32 `[T]`, the base step's logprobs of all but the first, float32 `[T - 1]`).

        The cache is donated.
        """
        _, (_, logprobs, *_) = self._probe("decode", BASE, params, cache)
        return self._probe_tokens(), logprobs

    def run_decode(self, params, cache, tables, slots, rows, tile: Tile) -> tuple[Cache, RowOutputs]:
        with self._first_use("decode", tile):
            step, how = self._step("decode"), self._static("decode", tile)
            cache, out = step(params, cache, tables, slots, pack(rows), **how)
        begin_copies(out, self.batch.tells_details)
        return cache, out

    def run_prefill(self, params, cache, tables, slots, blocks, rows, copies, tile: Tile) -> tuple[Cache, RowOutputs]:
        inputs = pack((blocks, rows, copies))
        with self._first_use("prefill", tile):
            step, how = self._step("prefill"), self._static("prefill", tile)
            cache, out = step(params, cache, tables, slots, inputs, **how)
        begin_copies(out, self.batch.tells_details)
        return cache, out

    def _step(self, kind: str) -> Any:
        """The jitted step for the device at hand."""
        step = steps.decode_step if kind == "decode" else steps.prefill_step
        return steps.captured(step) if jax.default_backend() == "gpu" else step

    def _static(self, kind: str, tile: Tile) -> dict[str, Any]:
        """What a step is compiled for."""
        how = dict(model_config=self.model_config, kernels=self.kernels, tile=tile, max_logprobs=self._max_logprobs)
        return how | (dict(num_steps=self.engine_config.decode_steps) if kind == "decode" else {})

    # -- compiling -----------------------------------------------------------------------------------------------------

    def _compile(self, wanted: Iterable[tuple[str, Tile]], params: Decoder, cache: Cache) -> None:
        """Compile steps side by side, as many at a time as there are cores; JAX then has them when they are called.

        Alone, a step is compiled by its first call.
        """
        new, cores = [step for step in dict.fromkeys(wanted) if step not in self._compiled], machine.num_threads()
        if len(new) < 2 or cores < 2:
            return
        with concurrent.futures.ThreadPoolExecutor(min(len(new), cores)) as threads:
            for done in [threads.submit(self._compile_one, *step, params, cache) for step in new]:
                done.result()

    def _compile_one(self, kind: str, tile: Tile, params: Decoder, cache: Cache) -> None:
        with self._first_use(kind, tile):
            self.lowered(kind, tile, params, cache).compile()

    def lowered(self, kind: str, tile: Tile, params: Any, cache: Any) -> Any:
        """The step before it is compiled; of `params` and `cache` only shapes and places are looked at."""
        batch, inputs = self.batch, pack(self.batch.smallest(kind, tile))
        return self._step(kind).lower(params, cache, batch.tables, batch.host_slots, inputs, **self._static(kind, tile))

    def workspace(self, params: Any, cache: Any) -> int:
        """Bytes that the widest steps take beside their arguments, read from the compiled programs.

        They hardly depend on the number of pages, so that those of a small pool may be asked.
        """
        sizes = []
        for kind, tiles in self._tiles.items():
            taken = self.lowered(kind, tiles[-1], params, cache).compile().memory_analysis()
            sizes.append(taken.temp_size_in_bytes + taken.output_size_in_bytes - taken.alias_size_in_bytes)
        return max(sizes)

    @contextlib.contextmanager
    def _first_use(self, kind: str, tile: Tile) -> Iterator[None]:
        if (kind, tile) in self._compiled:
            yield
            return
        start = time.monotonic()
        self.report(f"compiling the {kind} step for {tile.rows} rows …")
        yield
        self._compiled.add((kind, tile))
        self.report(f"compiled the {kind} step for {tile.rows} rows in {time.monotonic() - start:.1f} s")

    # -- proof ---------------------------------------------------------------------------------------------------------

    def _prove(self, kind: str, tile: Tile, params: Decoder, cache: Cache) -> tuple[Cache, bool]:
        if self._expected is None:
            self._compile([("decode", BASE), (kind, tile)], params, cache)
            cache, self._expected = self._probe("decode", BASE, params, cache)
        cache, found = self._probe(kind, tile, params, cache)
        same = all(equal_bits(a, b) for a, b in zip(self._expected, found, strict=True))
        if not same:
            self.report(
                f"the {kind} step for {tile.rows} rows gives other bits than the base tile on this machine: "
                "it will not be used"
            )
        return cache, same

    def _probe(self, kind: str, tile: Tile, params: Decoder, cache: Cache) -> tuple[Cache, list[np.ndarray]]:
        """Everything that a step says of the probe's tokens: outputs of each row, then the pages it wrote."""
        probe = self._probe_tokens()
        count = len(probe) - 1
        slot, tables, slots, histories = self._probe_inputs(probe)
        for upload in histories:
            cache = kv_cache.write_history(cache, *upload)
        run = self._probe_decode if kind == "decode" else self._probe_prefill
        cache, outputs = run(tile, params, cache, tables, slots, slot, count)
        pages = steps.read_pages(cache, tables[slot, : self.engine_config.probe_pages])
        written = [
            _written_part(pool, count)
            for keys, values in zip(pages.keys, pages.values, strict=True)
            for pool in self.kernels.attention.by_token(np.asarray(keys), np.asarray(values))
        ]
        return cache, outputs + written

    def _probe_tokens(self) -> np.ndarray:
        count = min(PROBE_TOKENS, self.engine_config.max_model_len)
        return np.random.RandomState(0).randint(0, self.model_config.vocab_size, count).astype(np.int32)

    def _probe_inputs(self, probe: np.ndarray):
        slot = self.batch.num_slots - 1
        tables, slots = self.batch.tables, jax.tree.map(np.copy, self.batch.host_slots)
        tables[slot, : self.engine_config.probe_pages] = self.engine_config.num_pages + np.arange(
            self.engine_config.probe_pages
        )
        slots.request.limit[slot] = self.engine_config.max_model_len + 1
        slots.request.likeliest[slot] = True
        return slot, tables, slots, history_uploads(self.batch.num_slots, [(slot, probe.tolist())])

    def _probe_decode(self, tile, params, cache, tables, slots, slot, count):
        answers = []
        for first in range(0, count, self.batch.decode_rows):
            positions = range(first, min(first + self.batch.decode_rows, count))
            size = len(positions)
            rows = rows_of(self.batch.decode_rows, range(size), [slot] * size, positions, [True] * size)
            cache, out = self.run_decode(params, cache, tables, slots, rows, tile)
            answers.append([np.asarray(x)[0, :size] for x in _fields(out)])
        return cache, [np.concatenate(parts) for parts in zip(*answers, strict=True)]

    def _probe_prefill(self, tile, params, cache, tables, slots, slot, count):
        answers, batch = [], self.batch
        room = self.engine_config.prefill_query_blocks * QUERY_BLOCK
        for first in range(0, count, room):
            size = min(room, count - first)
            once = np.arange(first, first + size, tile.tokens, dtype=np.int32)
            starts = np.tile(
                once, max(tile.blocks // len(once), 1)
            )  # a tile that holds more is full, and its last rows are looked at
            capacity = batch.prefill_query_blocks * (QUERY_BLOCK // tile.tokens)
            pad = lambda x, capacity=capacity: np.pad(x, (0, capacity - len(x))).astype(np.int32)
            blocks = QueryBlocks(
                pad(np.full_like(starts, slot)),
                pad(starts),
                pad(np.minimum(tile.tokens, first + size - starts)),
                np.int32(len(starts)),
            )
            last = (len(starts) - len(once)) * tile.tokens
            rows = rows_of(
                batch.prefill_rows, range(last, last + size), [slot] * size, range(first, first + size), [True] * size
            )
            nothing = np.zeros(self.engine_config.max_num_seqs, np.int32)
            cache, out = self.run_prefill(
                params, cache, tables, slots, blocks, rows, Copies(nothing, nothing, np.int32(0)), tile
            )
            answers.append([np.asarray(x)[:size] for x in _fields(out)])
        return cache, [np.concatenate(parts) for parts in zip(*answers, strict=True)]


def _fields(out: RowOutputs) -> tuple:
    return out.tokens, out.logprobs, out.ranks, out.top_ids, out.top_logprobs, out.finite


def _written_part(tokens: np.ndarray, count: int) -> np.ndarray:
    """The first `count` tokens of pages [n, p, …].

    What comes after them differs from step to step and is never read.
    """
    return tokens.reshape(-1, *tokens.shape[2:])[:count]


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype have the same shape and bits; NaNs and zeros with signs are bits too."""
    return np.array_equal(_bits(a), _bits(b))


def _bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind in "biu" else x.view(f"u{x.itemsize}")
