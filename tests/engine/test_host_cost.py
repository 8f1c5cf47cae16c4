"""The benchmark of the host's cost runs: its device that does nothing answers what the engine asks for."""

from benchmarks import host_cost


def test_a_step_over_no_device_has_a_cost():
    with host_cost.without_device():
        engine = host_cost.started(host_cost.Case(running=2, context=40, waiting=1, answer=8), overlap=True)
        computed, passed = host_cost.microseconds(engine, steps=1)
        placed, of_two = host_cost.of_replicas(2, running=2)
    assert min(computed, passed, placed, of_two) > 0
