"""The trainer: one compiled update, in which the logprobs are the engine's own.

Weights are kept in float32 and rounded to the model's dtype for each update. The engine runs the rounded weights, and
the gradient is taken at them; changes that are too small for 16 bits add up in the float32 copy.
"""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxengine.base.keys import key_data, key_of
from jaxengine.config import ModelConfig
from jaxengine.device.candidates import Candidates
from jaxengine.device.find_sampling_mask import find_sampling_mask
from jaxengine.device.grammar_mask import GrammarMask
from jaxengine.device.row_shares import on_shares
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.device.scoring import ScoringArrays, sampling_arrays_of, token_logprobs
from jaxengine.device.scoring_input import check_grammar_mask, check_sampling_mask, check_scored
from jaxengine.engine.scoring_proof import scoring_tiles
from jaxengine.engine.weights import homes, placed
from jaxengine.models import own_heads
from jaxengine.models.params import Decoder, shardings, specs
from jaxengine.ops.kernels import Kernels, choose_for_all_replicas
from jaxengine.rl import advantages as estimators
from jaxengine.rl import critic, metrics
from jaxengine.rl.critic import ActorCritic, Forward
from jaxengine.rl.distillation import check_targets, divergences
from jaxengine.rl.given_rewards import Given, by_sample_and_token, check_rewards
from jaxengine.rl.global_norm import global_norm
from jaxengine.rl.losses import correction_weights, kl_penalty, policy_loss, token_shares, token_weights, value_loss
from jaxengine.rl.micro_batches import check_shared, summed_gradient
from jaxengine.rl.rollout import Rollout
from jaxengine.rl.train_state import SHUFFLES, Batch, TrainerConfig, TrainState, check_parts
from sharding.mesh import WHOLE


