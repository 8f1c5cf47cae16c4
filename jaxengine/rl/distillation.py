"""Distillation from a teacher on what the student drew: at each token the divergence of two whole distributions.

On-policy distillation, GKD: Agarwal et al. 2023, arXiv:2306.13649. Both distributions are taken over the candidates
(device/candidates.py): the likeliest tokens of the teacher, if asked for those of the student, and the rest of the
vocabulary as one entry. A divergence of such coarsened distributions is at most that of the whole ones, at least 0, and
0 where and only where they are equal: every candidate has the same probability, and so has the rest.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device import scoring
from jaxengine.device.candidates import NOTHING, Candidates
from jaxengine.device.scoring import ScoringArrays, sampling_arrays_of
from jaxengine.device.scoring_input import check_grammar_mask, check_scored
from jaxengine.engine.scoring_proof import scoring_tiles
from jaxengine.engine.weights import check_fits, check_one_device
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.rl.objective import Divergence, Objective
from jaxengine.rl.rollout import Rollout
from jaxengine.sampling_params import SamplingParams
from pallas_kernels.pinned_math import exp


def likeliest(
    params: Decoder,
    rollout: Rollout,
    sampling: SamplingParams,
    *,
    config: ModelConfig,
    top_k: int,
    also: Int[Any, "B T k"] | None = None,
    kernels: str = "auto",
) -> Candidates:
    """The `top_k` likeliest tokens where each token under the rollout's mask was drawn, and those of `also` beside
    them, with this model's logprobs of them: numpy's arrays `[B, T, K]` and `[B, T, K + 1]`, the last of the rest.

    With a teacher's weights these are the targets that Trainer.train takes. `also` are tokens of another model, the
    student's `likeliest(…).token_ids`; the teacher's own are not repeated. Logprobs are of the distribution that
    `sampling` draws from, with the bits of `jaxengine.score`; its temperature is that of both models. Logits of the
    whole vocabulary are there for a tile of rows at a time. On one device.

    Raises ValueError where top_k is not within 1 … vocab_size, where `also` has another shape or tokens that this model
    lacks, and where `score` raises.
    """
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    check_scored(tokens, mask, config)
    check_grammar_mask(rollout.grammar_mask, tokens)
    check_fits(params, config)
    check_one_device(params)
    if not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k must be within 1 … vocab_size={config.vocab_size}, got {top_k}")
    also = np.zeros((*tokens.shape, 0), np.int32) if also is None else np.asarray(also)
    check_candidates(also, tokens.shape, config)
    chosen = choose_kernels(kernels, config, None)
    arrays = sampling_arrays_of([sampling] * len(tokens), config, grammar=rollout.grammar_mask)
    how: dict[str, Any] = dict(model_config=config, kernels=chosen, tiles=scoring_tiles(config, chosen))
    return jax.device_get(_likeliest(params, tokens, mask, arrays, also, top_k=top_k, **how))


@partial(jax.jit, static_argnames=("top_k", "model_config", "kernels", "tiles"))
def _likeliest(
    params: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    arrays: ScoringArrays,
    also: Int[Array, "B T k"],
    *,
    top_k: int,
    **how: Any,
) -> Candidates:
    x, tokens = scoring.trunk(params, tokens, mask, **how)
    found = scoring.head_logprobs(params, x, tokens, mask, arrays, candidates=also, top_k=top_k, **how)
    assert found.candidate_ids is not None and found.candidates is not None
    wanted = mask.at[:, 0].set(False)[..., None]
    return Candidates(jnp.where(wanted, found.candidate_ids, NOTHING), jnp.where(wanted, found.candidates, 0.0))


def check_candidates(token_ids: Int[np.ndarray, "B T K"], shape: tuple[int, ...], config: ModelConfig) -> None:
    """Raises ValueError where they are not those of tokens of this shape, or name one outside the vocabulary."""
    if token_ids.ndim != 3 or token_ids.shape[:2] != tuple(shape):
        raise ValueError(f"candidates must be [B, T, K] for tokens {list(shape)}, got {list(token_ids.shape)}")
    if token_ids.size and not NOTHING <= token_ids.min() <= token_ids.max() < config.vocab_size:
        raise ValueError(
            f"candidates must be within 0 … {config.vocab_size - 1} or {NOTHING}, got {token_ids.min()} … "
            f"{token_ids.max()}: distillation needs one vocabulary"
        )


def check_targets(
    targets: Candidates | None, shape: tuple[int, ...], config: ModelConfig, objective: Objective
) -> None:
    """Raises ValueError where an objective that distils has no targets for tokens of this shape, or another one has."""
    coefficient = objective.distillation_coefficient
    if (coefficient > 0) != (targets is not None):
        raise ValueError(
            f"distillation_coefficient={coefficient} of the objective asks for "
            + ("targets: give those of a teacher, distillation.likeliest" if coefficient else "no targets")
        )
    if targets is None:
        return
    ids = np.asarray(targets.token_ids)
    check_candidates(ids, shape, config)
    if targets.logprobs.shape != (*ids.shape[:2], ids.shape[2] + 1):
        raise ValueError(f"logprobs of targets must be one more than {list(ids.shape)}, the rest's")


def divergences(
    student: Float[Array, "B T N"],
    teacher: Float[Array, "B T N"],
    mask: Bool[Array, "B T"],
    divergence: Divergence = "reverse",
    beta: float = 0.5,
) -> Float[Array, "B T"]:
    """The divergence of two distributions given by their logprobs, in nats, at each token under `mask`; 0 elsewhere.

    With P the teacher's and Q the student's: "forward" is KL(P ‖ Q), "reverse" KL(Q ‖ P), and "jensen-shannon"
    β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q (arXiv:2306.13649, section 2). Differentiable in `student`;
    value and gradient are exactly 0 between equal logprobs. Infinite where a KL is.
    """
    possible = mask[..., None] & (jnp.maximum(student, teacher) > -jnp.inf)
    student, teacher = (jnp.where(possible, x, 0.0) for x in (student, teacher))
    if divergence == "forward":
        terms, slopes = _kl_terms(teacher, student), exp(student) - exp(teacher)
    elif divergence == "reverse":
        terms, slopes = _kl_terms(student, teacher), _weighed(student, student - teacher)
    else:
        mixture = _log_mixture(student, teacher, beta)
        terms = beta * _kl_terms(teacher, mixture) + (1 - beta) * _kl_terms(student, mixture)
        slopes = (1 - beta) * _weighed(student, student - mixture)
    zero = jnp.where(student > -jnp.inf, student - jax.lax.stop_gradient(student), 0.0)  # with the student's gradient
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0.0)
    return (jax.lax.stop_gradient(terms) + jax.lax.stop_gradient(slopes) * zero).sum(-1)


def _kl_terms(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of logprobs: terms p log(p / q) - p + q, which add up to KL(p ‖ q), because p and q add up to 1.

    Unlike p log(p / q) none is less than 0, and the gradient of each is 0 where p = q, not only that of their sum. The
    slopes above are these gradients, written out as products with a factor that is 0 there: a compiler may round the
    sums that differentiation makes of them, and what should cancel would not.
    """
    return _weighed(p, p - q) - exp(p) + exp(q)


def _weighed(p: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the probability, 0 where that is 0."""
    return jnp.where(p > -jnp.inf, exp(p) * x, 0.0)


def _log_mixture(q: Float[Array, "..."], p: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """log(β p + (1 - β) q) of logprobs, relative to the larger one, so that it is exactly p where p = q."""
    larger = q >= p
    high, low = jnp.where(larger, q, p), jnp.where(larger, p, q)
    return high + jnp.log1p(jnp.where(larger, beta, 1 - beta) * jnp.expm1(low - high))
