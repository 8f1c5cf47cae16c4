"""Problems for a Loop: (prompt, answer) pairs in batches, which a run that goes on takes up where it stopped.

Of records that are known, the batch is a function of the iteration, so nothing has to be kept. An iterator has a state,
which RunFolder keeps beside each snapshot.
"""

import base64
import dataclasses
import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxengine.base.arguments import integer

Pair = tuple[Any, Any]  # (prompt, answer)


def read_jsonl(path: str | Path, prompt: str = "prompt", answer: str = "answer") -> list[Pair]:
    """The fields `prompt` and `answer` of each line of a file of JSON objects; empty lines are skipped.

    Raises ValueError naming the file, the line and the fields it has, where a line is no object that has both.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON object: {error}") from error
        if not isinstance(record, dict) or not {prompt, answer} <= record.keys():
            has = f"fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f"{path}, line {number}: needs the fields {prompt!r} and {answer!r}, has {has}")
        pairs.append((record[prompt], record[answer]))
    return pairs


@dataclasses.dataclass(frozen=True)
class InEpochs:
    """`batch` records an iteration, each record once an epoch, in an order that follows from `seed` and the epoch.

    The batch of an iteration is a function of its number. One that an epoch ends in goes on with the next epoch's first
    records. Raises ValueError where there are no records, and where one is no (prompt, answer) pair.
    """

    records: Sequence[Pair]
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        integer("batch", self.batch, 1)
        if not len(self.records):
            raise ValueError("records is empty: an iteration needs problems")
        for index, record in enumerate(self.records):
            _check_pair(record, f"record {index}")

    def __call__(self, iteration: int) -> list[Pair]:
        count = len(self.records)
        places = (divmod(iteration * self.batch + i, count) for i in range(self.batch))
        return [self.records[_order(count, self.seed, epoch)[place]] for epoch, place in places]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The records of an epoch, shuffled.

    By numbers of random(), the one method of Python's generator of which later versions promise the same numbers:
    https://docs.python.org/3/library/random.html#notes-on-reproducibility
    """
    generator = random.Random(f"{seed} {epoch}")  # a text seed is hashed with SHA-512, so every process draws the same
    numbers = [generator.random() for _ in range(count)]
    return sorted(range(count), key=numbers.__getitem__)


@runtime_checkable
class Positioned(Protocol):
    """Problems that are no function of the iteration alone: RunFolder keeps their state, a JSON object."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class StatefulIterator(Protocol):
    """An iterator that can say where it stands, and be set there, such as grain's."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any, /) -> None: ...


class FromIterator:
    """`batch` pairs an iteration from an iterator of (prompt, answer) pairs, whose state is JSON or bytes.

    Iterations come in order; the last one may be asked for again. Raises TypeError for another kind of state, and
    ValueError for another iteration (a run that goes on sets the state first), where the iterator ends, and where it
    gives no pair.
    """

    def __init__(self, iterator: StatefulIterator, batch: int) -> None:
        self.iterator, self.batch = iterator, integer("batch", batch, 1)
        self._next = 0  # the iteration that the iterator stands before
        self._last: list[Pair] | None = None  # the batch of the iteration before it
        self._taken: list[Pair] = []  # of a batch under way: where the iterator raised, the rest may follow
        self.get_state()  # raises now and not at the first snapshot

    def __call__(self, iteration: int) -> list[Pair]:
        if iteration == self._next - 1 and self._last is not None:
            return self._last
        if iteration != self._next:
            raise ValueError(
                f"iteration {iteration} was asked for, and the iterator stands before iteration {self._next}: the "
                "FromIterator itself must be the loop's problems, with no function around it, so that learn keeps its "
                "state"
            )
        while len(self._taken) < self.batch:
            self._taken.append(self._pair())
        self._last, self._taken, self._next = self._taken, [], iteration + 1
        return self._last

    def get_state(self) -> dict[str, Any]:
        """Where it stands between two iterations."""
        return {"iteration": self._next, "iterator": _as_json(self.iterator.get_state())}

    def set_state(self, state: dict[str, Any]) -> None:
        self.iterator.set_state(_from_json(state["iterator"]))
        self._next, self._last, self._taken = state["iteration"], None, []

    def _pair(self) -> Pair:
        where = f"the iterator, in iteration {self._next} after {len(self._taken)} of {self.batch} records,"
        try:
            record = next(self.iterator)
        except StopIteration:
            raise ValueError(f"{where} has come to its end: give one that repeats, or fewer iterations") from None
        _check_pair(record, where)
        return record


def _check_pair(record: Any, where: str) -> None:
    if not isinstance(record, tuple | list) or len(record) != 2:
        raise ValueError(f"{where} gives {record!r:.80}: it must be a pair (prompt, answer)")


def _as_json(state: Any) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        is_kept = json.loads(json.dumps(state)) == state
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        raise TypeError(f"the iterator's state must be bytes, or what JSON gives back as it was, got {state!r:.80}")
    return {"json": state}


def _from_json(state: dict[str, Any]) -> Any:
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]
