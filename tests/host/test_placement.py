"""Which replica serves a request: a rule of the requests so far."""

import subprocess
import sys

from jaxengine.host.placement import FAR_MORE, REMEMBERED, Placement


def test_the_least_busy_one_and_the_first_of_several():
    placement = Placement(page_size=4)
    assert placement.choose([1, 2, 3, 4], [2, 1, 1]) == 1
    assert placement.choose([9], [3, 0, 0]) == 1  # no whole page: nothing to find again
    assert placement.choose([9], [0, 5, 5]) == 0


def test_what_begins_alike_goes_where_its_pages_are_until_that_one_has_far_more_to_do():
    placement, prompt = Placement(page_size=4), [1, 2, 3, 4, 5]
    first = placement.choose(prompt, [0, 0])
    assert placement.choose([1, 2, 3, 4, 9], [FAR_MORE, 0]) == first == 0
    assert placement.choose([7, 7, 7, 7], [FAR_MORE, 0]) == 1
    assert placement.choose(prompt, [FAR_MORE + 1, 0]) == 1
    assert placement.choose(prompt, [0, 0]) == 1  # it went there last


def test_few_beginnings_are_remembered():
    placement = Placement(page_size=1)
    for token in range(REMEMBERED + 10):
        placement.choose([token], [0, 0])
    assert len(placement._went) == REMEMBERED


def test_every_process_places_alike():
    code = (
        "from jaxengine.host.placement import Placement\n"
        "p, loads, went = Placement(2), [0, 0, 0], []\n"
        "for i in range(200):\n"
        "    went.append(p.choose([i % 7, i % 11, i], loads))\n"
        "    loads[went[-1]] += i % 3\n"
        "print(went)"
    )

    def run(seed: str) -> bytes:
        return subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True).stdout

    assert run("1") == run("2") != b""
