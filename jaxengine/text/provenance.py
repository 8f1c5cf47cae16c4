"""Which control tokens of a rendered chat the template wrote itself.

A template computes with the messages as it likes, and nothing in its text says who wrote what. So it is rendered twice:
as it is, and with *stand-ins*, characters that are nowhere else, in the place of every control token and part of one
that its own literals spell (template_worker.py). Where the two texts are the same but for the stand-ins, what stands in
stand-ins was written by the template, and all else is text: however a template escapes, cuts, joins or reverses what it
is given, no stand-in comes of it. Where they are not the same there is no telling, and the chat is refused.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import tokenizers

from jaxengine.text.control_tokens import Controls

# Symbols that repr, JSON, upper case and word boundaries leave alone: SignWriting's; then rare Chinese characters.
_STAND_INS = (*range(0x1D800, 0x1DA00), *range(0x20000, 0x2A6DE))


class StandIns:
    """A stand-in for every character of the control tokens, none of them in `taken`."""

    def __init__(self, controls: Controls, taken: Set[str] = frozenset()) -> None:
        self._controls = controls
        characters = sorted(set().union(*controls.ids))
        free = [chr(code) for code in itertools.islice(_free({*taken, *characters}), len(characters))]
        if len(free) < len(characters):
            raise ValueError("the messages hold nearly all rare Chinese characters, U+20000 … U+2A6DD: leave some out")
        self.characters, self.stand_ins = "".join(characters), "".join(free)
        self._marked = str.maketrans(self.characters, self.stand_ins)
        self._restored = str.maketrans(self.stand_ins, self.characters)
        self._pattern = re.compile("|".join(map(self._with_context, controls.longest_first)) or "(?!)")

    def apart_from(self, taken: Set[str]) -> "StandIns":
        """These, or others where a character of them is `taken`."""
        return self if taken.isdisjoint(self.stand_ins) else StandIns(self._controls, taken)

    def for_worker(self, named: Mapping[str, str], roles: Iterable[str]) -> dict[str, Any]:
        """What the process that renders has to know.

        `named` are the variables that hold control tokens. A role between a template's own brackets is the template's
        ('<|' + message.role + '|>' is how Phi-3 writes a turn), in capitals too.
        """
        words = {form(role) for role in roles for form in (str, str.lower, str.upper, str.capitalize)}
        return {
            "spellings": [token.content for token in self._controls.longest_first],
            "characters": self.characters,
            "stand_ins": self.stand_ins,
            "named": dict(named),
            "words": sorted(words),
        }

    def encode(self, marked: str) -> list[int]:
        """The ids of a text that has stand-ins where the template wrote control tokens."""
        controls, placed = self._controls, []

        def place(match: re.Match[str]) -> str:
            # The white space that a token swallows is no stand-in, even where the token has white space of its own.
            placed.append(controls.ids[match[0].strip().translate(self._restored)])
            return controls.place

        text = self._pattern.sub(place, marked)
        return controls.encode(text.translate(self._restored), placed=placed)

    def _with_context(self, token: tokenizers.AddedToken) -> str:
        """A pattern for the token in stand-ins, with the white space that the token swallows."""
        # (?<!\s) finds the beginning of white space at once; a long run before no token would take quadratic time.
        before, after = r"(?:(?<!\s)\s+)?" * token.lstrip, r"\s*" * token.rstrip
        spelled = re.escape(token.content.translate(self._marked))
        if token.single_word:
            pairs = zip(self.characters, self.stand_ins, strict=True)
            word = r"[\w" + "".join(stand_in for character, stand_in in pairs if re.match(r"\w", character)) + "]"
            spelled = f"(?<!{word}){spelled}(?!{word})"
        return before + spelled + after


def _free(taken: Set[str]) -> Iterator[int]:
    return (code for code in _STAND_INS if chr(code) not in taken)
