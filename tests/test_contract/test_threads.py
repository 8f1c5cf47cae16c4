"""XLA on CPU divides a product among threads, and some products add in another order for it. So their number is in the
contract: where bits may move, the digest does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Products of widths where XLA's order is known to follow the threads, then a model's logprobs, and the contract.
RUN = """
import hashlib, sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from conftest import make_llm, random_model
from jaxengine import SamplingParams
products = hashlib.sha256()
for dtype in (jnp.bfloat16, jnp.float32):
    for rows in (1, 8, 32, 128, 512):
        for inner, outer in ((64, 64), (1000, 48), (96, 4096)):
            x = jax.random.normal(jax.random.key(0), (rows, inner)).astype(dtype)
            w = jax.random.normal(jax.random.key(1), (inner, outer)).astype(dtype)
            product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
            products.update(np.asarray(product(x, w)).tobytes())
config, params = random_model("Qwen3", dtype="bfloat16", hidden_size=64, num_hidden_layers=1)
llm = make_llm(config, params, kernels="xla")
outputs = llm.generate([[1, 2, 3], list(range(70))], SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
bits = hashlib.sha256(b"".join(o.outputs[0].token_logprobs.tobytes() for o in outputs)).hexdigest()
print(products.hexdigest()[:12], bits[:12], llm.contract().digest, llm.contract().parts["device"]["threads"])
"""


@pytest.mark.slow
def test_where_bits_may_move_the_digest_does():
    found = {}
    for threads in (1, 2, 4):
        env = os.environ | {"NPROC": str(threads)}
        done = subprocess.run([sys.executable, "-c", RUN], env=env, cwd=TESTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        products, bits, digest, told = done.stdout.split()
        found[threads] = products, bits, digest
        assert int(told) == threads
    print(found)
    assert len({digest for _, _, digest in found.values()}) == 3
