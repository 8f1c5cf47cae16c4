"""This engine as a system of the bench."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor

from jaxengine.async_llm import AsyncLLM
from jaxengine.base.machine import peak_memory
from jaxengine.command.workloads import Prompts
from jaxengine.llm import LLM
from jaxengine.sampling_params import SamplingParams


class Ours:
    """An LLM as a system."""

    name, workloads = "jaxengine", ("decode", "group", "first-token")

    def __init__(self, llm: LLM) -> None:
        self.llm, self.vocab_size = llm, llm.config.vocab_size

    def warm_up(self) -> None:
        """Compile every step, however rarely the workloads run it."""
        self.llm.warm_up()

    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float:
        """Seconds of one call. The logprobs of the sampled tokens are computed with or without `logprobs`."""
        params = exact_lengths(lengths)
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        spent = time.perf_counter() - start
        drawn = [len(output.outputs[0].token_ids) for output in outputs]
        if drawn != lengths:
            raise ValueError(f"the workload asks for {lengths} tokens and got {drawn}: raise max_model_len")
        return spent

    def token_times(self, prompts: Prompts, lengths: list[int], late: list[int], before: int) -> list[list[float]]:
        """When tokens came out of AsyncLLM's streams."""
        with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop that runs
            return thread.submit(asyncio.run, _token_times(self.llm, prompts, lengths, late, before)).result()

    def peak_memory(self) -> int | None:
        return peak_memory(os.getpid())


def exact_lengths(lengths: list[int]) -> list[SamplingParams]:
    """Parameters of samples with so many tokens each, neither more nor fewer, and no text."""
    return [SamplingParams(max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]


async def _token_times(
    llm: LLM, prompts: Prompts, lengths: list[int], late: list[int], before: int
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in range(len(prompts) + 1)]
    is_time = asyncio.Event()

    async def follow(index: int, prompt: list[int], params: SamplingParams) -> None:
        async for delta in engine.stream({"prompt_token_ids": prompt}, params):
            times[index] += [time.perf_counter()] * sum(len(part.token_ids) for part in delta.outputs)
            if all(len(own) >= before for own in times[:-1]):
                is_time.set()

    async with AsyncLLM.over(llm) as engine, asyncio.TaskGroup() as group:
        for index, (prompt, params) in enumerate(zip(prompts, exact_lengths(lengths), strict=True)):
            group.create_task(follow(index, prompt, params))
        await is_time.wait()
        sent = time.perf_counter()
        group.create_task(follow(len(prompts), late, *exact_lengths([1])))
    return [[at - sent for at in own] for own in times]
