"""The host half in a simulated world.

A hundred thousand steps, the same run from the same seed, and bugs that have to be found.
"""

import re

import invariants
import pytest
import world
from driver import Episode, run
from planted import PLANTED

STEPS = 100_000
MUST_HAPPEN = (
    "hits",
    "hits under new weights",
    "hits of recomputed sequences",
    "preemptions",
    "settled",
    "forks",
    "copied pages",
    "versions",
    "recomputed under new weights",
    "kept under new weights",
    "restarts",
    "faults",
    "faults in a recovery",
    "ended by stop",
    "ended by length",
    "ended by abort",
    "ended by error",
    "aborted while waiting",
    "aborted while preempted",
    "aborted while prefilling",
    "aborted while decoding",
    "aborted while under way",
    "aborted while ended",
)
LEAST = 25  # times that each of these happens
MOST_EPISODES = 120  # in which a planted bug has to show


def test_a_hundred_thousand_steps():
    stats = run(STEPS, seed=0)
    assert stats["steps"] >= STEPS
    assert {name: stats[name] for name in MUST_HAPPEN if stats[name] < LEAST} == {}, (
        "a simulation of what hardly happens"
    )


@pytest.mark.parametrize("seed", [3, 4])
def test_a_seed_brings_back_its_run(seed):
    first, second = Episode(seed), Episode(seed)
    assert first.run() == second.run()
    assert first.world.watch.trace == second.world.watch.trace != Episode(seed + 10).world.watch.trace


def first_failure(**options) -> tuple[int, Exception]:
    """(seed, error) of the first episode that fails."""
    for seed in range(MOST_EPISODES):
        episode = Episode(seed, **options)
        try:
            episode.run()
        except Exception as error:
            return seed, error
    pytest.fail(f"not found in {MOST_EPISODES} episodes")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(name, monkeypatch):
    plant, message = PLANTED[name]
    plant(monkeypatch)
    seed, error = first_failure()
    assert isinstance(error, AssertionError) and re.search(message, str(error)), f"found as something else: {error!r}"
    assert f"--seed {seed}" in error.__notes__[0]
    monkeypatch.undo()
    Episode(seed).run()


@pytest.mark.parametrize(
    "name",
    [
        "a_hit_compares_the_tokens_alone",
        "the_hash_leaves_out_the_version",
        "an_evicted_page_can_still_be_found",
        "forks_share_the_page_that_is_partly_filled",
        "the_copy_for_a_fork_is_left_out",
    ],
)
def test_answers_alone_betray_what_reads_wrong_pages(name, monkeypatch):
    """No invariant looks, and the device draws from whatever it reads.

    Then it is a token that differs from the request's run alone.
    """
    checks = (invariants.Watch, "see"), (invariants.Resident, "check_hit"), (invariants.CacheCheck, "check")
    for owner, check in (*checks, (world, "check_step")):
        monkeypatch.setattr(owner, check, lambda *given: None)
    plant, _ = PLANTED[name]
    plant(monkeypatch)
    _, error = first_failure(trusting=True)
    assert "than alone" in str(error), f"found as something else: {error!r}"
