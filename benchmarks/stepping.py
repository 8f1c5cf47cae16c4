"""Requests that a benchmark serves a step at a time."""

import jax

from jaxengine import LLM
from jaxengine.command.ours import exact_lengths
from jaxengine.command.workloads import Prompts


def queue(llm: LLM, prompts: Prompts, lengths: list[int]) -> None:
    """Queue prompts with exactly so many new tokens each, without running them."""
    requests = llm.admitted(
        [{"prompt_token_ids": prompt} for prompt in prompts], exact_lengths(lengths), jax.random.key(0), None
    )
    for request in requests:
        llm.engine.add(request)


def drain(llm: LLM) -> None:
    """Step until every request has ended."""
    while llm.engine.requests:
        llm.engine.step()


def reads_prompts(llm: LLM) -> bool:
    """Whether the next step has tokens of a prompt to compute."""
    scheduler = llm.engine.scheduler
    return bool(scheduler.waiting) or any(s.num_computed < s.prompt_length for s in scheduler.running)
