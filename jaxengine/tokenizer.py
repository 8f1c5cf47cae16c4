"""Text to token ids and back: a folder's tokenizer, prompts, chats. User text never makes a control token.

Control tokens are those that the tokenizer flags as special, and its added tokens spelled `<|…|>` or `<｜…｜>` (DeepSeek's `<｜User｜>`
carries no flag). They come from the tokenizer's own beginning and end marks, from the chat template's own text, or from a caller who
says `allow_special_tokens=True`. Spelled in a prompt or a message they are ordinary text. Other added tokens (`<think>`) are
vocabulary like any word. No code of a model folder ever runs: `auto_map` and `tokenizer_class` are not looked at.
"""
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxengine import chat_template as templates
from jaxengine.detokenizer import Pieces

MAX_DEPTH = 64  # of lists and objects in a message
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them for a program's own use
_BARRED = re.compile("<[|｜].*[|｜]>", re.DOTALL)
_ROLE = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")


class Tokenizer:
    """A tokenizer and its chat template. `special_ids` are the flagged tokens: `skip_special_tokens` leaves these out of the text."""

    def __init__(self, backend: tokenizers.Tokenizer, *, named_tokens: Mapping[str, str] | None = None,
                 chat_template: str | Mapping[str, str] | None = None) -> None:
        """`named_tokens`: bos_token, eos_token, … as chat templates know them. `chat_template`: one, or several by name."""
        backend.no_truncation()
        backend.no_padding()
        spec = json.loads(backend.to_str())
        self._backend = backend
        self._named = dict(named_tokens or {})
        self._templates = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        named_ids = {name: backend.token_to_id(token) for name, token in self._named.items()}
        added = backend.get_added_tokens_decoder()
        flagged = {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(flagged | {token_id for token_id in named_ids.values() if token_id is not None})
        self.eos_token_id = named_ids.get("eos_token")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.pieces = Pieces(backend, spec["decoder"])
        self._controls = _Controls(spec, {token.content: token for token_id, token in added.items()
                                          if token_id in self.special_ids or _BARRED.fullmatch(token.content)})

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """The tokenizer of a folder in Hugging Face format. Raises ValueError where it has none or a broken one."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json, so text can be neither read nor written: add the file (save_pretrained of a "
                             "transformers tokenizer writes it), or give prompts as token ids with detokenize=False")
        try:
            loaded = _fast_tokenizer_class().from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise ValueError(f"{file} or the tokenizer_config.json beside it cannot be read: {error}") from error
        return cls(loaded.backend_tokenizer, named_tokens=loaded.special_tokens_map, chat_template=loaded.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special_tokens: bool = False) -> list[int]:
        """The ids of `text`, with the tokenizer's own beginning and end marks if `add_special_tokens`.

        With `allow_special_tokens` a control token's spelling in `text` makes the token: for text of the caller's own rendering only.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        _check_characters(text, "text")
        if allow_special_tokens:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._controls.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, as `Detokenizer` streams it; bytes that are no UTF-8 are U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return self.pieces.join(token_id for token_id in token_ids if token_id not in skipped).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token for display: special tokens by name, a part of a character as U+FFFD, "" for an id that the tokenizer lacks."""
        return self.pieces.piece(token_id, first=False).decode("utf-8", "replace")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat: the template's control tokens stay tokens, everything given here is text.

        `chat_template` is a template, or the name of one of the tokenizer's. Raises ValueError, saying what is wrong and where.
        """
        source = self._template(chat_template, tools)
        given = _plain(template_kwargs or {}, "template_kwargs")
        if clash := given.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise ValueError(f"template_kwargs has {sorted(clash)}: these are arguments of the call itself")
        given |= {"messages": _messages(messages), "tools": _plain(tools, "tools")}
        guard = _Guard(self._controls, list(_strings(given)))
        variables = self._named | guard.guarded(given) | {"add_generation_prompt": bool(add_generation_prompt)}
        return guard.encode(templates.render(source, variables, guard.num_characters))

    def _template(self, given: str | None, tools: object) -> str:
        if given is not None:
            return self._templates.get(given, given)
        for name in ["tool_use"] * bool(tools) + ["default"]:
            if name in self._templates:
                return self._templates[name]
        names = f" It has templates named {', '.join(sorted(self._templates))}: choose one." if self._templates else ""
        raise ValueError("the tokenizer has no chat template, so messages cannot be made a prompt: pass chat_template= (Jinja, as in "
                         f"the model's chat_template.jinja), or give a prompt as text or token ids.{names}")


class _Controls:
    """The control tokens, and a copy of the tokenizer that is blind to them but for the places where they were put on purpose."""

    def __init__(self, spec: dict[str, Any], tokens: dict[str, tokenizers.AddedToken]) -> None:
        added = [token | {"special": token["special"] or token["content"] in tokens} for token in spec["added_tokens"]]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
        self._backend.encode_special_tokens = True  # the library's name for "encode their spelling as text"
        self.ids = {token["content"]: token["id"] for token in added if token["content"] in tokens}
        longest_first = sorted(tokens, key=len, reverse=True)
        self.spelling = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.in_template = "|".join(_with_context(tokens[content]) for content in longest_first) or "(?!)"
        self.beginnings = frozenset(content[:cut] for content in tokens for cut in range(1, len(content)))
        self.longest = max(map(len, tokens), default=0)
        self.endings = frozenset(content[cut:] for content in tokens for cut in range(1, len(content)))
        self.place, cut = (f"{_NONCHARACTERS[0]}{secrets.token_hex(16)}{mark}" for mark in "pc")  # no text can hold these
        self._backend.add_tokens([tokenizers.AddedToken(self.place, normalized=False), tokenizers.AddedToken(cut, normalized=False)])
        self._cut, self._place_id, self._cut_id = cut, self._backend.token_to_id(self.place), self._backend.token_to_id(cut)
        unknown = spec["model"].get("unk_token"), spec["model"].get("unk_id")  # what plain text may well become
        self._forbidden = frozenset(token_id for content, token_id in self.ids.items() if not {content, token_id} & {*unknown})

    def encode(self, text: str, *, add_special_tokens: bool = False, placed: Iterable[int] = ()) -> list[int]:
        """The ids of `text`, with the ids `placed` where the text has `self.place`."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        while spans := self._forged(encoding):
            text = self._divided(text, spans)
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        next_placed = iter(placed)
        return [next(next_placed) if token_id == self._place_id else token_id for token_id in encoding.ids if token_id != self._cut_id]

    def _forged(self, encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
        """Where the vocabulary itself holds a control token's spelling, as word-level and unigram ones may."""
        if self._forbidden.isdisjoint(encoding.ids):
            return []
        own_marks = encoding.special_tokens_mask
        found = [index for index, token_id in enumerate(encoding.ids) if token_id in self._forbidden and not own_marks[index]]
        return [encoding.offsets[index] for index in found]

    def _divided(self, text: str, spans: list[tuple[int, int]]) -> str:
        for start, end in reversed(spans):
            if end - start < 2:
                raise ValueError(f"the tokenizer makes a control token of the text {text[start:end]!r}: leave it out or give token ids")
            text = text[: start + 1] + self._cut + text[start + 1 :]
        return text


class _Guard:
    """Tells, in one rendered chat, what the user spelled from what the template wrote.

    Noncharacters that occur in nothing given stand around every control token that is spelled there, and where a string begins or
    ends with a part of one, so that two strings cannot be joined to one. A template that deletes text from the middle of a message
    could still join what stood around it.
    """

    def __init__(self, controls: _Controls, strings: list[str]) -> None:
        self._controls = controls
        self.num_characters = sum(map(len, strings))
        taken = set().union(*strings)
        free = [mark for mark in _NONCHARACTERS if mark not in taken]
        if len(free) < 3:
            raise ValueError("the messages hold nearly all of Unicode's noncharacters U+FDD0 … U+FDEF: leave three of them out")
        self._open, self._close, self._cut = free[:3]

    def guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._guarded_text(value)
        if isinstance(value, dict):
            return {self.guarded(key): self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list) else value

    def encode(self, rendered: str) -> list[int]:
        controls, placed = self._controls, []

        def replaced(found: re.Match[str]) -> str:
            if found["control"] is None:
                return found["text"] or ""
            content = found["control"] if found["control"] in controls.ids else found["control"].strip()
            placed.append(controls.ids[content])
            return controls.place

        pattern = (f"{self._open}(?P<text>{controls.spelling}){self._close}|[{self._open}{self._close}{self._cut}]"
                   f"|(?P<control>{controls.in_template})")
        return controls.encode(re.sub(pattern, replaced, rendered), placed=placed)

    def _guarded_text(self, text: str) -> str:
        text = re.sub(self._controls.spelling, lambda found: f"{self._open}{found[0]}{self._close}", text)
        lengths = range(1, self._controls.longest)
        end = len(text.rstrip())
        if any(text[max(end - length, 0) : end] in self._controls.beginnings for length in lengths):
            text = text[:end] + self._cut + text[end:]
        start = len(text) - len(text.lstrip())
        if any(text[start : start + length] in self._controls.endings for length in lengths):
            text = text[:start] + self._cut + text[start:]
        return text


def _with_context(token: tokenizers.AddedToken) -> str:
    """A pattern for the token in the template's text, with the white space that the token swallows."""
    word = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    # The look behind finds the beginning of white space at once: without it, a long run before no token takes quadratic time.
    return r"(?:(?<!\s)\s+)?" * token.lstrip + word[0] + re.escape(token.content) + word[1] + r"\s*" * token.rstrip


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Plain copies, without the keys that hold None; content that is a list of text parts becomes one string, joined by newlines."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError(f'messages must be a list of {{"role": …, "content": …}}, one at least, got {messages!r:.80}')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} must be {{"role": …, "content": …}}, got {message!r:.80}')
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    role, content = plain.get("role"), plain.get("content", "")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(f"{where}.role must be a word of at most 64 letters, digits, - and _, got {role!r:.80}")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    elif not isinstance(content, str):
        raise ValueError(f'{where}.content must be a string or a list of {{"type": "text", "text": …}}, got {content!r:.80}')
    return plain


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where} must be {{"type": "text", "text": …}}, got {part!r:.80}: the engine takes text only')
    return part["text"]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON values alone, so that a template can reach no object's methods."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested in more than {MAX_DEPTH} lists and objects")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_characters(value, where)
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key, f"a key of {where}"): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(f"{where} must be a JSON value, got {value!r:.80} ({type(value).__name__})")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}: "
                         "it is half a character and has no tokens") from None


def _fast_tokenizer_class() -> Any:
    """transformers' wrapper of the tokenizers library, imported late (a second) and without its advice to install PyTorch."""
    def is_no_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_no_advice)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        logger.removeFilter(is_no_advice)
    return PreTrainedTokenizerFast
