"""Tool use: one sequence of turns and replies; turns have the bits of generate, and replies carry no loss."""

import re

import jax
import numpy as np
import optax
import pytest
from conftest import bits

from jaxengine import LLM, Rollout, SamplingParams
from jaxengine.base.keys import sample_key
from jaxengine.outputs import UNDRAWN
from jaxengine.rl.loops.calculator import calculate
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.loops.tools import Tool, calculator, generate_in_turns, generate_with_tools
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

KEY = jax.random.key(5)
BUDGET = 40
TOOL = calculator(begin="", end="=")  # a token is a byte: the text after a "=", to the end of the line, is the tool's
PROMPTS = ["1+1=2\n", "sum:", "go", "then 3*"]


@pytest.fixture(scope="module")
def llm(tiny_with_text) -> LLM:
    return tiny_with_text


@pytest.fixture(scope="module")
def sampling(llm) -> SamplingParams:
    """Digits, "+" and "=" alone; with every parameter whose effect depends on where a turn begins."""
    ids = llm.tokenizer.encode("0123456789+==")
    return SamplingParams(
        n=2,
        max_tokens=BUDGET,
        logit_bias={token: 60.0 for token in ids},
        temperature=1.3,
        top_k=12,
        repetition_penalty=1.2,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        entropy=True,
        raw_logprobs=True,
        logprobs=2,
    )


@pytest.fixture(scope="module")
def outputs(llm, sampling):
    return generate_with_tools(llm, PROMPTS, TOOL, sampling, key=KEY, max_calls=4)


@pytest.fixture(scope="module")
def rollout(outputs) -> Rollout:
    return Rollout.from_outputs(outputs)


def conversations(outputs):
    return [sample for output in outputs for sample in output.outputs]


def test_every_turn_keeps_the_prompts_cache_salt(llm, sampling, monkeypatch):
    """Without it, a tenant's conversation would be in the cache of others from its second turn on."""
    salts, generate = [], llm.generate

    def recorded(prompts, *positional, **keywords):
        salts.append([prompt["cache_salt"] for prompt in prompts])
        return generate(prompts, *positional, **keywords)

    monkeypatch.setattr(llm, "generate", recorded)
    generate_with_tools(llm, [{"prompt": PROMPTS[1], "cache_salt": "tenant"}], TOOL, sampling, key=KEY, max_calls=1)
    assert len(salts) > 1 and all(set(of_call) == {"tenant"} for of_call in salts)


def test_conversations_have_calls(outputs):
    """The outputs of the other tests have several turns, answers and errors, and both finish reasons."""
    samples = conversations(outputs)
    assert [o.prompt for o in outputs] == PROMPTS and {len(s.turns) for s in samples} >= {3, 5}
    assert "error: " in "".join(s.text for s in samples) and any(re.search(r"\d+\+\d+=\d+\n", s.text) for s in samples)
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_no_loss_on_the_tools_tokens(llm, outputs, rollout):
    """The mask follows from the text: all of a completion is under it but the text from each "=" to the line's end."""
    for row, output in enumerate(o for o in outputs for _ in o.outputs):
        sample = conversations(outputs)[row]
        text = llm.tokenizer.decode(sample.token_ids)
        drawn = np.ones(len(text), bool)
        for reply in re.finditer("=[^\n]*\n", text):
            drawn[reply.start() + 1 : reply.end()] = False
        assert len(text) == len(sample.token_ids) and 0 < drawn.sum() < len(text)
        start = len(output.prompt_token_ids)
        expected = np.pad(drawn, (start, rollout.mask.shape[1] - start - len(text)))
        np.testing.assert_array_equal(rollout.mask[row], expected)
    assert not rollout.logprobs[~rollout.mask].any() and (rollout.logprobs[rollout.mask] < 0).all()
    assert (rollout.weight_versions[~rollout.mask] == UNDRAWN).all() and (
        rollout.weight_versions[rollout.mask] == 0
    ).all()
    assert rollout.mask.sum() == sum(len(turn.token_ids) for s in conversations(outputs) for turn in s.turns)


def test_score_is_generate(llm, sampling, rollout):
    logprobs, entropies = llm.score(rollout.tokens, rollout.mask, sampling, entropy=True)
    assert (logprobs.view(np.uint32) == rollout.logprobs.view(np.uint32)).all()
    assert (entropies.view(np.uint32) == rollout.entropies.view(np.uint32)).all()
    one_more = rollout.mask | np.pad(rollout.mask, ((0, 0), (1, 0)))[:, :-1]
    with_answers = llm.score(rollout.tokens, one_more, sampling)
    assert (
        with_answers != rollout.logprobs
    ).any()  # the control: a token of the tool under the mask changes the logprobs


