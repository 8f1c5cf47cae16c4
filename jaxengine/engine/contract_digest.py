"""The contract of an engine: what has to be equal for bits to be equal."""

import dataclasses
import hashlib
import importlib.metadata
from typing import Any

import jax
import numpy as np

from jaxengine.base import machine
from jaxengine.config import KV_TILE, QUERY_BLOCK, VOCAB_BLOCK, ModelConfig
from jaxengine.coordinate import Contract
from jaxengine.device import checksums
from jaxengine.engine.engine import Engine
from jaxengine.engine.step_variants import BASE
from jaxengine.host.sample import Request
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels

CONTRACTS_KEPT = 16  # of earlier versions of the weights


def weights_digest(params: Decoder) -> str:
    """Hash of every parameter's bits, in the order of the tree; on an accelerator a hash of checksums that are found there.

    A loop of reinforcement learning has new weights every few seconds: their bits must not all come to the host for it.
    """
    digest, leaves = hashlib.sha256(), jax.tree.leaves(params)
    # All checksums are under way before the first is waited for.
    contents = [_bytes(leaf) if _on_cpu(leaf) else checksums.word_sums(leaf) for leaf in leaves]
    for leaf, content in zip(leaves, contents, strict=True):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.asarray(content).data)
    return digest.hexdigest()


def _on_cpu(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.devices())


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)


def contract_of(model_config: ModelConfig, kernels: Kernels, params: Decoder, version: int) -> Contract:
    """Equal contract and equal (key, prompt, sampling parameters) means equal bits."""
    return Contract(
        {
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "device": machine.device(),
            "compiler": machine.compiler_flags(),
            "weights_version": version,
            "weights": weights_digest(params),
            "model": dataclasses.asdict(model_config),
            "kernels": kernels.parts(),
            "tiles": {"rows": BASE.rows, "query_block": QUERY_BLOCK, "kv_tile": KV_TILE, "vocab_block": VOCAB_BLOCK},
        }
    )


class Contracts:
    """The contracts of the weights that an engine runs and ran lately, by version.

    Each is found once, since it reads all weights; it is kept because outputs may be rendered after an update.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_version: dict[int, Contract] = {}

    def current(self) -> Contract:
        """That of the weights that run."""
        engine, weights, known = self._engine, self._engine.weights, self._by_version
        if weights.version not in known:
            assert weights.params is not None
            known[weights.version] = contract_of(engine.model_config, engine.kernels, weights.params, weights.version)
            for old in sorted(known)[:-CONTRACTS_KEPT]:
                del known[old]
        return known[weights.version]

    def of(self, request: Request) -> Contract:
        """That of the weights that drew the request's newest token; before its first token, of those that run."""
        versions = [sample.drawn.versions[-1] for sample in request.samples if sample.drawn.versions]
        known = self._by_version.get(max(versions)) if versions else None
        return known or self.current()

    def clear(self) -> None:
        self._by_version.clear()
