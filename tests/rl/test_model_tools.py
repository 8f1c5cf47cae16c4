"""A chat model's own tool calls: what it wrote stays, the template's tokens follow, and answers carry no loss."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tokenizers
from conftest import make_llm

from jaxengine import Rollout, SamplingParams
from jaxengine.outputs import CompletionOutput, RequestOutput, RequestOutputs, VersionSpan
from jaxengine.rl.calc import model as calc_model
from jaxengine.rl.calc.model import build_tokenizer
from jaxengine.rl.loops import model_tools
from jaxengine.rl.loops.functions import Function
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.loops.model_tools import chat_with_tools
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer
from jaxengine.text.answer_parts import ToolCall
from jaxengine.text.tokenizer import Tokenizer

KEY = jax.random.key(3)
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last and '</think>' in thinking | default('') %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- set shown = tools if tools and loop.first else [] %}
        {%- for tool in shown %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TEMPLATES = {"<|im_end|>": QWEN, "<|eot_id|>": LLAMA}
QUESTION = [{"role": "user", "content": "What is 1+2?"}]


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def shout(text: str) -> str:
    """Says it louder.

    Args:
        text: what to say
    """
    if not text:
        raise ValueError("nothing to say")
    return text.upper() + "!"


TOOLS = [add, shout]


def backend() -> tokenizers.Tokenizer:
    made = build_tokenizer()
    made.add_special_tokens(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
    )
    made.add_tokens(["<tool_call>", "</tool_call>"])
    return made


NAMED = {"bos_token": "<|begin_of_text|>"}
IDS = backend()


def tokenizer_of(template: str) -> Tokenizer:
    return Tokenizer(backend(), named_tokens=NAMED, chat_template=template)


class Scripted:
    """In the place of an LLM: what the model writes in each turn of one conversation, control tokens by name."""

    def __init__(self, *turns: str, end: str = "<|im_end|>", template: str | None = None, eos: tuple = ()) -> None:
        self.tokenizer = tokenizer_of(template or TEMPLATES[end])
        self.config = SimpleNamespace(eos_token_ids=[IDS.token_to_id(token) for token in (end, *eos)])
        self.engine_config = SimpleNamespace(max_model_len=10**5, num_pages=10**5, page_size=16)
        self.turns = [self.tokenizer.encode(turn, allow_special_tokens=True) for turn in turns]
        self.contexts: list[list[int]] = []

    def generate(self, prompts: Any, sampling_params: Any, *, key: Any, use_tqdm: Any = None) -> RequestOutputs:
        (context,) = [prompt["prompt_token_ids"] for prompt in prompts]
        ids = self.turns[len(self.contexts)]
        self.contexts.append(context)
        is_ended, stop = ids[-1] in self.config.eos_token_ids, sampling_params[0].stop
        turn = CompletionOutput(
            index=0,
            text=self.tokenizer.decode(ids),
            token_ids=ids,
            token_logprobs=np.full(len(ids), -1, np.float32),
            finish_reason="stop",
            stop_reason=None if is_ended else stop[0],
            weight_versions=[VersionSpan(0, 0, len(ids))],
        )
        return RequestOutputs([RequestOutput("0", None, context, [turn], True)])

    def chat(self, tools: Any = TOOLS, sampling: SamplingParams | None = None, **options: Any) -> Any:
        llm: Any = self
        (output,) = chat_with_tools(llm, [QUESTION], tools, sampling, key=KEY, **options)
        return output.outputs[0]

    def shown(self) -> str:
        """The last context, from the model's first turn on."""
        return self.tokenizer.decode(self.contexts[-1][len(self.contexts[0]) :], skip_special_tokens=False)


def peers_ids(template: str, messages: list, tools: Any = TOOLS) -> list[int]:
    """What transformers makes of the whole conversation."""
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_object=backend(), **NAMED)
    return peer.apply_chat_template(
        messages, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def hermes(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def calls_of(*named: tuple[str, dict]) -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in named]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_qwens_tokens_are_the_templates_of_the_whole_conversation():
    """Two tools, called in one turn, and then one more: the model goes on after what the template would write."""
    first = f"{hermes('add', a=1, b=2)}\n{hermes('shout', text='é')}<|im_end|>"
    second = hermes("add", a=3, b=4) + "<|im_end|>"
    llm = Scripted(first, second, "It is 7.<|im_end|>")
    sample = llm.chat()
    written = [turn.removesuffix("<|im_end|>") for turn in (first, second)]
    one, other = ({"role": "assistant", "content": turn} for turn in written)
    answers = [{"role": "tool", "content": answer} for answer in ("3", "É!", "7")]
    expected = peers_ids(QWEN, [*QUESTION, one, *answers[:2], other, answers[2]])
    assert llm.contexts[-1] == expected and "\\u00e9" in llm.shown()
    assert llm.contexts[0] == peers_ids(QWEN, QUESTION)
    assert [list(turn.token_ids) for turn in sample.turns] == llm.turns and sample.text.endswith("It is 7.")


def test_the_calls_of_the_template_are_the_same_tokens():
    llm = Scripted(f"{hermes('add', a=1, b=2)}\n{hermes('shout', text='e')}<|im_end|>", "3<|im_end|>")
    llm.chat()
    calls = calls_of(("add", {"a": 1, "b": 2}), ("shout", {"text": "e"}))
    answers = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "E!"}]
    assert llm.contexts[-1] == peers_ids(QWEN, [*QUESTION, calls, *answers])


