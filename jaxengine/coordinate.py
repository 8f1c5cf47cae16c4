"""Contract and replay coordinate: what has to be equal for bits to be equal, and one sample's place in it."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from jaxengine.sampling_params import SamplingParams

# Fields of SamplingParams that a replay does not need: the coordinate has the key, and the rest only ends or reports.
WITHOUT_BITS = (
    "n",
    "key",
    "seed",
    "truncate_prompt_tokens",
    "stop",
    "include_stop_str_in_output",
    "logprobs",
    "logprob_token_ids",
    "prompt_logprobs",
    "raw_logprobs",
    "entropy",
    "detokenize",
    "skip_special_tokens",
    "bad_words",  # token ids by now
)


@dataclasses.dataclass(frozen=True, eq=False)
class Contract:
    """Versions, device, model, weights and tiles, as JSON-ready parts. Equal digests mean equal parts."""

    parts: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    def with_grammars(self, identity: dict[str, str]) -> "Contract":
        """That of tokens drawn under a grammar, which depend on what read it too."""
        return Contract(self.parts | {"grammars": identity})

    def differences(self, other: "Contract") -> list[str]:
        """Each part that differs, as "jaxlib: 0.10.2, here 0.11.0"; `other` is what is here."""
        mine, here = _flat(self.parts), _flat(other.parts)
        return [
            f"{name}: {mine.get(name, 'nothing')}, here {here.get(name, 'nothing')}"
            for name in sorted(mine.keys() | here.keys())
            if mine.get(name) != here.get(name)
        ]


def _flat(parts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in parts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: json.dumps(value)}
    return flat


@dataclasses.dataclass(frozen=True, eq=False)
class Coordinate:
    """All that one sample's bits depend on, and the bits: `llm.replay(coordinate)` draws it again, alone.

    `key` are the words of a typed key; `key_folds`, prompt and sample index, are folded into it before the position
    (-1: no fold). As JSON it survives with every bit.
    """

    contract: Contract
    key: tuple[int, int]
    key_folds: tuple[int, int]
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    token_ids: list[int]
    token_logprobs: np.ndarray

    def request_params(self) -> SamplingParams:
        """Sampling parameters under which the sample is drawn alone: as many tokens as it has."""
        count, given, plain = len(self.token_ids), self.sampling_params, SamplingParams(detokenize=False)
        kept = {name: getattr(plain, name) for name in WITHOUT_BITS}
        return given.replace(**kept, max_tokens=count, min_tokens=min(given.min_tokens, count))

    def to_json(self) -> str:
        bits = np.asarray(self.token_logprobs, np.float32).view(np.uint32).tolist()
        return json.dumps(
            {
                "contract": self.contract.parts,
                "key": self.key,
                "key_folds": self.key_folds,
                "prompt_token_ids": self.prompt_token_ids,
                "sampling_params": changed_sampling(self.sampling_params),
                "token_ids": self.token_ids,
                "token_logprob_bits": bits,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Coordinate":
        """The coordinate that `to_json` wrote. Raises ValueError for anything else."""
        try:
            saved = json.loads(text)
            logprobs = np.array(saved["token_logprob_bits"], np.uint32).view(np.float32)
            (high, low), (prompt, sample) = saved["key"], saved["key_folds"]
            return cls(
                Contract(saved["contract"]),
                (high, low),
                (prompt, sample),
                saved["prompt_token_ids"],
                sampling_of_changes(saved["sampling_params"]),
                saved["token_ids"],
                logprobs,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"this is no coordinate that Coordinate.to_json wrote: {type(error).__name__}: {error}"
            ) from error


def changed_sampling(params: SamplingParams) -> dict[str, Any]:
    """What of the sampling parameters bits depend on and is not the default, ready for JSON."""
    given = {
        field.name: getattr(params, field.name)
        for field in dataclasses.fields(SamplingParams)
        if field.name not in WITHOUT_BITS
    }
    changed = {name: value for name, value in given.items() if value != getattr(SamplingParams(), name)}
    return changed if params.structure is None else changed | {"structured_outputs": params.structure.given()}


def sampling_of_changes(changed: dict[str, Any]) -> SamplingParams:
    """The sampling parameters that `changed_params` wrote down."""
    given: dict[str, Any] = {
        name: [tuple(pair) for pair in value] if name == "logit_bias" else value for name, value in changed.items()
    }
    return SamplingParams(**given)
