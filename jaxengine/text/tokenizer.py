"""Text to token ids and back: a folder's tokenizer, prompts, chats. User text never makes a control token.

Control tokens are those that the tokenizer flags as special, and its added tokens spelled `<|…|>` or `<｜…｜>`
(DeepSeek's `<｜User｜>` carries no flag). They come from the tokenizer's own beginning and end marks, from the chat
template's own text, or from a caller who says `allow_special_tokens=True`. Spelled in a prompt or a message they are
ordinary text. Other added tokens (`<think>`) are vocabulary like any word. No code of a model folder ever runs:
`auto_map` and `tokenizer_class` are not looked at.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jaxengine.text import chat_template as templates
from jaxengine.text.chat_messages import check_characters, messages_of, plain, strings
from jaxengine.text.continuation import Continuation
from jaxengine.text.control_tokens import Controls
from jaxengine.text.grammar import Grammars
from jaxengine.text.pieces import Pieces
from jaxengine.text.provenance import StandIns

_BARRED = re.compile("<[|｜].*[|｜]>", re.DOTALL)


class RenderedChat(NamedTuple):
    """A chat as a prompt: the text that its template made, control tokens by name, and the ids."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """A tokenizer and its chat template. `special_ids` are the tokens that `skip_special_tokens` leaves out of text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """`named_tokens`: bos_token, eos_token, … as templates know them. `chat_template`: one, or several by name."""
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
        self._controls = Controls(
            spec,
            {
                token.content: token
                for token_id, token in added.items()
                if token_id in self.special_ids or _BARRED.fullmatch(token.content)
            },
        )
        self._stand_ins = StandIns(self._controls)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """The tokenizer of a folder in Hugging Face format. Raises ValueError where it has none or a broken one."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json, so text can be neither read nor written: add the file "
                "(save_pretrained of a transformers tokenizer writes it), or leave tokenizer= out and give prompts as "
                "token ids"
            )
        try:
            loaded = _fast_tokenizer_class().from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise ValueError(f"{file} or the tokenizer_config.json beside it cannot be read: {error}") from error
        return cls(loaded.backend_tokenizer, named_tokens=loaded.special_tokens_map, chat_template=loaded.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special_tokens: bool = False) -> list[int]:
        """The ids of `text`, with the tokenizer's own beginning and end marks if `add_special_tokens`.

        With `allow_special_tokens` a control token's spelling in `text` makes the token: only for text that the caller
        has rendered. Marks that such a text has itself, at its beginning or its end, are not added again.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        check_characters(text, "text")
        if not allow_special_tokens:
            return self._controls.encode(text, add_special_tokens=add_special_tokens)
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return self._without_second_marks(encoding, text.strip())

    def _without_second_marks(self, encoding: tokenizers.Encoding, text: str) -> list[int]:
        """The ids without the beginning and end marks that `text` spells too."""
        ids, added = encoding.ids, encoding.special_tokens_mask  # 1 for marks, 0 for what the text spells
        if 0 not in added:
            return ids
        start, stop = added.index(0), len(ids) - added[::-1].index(0)
        first, last = str(self._backend.id_to_token(ids[0])), str(self._backend.id_to_token(ids[-1]))
        has_first, has_last = start > 0 and text.startswith(first), stop < len(ids) and text.endswith(last)
        return ids[start if has_first else 0 : stop if has_last else len(ids)]

    def control_token_in(self, text: str) -> str | None:
        """The first control token that `text` spells, for a caller who may have meant it."""
        found = self._controls.spelling.search(text)
        return found and found[0]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, as `Detokenizer` streams it; bytes that are no UTF-8 are U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = self.pieces.join(token_id for token_id in token_ids if token_id not in skipped)
        return text.decode("utf-8", "replace")

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What reads grammars for these tokens. Raises ValueError where llguidance is not installed."""
        encode = functools.partial(self._controls.encode, add_special_tokens=False)
        return Grammars(self.pieces, self.vocab_size, self.special_ids, encode)

    def token_text(self, token_id: int) -> str:
        """One token for display: special tokens by name, a part of a character as U+FFFD, "" for an unknown id."""
        return self.pieces.piece(token_id, first=False).decode("utf-8", "replace")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of a chat; options and errors as for `render_chat`."""
        return self.render_chat(messages, **options).token_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Text and ids of a chat: the template's control tokens stay tokens, everything given here is text.

        `chat_template` is a template, or the name of one of the tokenizer's. The assistant's turn is begun, unless
        `add_generation_prompt` is False, or `continue_final_message` has the text end where the last message does.
        Raises ValueError that says what is wrong and where.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message, add_generation_prompt begins another"
            )
        source = self._template(chat_template, tools)
        given = plain(chat_template_kwargs or {}, "chat_template_kwargs")
        if clash := given.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise ValueError(f"chat_template_kwargs has {sorted(clash)}: these are arguments of the call itself")
        given |= {"messages": messages_of(messages), "tools": plain(tools, "tools")}
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        flags = bool(add_generation_prompt), continue_final_message
        try:
            return self._rendered(source, given, *flags)
        except templates.TemplateFailed:
            if (as_json := messages_of(messages, json_arguments=True)) == given["messages"]:
                raise
            with contextlib.suppress(templates.TemplateFailed):  # DeepSeek's joins the arguments of calls to its text
                return self._rendered(source, given | {"messages": as_json}, *flags)
            raise

    def _rendered(self, source: str, given: dict[str, Any], begins_turn: bool, continues: bool) -> RenderedChat:
        continuation = Continuation(given["messages"]) if continues else None
        if continuation is not None:
            given = given | {"messages": continuation.messages}
        text, marked, stand_ins = self._marked(source, given, begins_turn)
        end = len(text) if continuation is None else continuation.end(text)
        return RenderedChat(text[:end], stand_ins.encode(marked[:end]))

    def _marked(self, source: str, given: dict[str, Any], begins_turn: bool) -> tuple[str, str, StandIns]:
        """The chat's text, the same with stand-ins where the template wrote control tokens, and these."""
        texts = list(strings(given))
        stand_ins = self._stand_ins.apart_from(set(source).union(*texts))
        named = {name: token for name, token in self._named.items() if name not in given}
        marks = stand_ins.for_worker(named, {message["role"] for message in given["messages"]})
        variables = named | given | {"add_generation_prompt": begins_turn}
        text, marked = templates.render_marked(source, variables, sum(map(len, texts)), marks)
        if marked is None:
            raise ValueError(
                "the chat template looks for control tokens in the messages, or changes its own, so what it wrote "
                "cannot be told from what it was given: leave control tokens out of the messages (one that is in the "
                f"text is {self.control_token_in(text)!r}), or render them yourself and give generate "
                '{"prompt": …, "allow_special_tokens": True}'
            )
        return text, marked, stand_ins

    def template_has(self, text: str) -> bool:
        """Whether one of its chat templates has this text, a tag for one that the model was taught."""
        return any(text in template for template in self._templates.values())

    def _template(self, given: str | None, tools: object) -> str:
        if given is not None:
            return self._templates.get(given, given)
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        names = f" It has templates named {', '.join(sorted(self._templates))}: choose one." if self._templates else ""
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be made a prompt: pass chat_template= (Jinja, as "
            f"in the model's chat_template.jinja), or give a prompt as text or token ids.{names}"
        )


def _fast_tokenizer_class() -> Any:
    """transformers' tokenizer class, imported late (it takes a second), without its advice to install PyTorch."""

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_no_advice)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        logger.removeFilter(is_no_advice)
    return PreTrainedTokenizerFast
