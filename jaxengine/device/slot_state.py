"""What the host tells the device of each slot: block tables, sampling parameters, requests.

It stays on the device from step to step and is changed by what is new: a page that a sequence got, a slot that was
given away. Changes are padded to few sizes, so that little is compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxengine.base.pytree import pytree
from jaxengine.device.packed import Packed, pack
from jaxengine.device.sampling_arrays import empty_slots
from jaxengine.device.step_inputs import Slots

TABLE_ENTRIES = (32, 1024)  # that one change of the tables carries
SLOT_ROWS = 8  # that one change of the slots carries


@pytree
class SlotState:
    """Steps read it and change nothing in it."""

    tables: Int[Array, "slots n"]
    slots: Slots


def empty_state(num_slots: int, pages_per_seq: int, home: jax.sharding.Sharding | None = None) -> SlotState:
    """Slots that hold nothing, on every device of a mesh (`home`), or on the default device.

    Not committed to that one, as what the host hands to a step.
    """
    slots = jax.tree.map(lambda x: jnp.array(x, device=home), empty_slots(num_slots))
    return SlotState(jnp.zeros((num_slots, pages_per_seq), jnp.int32, device=home), slots)


def write_tables(state: SlotState, entries: Int[np.ndarray, "3 N"]) -> SlotState:
    """Put page `entries[2, i]` into place `entries[1, i]` of the table of slot `entries[0, i]`.

    A slot after the last one is padding. The tables are donated.
    """
    return dataclasses.replace(state, tables=_set_entries(state.tables, entries))


def write_slots(state: SlotState, which: Int[np.ndarray, " A"], rows: Slots) -> SlotState:
    """Put `rows`, of which there are A, into the slots `which`; a slot after the last one is padding.

    The slots are donated.
    """
    return dataclasses.replace(state, slots=_set_rows(state.slots, pack((which, rows))))


def _entries(tables: Int[Array, "slots n"], entries: Int[Array, "3 N"]) -> Int[Array, "slots n"]:
    slots, places, pages = entries
    return tables.at[slots, places].set(pages, mode="drop")


def _rows(slots: Slots, rows: Packed) -> Slots:
    which, values = rows.unpack()
    return jax.tree.map(lambda whole, new: whole.at[which].set(new, mode="drop"), slots, values)


_set_entries = jax.jit(_entries, donate_argnums=0)
_set_rows = jax.jit(_rows, donate_argnums=0)
