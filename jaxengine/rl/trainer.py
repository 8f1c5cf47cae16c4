"""The trainer: a state, a batch, and one compiled update that the engine's own logprobs go through.

Weights are kept in float32 and rounded to the model's dtype for each update: the rounded ones are what the engine runs and what the
gradient is taken at; changes too small for 16 bits add up in the float32 copy. Everything that a run needs to go on is in TrainState.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.base.arguments import strict_keywords
from jaxengine.base.keys import key_data, key_of
from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.device.scoring import sampling_arrays_of, token_logprobs
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.ops.tiles import WIDE, Tile
from jaxengine.rl import advantages as estimators
from jaxengine.rl import critic, metrics
from jaxengine.rl.critic import ActorCritic
from jaxengine.rl.losses import ALGORITHMS, Objective, policy_loss, token_shares, token_weights, value_loss
from jaxengine.rl.rollout import Rollout
from jaxengine.sampling_params import SamplingParams

DRAWS, SHUFFLES = 0, 1  # what the state's key is folded with for completions, and for the order of mini-batches


@strict_keywords
@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How a rollout is learned from: `epochs` passes over it, each in `mini_batches` updates, each update in `micro_batches` pieces whose
    gradients are added: more of them take less memory and change no logprob. `sampling` is what the completions were drawn with.

    The last three are for a critic: what its loss counts, and γ and λ of the generalized advantages.
    """

    objective: Objective = ALGORITHMS["grpo"]
    sampling: SamplingParams = SamplingParams()
    epochs: int = 1
    mini_batches: int = 1
    micro_batches: int = 1
    value_coefficient: float = 0.5
    value_clip: float = 0.2
    discount: float = 1.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        for name in ("epochs", "mini_batches", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@pytree
class TrainState:
    """All that a run is: it goes on from here to the same bits."""

    master: Any  # an ActorCritic in float32
    moments: Any  # the optimiser's
    step: Int[Array, ""]  # updates so far
    version: Int[Array, ""]  # of the weights: rollouts learned from so far
    key: UInt32[Array, " 2"]  # never changes; everything random folds it with what it is for and a count


@pytree
class Batch:
    """What one update learns from. None where the objective has no use for it."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    reference: Float[Array, "B T"] | None = None
    old_values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None


class Trainer:
    """Pure functions of a TrainState for one model, optimiser and configuration; each is compiled once for a shape.

    `kernels` and `tile` as in jaxengine.score. The optimiser works on the float32 weights: optax.adamw(1e-4), or a chain with a clip in
    front.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: optax.GradientTransformation,
        config: TrainerConfig | None = None,
        *,
        kernels: str = "auto",
        tile: Tile = WIDE,
    ) -> None:
        self.model_config, self.optimizer, self.config, self.tile = model, optimizer, config or TrainerConfig(), tile
        self.kernels = choose_kernels(kernels, model)
        self.update = jax.jit(self._update, donate_argnums=0)  # (state, batch) -> (state, metrics)
        self.policy = jax.jit(
            lambda state: critic.cast(state.master, model).policy
        )  # what the engine runs; a copy, the state may go
        self._forward = jax.jit(lambda master, tokens, mask: self._run(critic.cast(master, model), tokens, mask))

    @property
    def has_critic(self) -> bool:
        return self.config.objective.advantage == "generalized"

    def start(self, params: Decoder, key: Array) -> TrainState:
        """The state before the first update: `params` in float32, an optimiser that has seen nothing."""
        widened = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        master = ActorCritic(widened, critic.initialise(self.model_config) if self.has_critic else None)
        zero = lambda: jnp.zeros((), jnp.int32)
        return TrainState(
            master, jax.jit(self.optimizer.init)(master), zero(), zero(), jnp.array(key_data(key), jnp.uint32)
        )

    def train(
        self, state: TrainState, rollout: Rollout, rewards: Float[np.ndarray, " B"], *, reference: Decoder | None = None
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """All updates for one rollout with a reward for each sample: the next version's state, and the metrics of each update.

        A sample whose reward is NaN is left out. `state` is donated. Raises ValueError where the rows are no multiple of
        mini_batches · micro_batches.
        """
        whole, found = self.batch(state, rollout, rewards, reference=reference), []
        for batch in self._mini_batches(state, whole):
            state, values = self.update(state, batch)
            found.append(values)
        state = dataclasses.replace(state, version=state.version + 1)
        return state, [{name: float(x) for name, x in values.items()} for values in jax.device_get(found)]

    def batch(
        self, state: TrainState, rollout: Rollout, rewards: Float[np.ndarray, " B"], *, reference: Decoder | None = None
    ) -> Batch:
        """A rollout with its advantages, and what else the objective asks for. Raises ValueError where `rewards` are not one a sample, or
        where the objective's penalty has no `reference`."""
        kind, rewards = self.config.objective.advantage, np.asarray(rewards, np.float32)
        if rewards.shape != rollout.group.shape:
            raise ValueError(f"rewards must be {list(rollout.group.shape)}, one a sample, got {list(rewards.shape)}")
        counts = np.isfinite(rewards)
        known, group = jnp.asarray(np.where(counts, rewards, 0)), jnp.asarray(np.where(counts, rollout.group, -1))
        tokens, mask = jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask & counts[:, None])
        start = Batch(tokens, mask, jnp.asarray(rollout.logprobs), jnp.zeros(mask.shape, jnp.float32))
        if self.config.objective.kl_coefficient > 0:
            start = dataclasses.replace(start, reference=self._reference(reference, tokens, mask))
        if kind == "generalized":
            return self._with_values(state, start, known)
        each = (
            estimators.leave_one_out(known, group)
            if kind == "leave-one-out"
            else estimators.group_relative(known, group, scaled=kind == "scaled")
        )
        return dataclasses.replace(start, advantages=jnp.where(mask, each[:, None], 0.0))

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _reference(self, params: Decoder | None, tokens: Array, mask: Array) -> Float[Array, "B T"]:
        if params is None:
            raise ValueError(
                f"kl_coefficient={self.config.objective.kl_coefficient} asks for a penalty: give reference, the weights of "
                "the policy to stay near"
            )
        return token_logprobs(
            params,
            tokens,
            mask,
            self._slots(tokens),
            model_config=self.model_config,
            kernels=self.kernels,
            tile=self.tile,
        )[0]

    def _with_values(self, state: TrainState, batch: Batch, rewards: Float[Array, " B"]) -> Batch:
        _, values = self._forward(state.master, batch.tokens, batch.mask)
        found, returns = estimators.generalized(
            estimators.at_last_token(rewards, batch.mask),
            values,
            batch.mask,
            discount=self.config.discount,
            decay=self.config.decay,
        )
        return dataclasses.replace(
            batch, advantages=estimators.standardized(found, batch.mask), old_values=values, returns=returns
        )

    def _mini_batches(self, state: TrainState, batch: Batch) -> Iterator[Batch]:
        """The rows in a new order each epoch, cut into mini-batches; as they stand where there is but one."""
        rows, count = batch.tokens.shape[0], self.config.mini_batches
        if rows % (count * self.config.micro_batches):
            raise ValueError(
                f"{rows} samples are no multiple of mini_batches · micro_batches = {count} · {self.config.micro_batches}"
            )
        key = jax.random.fold_in(jax.random.fold_in(key_of(state.key), SHUFFLES), state.version)
        for epoch in range(self.config.epochs):
            order = jnp.arange(rows) if count == 1 else jax.random.permutation(jax.random.fold_in(key, epoch), rows)
            for chosen in jnp.split(order, count):
                yield jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)

    def _update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One step of the optimiser on the gradient of the whole batch."""
        weights = token_weights(batch.mask, self.config.objective), token_shares(batch.mask)
        batch = dataclasses.replace(batch, mask=batch.mask & self._needed(batch)[:, None])
        gradient, losses, (logprobs, values) = self.gradient(
            critic.cast(state.master, self.model_config), batch, weights
        )
        change, moments = self.optimizer.update(gradient, state.moments, state.master)
        state = dataclasses.replace(
            state, master=optax.apply_updates(state.master, change), moments=moments, step=state.step + 1
        )
        found = losses | metrics.mismatch(
            logprobs, batch.old_logprobs, batch.mask, batch.advantages, self.config.objective
        )
        if values is not None and batch.returns is not None:
            found["explained_variance"] = metrics.explained_variance(values, batch.returns, batch.mask)
        return state, found | {"gradient_norm": optax.global_norm(gradient)}

    def _needed(self, batch: Batch) -> Bool[Array, " B"]:
        """Samples that have a gradient. The others, of groups that were all right or all wrong, are masked: the regions' loops do not
        come to blocks that nothing asks for, so a batch costs what can be learned from it."""
        if self.has_critic or self.config.objective.kl_coefficient > 0:
            return jnp.ones(batch.mask.shape[0], bool)
        return (batch.advantages != 0).any(-1)

    def gradient(
        self, model: ActorCritic, batch: Batch, weights: tuple[Array, Array]
    ) -> tuple[Any, dict[str, Array], tuple[Array, Array | None]]:
        """(gradient, an ActorCritic in float32; losses; logprobs and values `[B, T]` that they were found with), over all micro-batches.

        `weights` `[B, T]` are what each token counts in the loss of the policy and in the critic's.
        """
        count, shape = self.config.micro_batches, batch.tokens.shape
        parts = jax.tree.map(lambda x: x.reshape(count, -1, shape[1]), (batch, weights))

        def add(total: ActorCritic, part: tuple) -> tuple[ActorCritic, Any]:
            (_, found), gradient = jax.value_and_grad(self._loss, has_aux=True)(model, *part)
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient), found

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), model)
        total, (losses, seen) = jax.lax.scan(add, zeros, parts)
        return total, jax.tree.map(jnp.sum, losses), jax.tree.map(lambda x: x.reshape(shape), seen)

    def _loss(self, model: ActorCritic, batch: Batch, weights: tuple[Array, Array]) -> tuple[Array, Any]:
        """(loss, (its parts, (logprobs, values))) of a micro-batch, whose tokens count what they do in the whole batch."""
        logprobs, values = self._run(model, batch.tokens, batch.mask)
        loss = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.mask,
            batch.advantages,
            self.config.objective,
            weights=weights[0],
            reference=batch.reference,
        )
        if values is None:
            return loss, ({"loss": loss}, (logprobs, None))
        assert batch.old_values is not None and batch.returns is not None
        error = value_loss(
            values, batch.old_values, batch.returns, batch.mask, clip=self.config.value_clip, weights=weights[1]
        )
        return loss + self.config.value_coefficient * error, ({"loss": loss, "value_loss": error}, (logprobs, values))

    def _run(self, model: ActorCritic, tokens: Array, mask: Array) -> tuple[Array, Array | None]:
        return critic.logprobs_and_values(
            model,
            tokens,
            mask,
            self._slots(tokens),
            model_config=self.model_config,
            kernels=self.kernels,
            tile=self.tile,
        )

    def _slots(self, tokens: Array) -> Any:
        return sampling_arrays_of([self.config.sampling] * tokens.shape[0], self.model_config)
