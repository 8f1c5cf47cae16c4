"""google-tunix: our engine as its rollout worker, our policy as its model.

    actor = TunixPolicy(llm.config, llm.params)
    ClusterConfig(rollout_engine=functools.partial(JaxEngineRollout, max_num_seqs=64), …)   # or the class itself
    RLCluster(actor=actor, tokenizer=…, cluster_config=…)

Written for google-tunix 0.1.7, which has to be installed. Tunix keeps prompts padded on the left and completions on the right, and tells
tokens from padding by the pad id: a completion that draws the pad id ends there.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxengine.base.keys import key_of, seeded
from jaxengine.llm import LLM
from jaxengine.models.params import Decoder
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.integrations.nnx_policy import Policy
from jaxengine.sampling_params import SamplingParams

if importlib.util.find_spec("tunix") is None:
    raise ImportError(
        "jaxengine.rl.integrations.tunix_rollout works inside google-tunix: pip install google-tunix==0.1.7"
    )
base_rollout: Any = importlib.import_module("tunix.rl.rollout.base_rollout")


class TunixPolicy(Policy):
    """The policy with the call that Tunix's trainers make: `model(tokens, positions, cache, attention_mask)`."""

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Any = None,
        cache: None = None,
        attention_mask: Bool[Array, "B T T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], None]:
        """(float32 logits, no cache). Rows may be padded anywhere: what is a token is read off the attention mask's last row.

        Positions follow from that too, and are not looked at. Logits of padding mean nothing.
        """
        if cache is not None:
            raise ValueError(
                "this policy has no cache of its own: leave cache=None, and generate with JaxEngineRollout"
            )
        if attention_mask is None:
            raise ValueError(
                "an attention mask is needed to tell tokens from padding; packed sequences (max_seq_token_per_tpu) are not "
                "supported"
            )
        # Our forward pass takes sequences from position 0 on: padding goes to the end, and its logits back to where it stood.
        order = jnp.argsort(~attention_mask[:, -1], axis=-1, stable=True)
        logits = super().__call__(jnp.take_along_axis(tokens, order, axis=-1))
        return jnp.take_along_axis(logits, jnp.argsort(order, axis=-1)[..., None], axis=1), None


class JaxEngineRollout(base_rollout.BaseRollout):
    """A rollout worker over an LLM of its own, whose weights change when Tunix syncs them and at no other time.

    `rollout_actor` is the TunixPolicy that is trained; `key` makes all draws, each `generate` call with its own fold (a `seed` in the
    rollout config takes the key's place). The context has room for what the rollout config it is built with asks for, or for
    `kv_cache_size` tokens where that is more. Further keywords are EngineConfig's.
    """

    def __init__(
        self,
        *,
        rollout_actor: TunixPolicy,
        tokenizer: Any,
        mesh: jax.sharding.Mesh | None,
        rollout_config: Any,
        key: jax.Array | None = None,
        **engine: Any,
    ) -> None:
        if not isinstance(rollout_actor, TunixPolicy):
            raise TypeError(
                f"the actor must be a jaxengine.rl.integrations.tunix_rollout.TunixPolicy, got {type(rollout_actor).__name__}"
            )
        if mesh is not None and mesh.size > 1:
            raise NotImplementedError(f"this version runs on one device, the rollout mesh has {mesh.size}")
        config = rollout_actor.config
        asked = max(
            rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate, rollout_config.kv_cache_size
        )
        engine.setdefault("max_model_len", min(asked, config.max_position_embeddings))
        engine.setdefault("kernels", rollout_actor.kernels.name)
        # Own arrays at first: Tunix syncs weights only where the worker's are not the trainer's.
        self._model = TunixPolicy(
            config,
            jax.tree.map(jnp.copy, rollout_actor.params),
            kernels=rollout_actor.kernels.name,
            tile=rollout_actor.tile,
        )
        self._llm = LLM.from_params(config, self._model.params, **engine)
        self._tokenizer, self._key = tokenizer, seeded(0) if key is None else key
        self._temperature = rollout_config.temperature
        self._calls = itertools.count()

    # -- what Tunix calls --------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], rollout_config: Any, **kwargs: Any) -> Any:
        """A completion of each prompt; a run of equal prompts is one group, prefilled once. Several threads may call, and share steps.

        Raises ValueError for a prompt longer than `max_prompt_length` (it would be trained on as another), and RuntimeError where the
        engine ended a sample with an error.
        """
        if kwargs:
            raise TypeError(f"JaxEngineRollout.generate has no keyword {sorted(kwargs)[0]!r}")
        groups = [(str(prompt), len(list(run))) for prompt, run in itertools.groupby(prompts)]  # numpy.str_ among them
        ids = [self._encode(prompt, rollout_config.max_prompt_length) for prompt, _ in groups]
        params = [self._sampling_params(rollout_config).replace(n=count) for _, count in groups]
        outputs = self._llm.generate(
            [{"prompt_token_ids": each} for each in ids], params, key=self._call_key(rollout_config.seed)
        )
        rows = list(_samples(outputs))
        pad = lambda tokens: [self.pad_id()] * (rollout_config.max_prompt_length - len(tokens)) + tokens
        return base_rollout.RolloutOutput(
            text=[self._text(sample) for _, sample in rows],
            logits=None,
            tokens=[np.array(sample.token_ids, np.int32) for _, sample in rows],
            left_padded_prompt_tokens=np.array([pad(output.prompt_token_ids) for output, _ in rows], np.int32),
            logprobs=[sample.token_logprobs for _, sample in rows],
        )

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any) -> Float[Array, "B C"]:
        """Logprobs of completions under the rollout's weights and temperature, the whole vocabulary kept, as Tunix's losses see them.

        Prompts `[B, P]` are padded on the left, completions `[B, C]` on the right; 0 on padding.
        """
        tokens = np.concatenate([np.asarray(prompt_tokens), np.asarray(completion_tokens)], axis=1)
        real, width = tokens != self.pad_id(), np.shape(completion_tokens)[1]
        order = np.argsort(~real, axis=1, kind="stable")
        completion = real & (np.arange(tokens.shape[1]) >= tokens.shape[1] - width)
        rows = lambda x, where: np.take_along_axis(x, where, axis=1)
        found = self._llm.score(
            rows(tokens, order), rows(completion, order), SamplingParams(temperature=self._temperature)
        )
        return jnp.asarray(rows(found, np.argsort(order, axis=1))[:, -width:])

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Take over the trainer's weights, an nnx.State of the actor's; nothing is copied, nothing is compiled anew."""
        # Tunix forbids transfers here, lest weights travel over the host. Ours do not: it is one flag for each, whether it is finite.
        with jax.transfer_guard("allow"):
            given = TunixPolicy(
                self._model.config, self._model.params
            )  # Params of its own: an update that is refused changes nothing
            nnx.update(given, params)
            self._llm.update_params(given.params)
        self._model.set_params(_current(self._llm))

    def pad_id(self) -> int:
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._tokenizer.eos_id()

    def model(self) -> TunixPolicy:
        return self._model

    # -- inside ------------------------------------------------------------------------------------------------------------------

    def _encode(self, prompt: str, max_length: int) -> list[int]:
        """Token ids as Tunix's own sampler has them: with the beginning mark where the tokenizer has one, once."""
        bos = self._tokenizer.bos_id()
        ids = [
            int(token)
            for token in self._tokenizer.dedup_bos_ids([bos] * bool(bos) + list(self._tokenizer.encode(prompt)))
        ]
        if len(ids) > max_length:
            raise ValueError(
                f"prompt {prompt!r:.80} has {len(ids)} tokens, max_prompt_length is {max_length}: raise it"
            )
        if self.pad_id() in ids:
            raise ValueError(
                f"prompt {prompt!r:.80} holds the pad token {self.pad_id()}, which Tunix would take for padding"
            )
        return ids

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
        """A key for each call: with one for all, the groups of every batch would be drawn alike."""
        own = self._key
        if seed is not None:
            own = seeded(int(seed)) if np.ndim(seed) == 0 and not _is_key(seed) else _typed(seed)
        return jax.random.fold_in(own, next(self._calls))

    def _text(self, sample: CompletionOutput) -> str:
        ended = sample.finish_reason == "stop"
        return self._tokenizer.decode(sample.token_ids[:-1] if ended else sample.token_ids)


def _current(llm: LLM) -> Decoder:
    assert llm.params is not None
    return llm.params


def _samples(outputs: list[RequestOutput]) -> Iterator[tuple[RequestOutput, CompletionOutput]]:
    """Every sample with its prompt. Raises RuntimeError where one ended with an error."""
    for output in outputs:
        for sample in output.outputs:
            if sample.finish_reason == "error":
                raise RuntimeError(f"the engine ended a sample with an error: {sample.stop_reason}")
            yield output, sample


def _is_key(seed: Any) -> bool:
    return isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)


def _typed(seed: Any) -> jax.Array:
    """A typed key, from one or from the words of a raw one."""
    return seed if _is_key(seed) else key_of(seed)
