"""Tool use: the model writes a call, the tool's answer enters the context, and the model goes on.

A conversation is one sequence. What the model writes keeps its keys, one for each position, and its logprobs. What a
tool writes has logprob 0 and weights version -1; it is never under a rollout's mask, and so carries no loss. `score`
sees each turn as a completion of everything before it, which is how it was generated, so the bits are the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jaxengine.config import EngineConfig
from jaxengine.host.admission import own_key, sampling_of
from jaxengine.host.prompts import prompts_of
from jaxengine.outputs import RequestOutputs
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


class Generator(Protocol):
    """What generate_with_tools needs of an LLM."""

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

    Prompts and samples draw with the keys that `generate` gives them: without a call the outputs are generate's, bit
    for bit. `max_tokens` bounds what the model writes in all turns of a sample together, and `min_tokens` holds for
    each turn. A conversation that has used up its tokens or its context ends with finish reason "length"; one that
    calls once more than it may ends with "stop", at that call. A round generates one turn of each conversation that
    still runs. Raises ValueError where the model has no tokenizer.
    """
    if llm.tokenizer is None:
        raise ValueError("tools read and write text, and the model has no tokenizer: give LLM one")
    batch = prompts_of(prompts)
    samplings = [each.replace(stop=(*each.stop, tool.end)) for each in sampling_of(sampling_params, len(batch))]
    first = llm.generate(batch, samplings, key=key, use_tqdm=use_tqdm)
    groups = [
        [
            Dialogue(sampling, own_key(key, sampling, i, j), output.prompt_token_ids, output.cache_salt, [turn])
            for j, turn in enumerate(output.outputs)
        ]
        for i, (sampling, output) in enumerate(zip(samplings, first, strict=True))
    ]
    answer = functools.partial(_answer, tool, llm.tokenizer, max_calls, _max_length(llm.engine_config))
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
    tool: Tool, tokenizer: Tokenizer, max_calls: int, max_length: int, dialogues: list[Dialogue]
) -> list[Dialogue]:
    """Answer each dialogue whose last turn is a call, and return those that go on with another turn."""
    running = []
    for dialogue in dialogues:
        turn = dialogue.parts[-1]
        is_call = (turn.finish_reason, turn.stop_reason) == ("stop", tool.end)
        if is_call and dialogue.num_replies != max_calls:
            if dialogue.add_reply(tool.reply(turn.text), tokenizer, max_length):
                running.append(dialogue)
    return running


def _max_length(config: EngineConfig) -> int:
    """Tokens that one sequence may have: those of the context, as far as the pool has pages for them."""
    return min(config.max_model_len, (config.num_pages - 1) * config.page_size)