def test_every_turn_replays(llm, outputs):
    for sample in conversations(outputs)[:3]:
        assert all(llm.replay(turn.coordinate).holds for turn in sample.turns)
        assert sample.coordinate is None


def test_alone_or_in_the_batch(llm, sampling, outputs):
    """A conversation depends on its key alone, however the key is given."""
    assert bits(generate_with_tools(llm, PROMPTS[:1], TOOL, sampling, key=KEY, max_calls=4)) == bits(outputs[:1])
    one = sampling.replace(n=1, key=sample_key(KEY, 2, 1))
    (alone,) = generate_with_tools(llm, PROMPTS[2], TOOL, one, key=jax.random.key(99), max_calls=4)
    assert bits([alone])[0] == bits(outputs[2:3])[1]
    group = sampling.replace(key=jax.random.fold_in(KEY, 3))
    assert bits(generate_with_tools(llm, PROMPTS[3:], TOOL, group, key=jax.random.key(99), max_calls=4)) == bits(
        outputs[3:]
    )


def test_a_seed_is_its_key(llm, sampling):
    seeded = generate_with_tools(llm, "sum:", TOOL, sampling.replace(seed=7), key=KEY, max_calls=2)
    keyed = generate_with_tools(llm, "sum:", TOOL, sampling.replace(key=jax.random.key(7)), key=KEY, max_calls=2)
    assert bits(seeded) == bits(keyed) and len(seeded[0].outputs[0].turns) == 3


def test_without_a_call_it_is_generate(llm, sampling):
    never = Tool(calculate, begin="", end="no such text")
    plain = llm.generate(PROMPTS, sampling, key=KEY)
    tooled = generate_with_tools(llm, PROMPTS, never, sampling, key=KEY)
    assert bits(plain) == bits(tooled)
    for a, b in zip(conversations(plain), conversations(tooled), strict=True):
        assert (a.text, a.logprobs, a.token_texts) == (b.text, b.logprobs, b.token_texts)
        assert (a.raw_logprobs == b.raw_logprobs).all() and a.weight_versions == b.weight_versions


def test_budgets(llm, sampling, outputs):
    for sample in conversations(outputs):
        written = sum(len(turn.token_ids) for turn in sample.turns)
        assert (
            written <= BUDGET and len(sample.turns) <= 5 and (written == BUDGET) == (sample.finish_reason == "length")
        )
        assert sample.finish_reason == "length" or (len(sample.turns) == 5 and sample.stop_reason == "=")
        assert len(sample.token_logprobs) == len(sample.logprobs) == len(sample.token_texts) == len(sample.raw_logprobs)
    wordy = Tool(lambda call: "x" * 200, begin="", end="=")
    (output,) = generate_with_tools(llm, "sum:", wordy, sampling.replace(max_tokens=None), key=KEY)
    assert all(s.finish_reason == "length" and len(s.token_ids) < 512 for s in output.outputs)


def test_replies():
    tool = calculator()
    assert tool.reply("let me see <calc>12+30") == "42\n" == tool.reply("<calc>1</calc><calc>12+30</calc>")
    assert tool.reply("12+30") == "error: a call begins with <calc>\n"
    assert tool.reply("<calc>12+</calc>").startswith("error: ")
    assert Tool(lambda call: "", begin="", end="!", after="").reply("x!") == " "
    with pytest.raises(ValueError, match="end must be the text"):
        calculator(end="")


def test_a_model_without_tokenizer_is_refused(tiny):
    with pytest.raises(ValueError, match="has no tokenizer"):
        generate_with_tools(tiny, [[1]], TOOL, key=KEY)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("12+30", "42"),
        (" 7/2 ", "3.5"),
        ("6/2", "3"),
        ("-(2-5)*4", "12"),
        ("7//2+7%4", "6"),
        ("2**10", "1024"),
        ("1/3", "0.3333333333"),
        ("10**50", "1" + "0" * 50),
        ("1e3", "1000"),
        ("0.1+0.2", "0.3"),
    ],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


