"""The canary: finds pages of the KV cache that changed behind the engine's back, by a fault of memory or of another program.

Behind every step the keys and values of each token that the step's sequences hold are summed up on the device (device/checksums.py). Before
a token of that step is accepted, the sums are compared with those that the same tokens had behind earlier steps.
Covered is every token in a page from the end of the step that wrote it: in full pages and in the front of partly filled ones, in pages
that many share, and in pages that lay in the prefix cache since. Not covered: what a step itself writes or reads wrongly, damage that is
gone again when the step ends, weights, token history and block tables. It reads all pages in use once more a step, and waits for the sums.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxengine.device import checksums
from jaxengine.device.kv_cache import Cache
from jaxengine.host.page_pool import PagePool
from jaxengine.host.sample import Sample
from jaxengine.ops.kernels import Kernels

PAGES = 64  # that one call sums up: the shape is fixed, so that it is compiled once
CAUSE = "a page of its keys and values was overwritten by a fault"


@dataclasses.dataclass
class Watch:
    """The pages of a step's sequences as they stand behind it; the sums may still be under way."""

    tables: list[list[int]]
    pages: list[tuple[int, int, int]]  # (page, its births, tokens in it)
    sums: list[jax.Array]


class PageChecksums:
    """What every watched page summed up to: one number a token."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._known: dict[int, tuple[int, np.ndarray]] = {}  # page -> births, sums

    def watch(self, cache: Cache, samples: Sequence[Sample], blocks: PagePool) -> Watch:
        """Start summing up what the sequences hold, those tokens included that the step under way writes."""
        filled = {
            page: min(s.num_computed - i * blocks.page_size, blocks.page_size)
            for s in samples
            for i, page in enumerate(s.pages)
        }
        pages = [(page, blocks.births[page], count) for page, count in filled.items() if count > 0]
        ids = np.zeros(-(-len(pages) // PAGES) * PAGES, np.int32)
        ids[: len(pages)] = [page for page, *_ in pages]
        sums = [checksums.token_sums(cache, part, kernels=self.kernels) for part in ids.reshape(-1, PAGES)]
        return Watch([list(s.pages) for s in samples], pages, sums)

    def damaged(self, watch: Watch, blocks: PagePool) -> set[int]:
        """The pages that lost a token since they were watched before; what is new in the others is remembered."""
        found = set()
        for (page, births, count), sums in zip(
            watch.pages, (row for part in watch.sums for row in np.asarray(part)), strict=False
        ):
            if births != blocks.births[page]:
                continue  # handed out anew since
            known = self._known.get(page, (0, sums))
            same = min(len(known[1]), count) if known[0] == births else 0
            if np.array_equal(known[1][:same], sums[:same]):
                self._known[page] = births, sums[:count]
            else:
                found.add(page)
        return found
