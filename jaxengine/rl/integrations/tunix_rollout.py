"""google-tunix: the engine as its rollout worker, the policy as its model.

    actor = TunixPolicy(llm.config, llm.params)
    ClusterConfig(rollout_engine=functools.partial(JaxEngineRollout, max_num_seqs=64), …)   # or the class itself
    RLCluster(actor=actor, tokenizer=…, cluster_config=…)

For google-tunix 0.1.7, which has to be installed. Tunix pads prompts on the left and completions on the right, and
tells tokens from padding by the pad id, so a completion that draws the pad id ends there.

A logprob has one meaning here, that of Tunix's losses: over the whole vocabulary, at the temperature of the rollout
config that the worker was made with. `generate` reports it, whatever top-p, top-k and temperature its tokens are drawn
with, and `get_per_token_logps` gives the same bits.
"""

import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.base.keys import key_of, seeded
from jaxengine.engine.weights import homes, placed
from jaxengine.llm import LLM
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import choose_kernels
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.integrations.samples import samples_of
from jaxengine.rl.integrations.tunix_mesh import engine_mesh
from jaxengine.rl.integrations.tunix_policy import TunixPolicy
from jaxengine.rl.rollout import Rollout
from jaxengine.sampling_params import SamplingParams

if importlib.util.find_spec("tunix") is None:
    raise ImportError(
        "jaxengine.rl.integrations.tunix_rollout works inside google-tunix: pip install google-tunix==0.1.7"
    )
base_rollout: Any = importlib.import_module("tunix.rl.rollout.base_rollout")


