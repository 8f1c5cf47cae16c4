"""The end of a step: float32 log-softmax over the vocabulary, the draw, and the logprob of the token that was drawn or given."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import Implementation
from pallas_kernels.sampling_gpu import sampling_gpu
from pallas_kernels.sampling_reference import BLOCK, log_softmax, sampling_reference
from pallas_kernels.sampling_tpu import sampling_tpu

BODIES = {"xla": sampling_reference, "pallas_tpu": sampling_tpu, "pallas_gpu": sampling_gpu,
          "pallas_interpret": functools.partial(sampling_tpu, interpret=True)}


def sampling_tail(logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"], *, implementation: Implementation
                  ) -> tuple[Int[Array, " t"], Float[Array, " t"]]:
    """(token, its logprob under softmax(logits)) for each row, the same bits whether the token is drawn or given.

    logits are those of the distribution to draw from; -inf is never drawn, and a row should hold a finite one. uniforms in [0, 1) pick a
    block of BLOCK ids by inverse CDF over the blocks' masses, then an id within it. given ≥ 0 is scored instead of a draw.
    Differentiable in logits, through the logprob. Raises ValueError where V is no multiple of BLOCK or a shape or dtype does not fit.
    """
    t, vocab = logits.shape
    if vocab % BLOCK:
        raise ValueError(f"the vocabulary must be padded with -inf to a multiple of {BLOCK}, got {vocab}")
    if logits.dtype != jnp.float32 or uniforms.shape != (t, 2) or given.shape != (t,):
        raise ValueError(f"sampling_tail takes float32 logits [t, V], uniforms [t, 2] and given [t], "
                         f"got {logits.dtype} {logits.shape}, {uniforms.shape} and {given.shape}")
    return _tail(implementation, logits, uniforms, given.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tail(implementation: Implementation, logits, uniforms, given):
    return BODIES[implementation.name](logits, uniforms, given)


def _forward(implementation, logits, uniforms, given):
    tokens, logprobs = BODIES[implementation.name](logits, uniforms, given)
    return (tokens, logprobs), (logits, uniforms, tokens)


def _backward(implementation, saved, cotangents):
    """d logprob / d logits = one-hot(token) - softmax(logits)."""
    logits, uniforms, tokens = saved
    here = jnp.arange(logits.shape[1]) == tokens[:, None]
    gradient = cotangents[1][:, None] * (here - jnp.exp(log_softmax(logits)))
    return gradient, jnp.zeros_like(uniforms), np.zeros(tokens.shape, jax.dtypes.float0)


_tail.defvjp(_forward, _backward)