REFUSED = {
    "": "no value",
    "1/0": "division by zero",
    "9**9**9": "too large",
    "(10**200)*(10**200)": "more than 1024 bits",
    "(-8)**0.5": "no finite real number",
    "1e400": "no finite real number",
    "x": "arithmetic on numbers only, got 'x'",
    "'a'*9": "numbers only",
    "__import__('os')": "numbers only",
    "1 if 1 else 2": "numbers only",
    "True": "numbers only",
    "[1][0]": "numbers only",
    "1<2": "numbers only",
    "(" * 120: "no value",
    "1+" * 100 + "1": "at most 200 characters",
    "1\0": "numbers only",
    "2**-2000": "too large",
    "0**-1": "no value",
    "e": "numbers only",
    "(1)(2)": "numbers only",
    "()": "numbers only",
    "1e": "no value",
    "1.5.2": "no value",
    "012": "no value",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_what_the_calculator_refuses(expression):
    with pytest.raises(ValueError, match=re.escape(REFUSED[expression])):
        calculate(expression)


def test_the_calculator_is_not_deep():
    assert calculate("-" * 199 + "1") == "-1"


def test_a_prompt_is_cut_once_and_no_later_turn(llm, sampling):
    prompt = llm.tokenizer.encode("1+1=2\nsum:")
    cut, whole = (
        generate_with_tools(llm, [ids], TOOL, params, key=KEY, max_calls=2)
        for ids, params in ((prompt, sampling.replace(truncate_prompt_tokens=4)), (prompt[-4:], sampling))
    )
    assert max(len(sample.turns) for sample in conversations(whole)) > 1
    assert bits(cut) == bits(whole)


def test_a_conversation_cannot_be_extended_and_says_what_to_do(llm, outputs):
    with pytest.raises(ValueError, match="coordinate.*prompt_token_ids"):
        llm.extend(outputs)


def test_an_environment_replies_in_text_or_token_ids(llm, sampling):
    """It is asked with all that was said; where it has no reply the sample is generate's, bit for bit."""
    sampling, asked = sampling.replace(stop=["="]), []

    def reply(number, parts):
        asked.append((number, len(parts)))
        return (None, [49, 61, 10], "9\n")[number] if len(parts) < 4 else None

    outputs = generate_in_turns(llm, PROMPTS[:3], reply, sampling, key=KEY)
    silent, *others = outputs
    assert bits([silent]) == bits(llm.generate(PROMPTS[:1], sampling, key=KEY))
    assert {number for number, _ in asked} == {0, 1, 2} and max(asked)[1] == 5
    for ids, output in zip(([49, 61, 10], llm.tokenizer.encode("9\n")), others, strict=True):
        for sample in output.outputs:
            first = len(sample.turns[0].token_ids)
            assert len(sample.turns) == 1 or sample.token_ids[first : first + len(ids)] == ids
    assert any(len(sample.turns) == 3 for output in others for sample in output.outputs)


def test_an_empty_reply_is_refused(llm, sampling):
    with pytest.raises(ValueError, match="a reply has at least one token"):
        generate_in_turns(llm, PROMPTS[:1], lambda number, parts: [], sampling.replace(stop=["="]), key=KEY)


def test_a_loop_learns_from_conversations(llm, sampling):
    """Replies carry no loss, and the first update finds the logprobs that the turns were drawn with."""
    sampling = SamplingParams(n=2, max_tokens=24, logit_bias=sampling.logit_bias, temperature=1.3)
    conversations = []

    def play(llm, prompts, sampling, key):
        conversations.extend(generate_with_tools(llm, prompts, TOOL, sampling, key=key, max_calls=2))
        return conversations

    trainer = Trainer(llm.config, optax.sgd(1e-2), TrainerConfig(sampling=sampling))
    judge = lambda outputs, answers: np.array([len(s.turns) for o in outputs for s in o.outputs], np.float32)
    room = {name: getattr(llm.engine_config, name) for name in ("max_model_len", "max_num_seqs", "num_pages")}
    problems = [(prompt, None) for prompt in PROMPTS]
    loop = Loop(trainer, lambda i: problems, judge, 256, tokenizer=llm.tokenizer, engine=room, play=play)
    _, iteration = loop.iterate(trainer.start(llm.params, jax.random.key(1)))
    turns = [turn for output in conversations for sample in output.outputs for turn in sample.turns]
    assert len(turns) > 2 * len(PROMPTS) and iteration.tokens == sum(len(turn.token_ids) for turn in turns)
    assert (iteration.updates[0]["max_delta"], iteration.updates[0]["ratio_max"]) == (0.0, 1.0)
