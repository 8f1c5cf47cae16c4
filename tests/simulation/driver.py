"""Chance, from a seed: an engine's configuration, its requests, and what happens to them."""

import random
from collections import Counter

from device import Fuse
from model import VOCAB
from world import SALTS, World

from jaxengine.config import QUERY_BLOCK, EngineConfig

ACTIONS = 400  # steps of an episode before it drains
CROWD = 24  # waiting samples beyond which nobody comes


class Episode:
    """A world and what a seed makes of it."""

    def __init__(self, seed: int, **world) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.config = random_config(self.rng)
        self.world = World(self.config, self.rng.choice([1, QUERY_BLOCK]), self.rng.choice([False, True]), **world)
        self.fronts = [self.rng.choices(range(2, 6), k=self.config.max_model_len) for _ in range(3)]
        self.weather = 1

    def run(self) -> Counter[str]:
        """The whole episode. Any failure names the seed that brings it back."""
        try:
            for _ in range(ACTIONS):
                self.act()
            self.world.drain()
        except Exception as error:
            error.add_note(
                f"step {self.world.stats['steps']} of seed {self.seed}; "
                f"python tests/simulation --seed {self.seed} --steps 1"
            )
            raise
        return self.world.stats

    def act(self) -> None:
        rng, world = self.rng, self.world
        happens = lambda chance: rng.random() < chance
        if happens(0.02):
            self.weather = rng.choice([0, 0, 1, 1, 3])
        while not world.live or (len(world.scheduler.waiting) < CROWD and happens(0.25 * self.weather)):
            self.arrive()
        if happens(0.03):
            world.abort(self.somebody(), self.interrupt())
        if happens(0.05):
            world.relax()
        elif happens(0.03):
            world.squeeze(rng.choice([2, 5, self.config.num_pages]))
        self.disturb(happens)
        if happens(0.004):
            world.device.fuse = self.fuse(calls=0)
            world.step(interrupt_after=rng.randint(1, 400))
        world.step(self.interrupt())

    def interrupt(self) -> int:
        """Behind how many lines; mostly never."""
        return self.rng.randint(1, 400) if self.rng.random() < 0.004 else 0

    def somebody(self) -> str:
        """A request to abort. Most are still in the queue, so those that ran get a chance of their own."""
        ran = [s.request.request_id for s in self.world.samples if s.drawn.token_ids or s.num_computed]
        return self.rng.choice([*self.world.live, "nobody"] if self.rng.random() < 0.4 or not ran else ran)

    def disturb(self, happens) -> None:
        rng, world = self.rng, self.world
        if happens(0.01):
            world.preempt_newest()
        if happens(0.008):
            world.raise_version(keep=rng.random() < 0.5)
        if happens(0.001):
            world.rebuild()
        if happens(0.003):
            world.device.rows_until_nan = rng.randint(1, 20)
        if happens(0.004):
            world.device.fuse = self.fuse(calls=rng.randint(0, 3))

    def fuse(self, calls: int) -> Fuse:
        return Fuse(calls, *(self.rng.random() < 0.5 for _ in range(3)))

    def arrive(self) -> None:
        rng, world = self.rng, self.world
        params = dict(
            n=rng.choice([1, 1, 1, 2, 4, 7]),
            logprobs=rng.choice([None] * 7 + [0]),
            raw_logprobs=rng.random() < 0.1,
            entropy=rng.random() < 0.1,
            prompt_logprobs=rng.choice([None] * 7 + [0]),
        )
        world.add(
            self.prompt(),
            rng.choice([1, 2, 8, 30, 60]),
            stops=rng.random() < 0.5,
            salt=rng.choice([*SALTS, ""]),
            interrupt_after=rng.randint(1, 30) if rng.random() < 0.01 else 0,
            **params,
        )

    def prompt(self) -> list[int]:
        """A common front, or a conversation that goes on; cut near the edge of a page as often as not."""
        rng, size = self.rng, self.config.page_size
        front = rng.choice(self.fronts)
        if self.world.ended and rng.random() < 0.3:
            front = rng.choice(rng.choice(self.world.ended).samples).token_ids
        edge = rng.randint(0, 3) * size + rng.choice([-1, 0, 1])
        length = edge if rng.random() < 0.5 else rng.randint(0, 3 * size)
        return front[: max(length, 0)] + rng.choices(range(2, VOCAB), k=rng.choice([0, 1, 1, 5, 20])) or [2]


def random_config(rng: random.Random) -> EngineConfig:
    return EngineConfig(
        overlap=rng.random() < 0.5,
        max_num_seqs=rng.choice([1, 2, 4, 8, 12]),
        max_num_batched_tokens=rng.choice([16, 40, 64, 256]),
        max_model_len=rng.choice([64, 128, 256]),
        page_size=rng.choice([16, 16, 32, 64]),
        num_pages=rng.choice([4, 7, 12, 24, 40]),
        enable_prefix_caching=rng.random() < 0.9,
        decode_steps=rng.choice([1, 1, 2, 5]),
    )


def run(steps: int, seed: int, report=lambda seed, stats: None) -> Counter[str]:
    """Episodes from `seed` on until they have taken `steps` steps."""
    total: Counter[str] = Counter()
    while total["steps"] < steps:
        total.update(Episode(seed).run(), episodes=1)
        report(seed, total)
        seed += 1
    return total
