"""What the device knows of the slots is what the host knows, and only what is new is sent."""

import jax
import numpy as np
import pytest

from jaxengine import SamplingParams
from jaxengine.config import EngineConfig
from jaxengine.device import slot_state
from jaxengine.device.slot_state import SLOT_ROWS, TABLE_ENTRIES, empty_state, write_slots, write_tables
from jaxengine.engine.batch import BatchBuilder
from jaxengine.host.sample import Request, Sample

CONFIG = EngineConfig(max_num_seqs=20, max_model_len=65_536, page_size=32, num_pages=5000)


def sample(slot: int, num_pages: int, first_page: int = 1, **sampling) -> Sample:
    request = Request(str(slot), [1, 2], SamplingParams(**sampling), (3, 4), slot, frozenset([7]), 60_000)
    return Sample(request, 0, slot, slot=slot, pages=list(range(first_page, first_page + num_pages)))


def tables_after(batch: BatchBuilder, samples: list[Sample], state=None):
    state = state or empty_state(batch.num_slots, CONFIG.pages_per_seq)
    for entries in batch.table_changes(samples):
        assert entries.shape[1] in TABLE_ENTRIES
        state = write_tables(state, entries)
    return state


@pytest.mark.parametrize("num_pages", [0, 1, 31, 32, 33, 1024, 1025, 2048])
def test_tables_hold_the_pages(num_pages):
    batch, samples = BatchBuilder(CONFIG), [sample(3, num_pages), sample(19, 5, 3000)]
    expected = batch.tables
    for each in samples:
        expected[each.slot, : len(each.pages)] = each.pages
    assert np.array_equal(tables_after(batch, samples).tables, expected), "the padding goes nowhere"


def test_only_new_pages_are_sent():
    batch, grown = BatchBuilder(CONFIG), sample(3, 1000)
    state = tables_after(batch, [grown, sample(4, 1000)])
    grown.pages += [77, 78]
    (entries,) = batch.table_changes([grown, sample(4, 1000)])
    assert entries[:, entries[0] < batch.num_slots].tolist() == [[3, 3], [1000, 1001], [77, 78]]
    state = write_tables(state, entries)
    assert np.asarray(state.tables)[3, 998:1003].tolist() == [999, 1000, 77, 78, 0]
    assert list(batch.table_changes([grown])) == [], "nothing is sent twice"
    grown.slot = -1
    grown.pages += [79]
    assert list(batch.table_changes([grown])) == [], "preempted since"


def test_a_slot_that_is_given_away_gets_its_whole_table():
    batch = BatchBuilder(CONFIG)
    state = tables_after(batch, [sample(3, 10)])
    other = sample(3, 4, 100)
    batch.admit(other)
    assert np.asarray(tables_after(batch, [other], state).tables)[3, :4].tolist() == [100, 101, 102, 103]


def test_only_slots_that_changed_are_sent():
    batch, state = BatchBuilder(CONFIG), empty_state(CONFIG.max_num_seqs + 1, CONFIG.pages_per_seq)
    sent = 0
    for slots in (range(11), [4], []):
        for slot in slots:
            batch.admit(sample(slot, 1, temperature=0.5 + slot / 100, logit_bias={5: 1.0}))
        changes = list(batch.slot_changes())
        assert [len(which) for which, _ in changes] == [SLOT_ROWS] * -(-len(slots) // SLOT_ROWS)
        for which, rows in changes:
            state, sent = write_slots(state, which, rows), sent + 1
        for a, b in zip(jax.tree.leaves(batch.host_slots), jax.tree.leaves(state.slots), strict=True):
            assert a.dtype == b.dtype and a.tobytes() == np.asarray(b).tobytes()
    assert sent == 3


def test_changes_are_made_in_place_by_few_programs():
    """A change donates what it changes, and after those of `empty_changes` none is compiled."""
    batch = BatchBuilder(CONFIG)
    state = empty_state(batch.num_slots, CONFIG.pages_per_seq)
    tables, slots = batch.empty_changes()
    for entries in tables:
        state = write_tables(state, entries)
    for which, rows in slots:
        state = write_slots(state, which, rows)
    assert not np.asarray(state.tables).any()
    sizes = slot_state._set_entries._cache_size(), slot_state._set_rows._cache_size()
    before = state
    for count in (1, 40, 1500):
        state = tables_after(batch, [sample(count % 20, count)], state)
    batch.admit(sample(3, 1))
    for which, rows in batch.slot_changes():
        state = write_slots(state, which, rows)
    assert before.tables.is_deleted() and all(x.is_deleted() for x in jax.tree.leaves(before.slots))
    assert (slot_state._set_entries._cache_size(), slot_state._set_rows._cache_size()) == sizes
