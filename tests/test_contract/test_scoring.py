"""The contract, C11: the trainer's logprobs have the bits of `generate`; its gradients are a plain float32 model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_llm, random_model
from test_contract import FULL, Case, answered

import jaxengine
from jaxengine import LLM, Rollout, SamplingParams
from jaxengine.device import scoring
from jaxengine.engine import scoring_proof
from jaxengine.models import plain
from jaxengine.ops.kernels import XLA
from jaxengine.ops.tiles import SCORING


class Scored:
    """A model's sampled batch as a rollout: groups, cut and penalised distributions, lengths of every kind."""

    def __init__(self, case: Case) -> None:
        self.config, self.params = case.config, case.params
        cut = SamplingParams(
            temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, presence_penalty=0.3, max_tokens=20, n=2
        )
        self.sampling = [p.replace(n=1) for p in case.sampling[::3]] + [
            cut,
            cut.replace(n=1, temperature=1.4, min_p=0.05, min_tokens=5),
        ]
        prompts = case.prompts[::3] + [case.prompts[7], case.prompts[12]]
        self.outputs = case.engine().generate(prompts, self.sampling, key=jax.random.key(3))
        self.rollout = Rollout.from_outputs(self.outputs)
        self.each = [p for output, p in zip(self.outputs, self.sampling, strict=True) for _ in output.outputs]

    def score(self, params=None, rows=slice(None), padding=0, **how):
        tokens, mask = (np.pad(x[rows], ((0, 0), (0, padding))) for x in (self.rollout.tokens, self.rollout.mask))
        return jaxengine.score(
            self.params if params is None else params, tokens, mask, self.each[rows], config=self.config, **how
        )


QUICK = [("Qwen3", "bfloat16", 1)]
mark = lambda case: () if case in QUICK else pytest.mark.long
SCORED = [pytest.param(case, id="-".join(map(str, case)), marks=mark(case)) for case in FULL]


@pytest.fixture(scope="module", params=SCORED)
def scored(request) -> Scored:
    return Scored(answered(*request.param))


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def test_score_is_generate(scored):
    found = scored.score()
    assert (bits(found) == bits(scored.rollout.logprobs)).all()
    off = (np.asarray(found) - scored.rollout.logprobs)[scored.rollout.mask]
    assert np.abs(off).max() == 0.0 and (np.exp(off) == 1.0).all()
    assert len(np.unique(found[scored.rollout.mask])) > 20


def test_inside_value_and_grad(scored):
    """The values that a loss sees, under jit, are the same bits, and so are those of a micro-batch."""

    def loss(params, first):
        logprobs = scored.score(params, slice(first, None))
        return -jnp.where(logprobs > -100, logprobs, 0).sum(), logprobs

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    for first in (0, 7):
        (_, found), gradient = both(scored.params, first)
        assert (bits(found) == bits(scored.rollout.logprobs[first:])).all()
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradient))


def test_batch_and_padding(scored):
    expected = bits(scored.rollout.logprobs)
    for row in (0, 4, len(expected) - 1):
        assert (bits(scored.score(rows=slice(row, row + 1))) == expected[row]).all()
    wide = bits(scored.score(padding=70))
    assert (wide[:, : expected.shape[1]] == expected).all() and not wide[:, expected.shape[1] :].any()


def test_the_llm_scores_in_batches_of_few_shapes(scored, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 1024)
    llm = make_llm(scored.config, scored.params)
    logprobs, entropies = llm.score(scored.rollout.tokens, scored.rollout.mask, scored.each, entropy=True)
    assert (bits(logprobs) == bits(scored.rollout.logprobs)).all()
    assert (entropies[scored.rollout.mask] >= 0).all() and not entropies[~scored.rollout.mask].any()


@pytest.mark.parametrize("refused", range(1, len(SCORING)), ids=lambda refused: str(SCORING[refused]))
def test_narrower_tiles_give_the_same(scored, refused, monkeypatch):
    monkeypatch.setattr(scoring_proof, "_refused", {(scored.config, XLA): refused})
    assert (bits(scored.score()) == bits(scored.rollout.logprobs)).all()


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """float32, whose gradients a plain model can be compared with."""
    return random_model("Qwen2", vocab_size=300, reduction_leaves=2)


@pytest.fixture(scope="module")
def small_with_experts():
    return random_model("Qwen3Moe", vocab_size=300, reduction_leaves=2, norm_topk_prob=False)


def plain_logprobs(config, params, tokens, mask):
    def one(row, wanted):
        logprobs = jax.nn.log_softmax(plain.logits(config, params, row[:-1]))
        return jnp.where(wanted, jnp.pad(jnp.take_along_axis(logprobs, row[1:, None], axis=-1)[:, 0], (1, 0)), 0)

    return jnp.stack([one(row, wanted) for row, wanted in zip(tokens, mask, strict=True)])


@pytest.mark.parametrize("model", ["small", "small_with_experts"])
def test_gradients_are_those_of_a_plain_model(model, request):
    config, params = request.getfixturevalue(model)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, config.vocab_size, (3, 77)), np.arange(77) >= np.array([[5], [40], [76]])
    mask[0, 50:] = False  # a short completion, and a tool's answer inside another
    mask[1, 48:52] = False
    weight = jnp.asarray(rng.normal(size=mask.shape), jnp.float32)
    ours = jax.jit(jax.grad(lambda p: (weight * jaxengine.score(p, tokens, mask, config=config)).sum()))(params)
    theirs = jax.jit(jax.grad(lambda p: (weight * plain_logprobs(config, p, tokens, mask)).sum()))(params)
    for path, a in jax.tree_util.tree_leaves_with_path(ours):
        b = np.asarray(dict(jax.tree_util.tree_leaves_with_path(theirs))[path])
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), jax.tree_util.keystr(path)


