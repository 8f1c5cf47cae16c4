"""Block tables and slots on the device are the host's, step for step, whatever fails in between."""

import jax
import numpy as np
import pytest
from neighbours import answers, assert_idle, start


def assert_in_step(llm) -> None:
    """The rows of every running sample, as the next step will find them."""
    engine = llm.engine
    tables, slots = np.asarray(engine.slot_state.tables), jax.tree.map(np.asarray, engine.slot_state.slots)
    for each in engine.scheduler.running:
        assert tables[each.slot, : len(each.pages)].tolist() == each.pages
        for a, b in zip(jax.tree.leaves(engine.batch.host_slots), jax.tree.leaves(slots), strict=True):
            assert a[each.slot].tobytes() == b[each.slot].tobytes()


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("lose", [False, True], ids=["kept", "lost"])
def test_the_device_follows_the_host_through_a_failure(tiny, overlap, lose, monkeypatch):
    """Pages are short, so that samples are preempted; then a step fails, and takes what it changes with it or not."""
    with tiny.engine.adjusted(overlap=overlap, held_pages=tiny.engine_config.num_pages - 14):
        alone = start(tiny)
        while tiny.engine.has_work:
            tiny.engine.step()
        requests = start(tiny)
        for _ in range(6):
            tiny.engine.step()
            assert_in_step(tiny)
        state = tiny.engine.slot_state

        def failing(*_):
            for array in jax.tree.leaves(state) if lose else ():
                array.delete()
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(tiny.engine, "_change_slots", failing)
            for _ in range(40):
                tiny.engine.step()
    while not all(request.is_finished for request in requests):
        tiny.engine.step()
        assert_in_step(tiny)
    assert answers(tiny, requests) == answers(tiny, alone)
    assert_idle(tiny)
