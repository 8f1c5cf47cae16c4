"""The simulated world driven by hypothesis: whatever it breaks, it breaks again with fewer and smaller moves."""

import pytest
from device import Fuse
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from planted import PLANTED
from world import SALTS, World

from jaxengine.config import QUERY_BLOCK, EngineConfig

# Derandomised: a suite that passed passes again. The seeds of test_simulation.py are there to look further.
BOUNDED = settings(
    max_examples=300,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CONFIGS = st.builds(
    EngineConfig,
    overlap=st.booleans(),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from([16, 40, 128]),
    max_model_len=st.just(128),
    page_size=st.sampled_from([16, 32, 64]),
    num_pages=st.integers(4, 24),
    enable_prefix_caching=st.booleans(),
    decode_steps=st.integers(1, 4),
)


class Machine(RuleBasedStateMachine):
    """Each rule is one thing that may happen between two steps."""

    requests = 0  # of the latest example; the latest of a failure is the smallest

    @initialize(config=CONFIGS, tokens_per_block=st.sampled_from([1, QUERY_BLOCK]), packs_rows=st.booleans())
    def start(self, config, tokens_per_block, packs_rows):
        self.world = World(config, tokens_per_block, packs_rows)
        Machine.requests = 0

    @rule(
        front=st.integers(2, 3),
        length=st.integers(1, 70),
        last=st.integers(2, 4),
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 30),
        stops=st.booleans(),
        salt=st.sampled_from(SALTS),
        scored=st.booleans(),
    )
    def add(self, front, length, last, n, max_tokens, stops, salt, scored):
        """Prompts of one token again and again: they share what they can."""
        Machine.requests += 1
        prompt = [front] * (length - 1) + [last]
        self.world.add(prompt, max_tokens, stops, salt, n=n, prompt_logprobs=0 if scored else None, entropy=scored)

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(lines=st.integers(1, 400))
    def interrupted_step(self, lines):
        self.world.step(interrupt_after=lines)

    @rule(name=st.integers(0, 5).map(str))
    def abort(self, name):
        self.world.abort(name)

    @rule(num_pages=st.integers(1, 24))
    def squeeze(self, num_pages):
        self.world.squeeze(num_pages)

    @rule()
    def relax(self):
        self.world.relax()

    @rule()
    def preempt_newest(self):
        self.world.preempt_newest()

    @rule(keep=st.booleans())
    def new_weights(self, keep):
        self.world.raise_version(keep)

    @rule()
    def rebuild(self):
        self.world.rebuild()

    @rule(fuse=st.builds(Fuse, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()))
    def fault(self, fuse):
        self.world.device.fuse = fuse

    @rule(rows=st.integers(1, 20))
    def not_finite(self, rows):
        self.world.device.rows_until_nan = rows

    @invariant()
    def holds(self):
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


def test_no_moves_break_the_host_half():
    run_state_machine_as_test(Machine, settings=BOUNDED)


def test_a_planted_bug_shrinks_to_a_few_moves(monkeypatch):
    """Two requests with the same front and new weights between them: it takes no more."""
    plant, message = PLANTED["the_hash_leaves_out_the_version"]
    plant(monkeypatch)
    found = settings(BOUNDED, max_examples=1000, phases=[Phase.generate, Phase.shrink])
    with pytest.raises(AssertionError, match=message):
        run_state_machine_as_test(Machine, settings=found)
    assert Machine.requests <= 2, "the smallest failure has more requests than it needs"
