"""This engine as a system of the bench."""

import os
import time

from jaxengine.base.machine import peak_memory
from jaxengine.command.workloads import Prompts
from jaxengine.llm import LLM
from jaxengine.sampling_params import SamplingParams


class Ours:
    """An LLM as a system."""

    name, workloads = "jaxengine", ("decode", "group")

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

    def peak_memory(self) -> int | None:
        return peak_memory(os.getpid())


def exact_lengths(lengths: list[int]) -> list[SamplingParams]:
    """Parameters of samples with so many tokens each, neither more nor fewer, and no text."""
    return [SamplingParams(max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
