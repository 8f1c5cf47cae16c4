"""Keys: whose they are, and that they are threefry's wherever they come from."""

import jax
import numpy as np
import pytest
from conftest import make_llm

from jaxengine import SamplingParams
from jaxengine.base.keys import seeded
from jaxengine.host.admission import own_key

PARAMS = SamplingParams(n=2, max_tokens=4, ignore_eos=True)


def words(key) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_is_jaxs_key(seed):
    assert words(seeded(seed)) == words(jax.random.key(seed))


def test_the_upper_half_of_a_seed_counts():
    assert words(seeded(2**32 + 7)) == [1, 7]


@pytest.mark.parametrize("own", [{}, dict(seed=9), dict(key=seeded(9))], ids=["the call's", "seed", "key"])
@pytest.mark.parametrize("n", [1, 2])
def test_own_key_draws_the_sample_alone(tiny, own, n):
    params, prompts, key = PARAMS.replace(n=n, **own), [[5, 6, 7], [8, 9]], seeded(3)
    for i, output in enumerate(tiny.generate(prompts, params, key=key)):
        for j, sample in enumerate(output.outputs):
            alone = tiny.generate([prompts[i]], params.replace(n=1, seed=None, key=own_key(key, params, i, j)))[
                0
            ].outputs[0]
            assert (
                alone.token_ids == sample.token_ids
                and alone.token_logprobs.tobytes() == sample.token_logprobs.tobytes()
            )


def test_another_default_of_the_process_changes_no_key(tiny):
    """Who trains on TPUs often sets rbg: the engine's own keys stay threefry's, and a key that is not is named."""
    expected = tuple(words(jax.random.fold_in(jax.random.key(0), 0)))
    with jax.default_prng_impl("rbg"):
        llm = make_llm(tiny.config, tiny.params)
        assert llm.generate([[5, 6, 7]], PARAMS)[0].outputs[0].coordinate.key == expected
        with pytest.raises(ValueError, match="one threefry key, got .*rbg.* of shape .*impl='threefry2x32'"):
            llm.generate([[5, 6, 7]], PARAMS, key=jax.random.key(0))
