"""Conversations: the model writes a turn, a tool or an environment replies, and the model goes on.

A conversation is one sequence. What the model writes keeps its keys, one for each position, and its logprobs. A reply
has logprob 0 and weights version -1; it is never under a rollout's mask, and so carries no loss. `score`
sees each turn as a completion of everything before it, which is how it was generated, so the bits are the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jaxengine.config import EngineConfig
from jaxengine.host.admission import own_key, sampling_of
from jaxengine.host.prompts import prompts_of
from jaxengine.outputs import CompletionOutput, RequestOutputs
from jaxengine.rl.loops.calculator import calculate
from jaxengine.rl.loops.dialogue import Dialogue
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tool:
    """`answer(call)` for what the model wrote between `begin` and `end`; the answer enters the context, with `after`
    appended.

    Where `begin` is empty, a turn that reaches `end` is a call of everything in it; else a turn without `begin` is
    answered by an error. Where `answer` raises ValueError, the error's text enters the context as the answer. Raises
    ValueError where `end` is empty.
    """

    answer: Callable[[str], str]
    begin: str = "<calc>"
    end: str = "</calc>"
    after: str = "\n"

    def __post_init__(self) -> None:
        if not self.end:
            raise ValueError("end must be the text that ends a call, got ''")

    def reply(self, turn: str) -> str:
        """What enters the context after a turn that ended with `end`; never empty text."""
        try:
            answer = self.answer(self._call(turn))
        except ValueError as error:
            answer = f"error: {error}"
        return answer + self.after or " "

    def _call(self, turn: str) -> str:
        text = turn.removesuffix(self.end)
        if not self.begin:
            return text
        _, begin, call = text.rpartition(self.begin)
        if not begin:
            raise ValueError(f"a call begins with {self.begin}")
        return call


def calculator(begin: str = "<calc>", end: str = "</calc>", after: str = "\n") -> Tool:
    """A tool that does arithmetic (calculator.py): after "<calc>12+30</calc>" comes "42" and a new line."""
    return Tool(calculate, begin, end, after)


# (number of the prompt, turns and replies so far) -> the reply to the last turn, or None where there is none
Reply = Callable[[int, Sequence[CompletionOutput]], str | Sequence[int] | None]


class Generator(Protocol):
    """What conversations need of an LLM."""

    tokenizer: Tokenizer | None

    @property
    def engine_config(self) -> EngineConfig: ...

    def generate(self, prompts: Any, sampling_params: Any, *, key: Any, use_tqdm: bool | None) -> RequestOutputs: ...


def generate_with_tools(
    llm: Generator,
    prompts: Any,
    tool: Tool,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    max_calls: int = 8,
    use_tqdm: bool | None = None,
) -> RequestOutputs:
    """Like `llm.generate`, with at most `max_calls` calls of the tool in each sample; the samples are `Conversation`s.

    As generate_in_turns, where each turn that ends with a call is answered. `min_tokens` holds for each turn. A sample
    that calls once more than it may ends with "stop", at that call. Raises ValueError where the model has no tokenizer.
    """
    batch = prompts_of(prompts)
    samplings = [each.replace(stop=(*each.stop, tool.end)) for each in sampling_of(sampling_params, len(batch))]

    def reply(number: int, parts: Sequence[CompletionOutput]) -> str | None:
        turn = parts[-1]
        return tool.reply(turn.text) if (turn.finish_reason, turn.stop_reason) == ("stop", tool.end) else None

    return generate_in_turns(llm, batch, reply, samplings, key=key, max_replies=max_calls, use_tqdm=use_tqdm)


def generate_in_turns(
    llm: Generator,
    prompts: Any,
    reply: Reply,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    max_replies: int = 8,
    use_tqdm: bool | None = None,
) -> RequestOutputs:
    """Like `llm.generate`, where an environment replies to a turn and another turn follows; samples are
    `Conversation`s.

    `reply(i, parts)` is asked for each sample of prompt i after each of its turns, which is `parts[-1]`, with the turns
    and replies before it. It gives a text, or token ids where a chat's control tokens belong to it; None ends the
    sample.

    Prompts and samples draw with the keys that `generate` gives them: without a reply the outputs are generate's, bit
    for bit. `max_tokens` bounds what the model writes in all turns of a sample together. A conversation that has used
    up its tokens or its context ends with finish reason "length", and is not asked about. A round generates one turn of
    each conversation that still runs. Raises ValueError where the model has no tokenizer, and for an empty reply.
    """
    if llm.tokenizer is None:
        raise ValueError("replies are read and written as text, and the model has no tokenizer: give LLM one")
    batch = prompts_of(prompts)
    samplings = sampling_of(sampling_params, len(batch))
    first = llm.generate(batch, samplings, key=key, use_tqdm=use_tqdm)
    groups = [
        [
            Dialogue(i, sampling, own_key(key, sampling, i, j), output.prompt_token_ids, output.cache_salt, [turn])
            for j, turn in enumerate(output.outputs)
        ]
        for i, (sampling, output) in enumerate(zip(samplings, first, strict=True))
    ]
    answer = functools.partial(_answer, reply, llm.tokenizer, max_replies, _max_length(llm.engine_config))
    running = answer([dialogue for group in groups for dialogue in group])
    while running:
        contexts = [{"prompt_token_ids": each.context, "cache_salt": each.cache_salt} for each in running]
        outputs = llm.generate(contexts, [each.next_sampling for each in running], key=key, use_tqdm=use_tqdm)
        for dialogue, output in zip(running, outputs, strict=True):
            dialogue.parts.append(output.outputs[0])
        running = answer(running)
    return RequestOutputs(
        dataclasses.replace(output, outputs=[each.conversation(j, llm.tokenizer) for j, each in enumerate(group)])
        for output, group in zip(first, groups, strict=True)
    )


def _answer(
    reply: Reply, tokenizer: Tokenizer, max_replies: int, max_length: int, dialogues: list[Dialogue]
) -> list[Dialogue]:
    """Reply to each dialogue's last turn, and return those that go on with another turn."""
    running = []
    for dialogue in dialogues:
        may_go_on = dialogue.parts[-1].finish_reason == "stop" and dialogue.num_replies < max_replies
        text = reply(dialogue.number, dialogue.parts) if may_go_on else None
        if text is not None and dialogue.add_reply(text, tokenizer, max_length):
            running.append(dialogue)
    return running


def _max_length(config: EngineConfig) -> int:
    """Tokens that one sequence may have: those of the context, as far as the pool has pages for them."""
    return min(config.max_model_len, (config.num_pages - 1) * config.page_size)
