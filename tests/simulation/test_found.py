"""What the simulation found, each in its smallest form."""

import pytest
from device import Fuse
from world import World

from jaxengine.config import EngineConfig
from jaxengine.host.scheduler import MustCollect


def test_a_request_whose_end_was_settled_is_returned_though_memory_runs_out(monkeypatch):
    """It ends before the step's plan is made, and the device fails after it."""
    world = World(EngineConfig(overlap=True, max_model_len=64, num_pages=8))
    world.add([2], max_tokens=1)
    world.add([3], max_tokens=10)
    world.step()

    def settle_first():
        monkeypatch.undo()
        raise MustCollect

    monkeypatch.setattr(world.scheduler, "schedule", settle_first)
    world.device.fuse = Fuse(0, after=False, lose=False, no_memory=True)
    world.step()
    assert [request.samples[0].drawn.finish_reason for request in world.ended] == ["length", "error"]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("no_memory", [False, True], ids=["error", "no memory"])
def test_an_interrupt_in_a_recovery_loses_nothing(overlap, no_memory):
    """At each line between a failure of the device and the end of the recovery from it."""
    caught = 0
    for line in range(1, 400):
        world = World(EngineConfig(overlap=overlap, max_model_len=64, num_pages=8))
        world.add([2] * 20, max_tokens=4, n=2)
        world.add([3], max_tokens=1)
        world.step()
        world.device.fuse = Fuse(0, after=False, lose=True, no_memory=no_memory)
        world.step(interrupt_after=line)
        world.drain()
        caught += world.stats["faults in a recovery"]
    assert caught > 0


def test_a_step_that_is_put_away_late_disturbs_no_other():
    """An interrupt between a step's halves may leave it in a traceback, for as long as somebody keeps that."""
    world = World(EngineConfig(max_model_len=64, num_pages=8))
    world.add([2] * 20, max_tokens=4, n=2)
    with world._plugged():
        late = world.engine.stepping()
        next(late)
    world.step()
    running, pool = list(world.scheduler.running), world.scheduler.page_pool
    late.close()
    assert running and world.scheduler.running == running and world.scheduler.page_pool is pool
    world.drain()


def test_an_interrupt_while_a_request_is_queued_leaves_the_queue_whole():
    for line in range(1, 60):
        world = World(EngineConfig(max_model_len=64, num_pages=8))
        world.add([2] * 20, max_tokens=4, interrupt_after=line, n=2)
        world.add([3] * 20, max_tokens=4)
        world.drain()
