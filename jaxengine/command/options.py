"""Command-line options made from the fields of a dataclass, a new field included, and the readers of their values."""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.sampling_params import SamplingParams

NOT_TEXT = ("mesh",)  # fields whose values no text has a form for


def add_fields(group: Any, cls: type, defaults: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """An option for every field of a dataclass; `given_fields` reads them back.

    Fields that are not given stay out of the namespace; `defaults` describes what they become, if not their default.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in NOT_TEXT:
            continue
        own = f"default {field.default!r}" if field.default not in (None, ()) else "not set by default"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"{cls.__name__}.{field.name}",
            default=argparse.SUPPRESS,
            **_form(field.name, hints[field.name], defaults.get(field.name, own)),
        )


def _form(name: str, hint: Any, known: str) -> dict[str, Any]:
    """How an option of a field's type reads its value."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not types.NoneType]
    origin = typing.get_origin(kinds[-1]) or kinds[-1]
    if name == "structured_outputs":
        return dict(type=json.loads, metavar="JSON", help='{"regex": …}, or json, choice or grammar')
    if name == "key":
        return dict(
            type=_key_words,
            metavar="WORD,WORD",
            help="the two words of a threefry key, as jax.random.key_data gives them",
        )
    if origin is bool:
        return dict(action=argparse.BooleanOptionalAction, help=known)
    if origin in (int, float, str):
        return dict(type=origin, metavar=origin.__name__.upper(), help=known)
    if origin is Mapping:
        return dict(action="append", type=_id_value, metavar="ID=VALUE", help="repeat for more")
    if origin is Sequence:
        item = typing.get_args(kinds[-1])[0]
        if typing.get_origin(item) is Sequence:
            return dict(action="append", type=_ids, metavar="ID,ID", help="repeat for more")
        return dict(action="append", type=item, metavar=item.__name__.upper(), help="repeat for more")
    raise TypeError(f"the command line has no form for the field {name}: {hint}")


def given_fields(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line gave."""
    prefix = f"{cls.__name__}."
    return {name.removeprefix(prefix): value for name, value in vars(arguments).items() if name.startswith(prefix)}


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The SamplingParams that the command line gave. Raises ValueError as SamplingParams does."""
    fields = given_fields(arguments, SamplingParams)
    if "key" in fields:
        from jaxengine.base.keys import key_of

        fields["key"] = key_of(fields["key"])
    return SamplingParams(**fields)


def token_ids(text: str) -> dict[str, list[int]]:
    """A prompt of token ids from "1,2,3"."""
    return {"prompt_token_ids": _ids(text)}


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 1,2,3") from None


def _key_words(text: str) -> list[int]:
    words = [int(word) for word in text.split(",") if word.strip().isdigit()]
    if len(words) != 2 or len(text.split(",")) != 2 or max(words) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no key: give two words of 32 bits such as 0,42")
    return words


def _id_value(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair such as 42=-1.5") from None


def count(text: str) -> int:
    """A number of things, at least one of them."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def group(text: str) -> tuple[int, int]:
    """(prompts, samples of each), as in 8x8."""
    prompts, cross, samples = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"must be two numbers as in 8x8, got {text!r}")
    return count(prompts), count(samples)
