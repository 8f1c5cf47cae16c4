"""TRL: completions for its GRPOTrainer, drawn here under the trainer's own weights.

    llm = LLM(FOLDER, dtype="float32")
    trainer = GRPOTrainer(model, reward_funcs=…, rollout_func=TrlRollout(llm), args=…)

TRL's trainer computes in PyTorch, so its logprobs are not ours by bits: `mean_abs_difference` measures how far apart
they are. Within the engine everything is exact as ever.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxengine.base.keys import folded, seeded
from jaxengine.llm import LLM
from jaxengine.rl.integrations.samples import samples_of
from jaxengine.sampling_params import SamplingParams


class TrlRollout:
    """A `rollout_func` for TRL's GRPOTrainer (1.16), which gives the engine the trainer's weights by itself.

    Weights are taken whenever the trainer's step has changed, under Hugging Face's names, rounded to the engine's dtype
    where it is another one. A model of adapters, or of parts on several devices, has no such names and is refused.
    Prompts come repeated for each generation, and each gets one completion. Draws follow from the trainer's seed, the
    number of the call and the prompt's place in it.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._step: int | None = None  # of the trainer, when weights were taken last
        self._num_calls = 0

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """`prompt_ids`, `completion_ids` and `logprobs`, a list for each prompt; logprobs are those of the distribution
        that was drawn from, after temperature, top-k, top-p and min-p. Raises RuntimeError where the engine ended a
        sample with an error, since a trainer would learn from what there is of it.
        """
        if trainer.state.global_step != self._step:
            self.llm.update_params(_named_weights(trainer), cast=True)
            self._step = trainer.state.global_step
        key = folded(seeded(trainer.args.seed), trainer.accelerator.process_index, self._num_calls)
        self._num_calls += 1
        outputs = self.llm.generate(_token_ids(prompts, trainer), _sampling_params(trainer), key=key, use_tqdm=False)
        samples = [sample for _, sample in samples_of(outputs)]
        return {
            "prompt_ids": [output.prompt_token_ids for output in outputs],
            "completion_ids": [sample.token_ids for sample in samples],
            "logprobs": [sample.token_logprobs.tolist() for sample in samples],
        }


def mean_abs_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Mean |Δlogprob| over all tokens, in nats."""
    pairs = zip(ours, theirs, strict=True)
    return float(np.mean(np.concatenate([np.abs(np.subtract(a, b)) for a, b in pairs])))


def _named_weights(trainer: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor of PyTorch's) of each parameter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for name, tensor in model.state_dict().items():
        yield name, tensor.detach().cpu()


def _token_ids(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """The prompts as the trainer's own tokenizer and chat template read them."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, tools=trainer.tools or None)
    how |= dict(chat_template=trainer.chat_template)
    rendered = tokenizer.apply_chat_template(list(prompts), **how, **trainer.chat_template_kwargs)
    return [list(ids) for ids in rendered["input_ids"]]


def _sampling_params(trainer: Any) -> SamplingParams:
    given = {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p,
        "repetition_penalty": trainer.repetition_penalty,
        "max_tokens": trainer.max_completion_length,
    }
    given = {name: value for name, value in given.items() if value is not None} | (trainer.args.generation_kwargs or {})
    return SamplingParams(stop_token_ids=[trainer.processing_class.eos_token_id], detokenize=False, **given)