class JaxEngineRollout(base_rollout.BaseRollout):
    """A rollout worker with its own LLM, whose weights change only when Tunix syncs them.

    `rollout_actor` is the TunixPolicy that is trained. Each `generate` call draws with another fold of `key`, or of
    the rollout config's `seed` where it has one. The context has room for the prompt and completion lengths of the
    given rollout config, and at least for `kv_cache_size` tokens. Further keywords are EngineConfig's.

    The weights lie on the rollout mesh, wherever the actor has its own: along "tp" (or "tensor", "model") devices share
    them, along "fsdp" (or "dp", "data") are replicas, each with all of them (tunix_mesh.py). They travel there from
    device to device, and tokens and logprobs have the bits of one device. Raises TypeError for another actor,
    ValueError for a mesh that cannot be read so, or whose devices cannot share the model's `reduction_leaves`.
    """

    def __init__(
        self,
        *,
        rollout_actor: TunixPolicy,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        rollout_config: Any,
        key: jax.Array | None = None,
        **engine: Any,
    ) -> None:
        if not isinstance(rollout_actor, TunixPolicy):
            raise TypeError(
                "the actor must be a jaxengine.rl.integrations.tunix_rollout.TunixPolicy, "
                f"got {type(rollout_actor).__name__}"
            )
        config, mesh = rollout_actor.config, engine_mesh(mesh, rollout_config)
        length = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
        context = max(length, rollout_config.kv_cache_size)
        engine.setdefault("max_model_len", min(context, config.context_length))
        engine.setdefault("kernels", rollout_actor.kernels.name)
        if mesh.size > 1:
            engine["mesh"] = mesh
        params = _own(rollout_actor.params, _homes(rollout_actor, engine["kernels"], mesh))
        self._llm = LLM.from_params(config, params, **engine)
        self._model = TunixPolicy(config, params, kernels=rollout_actor.kernels.name)
        self._tokenizer, self._key = tokenizer, seeded(0) if key is None else key
        self._scored_as = SamplingParams(temperature=rollout_config.temperature)
        self._calls = itertools.count()

    # -- what Tunix calls ----------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], rollout_config: Any, **kwargs: Any) -> Any:
        """A completion of each prompt. Equal prompts in a row are one group, prefilled once. Calls of several threads
        share steps.

        Where they are not drawn from the distribution that the logprobs are of, a UserWarning says so. Raises
        ValueError for a prompt longer than `max_prompt_length`, because it would be trained on as another one, and
        RuntimeError where the engine ended a sample with an error.
        """
        if kwargs:
            raise TypeError(f"JaxEngineRollout.generate has no keyword {sorted(kwargs)[0]!r}")
        # Tunix gives numpy.str_ among the prompts.
        groups = [(str(prompt), len(list(run))) for prompt, run in itertools.groupby(prompts)]
        ids = [self._encode(prompt, rollout_config.max_prompt_length) for prompt, _ in groups]
        samplings = [self._sampling_params(rollout_config).replace(n=count) for _, count in groups]
        outputs = self._llm.generate(
            [{"prompt_token_ids": each} for each in ids], samplings, key=self._call_key(rollout_config.seed)
        )
        rows = list(samples_of(outputs))
        logprobs = self._logprobs(outputs, samplings[0])
        padded = [self._padded(output.prompt_token_ids, rollout_config.max_prompt_length) for output, _ in rows]
        return base_rollout.RolloutOutput(
            text=[self._text(sample) for _, sample in rows],
            logits=None,
            tokens=[np.array(sample.token_ids, np.int32) for _, sample in rows],
            left_padded_prompt_tokens=np.array(padded, np.int32),
            logprobs=logprobs,
        )

    def get_per_token_logps(
        self, prompt_tokens: Any, completion_tokens: Any, completion_mask: Any = None
    ) -> Float[Array, "B C"]:
        """Logprobs of completions under the rollout's weights, as Tunix's losses take them and `generate` reports them.

        Prompts `[B, P]` are padded on the left, completions `[B, C]` on the right; 0 on padding. What is padding in a
        completion is told by the pad id, or by the `completion_mask` `[B, C]`, which is true for its tokens.
        """
        tokens = np.concatenate([np.asarray(prompt_tokens), np.asarray(completion_tokens)], axis=1)
        real, width = tokens != self.pad_id(), np.shape(completion_tokens)[1]
        if completion_mask is not None:
            real[:, -width:] = completion_mask
        order = np.argsort(~real, axis=1, kind="stable")
        completion = real & (np.arange(tokens.shape[1]) >= tokens.shape[1] - width)
        ordered, mask = np.take_along_axis(tokens, order, axis=1), np.take_along_axis(completion, order, axis=1)
        logprobs = self._llm.score(ordered, mask, self._scored_as)
        in_place = np.take_along_axis(logprobs, np.argsort(order, axis=1), axis=1)
        return jnp.asarray(in_place[:, -width:])

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Take over the trainer's weights, an nnx.State of the actor's. Copies nothing and compiles nothing."""
        # Tunix forbids transfers here, so that weights do not pass through the host. What passes here is one flag for
        # each array: whether it is finite.
        with jax.transfer_guard("allow"):
            # Another policy, so that an update that is refused changes nothing.
            updated = TunixPolicy(self._model.config, self._model.params)
            nnx.update(updated, params)
            self._llm.update_params(updated.params)
        self._model.set_params(_current(self._llm))

    def pad_id(self) -> int:
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._tokenizer.eos_id()

    def model(self) -> TunixPolicy:
        return self._model

    # -- inside --------------------------------------------------------------------------------------------------------

    def _padded(self, prompt_token_ids: list[int], length: int) -> list[int]:
        return [self.pad_id()] * (length - len(prompt_token_ids)) + prompt_token_ids

    def _encode(self, prompt: str, max_length: int) -> list[int]:
        """Token ids as in Tunix's sampler: after one beginning-of-sequence token, where the tokenizer has it."""
        bos = self._tokenizer.bos_id()
        tokens = [bos] * bool(bos) + list(self._tokenizer.encode(prompt))
        ids = [int(token) for token in self._tokenizer.dedup_bos_ids(tokens)]
        if len(ids) > max_length:
            raise ValueError(
                f"prompt {prompt!r:.80} has {len(ids)} tokens, max_prompt_length is {max_length}: raise it"
            )
        if self.pad_id() in ids:
            raise ValueError(
                f"prompt {prompt!r:.80} holds the pad token {self.pad_id()}, which Tunix would take for padding"
            )
        return ids

    def _logprobs(self, outputs: list[RequestOutput], sampling: SamplingParams) -> list[Float[np.ndarray, " C"]]:
        """Of each completion's tokens, in the module's meaning; 0 for the pad token, which Tunix takes for padding."""
        rollout = Rollout.from_outputs(outputs)
        logprobs = rollout.logprobs
        if not self._draws_as_scored(sampling):
            warnings.warn(
                f"tokens are drawn with temperature={sampling.temperature:g}, top_p={sampling.top_p:g} and "
                f"top_k={sampling.top_k}, and Tunix's losses are over the whole vocabulary at temperature="
                f"{self._scored_as.temperature:g}: their ratios leave the difference out. Train with top_p=1, "
                "top_k=None and one temperature",
                stacklevel=3,
            )
            logprobs = self._llm.score(rollout.tokens, rollout.mask, self._scored_as)
        logprobs = np.where(rollout.tokens == self.pad_id(), np.float32(0), logprobs)
        return [row[chosen] for row, chosen in zip(logprobs, rollout.mask, strict=True)]

    def _draws_as_scored(self, sampling: SamplingParams) -> bool:
        """Whether the distribution that tokens are drawn from is the one that they are scored by."""
        top_k, vocab_size = sampling.top_k, self._model.config.vocab_size
        cuts = not sampling.greedy and (sampling.top_p < 1 or 0 < top_k < vocab_size)
        return not cuts and sampling.temperature == self._scored_as.temperature

    def _sampling_params(self, config: Any) -> SamplingParams:
        ends = {*(config.eos_tokens or [self.eos_id()]), self.pad_id()}
        return SamplingParams(
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            max_tokens=config.max_tokens_to_generate,
            ignore_eos=True,
            stop_token_ids=sorted(ends),
            detokenize=False,
        )

    def _call_key(self, seed: Any) -> jax.Array:
        """A key of this call, because with one key for all calls the groups of every batch would draw the same."""
        return jax.random.fold_in(self._key if seed is None else _key_of_seed(seed), next(self._calls))

    def _text(self, sample: CompletionOutput) -> str:
        ended = sample.finish_reason == "stop"
        return self._tokenizer.decode(sample.token_ids[:-1] if ended else sample.token_ids)


def _homes(actor: TunixPolicy, kernels: str, mesh: jax.sharding.Mesh) -> Decoder:
    """Where a worker's weights lie: those of its first replica, or all on the only device."""
    if mesh.size > 1:
        return homes(actor.params, actor.config, choose_kernels(kernels, actor.config, mesh))
    only = jax.sharding.SingleDeviceSharding(mesh.devices.item())
    return jax.tree.map(lambda _: only, actor.params)


def _own(params: Decoder, home: Decoder) -> Decoder:
    """The weights at home, in other arrays: Tunix syncs weights only where the worker's are not the trainer's."""
    return jax.tree.map(lambda x, given: jnp.copy(x) if x is given else x, placed(params, home), params)


def _current(llm: LLM) -> Decoder:
    assert llm.params is not None
    return llm.params


def _key_of_seed(seed: Any) -> jax.Array:
    """A typed key: of a typed key itself, of an integer, or of the words of a raw key."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return seeded(int(seed)) if np.ndim(seed) == 0 else key_of(seed)
