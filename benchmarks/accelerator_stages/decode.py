"""The decode step on the device: what it takes, against reading its weights and contexts at the speed of a copy."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from accelerator_stages import here, models
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine import LLM
from jaxengine.device.needs import Needs
from jaxengine.engine.batch import rows_of
from pallas_kernels.numbers import cdiv

REPEATS, TINY_REPEATS = 20, 2


def measurements(settings: Settings, model: str) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    opened = functools.cache(functools.partial(models.open_llm, model, tiny))  # by the first measurement, for all
    pairs = models.TINY_DECODES if tiny else models.DECODES
    return [Measurement(f"B={b}, context {c}", functools.partial(measured, opened, b, c, tiny)) for b, c in pairs]


def measured(opened: Callable[[], LLM], batch: int, context: int, tiny: bool) -> Iterator[Row]:
    llm = opened()
    needed = batch * cdiv(context, llm.engine_config.page_size) + 1
    if needed > llm.engine_config.num_pages or batch > llm.engine_config.max_num_seqs:
        yield {"note": f"does not fit: it needs {needed} pages, there is room for {llm.engine_config.num_pages}"}
        return
    step, tile_rows = decode_step(llm, batch, context)
    spent = here.seconds(step, (), TINY_REPEATS if tiny else REPEATS)
    moved = models.read_bytes(llm.params) + batch * context * models.token_bytes(llm.config)
    yield {
        "kernels": llm.engine_config.kernels,
        "rows of a tile": tile_rows,
        "µs": spent * 1e6,
        "GB": moved / 1e9,
        "share of copy": moved / spent / here.copy_bandwidth(tiny),
        "tokens/s": batch / spent,
    }


def decode_step(llm: LLM, batch: int, context: int) -> tuple[Callable[[], jax.Array], int]:
    """(a call that runs the engine's step for the last token of `batch` contexts, rows of its tile).

    Nothing is prefilled: the contexts are pages of zeros, all of them different ones, so that each is read.
    """
    engine, pages = llm.engine, cdiv(context, llm.engine_config.page_size)
    tables, slots = engine.batch.tables, jax.tree.map(np.copy, engine.batch.host_slots)
    ids = 1 + np.random.RandomState(0).permutation(batch * pages)  # page 0 is scratch
    tables[:batch, :pages] = ids.reshape(batch, pages)
    slots.request.limit[:] = llm.engine_config.max_model_len + 1
    on_device = jax.device_put((tables, slots))
    wanted = "decode", batch, Needs.PLAIN
    engine.cache, variant = engine.step_variants.pick(*wanted, engine.params, engine.cache)
    size = engine.batch.num_blocks("decode", variant.tile)
    rows = rows_of(size, range(batch), range(batch), [context - 1] * batch, [False] * batch)

    def step() -> jax.Array:
        engine.cache, out = engine.step_variants.run_decode(engine.params, engine.cache, *on_device, rows, variant)
        return out.tokens

    return step, variant.tile.rows
