"""The queue against a list."""

import random
from types import SimpleNamespace

import pytest

from jaxengine.host.queue import Queue


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_is_a_list(seed):
    rng, samples = random.Random(seed), [Waiting(number=i, priority=0) for i in range(30)]
    expected = samples[:10]
    queue = Queue(expected)
    for _ in range(300):
        outside = [sample for sample in samples if sample not in expected]
        move = rng.choice(["push", "push_front", "pop", "discard"])
        if move == "push" and outside:
            queue.push(outside[0])
            expected.append(outside[0])
        elif move == "push_front" and outside:
            queue.push_front(outside[-1])
            expected.insert(0, outside[-1])
        elif move == "pop" and expected:
            assert queue.pop() is expected.pop(0)
        elif move == "discard":
            gone = rng.choice(samples)
            queue.discard(gone)
            expected = [sample for sample in expected if sample is not gone]
        assert list(queue) == expected and len(queue) == len(expected) and bool(queue) == bool(expected)
        assert not expected or queue.head is expected[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_line_for_each_priority(seed):
    rng, samples = random.Random(seed), [Waiting(number=i, priority=i % 4 - 1) for i in range(40)]
    lines: dict[int, list] = {priority: [] for priority in (-1, 0, 1, 2)}
    queue = Queue()
    for _ in range(400):
        sample, move = rng.choice(samples), rng.choice(["push", "push_front", "pop", "discard"])
        line = lines[sample.priority]
        if move == "pop" and len(queue):
            gone = next(each for each in lines.values() if each).pop(0)
            assert queue.pop() is gone
        elif move == "discard":
            queue.discard(sample)
            lines[sample.priority] = [each for each in line if each is not sample]
        elif move.startswith("push") and sample not in line:
            getattr(queue, move)(sample)
            line.insert(0 if move == "push_front" else len(line), sample)
        expected = [each for priority in sorted(lines) for each in lines[priority]]
        assert list(queue) == expected and len(queue) == len(expected) == sum(map(len, queue._lines.values()))


def test_the_length_is_a_number_that_is_kept():
    """Other threads ask for it, and lines that change while they are gone through would raise."""
    queue = Queue([Waiting(number=i, priority=i % 2) for i in range(5)])
    queue.push(queue.head)
    queue.discard(Waiting(number=9, priority=7))
    queue._lines = None
    assert len(queue) == 5
