"""Text to token ids and back: a folder's tokenizer, prompts, chats. User text never makes a control token.

Control tokens are those that the tokenizer flags as special, and its added tokens spelled `<|…|>` or `<｜…｜>`
(DeepSeek's `<｜User｜>` carries no flag). They come from the tokenizer's own beginning and end marks, from the chat
template's own text, or from a caller who says `allow_special_tokens=True`. Spelled in a prompt or a message they are
ordinary text. Other added tokens (`<think>`) are vocabulary like any word. No code of a model folder ever runs:
`auto_map` and `tokenizer_class` are not looked at.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxengine.text import chat_template as templates
from jaxengine.text.chat_messages import check_characters, messages_of, plain, strings
from jaxengine.text.control_tokens import Controls, Guard
from jaxengine.text.pieces import Pieces

_BARRED = re.compile("<[|｜].*[|｜]>", re.DOTALL)


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
        has rendered.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        check_characters(text, "text")
        if allow_special_tokens:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._controls.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, as `Detokenizer` streams it; bytes that are no UTF-8 are U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = self.pieces.join(token_id for token_id in token_ids if token_id not in skipped)
        return text.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token for display: special tokens by name, a part of a character as U+FFFD, "" for an unknown id."""
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

        `chat_template` is a template, or the name of one of the tokenizer's. Raises ValueError that says what is wrong
        and where.
        """
        source = self._template(chat_template, tools)
        given = plain(template_kwargs or {}, "template_kwargs")
        if clash := given.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise ValueError(f"template_kwargs has {sorted(clash)}: these are arguments of the call itself")
        given |= {"messages": messages_of(messages), "tools": plain(tools, "tools")}
        guard = Guard(self._controls, list(strings(given)))
        variables = self._named | guard.guarded(given) | {"add_generation_prompt": bool(add_generation_prompt)}
        return guard.encode(templates.render(source, variables, guard.num_characters))

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