class Trainer:
    """Pure functions of a TrainState, for one model, optimiser and configuration; each compiles once for a shape.

    `kernels` are as in jaxengine.score. The optimiser works on the float32 weights: optax.adamw(1e-4), or a
    chain with a clip before it (rl/global_norm.py). On a `mesh` devices along "tensor" share the weights and the
    optimiser's moments by leaves, and replicas along "data", which all have them, share the micro-batches of an update
    and the sequences that are scored. Gradients have the bits of one device, and what the optimiser does number by
    number keeps them. Where the mesh has devices of several processes, the first replica of each process does all of
    it. Raises ValueError where micro_batches is no multiple of the replicas.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        optimizer: optax.GradientTransformation,
        config: TrainerConfig | None = None,
        *,
        kernels: str = "auto",
        mesh: Mesh | None = None,
    ) -> None:
        self.model_config, self.optimizer, self.config = model_config, optimizer, config or TrainerConfig()
        self.kernels = choose_for_all_replicas(kernels, model_config, mesh)
        check_shared(self.kernels, self.config.micro_batches)
        whole: Any = WHOLE
        self._specs = ActorCritic(specs(model_config), whole)  # how it lies on a mesh
        self.update = jax.jit(self._update, donate_argnums=0)  # (state, batch) -> (state, metrics)
        self.policy = jax.jit(self._policy)  # state -> weights for the engine, a copy: the state may be donated
        self._forward = jax.jit(self._rounded_run)

    @property
    def has_critic(self) -> bool:
        return self.config.objective.advantage == "generalized"

    def start(self, params: Decoder, key: Array) -> TrainState:
        """The state before the first update: `params` in float32, and the optimiser's initial moments.

        Key-value heads that several leaves hold are in it once. Raises ValueError where their copies differ.
        """
        widened = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        own_heads.check_copies(self.model_config, widened)
        policy = own_heads.weights_once(self.model_config, widened)
        master = ActorCritic(policy, critic.initialise(self.model_config) if self.has_critic else None)
        state = TrainState(
            master=master,
            moments=jax.jit(self.optimizer.init)(master),
            step=jnp.zeros((), jnp.int32),
            version=jnp.zeros((), jnp.int32),
            key=jnp.array(key_data(key), jnp.uint32),
        )
        return state if self.kernels.split is None else jax.device_put(state, self._homes(state))

    def _homes(self, state: TrainState) -> Any:
        """Where a state lies on the mesh: weights and their moments cut by leaves, all else on every device."""
        assert self.kernels.split is not None
        whole: Any = self.kernels.whole
        policy = own_heads.homes_once(self.model_config, shardings(self.model_config, self.kernels.split), whole)
        master = ActorCritic(policy, jax.tree.map(lambda _: whole, state.master.critic))
        moments = optax.tree_map_params(
            self.optimizer, lambda _, own: own, state.moments, master, transform_non_params=lambda _: whole
        )
        return TrainState(master, moments, whole, whole, whole)

    def train(
        self,
        state: TrainState,
        rollout: Rollout,
        rewards: Given | None,
        *,
        reference: Decoder | None = None,
        targets: Candidates | None = None,
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """All updates of one rollout: the state with the next version of the weights, and the metrics of each update.

        `rewards` are one for each sample, `[B]`, or one for each token, `[B, T]` (given_rewards.py), or None, where the
        samples are only distilled from a teacher. A sample with a reward that is not finite is left out. `targets` are
        the teacher's (distillation.likeliest). `state` is donated. Raises ValueError where the number of samples is no
        multiple of mini_batches · micro_batches. Metrics of the policy are over the samples that have a gradient, of
        whose tokens measured_share says the share. Where a `reference` is given, the distance to it is one of them.
        """
        stale = metrics.staleness(np.asarray(rollout.weight_versions), np.asarray(rollout.mask), int(state.version))
        whole, updates = self.batch(state, rollout, rewards, reference=reference, targets=targets), []
        for batch in self._mini_batches(state, whole):
            state, values = self.update(state, batch)
            updates.append(values)
        state = dataclasses.replace(state, version=state.version + 1)
        measured = [{name: float(x) for name, x in values.items()} for values in jax.device_get(updates)]
        return state, [values | {"staleness": stale} for values in measured]

    def batch(
        self,
        state: TrainState,
        rollout: Rollout,
        rewards: Given | None,
        *,
        reference: Decoder | None = None,
        targets: Candidates | None = None,
    ) -> Batch:
        """A rollout with its advantages, and what else the objective needs.

        Raises ValueError where `rewards` are not one for each sample or token, or are not 0 outside the rollout's mask,
        where a KL penalty has no `reference`, where rewards are compared within groups and each sample is a group of
        its own, where truncated samples are to be masked and the rollout has no finish_reasons, where completions were
        drawn with structured outputs and the rollout has no grammar mask, where an objective that distils has no
        `targets`, or another one has, where there are neither rewards nor targets, and where `score` raises.
        """
        check_scored(rollout.tokens, rollout.mask, self.model_config)
        check_sampling_mask(rollout.sampling_mask, rollout.tokens)
        is_judged = rewards is not None
        check_targets(targets, rollout.tokens.shape, self.model_config, self.config.objective)
        if not is_judged and (targets is None or self.has_critic):
            raise ValueError("rewards may be None only where a teacher gives targets and no critic learns from them")
        rewards = rewards if is_judged else np.zeros(rollout.tokens.shape[0], np.float32)
        check_rewards(rewards, np.asarray(rollout.mask))
        check_grammar_mask(rollout.grammar_mask, rollout.tokens)
        if (self.config.sampling.structure is None) != (rollout.grammar_mask is None):
            raise ValueError(
                "the configuration's sampling has structured_outputs, and the rollout no grammar_mask: train on "
                "rollout.with_grammar_mask(model_config, tokenizer)"
                if rollout.grammar_mask is None
                else "the rollout has a grammar_mask, and the configuration's sampling no structured_outputs: give "
                "TrainerConfig the sampling that drew it"
            )
        if is_judged and not self.has_critic:
            estimators.check_groups(np.asarray(rollout.group), self.config.objective.advantage)
        sample_rewards, token_rewards, has_reward = by_sample_and_token(rewards, np.asarray(rollout.mask))
        group, tokens = np.where(has_reward, rollout.group, -1), jnp.asarray(rollout.tokens)
        judged = jnp.asarray(rollout.mask & has_reward[:, None])
        mask = judged & ~rollout.ended_by("length")[:, None] if self.config.mask_truncated else judged
        kept = self._sampling_mask(state, rollout)
        batch = Batch(tokens, mask, jnp.asarray(rollout.logprobs), jnp.zeros(mask.shape, jnp.float32), kept=kept)
        grammar, targets = jax.tree.map(jnp.asarray, (rollout.grammar_mask, targets))
        batch = dataclasses.replace(batch, grammar=grammar, targets=targets)
        objective = self.config.objective
        if reference is not None or objective.kl_coefficient > 0:
            # Of truncated samples too: a penalty in the reward is in their group's baseline.
            near = self._reference(reference, dataclasses.replace(batch, mask=judged))
            batch = dataclasses.replace(batch, reference=near)
            if objective.kl_coefficient > 0 and not objective.penalises_loss:
                penalty = objective.kl_coefficient * kl_penalty(batch.old_logprobs, near, judged, objective.kl)
                token_rewards, sample_rewards = token_rewards - penalty, sample_rewards - penalty.sum(-1)
        start = self._forward(state.master, batch) if self.has_critic or objective.correction is not None else None
        if start is not None and objective.correction is not None:
            corrections = correction_weights(start.logprobs, batch.old_logprobs, mask, objective)
            batch = dataclasses.replace(batch, old_logprobs=start.logprobs, corrections=corrections)
        if start is not None and start.values is not None:
            return self._with_values(batch, start.values, token_rewards)
        per_sample = estimators.of_samples(sample_rewards, jnp.asarray(group), objective.advantage, objective.deviation)
        return dataclasses.replace(batch, advantages=jnp.where(mask, per_sample[:, None], 0.0))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _policy(self, state: TrainState) -> Decoder:
        policy = critic.cast(state.master, self.model_config).policy
        if self.kernels.split is None:
            return policy
        return jax.lax.with_sharding_constraint(policy, shardings(self.model_config, self.kernels.split))

    def _sampling_mask(self, state: TrainState, rollout: Rollout) -> SamplingMask | None:
        """The rollout's own, or the one under the state's weights, which drew it."""
        if rollout.sampling_mask is not None or not self.config.keep_sampling_mask:
            return jax.tree.map(jnp.asarray, rollout.sampling_mask)
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        arrays = self._sampling_arrays(tokens, grammar=rollout.grammar_mask)
        found = find_sampling_mask(self.policy(state), tokens, mask, arrays, **self._how(self.kernels))
        return jax.tree.map(jnp.asarray, found)

    def _reference(self, params: Decoder | None, batch: Batch) -> Float[Array, "B T"]:
        if params is None:
            raise ValueError(
                f"kl_coefficient={self.config.objective.kl_coefficient} asks for a penalty: "
                "give reference, the weights of the policy to stay near"
            )
        if self.kernels.split is not None:
            params = placed(params, homes(params, self.model_config, self.kernels))
        sampling = self._sampling_arrays(batch.tokens, batch.kept, batch.grammar)
        logprobs, _ = token_logprobs(params, batch.tokens, batch.mask, sampling, **self._how(self.kernels))
        return logprobs

    def _with_values(self, batch: Batch, values: Float[Array, "B T"], token_rewards: Float[Array, "B T"]) -> Batch:
        """The batch with the critic's values, and the advantages and returns that follow from them."""
        advantages, returns = estimators.generalized(
            token_rewards, values, batch.mask, discount=self.config.discount, decay=self.config.decay
        )
        standardized = estimators.standardized(advantages, batch.mask)
        return dataclasses.replace(batch, advantages=standardized, old_values=values, returns=returns)

    def _mini_batches(self, state: TrainState, batch: Batch) -> Iterator[Batch]:
        """The rows, shuffled in each epoch and cut into mini-batches; not shuffled where there is one mini-batch."""
        rows, count = batch.tokens.shape[0], self.config.mini_batches
        check_parts(rows, count, self.config.micro_batches)
        key = jax.random.fold_in(jax.random.fold_in(key_of(state.key), SHUFFLES), state.version)
        for epoch in range(self.config.epochs):
            order = jnp.arange(rows) if count == 1 else jax.random.permutation(jax.random.fold_in(key, epoch), rows)
            for indices in jnp.split(order, count):
                yield jax.tree.map(operator.itemgetter(indices), batch)

    def _update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One step of the optimiser, on the gradient of the whole batch."""
        weights = token_weights(batch.mask, self.config.objective), token_shares(batch.mask)
        sampled = batch.mask
        batch = dataclasses.replace(batch, mask=sampled & self._has_gradient(batch)[:, None])
        model = critic.cast(state.master, self.model_config)
        gradient, losses, (logprobs, values) = self.gradient(model, batch, weights)
        change, moments = self.optimizer.update(gradient, state.moments, state.master)
        state = dataclasses.replace(
            state, master=optax.apply_updates(state.master, change), moments=moments, step=state.step + 1
        )
        measured = losses | metrics.mismatch(
            logprobs, batch.old_logprobs, batch.mask, batch.advantages, self.config.objective
        )
        if batch.reference is not None:
            measured["kl_reference"] = metrics.kl_reference(logprobs, batch.reference, batch.mask)
        if values is not None and batch.returns is not None:
            measured["explained_variance"] = metrics.explained_variance(values, batch.returns, batch.mask)
        if self.kernels.split is not None:  # as it lay, so that nothing is compiled again
            state = jax.lax.with_sharding_constraint(state, self._homes(state))
        measured["measured_share"] = metrics.mean_over(batch.mask, sampled)
        return state, measured | {"gradient_norm": global_norm(gradient)}

    def _has_gradient(self, batch: Batch) -> Bool[Array, " B"]:
        """Samples that have a gradient. Those of groups that are all right or all wrong have none, and are masked: the
        loops over rows stop before blocks that are masked, so that a batch costs what can be learned from it.
        """
        if self.config.objective.needs_all_samples:
            return jnp.ones(batch.mask.shape[0], bool)
        return (batch.advantages != 0).any(-1)

    def gradient(
        self, model: ActorCritic, batch: Batch, weights: tuple[Array, Array]
    ) -> tuple[Any, dict[str, Array], tuple[Array, Array | None]]:
        """(gradient, as the master copy is; losses; the logprobs and values `[B, T]` of the same forward pass).

        Of all micro-batches. `weights` `[B, T]` are those of the tokens in the policy's loss and in the critic's.
        """
        count, shape = self.config.micro_batches, batch.tokens.shape
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (batch, weights))
        total, (losses, (logprobs, values)) = summed_gradient(self.kernels, self._specs, self._loss, model, parts)
        policy = own_heads.gradient_once(self.model_config, total.policy, self.kernels.whole)
        total = dataclasses.replace(total, policy=policy)
        values = None if values is None else values.reshape(shape)
        return total, jax.tree.map(jnp.sum, losses), (logprobs.reshape(shape), values)

    def _loss(
        self, kernels: Kernels, model: ActorCritic, part: tuple[Batch, tuple[Array, Array]]
    ) -> tuple[Array, tuple[dict[str, Array], tuple[Array, Array | None]]]:
        """(loss, (its parts, (logprobs, values))) of a micro-batch and the weights of its tokens in the batch."""
        batch, weights = part
        forward = self._run(kernels, model, batch, entropy=self.config.objective.entropy_coefficient > 0)
        loss = policy_loss(
            forward.logprobs,
            batch.old_logprobs,
            batch.mask,
            batch.advantages,
            self.config.objective,
            weights=weights[0],
            reference=batch.reference,
            corrections=batch.corrections,
        )
        parts = {"loss": loss}
        if forward.entropies is not None:
            parts["entropy"] = (weights[1] * forward.entropies).sum()
            loss -= self.config.objective.entropy_coefficient * parts["entropy"]
        if forward.candidates is not None:
            assert batch.targets is not None
            how = self.config.objective.divergence, self.config.objective.divergence_beta
            apart = divergences(forward.candidates, batch.targets.logprobs, batch.mask, *how)
            parts["distillation"] = (weights[0] * apart).sum()
            loss += self.config.objective.distillation_coefficient * parts["distillation"]
        if forward.values is None:
            return loss, (parts, (forward.logprobs, None))
        assert batch.old_values is not None and batch.returns is not None
        parts["value_loss"] = value_loss(
            forward.values, batch.old_values, batch.returns, batch.mask, clip=self.config.value_clip, weights=weights[1]
        )
        return loss + self.config.value_coefficient * parts["value_loss"], (parts, (forward.logprobs, forward.values))

    def _rounded_run(self, master: ActorCritic, batch: Batch) -> Forward:
        return on_shares(self.kernels, self._run, self._specs, critic.cast(master, self.model_config), batch)

    def _run(self, kernels: Kernels, model: ActorCritic, batch: Batch, *, entropy: bool = False) -> Forward:
        sampling = self._sampling_arrays(batch.tokens, batch.kept, batch.grammar)
        candidates = None if batch.targets is None else batch.targets.token_ids
        asked: dict[str, Any] = dict(entropy=entropy, candidates=candidates)
        return critic.forward(model, batch.tokens, batch.mask, sampling, **asked, **self._how(kernels))

    def _how(self, kernels: Kernels) -> dict[str, Any]:
        """The implementation that generates, on tiles that are proven to give its bits on this machine."""
        tiles = scoring_tiles(self.model_config, self.kernels)
        return dict(model_config=self.model_config, kernels=kernels, tiles=tiles)

    def _sampling_arrays(
        self, tokens: Any, kept: SamplingMask | None = None, grammar: GrammarMask | None = None
    ) -> ScoringArrays:
        return sampling_arrays_of([self.config.sampling] * tokens.shape[0], self.model_config, kept, grammar)
