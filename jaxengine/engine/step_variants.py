"""Step variants: which compiled step serves a plan, and the proof that it may.

A step is compiled for a few tile shapes, and for what its rows may ask for. The bits of BASE, the decode step on tiles
of eight rows, are the definition, compiled for what was asked for first. Every other variant serves only after it has
answered PROBE_TOKENS random tokens, with the engine's own weights and program, with the same bits: logprobs, the
likeliest tokens at every position where it knows them, keys and values of every layer. Where one bit differs the base
tile serves instead, or none (fail closed).

Most steps loop over their tiles, so that each tile can carry every plan. Where kernels compute all rows of their arrays
(`Kernels.computes_padding`), arrays have the size of the tile: it carries no more than that, and where its bits differ
a wider one serves.
"""

import concurrent.futures
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxengine.base import machine
from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import PROBE_TOKENS, QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.device import kv_cache, steps
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.packed import pack
from jaxengine.device.step_inputs import Copies, RowOutputs
from jaxengine.engine.batch import BatchBuilder, history_uploads, pieces_of, rows_of
from jaxengine.engine.collect import ALWAYS, LIKELIEST, begin_copies
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.tiles import BASE, TILES, Tile
from sharding.mesh import on_host


class Variant(NamedTuple):
    """A step as it is compiled."""

    kind: str  # "decode" or "prefill"
    tile: Tile
    needs: Needs

    def __str__(self) -> str:
        return f"{self.kind} step for {self.tile.rows} rows{self.needs}"


def step_of(kind: str, *, on_gpu: bool) -> Any:
    """The jitted step of that kind."""
    step = steps.decode_step if kind == "decode" else steps.prefill_step
    return steps.captured(step) if on_gpu else step


def variants_of(
    model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels, report: Report = say_nothing
) -> "StepVariants":
    """Those of an engine, with a batch whose arrays are as the kernels want them."""
    batch = BatchBuilder(engine_config, fit_the_tile=kernels.computes_padding, packs_rows=kernels.packs_rows)
    return StepVariants(model_config, engine_config, kernels, batch, report)


