"""Chats in which the model calls tools in the format that it was trained on, and goes on with their answers.

The chat template describes the tools to the model and writes their answers. What the model wrote is never tokenised
again: its tokens stay as they were drawn, and only what the template puts after them is added.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxengine.host.prompts import conversations_of
from jaxengine.llm import LLM
from jaxengine.outputs import CompletionOutput, RequestOutputs
from jaxengine.rl.loops.functions import Function, answer_of, functions_of
from jaxengine.rl.loops.tools import generate_in_turns
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.answer_parts import THINK, THOUGHT, ToolCall
from jaxengine.text.answer_reader import AnswerReader
from jaxengine.text.tokenizer import RenderedChat, Tokenizer
from jaxengine.text.tool_calls import TOOL_FORMS, ToolForm, form_of_template


def chat_with_tools(
    llm: LLM,
    conversations: Any,
    tools: Sequence[Callable[..., Any] | Function],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    tool_parser: str = "auto",
    max_calls: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    use_tqdm: bool | None = None,
) -> RequestOutputs:
    """Like `llm.chat`, where the tools that the model calls are run and it goes on with their answers; the samples are
    `Conversation`s.

    The calls of a turn are answered in their order, each by a message of role "tool"; a turn without calls ends the
    sample. A call that cannot be made, because of its name or its arguments, is answered by its error. What is no call
    in the parser's format is text. The limits are those of generate_in_turns, and a sample that would have more than
    `max_calls` calls ends with "stop", at the turn that makes them. `tool_parser` is "hermes" (Qwen's too),
    "llama3_json", or "auto": by the chat template.

    Raises ValueError where the model has no tokenizer or template, for tools that cannot be described, and where the
    template does not write the tools, or what it writes after a turn cannot be told from the turn.
    """
    functions = functions_of(tools)
    if llm.tokenizer is None:
        raise ValueError("a chat is read and written as text, and the model has no tokenizer: give LLM one")
    if tool_parser not in ("auto", *TOOL_FORMS):
        raise ValueError(f"tool_parser must be auto, {' or '.join(TOOL_FORMS)}, got {tool_parser!r:.80}")
    form = TOOL_FORMS[form_of_template(llm.tokenizer.template_has) if tool_parser == "auto" else tool_parser]
    options = {"tools": [each.description for each in functions.values()], "chat_template_kwargs": chat_template_kwargs}
    ends = frozenset(llm.config.eos_token_ids)
    chats = [_Chat(llm.tokenizer, messages, options, form, ends) for messages in conversations_of(conversations)]

    def reply(number: int, parts: Sequence[CompletionOutput]) -> list[int] | None:
        turns = [chats[number].calls(turn) for turn in parts[::2]]
        if not turns[-1] or sum(map(len, turns)) > max_calls:
            return None
        answers = [_message(call.name, answer_of(functions, call)) for call in turns[-1]]
        return chats[number].between(parts[-1], answers)

    prompts = [chat.checked_prompt(next(iter(functions))) for chat in chats]
    return generate_in_turns(llm, prompts, reply, sampling_params, key=key, max_replies=max_calls, use_tqdm=use_tqdm)


def _message(name: str, answer: str) -> dict[str, str]:
    return {"role": "tool", "name": _whole(name), "content": _whole(answer)}


def _whole(text: str) -> str:
    """The text with half characters spelled out: JSON that a model wrote can have them, and they have no tokens."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class _Chat:
    """One conversation, as its template writes it and the model's turns are read."""

    tokenizer: Tokenizer
    messages: list[Any]
    options: dict[str, Any]  # of Tokenizer.render_chat
    form: ToolForm
    ends: frozenset[int]  # the model's end tokens

    def render(self, *more: Any, **options: Any) -> RenderedChat:
        """The conversation with `more` messages."""
        return self.tokenizer.render_chat([*self.messages, *more], **self.options | options)

    @functools.cached_property
    def prompt(self) -> RenderedChat:
        return self.render()

    def checked_prompt(self, tool: str) -> dict[str, Any]:
        """The prompt, for `generate`. Raises ValueError for a template that tools cannot be used with.

        What comes after a turn has to be the same whether the template is given the turn's text or its calls, and
        whatever turns came before; and the turn ends with the same token where nothing follows it.
        """
        if self.prompt.text == self.render(tools=None).text:
            raise ValueError("the chat template does not write the tools, so the model would not know of them")
        answer = _message(tool, "0")
        after, ids = self._after_turn(answer)
        calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": tool, "arguments": {}}}]}
        longer, (_, last_ids) = self.render(calls, answer, calls, answer), self._after_turn(add_generation_prompt=False)
        if not longer.text.endswith(after) or last_ids[0] != ids[0]:
            raise ValueError(
                f"the chat template writes {after!r} after the text of a turn, and something else after its calls, "
                "after the last turn or in a longer chat: use generate_in_turns with replies of your own"
            )
        return {"prompt": self.prompt.text, "prompt_token_ids": self.prompt.token_ids}

    def calls(self, turn: CompletionOutput) -> list[ToolCall]:
        """The calls of a turn; those in its thoughts are none."""
        tells_thoughts = self.tokenizer.template_has(THOUGHT)
        reader = AnswerReader(self.form, self.prompt.text.rstrip().endswith(THINK) if tells_thoughts else None)
        parts = reader.push(self.tokenizer.decode(turn.token_ids, skip_special_tokens=False))
        return [part for part in parts if isinstance(part, ToolCall)]

    def between(self, turn: CompletionOutput, answers: list[dict[str, str]]) -> list[int]:
        """The tokens from the end of `turn` to the beginning of the next turn, with the answers.

        An end token that the model drew takes the place of the template's.
        """
        _, ids = self._after_turn(*answers)
        last = turn.token_ids[-1]
        is_ended = last == ids[0] or (last in self.ends and not isinstance(turn.stop_reason, str))
        return ids[1:] if is_ended else ids

    def _after_turn(self, *answers: dict[str, str], **options: Any) -> tuple[str, list[int]]:
        """Text and ids of what the template writes after a turn of the assistant, which is followed by `answers`.

        Two chats whose turns are one digit each, "0" and "1", have this and no more in common from their ends on.
        Begins with a control token, so that no token is made of the turn's text and of what comes after it.
        """
        zero, one = (self.render({"role": "assistant", "content": turn}, *answers, **options) for turn in "01")
        text, ids = _common_end(zero.text, one.text), _common_end(zero.token_ids, one.token_ids)
        before = zero.text.removesuffix(f"0{text}")
        is_told = (zero.text, one.text) == (f"{before}0{text}", f"{before}1{text}")
        begins = (
            bool(ids) and ids[0] in self.tokenizer.special_ids and text.startswith(self.tokenizer.token_text(ids[0]))
        )
        if not (is_told and begins):
            raise ValueError(
                "the chat template does not write the text of an assistant's turn once, followed by a control token "
                f"that ends it, but {text[:80]!r}: use generate_in_turns with replies of your own"
            )
        return text, ids


def _common_end(one: Any, other: Any) -> Any:
    """The longest end that two sequences have in common."""
    count = len(os.path.commonprefix([one[::-1], other[::-1]]))
    return one[len(one) - count :]
