"""A Loop without a model, whose state follows from the problems of all its iterations: for tests of what drives one."""

import dataclasses
import zlib
from typing import Any, get_origin

import jax.numpy as jnp

from jaxengine.rl.loops.loop import Iteration, Loop
from jaxengine.rl.train_state import TrainState

NUMBERS: dict[str, Any] = {  # of an Iteration
    field.name: {"NAME": 1.0} if get_origin(field.type) is dict else 1.0 for field in dataclasses.fields(Iteration)
}
RECORDS = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(3)]


def first_state() -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(jnp.ones(3, jnp.uint32), jnp.zeros(2), zero, zero, jnp.zeros(2, jnp.uint32))


class CountingLoop(Loop):
    """`at` is called with the version before each iteration; the reward is that of `rewards`, 0.5 after their end."""

    def __init__(self, problems, *, rewards=(), at=lambda version: None) -> None:
        super().__init__(None, problems, None, 8)  # pyright: ignore[reportArgumentType]
        vars(self).update(rewards=list(rewards), at=at)

    def iterate(self, state):
        version, fields = int(state.version), vars(self)
        fields["at"](version)
        taken = zlib.crc32(repr(list(self.problems(version))).encode())
        reward = fields["rewards"][version] if version < len(fields["rewards"]) else 0.5
        updates = [{"kl": 0.0, "loss": 1.0}, {"kl": 0.25, "loss": float(taken % 97)}]
        numbers = NUMBERS | dict(version=version, reward=reward, deviation=0.5, entropy=None, updates=updates)
        master = state.master * 3 + jnp.uint32(taken)
        return dataclasses.replace(state, master=master, version=state.version + 1), Iteration(**numbers)


def number_of(state: TrainState) -> int:
    return int(state.master[0])


class Numbers:
    """An iterator without end, whose pairs follow from all before: each state differs. Its state is bytes."""

    def __init__(self) -> None:
        self.number = 1

    def __next__(self):
        self.number = self.number * 48271 % (2**31 - 1)
        return f"{self.number}=", self.number

    def get_state(self) -> bytes:
        return self.number.to_bytes(4)

    def set_state(self, state: bytes) -> None:
        self.number = int.from_bytes(state)
