"""`hf_overrides`: what a caller says in the place of config.json, before anything of it is read."""

from collections.abc import Mapping
from typing import Any

from jaxengine.base.arguments import nearest
from jaxengine.models.hugging_face import CONFIG_KEYS
from jaxengine.models.rope_parameters import BESIDE, ROPE_KEYS, rope_parameters

ROPE = ("rope_parameters", "rope_scaling", *BESIDE)
DTYPE = ("dtype", "torch_dtype")  # transformers 5's name, and the one before


def overridden(hf: dict[str, Any], overrides: Any) -> dict[str, Any]:
    """`hf` with the values of `overrides`, objects merged key by key; {} and None change nothing.

    A value counts under whichever of its names config.json and the caller use: `torch_dtype` or `dtype`,
    `rope_scaling` or `rope_parameters`, `rope_theta` inside that object or beside it. `rope_scaling=None` is no
    scaling. Unlike vLLM, which sets what it is given, this refuses keys that config.json has not and nothing reads:
    a misspelled one would leave the model as it was without a word. Raises ValueError naming the nearest key.
    """
    if not overrides and (overrides is None or isinstance(overrides, Mapping)):
        return hf
    if not isinstance(overrides, Mapping):
        raise ValueError(f"hf_overrides must be a dict of config.json's keys, got {overrides!r:.80}")
    _check_keys("hf_overrides", overrides, (*hf, *CONFIG_KEYS, *ROPE, *DTYPE))
    rope = {key: value for key, value in overrides.items() if key in ROPE}
    dtypes = [key for key in DTYPE if key in overrides]
    base = {key: value for key, value in hf.items() if not dtypes or key not in DTYPE}
    merged = _merged(base, {key: value for key, value in overrides.items() if key not in ROPE})
    return _with_rope(merged, rope) if rope else merged


def _with_rope(hf: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """`hf` with its rope in one object, changed by what the caller says of it."""
    objects = [rope[key] for key in ("rope_parameters", "rope_scaling") if key in rope]
    for value in objects:
        if isinstance(value, Mapping):
            _check_keys("hf_overrides of the rope", value, ROPE_KEYS)
    said = rope_parameters({key: dict(value) if isinstance(value, Mapping) else value for key, value in rope.items()})
    if not any(isinstance(value, Mapping) and {"type", "rope_type"} & value.keys() for value in objects):
        del said["rope_type"]  # not said, so the file's stays
    before = rope_parameters(hf)
    if objects and all(value is None for value in objects):
        before = {"rope_theta": before.get("rope_theta")}
    return {key: value for key, value in hf.items() if key not in ROPE} | {"rope_parameters": before | said}


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = base.keys() & changes.keys()
    nested = {
        key: _merged(base[key], changes[key])
        for key in both
        if isinstance(base[key], dict) and isinstance(changes[key], Mapping)
    }
    return base | dict(changes) | nested


def _check_keys(where: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has {key!r}, which is no key of config.json{nearest(str(key), known) or '.'} It has "
                f"{', '.join(sorted(set(known)))}"
            )
