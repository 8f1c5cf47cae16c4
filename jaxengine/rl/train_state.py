"""What training keeps and takes: the configuration, the state of a run, and the batch that an update learns from."""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.base.arguments import strict_keywords
from jaxengine.base.pytree import pytree
from jaxengine.device.candidates import Candidates
from jaxengine.device.grammar_mask import GrammarMask
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.rl.objective import ALGORITHMS, Objective
from jaxengine.sampling_params import SamplingParams

# What the state's key is folded with: for completions, for the order of mini-batches, for completions of refills
DRAWS, SHUFFLES, REFILLS = 0, 1, 2


@strict_keywords
@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How a rollout is learned from. Raises ValueError naming the field where a count is less than 1.

    An objective's budget is sampling.max_tokens where it is not given.

    The last four fields are for an objective with a critic, "generalized" advantages.
    """

    objective: Objective = ALGORITHMS["grpo"]
    sampling: SamplingParams = SamplingParams()  # that the completions are drawn with
    epochs: int = 1  # passes over a rollout
    mini_batches: int = 1  # updates of an epoch
    micro_batches: int = 1  # parts of an update whose gradients are added: more take less memory, and change no logprob
    # For several updates of a rollout that top-k, top-p or min-p cut: score over what they kept at the draw, because a
    # drawn token that the new weights would cut off has ratio 0. It costs one pass of scoring.
    keep_sampling_mask: bool = False
    # DAPO's overlong filtering: a sample that ended by "length", that max_tokens or the context cut off, counts in its
    # group's mean and deviation and has no loss. Its tokens are out of the mask, and out of what averages divide by.
    mask_truncated: bool = False
    value_coefficient: float = 0.5  # of the critic's loss
    value_clip: float = 0.2  # how far a value may move from the old one (losses.value_loss)
    discount: float = 1.0  # γ of the generalized advantages
    decay: float = 0.95  # λ of the generalized advantages

    def __post_init__(self) -> None:
        if self.objective.average == "constant" and self.objective.budget is None:
            if self.sampling.max_tokens is None:
                raise ValueError(
                    "average='constant' divides by a number of tokens: give the objective's budget, or max_tokens in "
                    "sampling"
                )
            object.__setattr__(self, "objective", dataclasses.replace(self.objective, budget=self.sampling.max_tokens))
        drawn = self.sampling
        if self.objective.distillation_coefficient and (drawn.top_k or drawn.top_p < 1 or drawn.min_p):
            raise ValueError(
                "distillation compares whole distributions, because the KL is infinite where one of them is cut to "
                f"0: give sampling without top_k, top_p and min_p, got {drawn.top_k}, {drawn.top_p} and {drawn.min_p}"
            )
        for name in ("epochs", "mini_batches", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def check_parts(rows: int, mini_batches: int, micro_batches: int, made_of: str = "") -> None:
    """Raises ValueError where samples cannot be cut into so many parts; `made_of` stands before their number."""
    if rows % (mini_batches * micro_batches):
        parts = f"mini_batches · micro_batches = {mini_batches} · {micro_batches}"
        raise ValueError(f"{made_of}{rows} samples are no multiple of {parts}")


@pytree
class TrainState:
    """Everything that a run needs to continue to the same bits."""

    master: Any  # an ActorCritic in float32, each key-value head once (models/own_heads.py)
    moments: Any  # the optimiser's
    step: Int[Array, ""]  # updates so far
    version: Int[Array, ""]  # of the weights: rollouts learned from so far
    key: UInt32[Array, " 2"]  # never changes; each draw folds it with its purpose and a count


@pytree
class Batch:
    """What one update learns from. A field is None where the objective does not need it."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    reference: Float[Array, "B T"] | None = None  # logprobs under the reference policy, for a penalty and a metric
    old_values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None
    kept: SamplingMask | None = None  # scored under it where it is there
    grammar: GrammarMask | None = None  # of structured outputs
    targets: Candidates | None = None  # a teacher's (distillation.py)
    corrections: Float[Array, "B T"] | None = None  # for what earlier weights drew (losses.correction_weights)
