"""What processes compare of a plan: all that reaches the device, and nothing that grows with a context."""

from types import SimpleNamespace

import pytest

from jaxengine.host.plan import Chunk, Decode, Plan, Row
from jaxengine.host.plan_record import record
from jaxengine.sampling_params import SamplingParams


def sample(slot: int, pages: list[int], **request):
    given = dict(
        request_id="0", prompt_token_ids=[1, 2], sampling=SamplingParams(), key=(0, 0), prompt_index=0, limit=9
    )
    return SimpleNamespace(request=SimpleNamespace(**given | request), index=0, slot=slot, version=0, pages=pages)


def plan(slot=3, position=7, stop=5, scored=False, target=9, page=4, **request) -> Plan:
    first, other = sample(slot, [1, page], **request), sample(1, [2])
    chunk = Chunk(other, 0, stop, True, rows=[Row(other, 4, scored)])  # type: ignore[arg-type]
    return Plan([Decode(first, position, 1)], [chunk], [(8, target)], [first], [first])  # type: ignore[arg-type]


CHANGES = [
    dict(slot=2), dict(position=8), dict(stop=6), dict(scored=True), dict(target=10), dict(page=5),
    dict(prompt_token_ids=[1, 3]), dict(sampling=SamplingParams(temperature=0.5)), dict(key=(0, 1)),
    dict(prompt_index=1), dict(limit=8), dict(request_id="1"),
]  # fmt: skip


def test_equal_plans_have_one_record():
    assert repr(record(plan())) == repr(record(plan()))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_any_change_is_seen(change):
    assert repr(record(plan(**change))) != repr(record(plan()))


def test_a_long_context_makes_no_longer_record():
    short, long = Plan(grown=[sample(0, [5])]), Plan(grown=[sample(0, list(range(9000)))])  # type: ignore[list-item]
    assert len(repr(record(long))) < len(repr(record(short))) + 10
