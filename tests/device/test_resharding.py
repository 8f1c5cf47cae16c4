"""Weights travel from device to device, however a trainer has cut them."""

from conftest import run_script


def test_weights_come_home_and_not_through_the_host():
    ways, homes = run_script("device/reshard.py")
    assert {name: came for name, (_, _, came) in ways.items()} == dict.fromkeys(ways, True)
    assert {name: ours for name, (_, ours, _) in ways.items()} == dict.fromkeys(ways, 0)
    # What is measured is there: JAX alone takes the host's memory in all ways but those from one device.
    assert {name for name, (alone, _, _) in ways.items() if not alone} == {"one to many"}
    assert homes == [[2, 3], [2, 3]]