def test_llamas_tokens_are_the_templates_of_the_whole_conversation():
    call = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
    llm = Scripted(f"{call}<|eot_id|>", f"{call}; {call}<|eot_id|>", "3.<|eot_id|>", end="<|eot_id|>")
    llm.chat()
    answer = {"role": "tool", "content": "3"}
    messages = [*QUESTION, calls_of(("add", {"a": 1, "b": 2})), answer]
    assert llm.contexts[1] == peers_ids(LLAMA, messages)
    messages += [{"role": "assistant", "content": f"{call}; {call}"}, answer, answer]
    assert llm.contexts[2] == peers_ids(LLAMA, messages)


def test_the_end_of_a_turn_stands_once():
    call = hermes("add", a=1, b=2)
    between = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    for end, expected, stop in (
        ("<|im_end|>", f"<|im_end|>{between}", ()),
        ("<|endoftext|>", f"<|endoftext|>{between}", ()),  # another end token of the model's takes its place
        ("", f"<|im_end|>{between}", ("</tool_call>",)),  # a stop string: the template's is added
    ):
        llm = Scripted(call + end, "3<|im_end|>", eos=("<|endoftext|>",))
        llm.chat(sampling=SamplingParams(stop=stop))
        assert llm.shown() == call + expected


@pytest.mark.parametrize(
    "call, answer",
    [
        (hermes("subtract", a=1), "error: there is no tool 'subtract', only add, shout"),
        (hermes("\ud800"), "error: there is no tool '\\ud800', only add, shout"),
        (hermes("add", a=1), "error: missing a required argument: 'b'"),
        (hermes("add", a=1, b=2, c=3), "error: there is no argument 'c', only a, b"),
        (hermes("add", a="1", b=2), "error: a must be of type integer, got '1'"),
        (hermes("add", a=True, b=2), "error: a must be of type integer, got True"),
        (hermes("shout", text=""), "error: nothing to say"),
        (hermes("shout", text="\ud800"), "\\ud800!"),
        (hermes("shout", text="<|im_end|>"), "<|IM_END|>!"),
    ],
)
def test_a_call_that_cannot_be_made_is_answered_by_its_error(call, answer):
    llm = Scripted(call + "<|im_end|>", "Oh.<|im_end|>")
    llm.chat()
    assert f"<tool_response>\n{answer}\n</tool_response>" in llm.shown()


def test_types_that_a_description_allows():
    def scaled(a: int | None = None, b: float = 0.0) -> list:
        """Scales.

        Args:
            a: what is scaled
            b: by what
        """
        return [a, b]

    llm = Scripted(hermes("scaled", a=None, b=3) + hermes("scaled", b=0.5) + "<|im_end|>", "Oh.<|im_end|>")
    llm.chat([scaled])
    assert "\n[null, 3]\n" in llm.shown() and "\n[null, 0.5]\n" in llm.shown()


def test_an_answers_control_tokens_are_text():
    llm = Scripted(hermes("show") + "<|im_end|>", "Oh.<|im_end|>")
    show = Function(lambda: "<|im_end|>", {"type": "function", "function": {"name": "show"}})
    llm.chat([show])
    assert "\n<|im_end|>\n" in llm.shown()
    ends = [token for token in llm.contexts[-1][len(llm.contexts[0]) :] if token == IDS.token_to_id("<|im_end|>")]
    assert len(ends) == 2


def test_other_errors_end_the_run():
    def broken() -> str:
        """Breaks."""
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Scripted(hermes("broken") + "<|im_end|>").chat([broken])


def test_what_is_no_call_ends_the_sample():
    for turn in ("It is 3.", "<tool_call>\n{oops\n</tool_call>", f"<think>{hermes('add', a=1, b=2)}</think>3"):
        llm = Scripted(f"{turn}<|im_end|>")
        assert len(llm.chat().turns) == 1


def test_at_most_max_calls():
    calls = f"{hermes('add', a=1, b=2)}\n{hermes('add', a=3, b=4)}<|im_end|>"
    numbers = []

    def count() -> int:
        """Counts."""
        numbers.append(0)
        return len(numbers)

    counted = f"{hermes('count')}{hermes('count')}<|im_end|>"
    for most, turns in ((1, 1), (2, 2), (3, 2), (4, 3)):
        numbers.clear()
        sample = Scripted(counted, counted, counted).chat([count], max_calls=most)
        assert (len(sample.turns), len(numbers), sample.finish_reason) == (turns, 2 * (turns - 1), "stop")
    assert len(Scripted(calls, "7<|im_end|>").chat().turns) == 2


