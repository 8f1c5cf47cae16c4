"""Rollout: generated samples as the arrays that a trainer takes, and as a safetensors file."""

import dataclasses
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from checkpoints.tensor_file import read_tensors, write_tensors
from jaxengine.config import ModelConfig
from jaxengine.coordinate import Contract, Coordinate, changed_sampling, sampling_of_changes
from jaxengine.device.grammar_mask import GrammarMask, find_grammar_mask
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.outputs import UNDRAWN, CompletionOutput, RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

Array = Any  # numpy as it is built, jax.Array inside a trainer's step
FORMAT = "jaxengine.Rollout/1"
FINISH_REASONS = ("stop", "length", "abort", "error")  # of CompletionOutput; Rollout.finish_reasons are indices of them
UNFINISHED = -1


@dataclasses.dataclass(frozen=True)
class Rollout:
    """B samples, one in each row: prompt then completion, padded on the right with token 0. A pytree of its arrays.

    `score(params, rollout.tokens, rollout.mask, rollout.sampling_params, config=…)` gives `logprobs`, bit for bit.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # True on generated tokens; False on those of a tool
    logprobs: Float[Array, "B T"]  # of generated tokens, each at its position; 0 elsewhere
    lengths: Int[Array, " B"]  # prompt and completion
    # Samples that are compared with each other, by default those of one prompt, share it. Numbers are this rollout's
    # own: for one rollout of several calls give `from_outputs` all their outputs.
    group: Int[Array, " B"]
    weight_versions: Int[Array, "B T"]  # of the weights that drew each generated token; -1 elsewhere
    entropies: Float[Array, "B T"] | None = None  # of the processed distribution, in nats; None where not asked for
    finish_reasons: Int[Array, " B"] | None = None  # index in FINISH_REASONS; -1 where a sample has not ended
    sampling_mask: SamplingMask | None = None  # what top-k, top-p and min-p kept: jaxengine.sampling_mask finds it
    grammar_mask: GrammarMask | None = None  # what structured outputs allowed: `with_grammar_mask` finds it
    # Of each row, for LLM.replay. No part of the pytree, so that jax's transformations drop them.
    coordinates: tuple[Coordinate, ...] | None = None

    @classmethod
    def from_outputs(
        cls, outputs: Sequence[RequestOutput], *, length: int | None = None, groups: Sequence[Hashable] | None = None
    ) -> "Rollout":
        """Numpy arrays of all samples, in order. T is `length`, or that of the longest sample.

        `groups` names the group of each output, the id of its problem for one. By default an output of several samples
        (n=…) is a group, and outputs of one sample each are a group where their prompts have the same tokens, wherever
        they stand: prompts that were repeated instead of n=. Groups are numbered in the order of their first outputs.

        Raises ValueError where there is no sample, or one is longer than `length`, or only some have entropies, or
        where `groups` are not one for each output.
        """
        numbers = _numbered(list(map(_group_of, range(len(outputs)), outputs)) if groups is None else list(groups))
        if len(numbers) != len(outputs):
            raise ValueError(f"{len(numbers)} groups for {len(outputs)} outputs: give one for each prompt")
        rows = [
            Row(group, output.prompt_token_ids, sample)
            for group, output in zip(numbers, outputs, strict=True)
            for sample in output.outputs
        ]
        if not rows:
            raise ValueError("no outputs: a rollout has at least one sample")
        lengths = np.array([row.stop for row in rows], np.int32)
        width = int(lengths.max()) if length is None else length
        if lengths.max() > width:
            raise ValueError(f"sample {int(lengths.argmax())} has {lengths.max()} tokens, more than length={length}")
        shape = len(rows), width
        versions = _of_completions(np.full(shape, UNDRAWN, np.int32), rows, [_versions(row.sample) for row in rows])
        logprobs = [row.sample.token_logprobs for row in rows]
        coordinates = tuple(row.sample.coordinate for row in rows if row.sample.coordinate is not None)
        return cls(
            tokens=_tokens(shape, rows),
            mask=versions != UNDRAWN,
            logprobs=_of_completions(np.zeros(shape, np.float32), rows, logprobs),
            lengths=lengths,
            group=np.array([row.group for row in rows], np.int32),
            weight_versions=versions,
            entropies=_entropies(shape, rows),
            finish_reasons=np.array([_finish_reason(row.sample) for row in rows], np.int32),
            coordinates=coordinates if len(coordinates) == len(rows) else None,
        )

    def ended_by(self, reason: str) -> Bool[Array, " B"]:
        """Which samples ended for one of FINISH_REASONS: `"length"` are those that were cut off.

        Raises ValueError for another reason, and where the rollout has none.
        """
        if reason not in FINISH_REASONS:
            raise ValueError(f"reason must be one of {', '.join(FINISH_REASONS)}, got {reason!r}")
        if self.finish_reasons is None:
            raise ValueError("this rollout has no finish_reasons: Rollout.from_outputs brings them")
        return self.finish_reasons == FINISH_REASONS.index(reason)

    @property
    def sampling_params(self) -> list[SamplingParams]:
        """Of each row, as `score` takes them. Raises ValueError where there are no coordinates."""
        if self.coordinates is None:
            raise ValueError(
                "this rollout has no coordinates (transformations such as jax.tree.map drop them: take the original's; "
                "conversations with tools have none: give the sampling parameters that they were generated with)"
            )
        return [coordinate.sampling_params for coordinate in self.coordinates]

    def with_grammar_mask(self, config: ModelConfig, tokenizer: Tokenizer) -> "Rollout":
        """The rollout with what structured outputs allowed at each token, as a Trainer takes it; the same where none
        were asked for.

        Raises ValueError as `jaxengine.grammar_mask` does, and where there are no coordinates.
        """
        found = find_grammar_mask(self.tokens, self.mask, self.sampling_params, tokenizer, config)
        return dataclasses.replace(self, grammar_mask=found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file of the arrays, bit for bit, and the coordinates. It is written whole or not at all.

        Raises FileExistsError where the file exists.
        """
        leaves, name = jax.tree_util.tree_leaves_with_path(self), jax.tree_util.keystr
        arrays = {name(path, simple=True, separator="."): np.asarray(array) for path, array in leaves}
        write_tensors(Path(path), arrays, {"format": FORMAT, "origins": json.dumps(_origins(self.coordinates))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollout":
        """The rollout that `save` wrote. Raises ValueError naming the file where it holds something else."""
        tensors, metadata = read_tensors(Path(path))
        needed = set(ARRAYS) - OPTIONAL
        of_masks = {name for mask in MASKS for name in _of_mask(mask)}
        if metadata.get("format") != FORMAT or not needed <= tensors.keys() <= needed | OPTIONAL | of_masks:
            raise ValueError(
                f"{path} is no rollout that Rollout.save wrote: it holds {', '.join(sorted(tensors)) or 'nothing'}"
            )
        arrays: dict[str, Any] = {name: tensors[name] for name in ARRAYS if name in tensors}
        for mask, kind in MASKS.items():
            if tensors.keys() >= set(_of_mask(mask)):
                arrays[mask] = kind(*(tensors[name] for name in _of_mask(mask)))
        loaded = cls(**arrays)
        return dataclasses.replace(loaded, coordinates=_coordinates(loaded, json.loads(metadata["origins"])))


OPTIONAL = {"entropies", "finish_reasons"}
MASKS = {"sampling_mask": SamplingMask, "grammar_mask": GrammarMask}
DATA = [field.name for field in dataclasses.fields(Rollout) if field.name != "coordinates"]
ARRAYS = tuple(name for name in DATA if name not in MASKS)
jax.tree_util.register_dataclass(Rollout, data_fields=DATA, meta_fields=[], drop_fields=["coordinates"])


# -- from outputs ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A sample, its prompt and the number of its group."""

    group: int
    prompt_token_ids: list[int]
    sample: CompletionOutput

    @property
    def start(self) -> int:
        """Position of the completion's first token."""
        return len(self.prompt_token_ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.sample.token_ids)


def _group_of(index: int, output: RequestOutput) -> Hashable:
    """The default: a name that outputs of one group share."""
    return tuple(output.prompt_token_ids) if len(output.outputs) == 1 else index


def _numbered(groups: Sequence[Hashable]) -> list[int]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]


def _finish_reason(sample: CompletionOutput) -> int:
    return UNFINISHED if sample.finish_reason is None else FINISH_REASONS.index(sample.finish_reason)


def _tokens(shape: tuple[int, int], rows: list[Row]) -> np.ndarray:
    tokens = np.zeros(shape, np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: row.stop] = row.prompt_token_ids + row.sample.token_ids
    return tokens


def _of_completions(out: np.ndarray, rows: list[Row], values: list[Any]) -> np.ndarray:
    """`out`, with `values[i]` written to the tokens of row i's completion."""
    for line, row, value in zip(out, rows, values, strict=True):
        line[row.start : row.stop] = value
    return out


def _versions(sample: CompletionOutput) -> np.ndarray:
    spans = sample.weight_versions
    return np.repeat(np.array([span.version for span in spans], np.int32), [span.stop - span.start for span in spans])


def _entropies(shape: tuple[int, int], rows: list[Row]) -> np.ndarray | None:
    values = [row.sample.entropies for row in rows if row.sample.entropies is not None]
    if not values:
        return None
    if len(values) < len(rows):
        raise ValueError("only some samples have entropies: ask for them in all sampling parameters, or in none")
    return _of_completions(np.zeros(shape, np.float32), rows, values)


def _of_mask(mask: str) -> list[str]:
    """What a file calls the arrays of one of MASKS."""
    return [f"{mask}.{field.name}" for field in dataclasses.fields(MASKS[mask])]


# -- on disk -----------------------------------------------------------------------------------------------------------


def _origins(coordinates: tuple[Coordinate, ...] | None) -> dict[str, Any] | None:
    """What the coordinates hold and the arrays do not. Contracts and sampling parameters that rows share stand once."""
    if coordinates is None:
        return None
    digests = [coordinate.contract.digest for coordinate in coordinates]
    samplings = [json.dumps(changed_sampling(coordinate.sampling_params)) for coordinate in coordinates]
    contracts = {coordinate.contract.digest: coordinate.contract.parts for coordinate in coordinates}
    distinct_digests, distinct_samplings = list(contracts), list(dict.fromkeys(samplings))
    rows = []
    for coordinate, digest, sampling in zip(coordinates, digests, samplings, strict=True):
        indices = distinct_digests.index(digest), distinct_samplings.index(sampling)
        rows.append((*indices, *coordinate.key, *coordinate.key_folds))
    return {
        "contracts": list(contracts.values()),
        "sampling_params": [json.loads(sampling) for sampling in distinct_samplings],
        "rows": rows,
    }


def _coordinates(rollout: Rollout, origins: dict[str, Any] | None) -> tuple[Coordinate, ...] | None:
    if origins is None:
        return None
    contracts = [Contract(parts) for parts in origins["contracts"]]
    samplings = [sampling_of_changes(changes) for changes in origins["sampling_params"]]
    starts = rollout.lengths - rollout.mask.sum(1)
    coordinates = []
    for row, (contract, sampling, high, low, prompt, sample) in enumerate(origins["rows"]):
        start, stop = starts[row], rollout.lengths[row]
        tokens = rollout.tokens[row].tolist()
        coordinate = Coordinate(
            contracts[contract],
            (high, low),
            (prompt, sample),
            tokens[:start],
            samplings[sampling],
            tokens[start:stop],
            rollout.logprobs[row, start:stop],
        )
        coordinates.append(coordinate)
    return tuple(coordinates)