def test_gradients_of_a_cut_distribution(small):
    """Of top-k and temperature: only the support has a gradient, and it is that of the renormalised distribution."""
    config, params = small
    tokens, mask = np.array([[5, 6, 7, 8, 9, 10]]), np.array([[False, False, True, False, False, False]])
    cut = SamplingParams(temperature=0.5, top_k=3)
    logits = lambda p: plain.logits(config, p, tokens[0, :2])[-1]
    kept = jax.lax.top_k(logits(params), 3)[1]
    tokens[0, 2] = kept[1]
    ours = jax.grad(lambda p: jaxengine.score(p, tokens, mask, cut, config=config).sum())(params)
    theirs = jax.grad(lambda p: jax.nn.log_softmax(logits(p)[kept] / 0.5)[1])(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(b).max(), 1e-6)


def test_memory_is_one_layers_activations(small):
    """Temporaries of a gradient grow by one array with a layer: the residual stream before it."""

    def temporaries(layers: int) -> int:
        config, params = random_model(num_hidden_layers=layers, vocab_size=300)
        tokens, mask = np.zeros((8, 256), np.int32), np.ones((8, 256), bool)
        mask[:, 0] = False
        compiled = (
            jax.jit(jax.grad(lambda p: jaxengine.score(p, tokens, mask, config=config).sum())).lower(params).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    # q, k, v, what attention gives, and the gates are 14 more; all of them are kept where nothing is computed again.
    residual = 8 * 256 * 96 * 4
    each = temporaries(2) - temporaries(1)
    assert each < 1.1 * residual, f"{each / residual:.1f} residual streams a layer"


def test_constants_of_the_callers_program_change_nothing(small):
    """Tokens that are constants, and even sampling parameters, must not let the compiler unroll or fold."""
    config, params = small
    rollout = Rollout.from_outputs(
        make_llm(config, params).generate(
            [[1, 2, 3]], SamplingParams(temperature=0.7, max_tokens=9, n=3), key=jax.random.key(0)
        )
    )
    cut = SamplingParams(temperature=0.7)
    closed = jax.jit(lambda p: jaxengine.score(p, rollout.tokens, rollout.mask, cut, config=config))(params)
    given = jax.jit(lambda t, m: jaxengine.score(params, t, m, cut, config=config))(rollout.tokens, rollout.mask)
    assert (bits(closed) == bits(rollout.logprobs)).all() and (bits(given) == bits(rollout.logprobs)).all()


def test_other_parameters_score_other_bits(small):
    """The control: the comparison sees another temperature, and a plain forward pass."""
    config, params = small
    rollout = Rollout.from_outputs(
        make_llm(config, params).generate([[1, 2, 3]], SamplingParams(max_tokens=30), key=jax.random.key(0))
    )
    expected = bits(rollout.logprobs)
    assert (bits(jaxengine.score(params, rollout.tokens, rollout.mask, config=config)) == expected).all()
    hot = SamplingParams(temperature=1.01)
    assert (bits(jaxengine.score(params, rollout.tokens, rollout.mask, hot, config=config)) != expected).any()
    reference = jax.jit(lambda p: plain_logprobs(config, p, rollout.tokens, rollout.mask))(params)
    assert (bits(reference) != expected).any() and np.abs(np.asarray(reference) - rollout.logprobs).max() < 1e-4


@pytest.mark.parametrize(
    "tokens, mask, error",
    [
        ([1, 2], [True, True], r"one shape \[B, T\], got \[2\] and \[2\]"),
        ([[1, 2]], [[True]], r"got \[1, 2\] and \[1, 1\]"),
        ([[1.0, 2.0]], [[False, True]], "must be integers"),
        ([[1, 2]], [[0, 1]], "mask booleans"),
        ([[1, 300]], [[False, True]], r"tokens\[0, 1\] is 300.* the vocabulary is 0 … 299"),
        ([[300, 1]], [[False, True]], r"tokens\[0, 0\] is 300.* the vocabulary is 0 … 299"),  # in the prompt
        ([[1, -100, 1]], [[False, False, True]], r"tokens\[0, 1\] is -100.* the vocabulary is 0 … 299"),
        ([[1, 2]], [[True, True]], r"mask\[0, 0\] is True"),
    ],
)
def test_what_is_no_batch_is_refused(small, tokens, mask, error):
    config, params = small
    with pytest.raises(ValueError, match=error):
        jaxengine.score(params, np.array(tokens), np.array(mask), config=config)


@pytest.mark.long
def test_llm_and_function_agree_on_the_model_that_ships():
    llm = LLM("calc", progress=False, max_model_len=128, max_num_seqs=8)
    params = SamplingParams(n=4, temperature=0.7, top_p=0.9, top_k=20, max_tokens=16, entropy=True)
    rollout = Rollout.from_outputs(llm.generate(["12+30=", "7*8="], params, key=jax.random.key(0)))
    logprobs, entropies = llm.score(rollout.tokens, rollout.mask, params, entropy=True)
    assert (bits(logprobs) == bits(rollout.logprobs)).all() and (bits(entropies) == bits(rollout.entropies)).all()
