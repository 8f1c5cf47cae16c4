"""The forms in which prompts are given, and token ids of each: text, lists of ids, dicts, a batch of them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.base.arguments import as_integer, check_keywords, flag
from jaxengine.text.tokenizer import Tokenizer

PROMPT_KEYS = ("prompt", "prompt_token_ids", "add_special_tokens", "allow_special_tokens", "cache_salt")
log = logging.getLogger("jaxengine")


class Refused(NamedTuple):
    """In the place of a prompt that could not be made: why."""

    reason: str


class Prompt(NamedTuple):
    """A prompt as the engine takes it; `text` is None where it came as token ids."""

    text: str | None
    token_ids: list[int]
    cache_salt: str


def prompts_of(prompts: Any) -> list[Any]:
    """A batch of prompts: one string, one list of ids or one dict is a batch of one, as in vLLM."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # an array at once: it may be on a device
    if isinstance(given, (bytes, type(None))) or not hasattr(given, "__iter__"):
        raise ValueError(f"prompts must be strings, lists of token ids or dicts, got {type(prompts).__name__}")
    batch = list(given)
    return [batch] if batch and all(map(_is_token, batch)) else batch


def conversations_of(messages: Any) -> list[Any]:
    """A batch of conversations: one list of messages is a batch of one."""
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _is_token(item: Any) -> bool:
    is_scalar_array = getattr(item, "ndim", None) == 0
    return is_scalar_array or not isinstance(item, str) and not hasattr(item, "__iter__")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Reads prompts for one model."""

    vocab_size: int
    tokenizer: Tokenizer | None
    _warned: list[str] = dataclasses.field(default_factory=list, init=False)  # of which prompt: one warning is enough

    def prompt(self, prompt: Any, index: int) -> Prompt:
        """The checked prompt `prompts[index]`. Raises ValueError, naming it and what is allowed."""
        where, vocab_size = f"prompts[{index}]", self.vocab_size
        salt, allow, add = "", None, True
        if isinstance(prompt, Refused):
            raise ValueError(prompt.reason)
        if isinstance(prompt, Mapping):
            check_keywords(where, prompt, PROMPT_KEYS)
            if "allow_special_tokens" in prompt:
                allow = flag(f"{where}['allow_special_tokens']", prompt["allow_special_tokens"])
            add = flag(f"{where}['add_special_tokens']", prompt.get("add_special_tokens", True))
            salt = _cache_salt(prompt, where)
            if prompt.get("prompt_token_ids") is not None:
                ids = token_ids_of(prompt["prompt_token_ids"], vocab_size, f"{where}['prompt_token_ids']")
                return Prompt(prompt.get("prompt"), ids, salt)
            if not isinstance(prompt.get("prompt"), str):
                raise ValueError(f"{where} needs 'prompt' or 'prompt_token_ids', got the keys {sorted(prompt)}")
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            return Prompt(None, token_ids_of(prompt, vocab_size, where), salt)
        if not prompt:
            raise ValueError(f"{where} is empty: at least one token is needed to predict the next one")
        if self.tokenizer is None:
            raise ValueError(
                f"{where} is text, but the model has no tokenizer: give {{'prompt_token_ids': [...]}}, or give the "
                "LLM a folder with a tokenizer.json as tokenizer="
            )
        text = str(prompt)  # a numpy.str_ is a str too, and stays one in outputs otherwise
        ids = self.tokenizer.encode(text, add_special_tokens=add, allow_special_tokens=bool(allow))
        if allow is None:
            self._warn_of_control_tokens(text, where, self.tokenizer)
        return Prompt(text, token_ids_of(ids, vocab_size, where), salt)

    def _warn_of_control_tokens(self, text: str, where: str, tokenizer: Tokenizer) -> None:
        """Once, where a text spells a control token: it may have come from a chat template."""
        if self._warned or (token := tokenizer.control_token_in(text)) is None:
            return
        self._warned.append(where)
        log.warning(
            "%s spells the control token %r, and text in a prompt makes no control token: the model sees plain "
            "characters. If a chat template rendered it, give the messages to chat(), or the text as {'prompt': …, "
            "'allow_special_tokens': True}; False there says that text is meant. This LLM says so once.",
            where,
            token,
        )


def token_ids_of(ids: Any, vocab_size: int, where: str) -> list[int]:
    """`ids` as a list of Python ints in [0, vocab_size).

    Integers of any kind, numpy's and JAX's included, are accepted.

    Raises ValueError with the index and the value: a JAX gather would clamp a wrong id and answer garbage.
    """
    array_ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(array_ids, Sequence) or isinstance(array_ids, (str, bytes)):
        raise ValueError(f"{where} must be a list of token ids, got {type(ids).__name__}")
    if len(array_ids) == 0:
        raise ValueError(f"{where} is empty: at least one token is needed to predict the next one")
    tokens = []
    for position, value in enumerate(array_ids):
        token = as_integer(value)
        if token is None:
            raise ValueError(
                f"{where} has {value!r} ({type(value).__name__}) at index {position}: token ids are integers"
            )
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where} has token id {token} at index {position}: the vocabulary is 0 … {vocab_size - 1}"
            )
        tokens.append(token)
    return tokens


def _cache_salt(prompt: Mapping[str, Any], where: str) -> str:
    salt = "" if prompt.get("cache_salt") is None else prompt["cache_salt"]
    if not isinstance(salt, str):
        raise ValueError(f"{where}['cache_salt'] must be a string or None, got {salt!r:.80}")
    return salt
