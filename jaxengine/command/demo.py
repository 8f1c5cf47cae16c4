"""What ships, in one command: arithmetic sampled and graded, and every sample drawn again, alone and among others, bit
for bit."""

import random
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxengine.base.keys import sample_key, seeded
from jaxengine.contract.compare import Comparison, compare
from jaxengine.llm import LLM
from jaxengine.outputs import CompletionOutput
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem, is_right
from jaxengine.sampling_params import SamplingParams

MAX_TOKENS = 16
CONTEXT = 128  # tokens, more than any problem and its answer need
OTHERS = 24  # requests beside the samples when they are drawn again in a batch
END_MARK = "|"
# (probability from, ANSI color, mark without color)
SHADES = ((0.9, 34, ""), (0.5, 148, ""), (0.1, 214, "~"), (0.0, 196, "!"))

Say = Callable[[str], None]


def draw_alone(llm: LLM, prompts: Sequence[str], samples: int, key: jax.Array) -> list[CompletionOutput]:
    """Every sample of `generate(prompts, n=samples, key=key)` by itself, in a call of its own."""
    return [
        llm.generate([prompt], _own(sample_key(key, p, i)), use_tqdm=False)[0].outputs[0]
        for p, prompt in enumerate(prompts)
        for i in range(samples)
    ]


def draw_among_others(
    llm: LLM, prompts: Sequence[str], samples: int, key: jax.Array, seed: int
) -> list[CompletionOutput]:
    """The same samples in one batch, each a request of its own, shuffled and with other requests between them."""
    wanted = [(prompt, sample_key(key, p, i)) for p, prompt in enumerate(prompts) for i in range(samples)]
    other_key, other_problems = seeded(seed + 1), arithmetic.problems(seed, OTHERS)
    others = [(problem.prompt, sample_key(other_key, i, 0)) for i, problem in enumerate(other_problems)]
    batch = list(enumerate(wanted + others))
    random.Random(seed).shuffle(batch)
    prompts, params = [prompt for _, (prompt, _) in batch], [_own(own) for _, (_, own) in batch]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    placed = {index: output.outputs[0] for (index, _), output in zip(batch, outputs, strict=True)}
    return [placed[index] for index in range(len(wanted))]


def _own(key: jax.Array) -> SamplingParams:
    return SamplingParams(key=key, max_tokens=MAX_TOKENS)


def demo(
    model: str = "calc", *, samples: int = 8, problems: int = 6, seed: int = 0, color: bool = False, say: Say = print
) -> bool:
    """Sample problems, show and grade the answers, and draw them all again; True where every bit was the same."""
    say(f"Loading {model}. The first call compiles the steps of the engine, which takes most of this demo's time.")
    llm = LLM(model, max_model_len=CONTEXT)
    chosen, key = arithmetic.problems(seed, problems, "held-out"), seeded(seed)
    prompts, params = [problem.prompt for problem in chosen], SamplingParams(n=samples, max_tokens=MAX_TOKENS)
    say(
        f"{_size(llm)}. {problems} problems that it was not trained on, "
        f"{samples} samples each, temperature 1, key {seed}:"
    )

    def draw() -> list[CompletionOutput]:
        requests = llm.generate(prompts, params, key=key, use_tqdm=False)
        return [sample for request in requests for sample in request.outputs]

    first, compiling = _timed(draw)
    _show(chosen, first, samples, color, say)
    again, seconds = _timed(draw)
    tokens = sum(len(sample.token_ids) for sample in again)
    say(
        f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s "
        f"(the first call, with compilation, took {compiling:.1f} s)"
    )
    say(
        "\nThe same call again; each sample alone, with its own key; "
        f"all in one batch, shuffled among {OTHERS} other requests …"
    )
    comparisons = [
        compare("in the same call again", first, again),
        compare("alone", first, draw_alone(llm, prompts, samples, key)),
        compare("among others", first, draw_among_others(llm, prompts, samples, key, seed)),
    ]
    return _verdict(comparisons, say)


def _verdict(comparisons: Sequence[Comparison], say: Say) -> bool:
    """Print what held; True where everything did."""
    holds = all(comparison.holds for comparison in comparisons)
    verdict = "bit-equal" if holds else "BITS DIFFER"
    say(f"{verdict}: {', '.join(map(str, comparisons))} (tokens, and logprobs as uint32)")
    return holds


def _timed(function: Callable[[], list[CompletionOutput]]) -> tuple[list[CompletionOutput], float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _size(llm: LLM) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(llm.params))
    return f"{size / 1e6:.1f} million parameters, {llm.config.dtype}, on {jax.devices()[0].device_kind}"


# -- text --------------------------------------------------------------------------------------------------------------


def _show(problems: Sequence[Problem], drawn: Sequence[CompletionOutput], samples: int, color: bool, say: Say) -> None:
    """A line a problem: its answer, how many samples are right, and the samples token by token."""
    say(_legend(color) + "\n")
    wide, total = max(len(f"{problem.prompt}{problem.answer}") for problem in problems), 0
    for i, problem in enumerate(problems):
        own = drawn[i * samples : (i + 1) * samples]
        right = sum(is_right(problem, sample.text) for sample in own)
        total += right
        shown = "  ".join(colored(sample, color) for sample in own)
        say(f"{problem.prompt + problem.answer:<{wide}}  {right:>3} of {samples} right   {shown}")
    say(f"\nright answers: {total} of {len(drawn)} ({total / len(drawn):.0%})")


def _legend(color: bool) -> str:
    words = ("0.9 and more", "0.5 to 0.9", "0.1 to 0.5", "less")
    if color:
        shown = ", ".join(_paint(word, shade) for word, (_, shade, _) in zip(words, SHADES, strict=True))
        return f"color: the token's probability ({shown}); {END_MARK} is the end token"
    marks = ", ".join(f"{mark} {word}" for word, (_, _, mark) in zip(words, SHADES, strict=True) if mark)
    return f"mark after a token: its probability ({marks}; none: 0.5 and more); {END_MARK} is the end token"


def colored(sample: CompletionOutput, color: bool) -> str:
    """The sample's tokens, each colored or marked by its probability."""
    texts = [printable(text) for text in sample.token_texts or map(str, sample.token_ids)]
    if sample.finish_reason == "stop" and sample.stop_reason is None:
        texts[-1] = END_MARK
    return "".join(_marked(text, logprob, color) for text, logprob in zip(texts, sample.token_logprobs, strict=True))


def _marked(text: str, logprob: float, color: bool) -> str:
    # No comparison with NaN holds, so it is shown as the least likely.
    _, shade, mark = next((shade for shade in SHADES if np.exp(logprob) >= shade[0]), SHADES[-1])
    return _paint(text, shade) if color else text + mark


def _paint(text: str, shade: int) -> str:
    return f"\x1b[38;5;{shade}m{text}\x1b[0m"


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters spelled out, but for those to `keep`: what a model writes must not steer the
    terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
