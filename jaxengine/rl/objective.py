"""What is maximised: an Objective for each published algorithm.

README.md in this folder says where each is otherwise than its source, and why.
"""

import dataclasses
from typing import Literal

from jaxengine.base.arguments import strict_keywords

Advantage = Literal["scaled", "centred", "leave-one-out", "generalized"]
Estimator = Literal["k1", "k2", "k3"]
Divergence = Literal["reverse", "forward", "jensen-shannon"]
CHOICES = {
    "advantage": ("scaled", "centred", "leave-one-out", "generalized"),
    "deviation": ("population", "sample"),
    "ratio": ("token", "sequence", "trajectory"),
    "surrogate": ("minimum", "weight"),
    "average": ("sequence", "token", "constant"),
    "kl": ("k1", "k2", "k3"),
    "kl_in": ("loss", "reward"),
    "correction": (None, "truncated", "masked"),
    "correction_of": ("token", "sequence"),
    "divergence": ("reverse", "forward", "jensen-shannon"),
}


@strict_keywords
@dataclasses.dataclass(frozen=True)
class Objective:
    """Which loss. Raises ValueError naming the field.

    Advantage: as advantages.py has it; "scaled" divides by the deviation of the group, with divisor G ("population") or
    G - 1 ("sample").

    Ratio: `ratio` is that of a "token", of a "sequence" (GSPO's, the geometric mean of its tokens'), or of a
    "trajectory" (the product of its tokens'). With `surrogate` "minimum" the clip keeps ρ within [1 - clip_low, 1 +
    clip_high] where a ρ outside would raise the objective, and, where A < 0, below `dual_clip` (Ye et al. 2019,
    arXiv:1912.09729, section 3.4). With "weight" the clipped ρ is a constant, the weight of log π (CISPO).

    Average: "sequence" is the mean over a sample's tokens, then over samples; "token" the mean over all tokens of the
    batch; "constant" a sum over a sample's tokens divided by `budget` tokens (in a Trainer None is its
    sampling.max_tokens), then the mean over samples.

    KL: `kl_coefficient` is the weight of the penalty to a reference policy, estimated by `kl`: in the loss, where
    `kl_ratio` weighs it by the token's ρ so that its gradient is unbiased for tokens that other weights drew
    (DeepSeek-V3.2, arXiv:2512.02556), or taken from the reward.

    Entropy: `entropy_coefficient` times the mean entropy of the tokens' distributions is added to what is maximised.

    Correction, for samples that earlier weights drew: the loss is weighed by π_start / π_drew, π_start that of the
    weights when training on the rollout began, from which ρ is taken then. The weight is of a token or of a sequence
    (the product of its tokens'), and kept within [correction_low, correction_high]: "truncated" (Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training"), or 0 outside it: "masked".

    Distillation: `distillation_coefficient` times the mean `divergence` from a teacher is added to the loss, averaged
    as the tokens are (distillation.py). `divergence_beta`, between 0 and 1, is the teacher's weight in the mixture of
    "jensen-shannon".
    """

    advantage: Advantage = "scaled"
    ratio: Literal["token", "sequence", "trajectory"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    average: Literal["sequence", "token", "constant"] = "sequence"
    budget: int | None = None
    kl: Estimator = "k3"
    kl_coefficient: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_ratio: bool = False
    deviation: Literal["population", "sample"] = "population"
    surrogate: Literal["minimum", "weight"] = "minimum"
    dual_clip: float | None = None
    entropy_coefficient: float = 0.0
    correction: Literal["truncated", "masked"] | None = None
    correction_of: Literal["token", "sequence"] = "token"
    correction_low: float = 0.0
    correction_high: float = 3.0
    distillation_coefficient: float = 0.0
    divergence: Divergence = "reverse"
    divergence_beta: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if not 0 <= self.clip_low <= 1 or not self.clip_high >= 0:
            raise ValueError(
                f"clip_low must be within 0 … 1 and clip_high at least 0, got {self.clip_low} and {self.clip_high}"
            )
        for name in ("kl_coefficient", "entropy_coefficient", "distillation_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.divergence_beta < 1:
            raise ValueError(f"divergence_beta must be between 0 and 1, got {self.divergence_beta}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip must be more than 1 + clip_high={1 + self.clip_high}, got {self.dual_clip}")
        if not 0 <= self.correction_low <= 1 <= self.correction_high:
            raise ValueError(
                "correction_low must be within 0 … 1 and correction_high at least 1, got "
                f"{self.correction_low} and {self.correction_high}"
            )
        if self.kl_coefficient and self.kl_in == "loss" and self.kl == "k1":
            raise ValueError(
                "kl='k1' has an expected gradient of 0 in the loss, so it keeps nothing near the reference: "
                "kl_in='reward', or kl='k2' or 'k3'"
            )

    @property
    def needs_all_samples(self) -> bool:
        """Whether a sample with advantage 0 has a gradient."""
        others = self.entropy_coefficient + self.distillation_coefficient
        return self.advantage == "generalized" or others > 0 or self.penalises_loss

    @property
    def penalises_loss(self) -> bool:
        return self.kl_coefficient > 0 and self.kl_in == "loss"


ALGORITHMS = {
    "grpo": Objective(),  # Shao et al. 2024, arXiv:2402.03300, eq. 3; its KL penalty is kl_coefficient, 0.04 there
    "dr_grpo": Objective(advantage="centred", average="constant"),  # Liu et al. 2025, arXiv:2503.20783
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL
    "dapo": Objective(clip_high=0.28, average="token"),
    "gspo": Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4),  # Zheng et al. 2025, arXiv:2507.18071
    # Ahmadian et al. 2024, arXiv:2402.14740: a completion is one action, its KL a part of its reward; with PPO's clip
    "rloo": Objective(advantage="leave-one-out", ratio="trajectory", kl="k1", kl_in="reward"),
    # MiniMax 2025, arXiv:2506.13585, eq. 4: no lower bound, and an upper one of 5, of which the paper says no number
    "cispo": Objective(surrogate="weight", clip_low=1.0, clip_high=4.0, average="token"),
    "ppo": Objective(advantage="generalized", average="token"),  # Schulman et al. 2017, arXiv:1707.06347, eq. 7
}