def test_a_template_that_shows_the_last_turn_otherwise():
    """Qwen3 writes thoughts in the assistant's last turn alone; what comes after a turn is told all the same."""
    template = QWEN.replace("thinking | default('')", "'</think>'")
    llm = Scripted(hermes("add", a=1, b=2) + "<|im_end|>", "3<|im_end|>", template=template)
    llm.chat()
    assert "<tool_response>\n3\n" in llm.shown() and "<think>" not in llm.shown()


END = "        {{- '<|im_end|>\\n' }}"
CONTENT = "{{- message.content }}"


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("{%- if tools %}", "{%- if false %}", "does not write the tools"),
        (CONTENT, "{{- 'x' }}", "does not write the text of an assistant's turn once"),
        (CONTENT, "{{- message.content * 2 }}", "does not write the text of an assistant's turn once"),
        (END, "{{- '.' }}", "does not write the text of an assistant's turn once"),
        (END, "", "a control token that ends it, but ''"),
        (END, "{{- '<|im_end|>' ~ ('' if message.tool_calls else '\\n') }}", "after its calls"),
        (END, "{{- '<|endoftext|>' if loop.last else '<|im_end|>\\n' }}", "after the last turn"),
        ("{{- '\\n<tool_response>", "{{- ('' if loop.index0 < 4 else '.') ~ '\\n<tool_response>", "in a longer chat"),
    ],
)
def test_a_template_whose_turns_have_no_end_that_can_be_told_is_refused(old, new, error):
    template = QWEN.replace(old, new)
    assert template != QWEN
    with pytest.raises(ValueError, match=error):
        Scripted("3<|im_end|>", template=template).chat()


def test_tools_that_cannot_be_described_are_refused():
    def bare(a):
        return a

    named = {"type": "function", "function": {"name": "add"}}
    for tools, error in (
        ([], "one function at least"),
        ([bare], "bare.*complete"),
        ([add, Function(add, named)], "'add'"),
    ):
        with pytest.raises(ValueError, match=error):
            Scripted("3<|im_end|>").chat(tools)
    with pytest.raises(ValueError, match="tool_parser must be auto, hermes or llama3_json, got 'xml'"):
        Scripted("3<|im_end|>").chat(tool_parser="xml")


# -- with a model that draws --

SMALL = Function(
    lambda a, b: a + b,
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}}},
)


class Reader:
    """Takes every turn for two calls: a random model writes none in a real format."""

    def __init__(self, form: Any, thinks: bool | None) -> None:
        pass

    def push(self, text: str) -> list:
        return [ToolCall("add", f'{{"a": {len(text)}, "b": {b}}}') for b in (1, 2)]


@pytest.fixture
def llm(calc, monkeypatch):
    monkeypatch.setattr(model_tools, "AnswerReader", Reader)
    text = Tokenizer(build_tokenizer(), named_tokens={"eos_token": "<|im_end|>"}, chat_template=QWEN)
    return make_llm(calc.config, calc.params, tokenizer=text)


def sampling(**more) -> SamplingParams:
    ids = [*build_tokenizer().encode("1234567").ids, *calc_model.CONFIG.eos_token_ids]
    return SamplingParams(n=3, max_tokens=60, temperature=1.3, logit_bias={token: 60.0 for token in ids}, **more)


def play(llm, prompts, sampling, key):
    return chat_with_tools(llm, prompts, [SMALL], sampling, key=key, max_calls=4)


def test_score_has_the_bits_of_every_turn_and_answers_carry_no_loss(llm):
    outputs = play(llm, [QUESTION, QUESTION], sampling(repetition_penalty=1.1), KEY)
    samples = [sample for output in outputs for sample in output.outputs]
    assert {len(sample.turns) for sample in samples} == {3} and len({s.text for s in samples}) == 6
    rollout = Rollout.from_outputs(outputs)
    for tokens, mask, sample in zip(rollout.tokens, rollout.mask, samples, strict=True):
        np.testing.assert_array_equal(tokens[mask], [token for turn in sample.turns for token in turn.token_ids])
        expected = np.concatenate([turn.token_logprobs for turn in sample.turns])
        scored = llm.score(tokens[None], mask[None], sampling(repetition_penalty=1.1))[0, mask]
        assert np.array_equal(scored.view(np.uint32), expected.view(np.uint32))


def test_a_loop_plays_it(llm):
    """With messages as its prompts; test_tools.py has a loop that learns from conversations."""
    room = {name: getattr(llm.engine_config, name) for name in ("max_model_len", "max_num_seqs", "num_pages")}
    trainer = Trainer(llm.config, optax.sgd(1e-2), TrainerConfig(sampling=sampling()))
    state = trainer.start(llm.params, jax.random.key(1))
    problems = [(QUESTION, None), (QUESTION, None)]
    loop = Loop(trainer, lambda i: problems, np.zeros, 512, tokenizer=llm.tokenizer, engine=room, play=play)
    prompts, _ = zip(*problems, strict=True)
    assert [len(sample.turns) for output in loop.generate(state, prompts) for sample in output.outputs] == [3] * 6
