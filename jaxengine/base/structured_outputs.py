"""What the text of a completion has to follow: a JSON schema, a regular expression, a choice or a grammar."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.base.arguments import flag, items, strict_keywords

MAX_CHARACTERS = 65_536  # of a schema, an expression, a grammar, or all choices together
MAX_CHOICES = 1_024
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@strict_keywords
@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """One of: `json`, a JSON schema as text or as a dict; `regex`; `choice`, a list of texts; `grammar`, in Lark's form
    as llguidance reads it; `json_object=True`, any JSON object. Names are vLLM's.

    Between the parts of JSON stands at most one space, so that no completion is whitespace without end;
    `whitespace_pattern` is another expression for what may stand there. Raises ValueError for none or several of them,
    and for one that is too long. Whether it can be followed is found where a prompt is admitted.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs needs one of {', '.join(KINDS)}, got {' and '.join(given) or 'none of them'}"
            )
        object.__setattr__(self, "json", self.json if self.json is None else _json_text(self.json))
        object.__setattr__(self, "choice", self.choice if self.choice is None else _choices(self.choice))
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        if self.json_object is not None:
            object.__setattr__(self, "json_object", flag("structured_outputs.json_object", self.json_object) or None)

    def given(self) -> dict[str, Any]:
        """The fields that are given, as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}


def structured_outputs_of(given: Any) -> StructuredOutputsParams | None:
    """A StructuredOutputsParams, or one from a dict of its fields. Raises ValueError for anything else."""
    if given is None or isinstance(given, StructuredOutputsParams):
        return given
    if isinstance(given, Mapping):
        return StructuredOutputsParams(**given)
    raise ValueError(f"structured_outputs must be a StructuredOutputsParams or a dict of its fields, got {given!r:.80}")


def _json_text(schema: Any) -> str:
    """The schema as text; the order of its properties stays, because text follows it."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"structured_outputs.json must be a schema as text or as a dict, got {schema!r:.80}")
    try:
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.json is no JSON: {error}") from None


def _choices(given: Any) -> tuple[str, ...]:
    where = "structured_outputs.choice"
    choices = () if isinstance(given, str) else items(where, given, "a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError(f"{where} must be a list of 1 to {MAX_CHOICES} strings, got {len(choices)} of {given!r:.80}")
    for index, text in enumerate(choices):
        _check_text(f"choice[{index}]", text)
        if not text:
            raise ValueError(f"{where}[{index}] is empty: a completion has one token at least")
    if sum(map(len, choices)) > MAX_CHARACTERS:
        raise ValueError(f"{where} has {sum(map(len, choices))} characters, at most {MAX_CHARACTERS} are possible")
    return tuple(choices)


def _check_text(name: str, text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise ValueError(f"structured_outputs.{name} must be text, got {text!r:.80}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"structured_outputs.{name} has {len(text)} characters, at most {MAX_CHARACTERS} are possible")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"structured_outputs.{name} has half a surrogate pair, which no text has")
