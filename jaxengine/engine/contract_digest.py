"""The contract of an engine: what has to be equal for bits to be equal."""

import dataclasses
import hashlib
import importlib.metadata
import threading
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxengine.base import machine
from jaxengine.config import KV_TILE, OF_EXPERTS, QUERY_BLOCK, VOCAB_BLOCK, ModelConfig
from jaxengine.coordinate import Contract
from jaxengine.device import checksums
from jaxengine.engine.engine import Engine
from jaxengine.engine.lockstep import as_one
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.step_variants import BASE
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.rope import inverse_frequencies
from sharding.mesh import on_host

# Of this project's own arithmetic: raised by hand whenever tokens or logprobs change by a bit on any machine, whatever
# the change is in (a coefficient, the order of a sum, a tile). tests/test_contract/test_numerics.py holds it.
NUMERICS = 2
VERSIONS_KEPT = 16  # of the weights, whose digests stay known


def weights_digest(params: Decoder) -> str:
    """Hash of every parameter's bits, in the order of the tree.

    On an accelerator a hash of checksums that are found there.

    A loop of reinforcement learning has new weights every few seconds: their bits must not all come to the host for it.
    """
    digest, leaves = hashlib.sha256(), jax.tree.leaves(params)
    # All checksums are under way before the first is waited for. On a CPU's mesh a leaf is copied to be read whole.
    sums = [None if _on_cpu(leaf) else checksums.word_sums(leaf) for leaf in leaves]
    for leaf, words in zip(leaves, sums, strict=True):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(_bytes(leaf).data if words is None else np.asarray(words).data)
    return digest.hexdigest()


def _on_cpu(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.devices())


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(on_host(leaf)).reshape(-1).view(np.uint8)


def contract_of(model_config: ModelConfig, kernels: Kernels, weights: str | list[str]) -> Contract:
    """Equal contract and equal (key, prompt, sampling parameters) means equal bits.

    `weights` is their digest, or a list of several in the order in which they drew.
    """
    return Contract(
        {
            "numerics": NUMERICS,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "device": machine.device(kernels.any_processor),
            "compiler": machine.compiler() | machine.compiler_flags(kernels.any_processor),
            "weights": weights,
            "model": _parts_of(model_config),
            "kernels": kernels.parts(),
            "frequencies": _frequencies_digest(model_config),
            "tiles": {"rows": BASE.rows, "query_block": QUERY_BLOCK, "kv_tile": KV_TILE, "vocab_block": VOCAB_BLOCK},
        }
    )


def _parts_of(model_config: ModelConfig) -> dict[str, Any]:
    """The configuration, without what it says of experts where it has none: coordinates are older than experts."""
    parts = dataclasses.asdict(model_config)
    left_out = () if model_config.num_experts else (*OF_EXPERTS, "norm_topk_prob")
    return {name: value for name, value in parts.items() if name not in left_out}


def _frequencies_digest(model_config: ModelConfig) -> str:
    """Of the rotary embedding's, because their powers are a C library's."""
    frequencies = inverse_frequencies(model_config.rope, model_config.head_dim)
    return hashlib.sha256(frequencies.tobytes()).hexdigest()[:16]


class Contracts:
    """The contracts of the weights that an engine runs and ran lately. Every method may be called from any thread.

    A version's digest is found once, since that reads all weights; it is kept because outputs may be rendered after an
    update.
    """

    def __init__(self, engine: Engine | Replicas) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._digests: dict[int, str] = {}  # by version
        self._contracts: dict[tuple[str, ...], Contract] = {}  # by the digests of the weights that drew

    def current(self) -> Contract:
        """That of the weights that run. Raises RuntimeError where there are none."""
        with self._lock:
            return self._of((self._current_digest(),))

    def of(self, versions: Iterable[int]) -> Contract:
        """That of tokens which these versions of the weights drew; of none yet, that of the weights that run.

        Versions with equal bits are one. A version that is long gone has no digest, and is nobody's equal.
        """
        with self._lock:
            drew = list(dict.fromkeys(versions)) or [self._engine.weights.version]
            if self._engine.weights.version in drew and self._engine.params is not None:
                self._current_digest()
            digests = [self._digests.get(version, f"those of version {version}, which is gone") for version in drew]
            return self._of(tuple(dict.fromkeys(digests)))

    def clear(self) -> None:
        with self._lock:
            self._digests.clear()
            self._contracts.clear()

    def _current_digest(self) -> str:
        weights = self._engine.weights
        if weights.version not in self._digests:
            if weights.params is None:
                raise RuntimeError("there are no weights, so there is no contract: give some to update_params first")
            with as_one(self._engine.lockstep, ("weights digest", weights.version)):
                self._digests[weights.version] = weights_digest(weights.params)
            for old in sorted(self._digests)[:-VERSIONS_KEPT]:
                del self._digests[old]
        return self._digests[weights.version]

    def _of(self, digests: tuple[str, ...]) -> Contract:
        if digests not in self._contracts:
            while len(self._contracts) >= VERSIONS_KEPT:
                del self._contracts[next(iter(self._contracts))]
            weights = digests[0] if len(digests) == 1 else list(digests)
            self._contracts[digests] = contract_of(self._engine.model_config, self._engine.kernels, weights)
        return self._contracts[digests]
