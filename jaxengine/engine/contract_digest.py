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
from jaxengine.engine.step_variants import BASE
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels


def weights_digest(params: Decoder) -> str:
    """Hash of every parameter's bits, in the order of the tree; on an accelerator a hash of checksums that are found there.

    A loop of reinforcement learning has new weights every few seconds: their bits must not all come to the host for it.
    """
    digest, leaves = hashlib.sha256(), jax.tree.leaves(params)
    sums = [
        _bytes(leaf) if _on_cpu(leaf) else checksums.word_sums(leaf) for leaf in leaves
    ]  # all under way before the first is waited for
    for leaf, found in zip(leaves, sums, strict=True):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.asarray(found).data)
    return digest.hexdigest()


def _on_cpu(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.devices())


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)


def contract(model_config: ModelConfig, kernels: Kernels, params: Decoder, version: int) -> Contract:
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
