"""The draw: float32 log-softmax over the vocabulary, a token, and the logprob of the token that was drawn or given."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_gpu import draw_gpu
from pallas_kernels.draw_reference import Draw, draw_reference
from pallas_kernels.draw_tpu import draw_tpu
from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.pinned_math import exp
from pallas_kernels.sizes import VOCAB_BLOCK

BODIES = bodies(draw_reference, draw_tpu, draw_gpu)


def draw_and_score(
    logits: Float[Array, "t V"],
    given: Int[Array, " t"],
    uniforms: Float[Array, "t 2"] | None = None,
    *,
    implementation: Implementation,
) -> Draw:
    """A token for each row and its logprob under softmax(logits), the same bits whether the token is drawn or given.

    logits are those of the distribution to draw from; -inf is never drawn, and every row should hold a finite logit.
    uniforms in [0, 1) pick a block of VOCAB_BLOCK ids by inverse CDF over the masses of the blocks, then an id within
    it. given ≥ 0 is scored instead of a draw; without uniforms all are given. Differentiable in logits, through the
    logprob and the log-mass. The largest logit counts as a constant, which makes no difference to all_logprobs,
    because it cancels there. Raises ValueError where V is no multiple of VOCAB_BLOCK or a shape or dtype does not fit.
    """
    return draw_by(BODIES[implementation.name], logits, given, uniforms)


def draw_by(
    body: Callable, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
) -> Draw:
    """draw_and_score by a body that no name stands for: (logits, uniforms, given) -> Draw."""
    t, vocab = logits.shape
    if vocab % VOCAB_BLOCK:
        raise ValueError(f"the vocabulary must be padded with -inf to a multiple of {VOCAB_BLOCK}, got {vocab}")
    if uniforms is None:
        uniforms = jnp.zeros((t, 2), jnp.float32)
    if logits.dtype != jnp.float32 or uniforms.shape != (t, 2) or given.shape != (t,):
        raise ValueError(
            "draw_and_score takes float32 logits [t, V], given [t] and uniforms [t, 2], "
            f"got {logits.dtype} {logits.shape}, {given.shape} and {uniforms.shape}"
        )
    return _draw(body, logits, uniforms, given.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _draw(body: Callable, logits, uniforms, given):
    return body(logits, uniforms, given)


def _forward(body, logits, uniforms, given):
    out = body(logits, uniforms, given)
    return out, (logits, uniforms, out)


def _backward(body, saved, cotangents):
    """d logprob / d logits = one-hot(token) - softmax(logits); d log-mass / d logits = softmax(logits)."""
    logits, uniforms, out = saved
    here = jnp.arange(logits.shape[1]) == out.tokens[:, None]
    of_softmax = (cotangents.log_masses - cotangents.logprobs)[:, None] * exp(out.all_logprobs(logits))
    gradient = jnp.where(here, cotangents.logprobs[:, None], 0.0) + of_softmax
    return gradient, jnp.zeros_like(uniforms), np.zeros(out.tokens.shape, jax.dtypes.float0)


_draw.defvjp(_forward, _backward)
