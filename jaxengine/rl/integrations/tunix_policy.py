"""The policy with the call that google-tunix's trainers make; it needs no Tunix itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.rl.integrations.nnx_policy import Policy


class TunixPolicy(Policy):
    """The policy with the call that Tunix's trainers make: `model(tokens, positions, cache, attention_mask)`."""

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Any = None,
        cache: None = None,
        attention_mask: Bool[Array, "B T T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], None]:
        """(float32 logits, no cache). Rows may be padded anywhere: the attention mask's last row tells which entries
        are tokens.

        Positions follow from that too, so `positions` is not read. Logits of padding have no meaning. Raises ValueError
        where a cache is given, or no attention mask.
        """
        if cache is not None:
            raise ValueError(
                "this policy has no cache of its own: leave cache=None, and generate with JaxEngineRollout"
            )
        if attention_mask is None:
            raise ValueError(
                "an attention mask is needed to tell tokens from padding; "
                "packed sequences (max_seq_token_per_tpu) are not supported"
            )
        # The forward pass takes sequences from position 0 on: padding moves to the end, and its logits move back.
        order = jnp.argsort(~attention_mask[:, -1], axis=-1, stable=True)
        logits = super().__call__(jnp.take_along_axis(tokens, order, axis=-1))
        return jax.vmap(_permuted)(logits, jnp.argsort(order, axis=-1)), None


def _permuted(rows: Float[Array, "T V"], order: Int[Array, " T"]) -> Float[Array, "T V"]:
    return rows.at[order].get(unique_indices=True)  # so that the gradient is no sum
