"""Checksums of pages: they find pages of the KV cache that a fault of memory or another program has changed.

After every step the keys and values of each token that the step's samples hold are summed up on the device
(device/checksums.py). Before a token of that step is accepted, the sums are compared with those of the same tokens after
earlier steps.
Covered is every token in a page from the end of the step that wrote it: in full pages and in the front of partly filled ones,
in shared pages, and in pages that lay in the prefix cache since. Not covered are what a step itself writes or reads wrongly,
damage that is gone again when the step ends, weights, token history and block tables. All pages in use are read once more a
step, and the host waits for the sums.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxengine.base.numbers import ceil_to
from jaxengine.device import checksums
from jaxengine.device.kv_cache import Cache
from jaxengine.host.page_pool import PagePool
from jaxengine.host.sample import Sample
from jaxengine.ops.kernels import Kernels

PAGES = 64  # that one call sums up: the shape is fixed, so that it is compiled once
CAUSE = "a page of its keys and values was overwritten by a fault"


@dataclasses.dataclass
class Watch:
    """The pages of a step's samples as they are after it; the sums may still be under way."""

    tables: list[list[int]]
    pages: list[tuple[int, int, int]]  # (page, its births, tokens in it)
    sums: list[jax.Array]


class PageChecksums:
    """What every watched page summed up to: one number a token."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._known: dict[int, tuple[int, np.ndarray]] = {}  # page -> births, sums

    def watch(self, cache: Cache, samples: Sequence[Sample], pool: PagePool) -> Watch:
        """Start summing up what the samples hold, those tokens included that the step under way writes."""
        filled: dict[int, int] = {}
        for sample in samples:
            for i, page in enumerate(sample.pages):
                filled[page] = min(sample.num_computed - i * pool.page_size, pool.page_size)
        pages = [(page, pool.births[page], count) for page, count in filled.items() if count > 0]
        ids = np.zeros(ceil_to(len(pages), PAGES), np.int32)
        ids[: len(pages)] = [page for page, *_ in pages]
        sums = [checksums.token_sums(cache, part, kernels=self.kernels) for part in ids.reshape(-1, PAGES)]
        return Watch([list(sample.pages) for sample in samples], pages, sums)

    def damaged(self, watch: Watch, pool: PagePool) -> set[int]:
        """The pages in which a token changed since they were watched before; what is new in the others is remembered."""
        pages = set()
        rows = np.concatenate([np.asarray(part) for part in watch.sums]) if watch.sums else []
        for (page, births, count), sums in zip(watch.pages, rows, strict=False):
            if births != pool.births[page]:
                continue  # handed out again since
            known_births, known_sums = self._known.get(page, (0, sums))
            num_known = min(len(known_sums), count) if known_births == births else 0
            if np.array_equal(known_sums[:num_known], sums[:num_known]):
                self._known[page] = births, sums[:count]
            else:
                pages.add(page)
        return pages