class StepVariants:
    """The compiled steps of one engine, compiled at first use and proven before they serve."""

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
        capacities = {"decode": batch.decode_rows, "prefill": batch.prefill_query_blocks}
        self._tiles = {kind: self._tiles_of(kind, capacity) for kind, capacity in capacities.items()}
        self._proven: dict[Variant, bool] = {}  # the first is the definition
        self._times_wanted: Counter[Variant] = Counter()
        self._expected: dict[Needs, list[np.ndarray]] = {}
        self._compiled: set[Variant] = set()

    def _tiles_of(self, kind: str, capacity: int) -> tuple[Tile, ...]:
        """For steps that can carry `capacity` query blocks, narrowest first."""
        own = self.kernels.own_tiles.within(kind, capacity, are_arrays=self.kernels.computes_padding)
        return own or tuple(tile for tile in TILES[kind] if capacity % tile.blocks == 0)

    @property
    def refused(self) -> list[Variant]:
        """Steps whose bits differed from the base tile's on this machine."""
        return [variant for variant, is_proven in self._proven.items() if not is_proven]

    def forget_expected(self) -> None:
        """Other weights run from now on, so the base step's answers under the old ones are no measure any more.

        Proofs stay good: whether XLA adds in the same order depends on shapes alone.
        """
        self._expected = {}

    # -- serving -------------------------------------------------------------------------------------------------------

    def pick(
        self,
        kind: str,
        num_blocks: int,
        needs: Needs,
        params: Decoder,
        cache: Cache,
        before_a_proof: Callable[[], None] = lambda: None,
    ) -> tuple[Cache, Variant]:
        """The step for num_blocks query blocks that ask for `needs`: of the narrowest tile that holds them, or the
        widest.

        One that is not compiled yet has to be wanted compile_patience times while another can serve: compiling takes
        longer than the last steps of a batch, in which few rows are left. One that could do more serves for good where
        it skips what is not asked for. Raises RuntimeError where bits differ in every step that could carry the blocks.
        """
        self._define(needs)
        tiles = self._tiles[kind]
        holding = [tile for tile in tiles if tile.blocks >= num_blocks] or [tiles[-1]]
        for tile in holding if self.kernels.computes_padding else holding[:1]:
            wanted = Variant(kind, tile, needs)
            if wanted not in self._proven:
                self._times_wanted[wanted] += 1
                nearest = self._nearest(wanted, num_blocks)
                if nearest is not None:
                    is_enough = nearest.tile == tile and self.kernels.skips
                    if is_enough or self._times_wanted[wanted] <= self.engine_config.compile_patience:
                        return cache, nearest
                before_a_proof()
                cache = self._prove(wanted, params, cache)
            if self._proven[wanted]:
                return cache, wanted
        if self.kernels.computes_padding:
            raise RuntimeError(
                f"every {kind} step that holds {num_blocks} query blocks gives other bits than the {self._definition} "
                "on this machine, so none may serve: take kernels 'xla'"
            )
        return cache, Variant(kind, BASE, needs)

    def _nearest(self, wanted: Variant, num_blocks: int) -> Variant | None:
        """Of the proven steps that can serve in the place of the wanted one, that of the nearest tile."""
        least = num_blocks if self.kernels.computes_padding else 0
        ready = [
            v
            for v, is_proven in self._proven.items()
            if is_proven and v.kind == wanted.kind and v.needs >= wanted.needs and v.tile.blocks >= least
        ]
        return min(ready, key=lambda v: (abs(v.tile.blocks - wanted.tile.blocks), v.needs), default=None)

    def _define(self, needs: Needs) -> None:
        """What is asked for first, the definition is compiled for."""
        if not self._proven:
            self._proven[Variant("decode", BASE, needs)] = True

    @property
    def _definition(self) -> Variant:
        return next(iter(self._proven))

    def warm_up(self, params: Decoder, cache: Cache) -> Cache:
        """Compile and prove every step that can serve."""
        needs = (Needs.ALL,) if self.kernels.skips else tuple(Needs)
        wanted = [Variant(kind, tile, n) for n in needs for kind, tiles in self._tiles.items() for tile in tiles]
        self._define(needs[0])
        self._compile(wanted, params, cache)
        for variant in wanted:
            if variant not in self._proven:
                cache = self._prove(variant, params, cache)
        for variant in () if self.kernels.computes_padding else self.refused:
            cache, _ = self._probe(variant._replace(tile=BASE), params, cache)
        return cache

    def base_logprobs(self, params: Decoder, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """(the probe's tokens int32 `[T]`, the base step's logprobs of all but the first, float32 `[T - 1]`).

        The cache is donated.
        """
        _, (_, logprobs, *_) = self._probe(Variant("decode", BASE, Needs.PLAIN), params, cache)
        return self._probe_tokens(), logprobs

    def run_decode(self, params, cache, tables, slots, rows, variant: Variant) -> tuple[Cache, RowOutputs]:
        return self._run(variant, params, cache, tables, slots, rows)

    def run_prefill(self, params, cache, tables, slots, blocks, rows, copies, variant: Variant):
        return self._run(variant, params, cache, tables, slots, (blocks, rows, copies))

    def _run(self, variant, params, cache, tables, slots, inputs) -> tuple[Cache, RowOutputs]:
        with self._first_use(variant):
            cache, out = self._step(variant)(params, cache, tables, slots, pack(inputs), **self._static(variant))
        begin_copies(out, self.batch.tells_details)
        return cache, out

    def _step(self, variant: Variant) -> Any:
        """The jitted step for the device at hand."""
        return step_of(variant.kind, on_gpu=jax.default_backend() == "gpu")

    def _static(self, variant: Variant) -> dict[str, Any]:
        """What a step is compiled for."""
        of_engine = dict(model_config=self.model_config, kernels=self.kernels, max_logprobs=self._max_logprobs)
        of_kind = dict(num_steps=self.engine_config.decode_steps) if variant.kind == "decode" else {}
        return of_engine | of_kind | dict(tile=variant.tile, needs=variant.needs)

    # -- compiling -----------------------------------------------------------------------------------------------------

    def _compile(self, wanted: Iterable[Variant], params: Decoder, cache: Cache) -> None:
        """Compile steps side by side, as many at a time as there are cores; JAX then has them when they are called.

        Alone, a step is compiled by its first call.
        """
        new, cores = [v for v in dict.fromkeys(wanted) if v not in self._compiled], machine.num_threads()
        if len(new) < 2 or cores < 2:
            return
        with concurrent.futures.ThreadPoolExecutor(min(len(new), cores)) as threads:
            for done in [threads.submit(self._compile_one, variant, params, cache) for variant in new]:
                done.result()

    def _compile_one(self, variant: Variant, params: Decoder, cache: Cache) -> None:
        with self._first_use(variant):
            self.lowered(variant, params, cache).compile()

    def lowered(self, variant: Variant, params: Any, cache: Any) -> Any:
        """The step before it is compiled; of `params` and `cache` only shapes and places are looked at."""
        inputs, how = self.call(variant)
        return self._step(variant).lower(params, cache, *inputs, **how)

    def call(self, variant: Variant) -> tuple[tuple, dict[str, Any]]:
        """(what the step takes after params and cache, for its shapes, what it is compiled for)."""
        inputs = pack(self.batch.smallest(variant.kind, variant.tile))
        return (self.batch.tables, self.batch.host_slots, inputs), self._static(variant)

    def widest(self, needs: Needs) -> list[Variant]:
        """The step of each kind that takes the most rows at a time."""
        return [Variant(kind, tiles[-1], needs) for kind, tiles in self._tiles.items()]

    def workspace(self, params: Any, cache: Any) -> int:
        """Bytes that the widest steps take beside their arguments, read from the compiled programs.

        They hardly depend on the number of pages, so that those of a small pool may be asked.
        """
        widest = self.widest(Needs.ALL)

        def taken(variant: Variant) -> int:
            found = self.lowered(variant, params, cache).compile().memory_analysis()
            return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes

        with concurrent.futures.ThreadPoolExecutor(min(len(widest), machine.num_threads())) as threads:
            return max(threads.map(taken, widest))

    @contextlib.contextmanager
    def _first_use(self, variant: Variant) -> Iterator[None]:
        if variant in self._compiled:
            yield
            return
        start = time.monotonic()
        self.report(f"compiling the {variant} …")
        yield
        self._compiled.add(variant)
        self.report(f"compiled the {variant} in {time.monotonic() - start:.1f} s")

    # -- proof ---------------------------------------------------------------------------------------------------------

    def _prove(self, variant: Variant, params: Decoder, cache: Cache) -> Cache:
        """Writes down whether the variant has the bits of the base tile that is compiled for the same needs.

        Raises RuntimeError where that one has not the definition's.
        """
        base = Variant("decode", BASE, variant.needs)
        first = () if base in self._proven else (self._definition,)
        self._compile([*first, base, variant], params, cache)
        cache, expected = self._answers(variant.needs, params, cache)
        if variant != base:
            cache, found = self._probe(variant, params, cache)
            self._proven[variant] = _same(expected, found)
            if not self._proven[variant]:
                self.report(f"the {variant} gives other bits than the base tile on this machine: it will not be used")
        return cache

    def _answers(self, needs: Needs, params: Decoder, cache: Cache) -> tuple[Cache, list[np.ndarray]]:
        """What the base tile that is compiled for `needs` says of the probe, once it has the definition's bits."""
        if needs not in self._expected:
            base, definition = Variant("decode", BASE, needs), self._definition
            cache, found = self._probe(base, params, cache)
            if base not in self._proven:
                cache, expected = self._answers(definition.needs, params, cache)
                if not _same(_without_likeliest(expected), _without_likeliest(found)):
                    raise RuntimeError(
                        f"the {base} gives other bits than the {definition} on this machine, so it may not serve"
                    )
                self._proven[base] = True
            self._expected[needs] = found
        return cache, self._expected[needs]

    def _probe(self, variant: Variant, params: Decoder, cache: Cache) -> tuple[Cache, list[np.ndarray]]:
        """Everything that a step says of the probe's tokens: outputs of each row, then the pages it wrote."""
        probe = self._probe_tokens()
        count = len(probe) - 1
        slot, tables, slots, histories = self._probe_inputs(probe)
        for upload in histories:
            cache = kv_cache.write_history(cache, *upload)
        run = self._probe_decode if variant.kind == "decode" else self._probe_prefill
        cache, outputs = run(variant, params, cache, tables, slots, slot, count)
        pages = steps.read_pages(cache, tables[slot, : self.engine_config.probe_pages])
        written = [
            _written_part(pool, count)
            for keys, values in zip(pages.keys, pages.values, strict=True)
            for pool in self.kernels.attention.by_token(on_host(keys), on_host(values))
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
        slots.request.named_ids[slot] = np.resize(probe, slots.request.named_ids.shape[1])
        return slot, tables, slots, history_uploads(self.batch.num_slots, [(slot, probe.tolist())])

    def _probe_decode(self, variant, params, cache, tables, slots, slot, count):
        answers, room = [], self.batch.num_blocks("decode", variant.tile)
        for first in range(0, count, room):
            once = range(first, min(first + room, count))
            size, times = len(once), max(variant.tile.rows // len(once), 1)  # as in _probe_prefill
            positions = [*once] * times
            rows = rows_of(room, range(room), [slot] * len(positions), positions, [True] * len(positions))
            cache, out = self.run_decode(params, cache, tables, slots, rows, variant)
            answers.append([np.asarray(x)[0, len(positions) - size : len(positions)] for x in _fields(out)])
        return cache, [np.concatenate(parts) for parts in zip(*answers, strict=True)]

    def _probe_prefill(self, variant, params, cache, tables, slots, slot, count):
        answers, batch, tile = [], self.batch, variant.tile
        room = min(self.engine_config.prefill_query_blocks, batch.num_blocks("prefill", tile)) * QUERY_BLOCK
        for first in range(0, count, room):
            size = min(room, count - first)
            once = pieces_of(slot, first, first + size, tile.tokens)
            before = once * max(tile.blocks // len(once) - 1, 0)  # a tile that holds more is full, its last rows count
            if batch.packs_rows:  # some as if they rode along
                once = pieces_of(slot, first, first + once[0][2], 1) + once[1:]
            blocks, first_rows = batch.query_blocks(before + once, tile)
            last = first_rows[len(before)]
            rows = rows_of(
                batch.prefill_rows(tile),
                range(last, last + size),
                [slot] * size,
                range(first, first + size),
                [True] * size,
            )
            nothing = np.zeros(self.engine_config.max_num_seqs, np.int32)
            cache, out = self.run_prefill(
                params, cache, tables, slots, blocks, rows, Copies(nothing, nothing, np.int32(0)), variant
            )
            answers.append([np.asarray(x)[:size] for x in _fields(out)])
        return cache, [np.concatenate(parts) for parts in zip(*answers, strict=True)]


def _fields(out: RowOutputs) -> tuple:
    return tuple(getattr(out, name) for name in ALWAYS + LIKELIEST)


def _without_likeliest(answers: list[np.ndarray]) -> list[np.ndarray]:
    """What two steps of different needs both say: what is always said, and the pages."""
    return answers[: len(ALWAYS)] + answers[len(ALWAYS + LIKELIEST) :]


def _same(expected: list[np.ndarray], found: list[np.ndarray]) -> bool:
    return all(equal_bits(a, b) for a, b in zip(expected, found, strict=True))


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
