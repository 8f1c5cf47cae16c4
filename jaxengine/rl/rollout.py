"""Rollout: what was generated, as the arrays that a trainer takes; on disk as safetensors."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from checkpoints.tensor_file import read_tensors, write_tensors
from jaxengine.coordinate import Contract, Coordinate, changed_sampling, sampling_of_changes
from jaxengine.outputs import UNDRAWN, CompletionOutput, RequestOutput
from jaxengine.sampling_params import SamplingParams

Array = Any  # numpy as it is built, jax.Array inside a trainer's step
FORMAT = "jaxengine.Rollout/1"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """B samples, a row each: prompt then completion, padded on the right with token 0. A pytree of its arrays.

    `score(params, rollout.tokens, rollout.mask, rollout.sampling_params, config=…)` gives `logprobs` again, bit for bit.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # True on generated tokens, and not on those of a tool
    logprobs: Float[Array, "B T"]  # of generated tokens, each at its own position; 0 elsewhere
    lengths: Int[Array, " B"]  # prompt and completion
    group: Int[Array, " B"]  # index of the prompt: samples of one prompt share it
    weight_versions: Int[Array, "B T"]  # of the weights that drew each generated token; -1 elsewhere
    entropies: Float[Array, "B T"] | None = None  # of the processed distribution, where it was asked for
    coordinates: tuple[Coordinate, ...] | None = (
        None  # of each row, for LLM.replay; no part of the pytree: transformations drop them
    )

    @classmethod
    def from_outputs(cls, outputs: Sequence[RequestOutput], *, length: int | None = None) -> "Rollout":
        """Numpy arrays of all samples, in order. T is `length`, or that of the longest sample.

        Raises ValueError where there is no sample, or one is longer than `length`, or only some have entropies.
        """
        rows = [
            (group, output.prompt_token_ids, sample)
            for group, output in enumerate(outputs)
            for sample in output.outputs
        ]
        if not rows:
            raise ValueError("no outputs: a rollout has at least one sample")
        lengths = np.array([len(prompt) + len(sample.token_ids) for _, prompt, sample in rows], np.int32)
        width = int(lengths.max()) if length is None else length
        if lengths.max() > width:
            raise ValueError(f"sample {int(lengths.argmax())} has {lengths.max()} tokens, more than length={length}")
        place = lambda dtype, fill, part: _placed((len(rows), width), dtype, fill, rows, part)
        versions = place(np.int32, UNDRAWN, _versions)
        coordinates = tuple(sample.coordinate for _, _, sample in rows if sample.coordinate is not None)
        return cls(
            _tokens((len(rows), width), rows),
            versions != UNDRAWN,
            place(np.float32, 0, lambda s: s.token_logprobs),
            lengths,
            np.array([group for group, _, _ in rows], np.int32),
            versions,
            place(np.float32, 0, lambda s: s.entropies) if _have_entropies(rows) else None,
            coordinates if len(coordinates) == len(rows) else None,
        )

    @property
    def sampling_params(self) -> list[SamplingParams]:
        """Of each row, as `score` takes them. Raises ValueError where the coordinates were dropped."""
        if self.coordinates is None:
            raise ValueError(
                "this rollout has no coordinates (a transformation such as jax.tree.map drops them: take the original's; "
                "conversations with tools have none: give the sampling parameters that they were generated with)"
            )
        return [coordinate.sampling_params for coordinate in self.coordinates]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, at once or not at all: arrays with every bit, and the coordinates. It must not exist yet."""
        arrays = {field: np.asarray(getattr(self, field)) for field in ARRAYS if getattr(self, field) is not None}
        write_tensors(Path(path), arrays, {"format": FORMAT, "origins": json.dumps(_origins(self.coordinates))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollout":
        """The rollout that `save` wrote. Raises ValueError naming the file where it holds something else."""
        found, metadata = read_tensors(Path(path))
        arrays: dict[str, Any] = found
        if metadata.get("format") != FORMAT or not set(ARRAYS) - {"entropies"} <= arrays.keys() <= set(ARRAYS):
            raise ValueError(
                f"{path} is no rollout that Rollout.save wrote: it holds {', '.join(sorted(arrays)) or 'nothing'}"
            )
        loaded = cls(**arrays)
        return dataclasses.replace(loaded, coordinates=_coordinates(loaded, json.loads(metadata["origins"])))


ARRAYS = tuple(field.name for field in dataclasses.fields(Rollout) if field.name != "coordinates")
jax.tree_util.register_dataclass(Rollout, data_fields=list(ARRAYS), meta_fields=[], drop_fields=["coordinates"])
Row = tuple[int, list[int], CompletionOutput]


# -- from outputs --------------------------------------------------------------------------------------------------------------


def _tokens(shape: tuple[int, int], rows: list[Row]) -> np.ndarray:
    tokens = np.zeros(shape, np.int32)
    for row, (_, prompt, sample) in zip(tokens, rows, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(sample.token_ids)] = sample.token_ids
    return tokens


def _placed(shape, dtype, fill, rows: list[Row], part) -> np.ndarray:
    """`part(sample)` on each row's generated tokens, `fill` elsewhere."""
    out = np.full(shape, fill, dtype)
    for row, (_, prompt, sample) in zip(out, rows, strict=True):
        row[len(prompt) : len(prompt) + len(sample.token_ids)] = part(sample)
    return out


def _versions(sample: CompletionOutput) -> np.ndarray:
    spans = sample.weight_versions
    return np.repeat(np.array([span.version for span in spans], np.int32), [span.stop - span.start for span in spans])


def _have_entropies(rows: list[Row]) -> bool:
    have = {sample.entropies is not None for _, _, sample in rows}
    if len(have) > 1:
        raise ValueError("only some samples have entropies: ask for them in all sampling parameters, or in none")
    return have.pop()


# -- on disk -------------------------------------------------------------------------------------------------------------------


def _origins(coordinates: tuple[Coordinate, ...] | None) -> dict[str, Any] | None:
    """What of the coordinates the arrays do not hold. Rows share most contracts and sampling parameters: each is written once."""
    if coordinates is None:
        return None
    contracts = {coordinate.contract.digest: coordinate.contract.parts for coordinate in coordinates}
    params = {json.dumps(changed_sampling(coordinate.sampling_params)): None for coordinate in coordinates}
    digests, kinds = list(contracts), list(params)
    rows = [
        (
            digests.index(c.contract.digest),
            kinds.index(json.dumps(changed_sampling(c.sampling_params))),
            *c.key,
            *c.key_folds,
        )
        for c in coordinates
    ]
    return {
        "contracts": list(contracts.values()),
        "sampling_params": [json.loads(kind) for kind in kinds],
        "rows": rows,
    }


def _coordinates(rollout: Rollout, origins: dict[str, Any] | None) -> tuple[Coordinate, ...] | None:
    if origins is None:
        return None
    contracts, params = [*map(Contract, origins["contracts"])], [*map(sampling_of_changes, origins["sampling_params"])]
    counts = rollout.mask.sum(1)
    found = []
    for row, (contract, kind, high, low, prompt, sample) in enumerate(origins["rows"]):
        start, stop = rollout.lengths[row] - counts[row], rollout.lengths[row]
        tokens = rollout.tokens[row].tolist()
        found.append(
            Coordinate(
                contracts[contract],
                (high, low),
                (prompt, sample),
                tokens[:start],
                params[kind],
                tokens[start:stop],
                rollout.logprobs[row, start:stop],
            )
        )
    return tuple(found)
