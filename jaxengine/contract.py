"""The contract of an engine: what has to be equal for bits to be equal."""
import dataclasses
import hashlib
import importlib.metadata

import jax
import numpy as np

from jaxengine.config import KV_TILE, QUERY_BLOCK, VOCAB_BLOCK, ModelConfig
from jaxengine.coordinate import Contract
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.programs import BASE


def weights_digest(params: Decoder) -> str:
    """Hash of every parameter's bits, in the order of the tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def contract(model: ModelConfig, kernels: Kernels, params: Decoder, version: int) -> Contract:
    """Equal contract and equal (key, prompt, sampling parameters) means equal bits."""
    return Contract({
        "jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib"), "device": jax.devices()[0].device_kind,
        "weights_version": version, "weights": weights_digest(params), "model": dataclasses.asdict(model),
        "kernels": kernels.parts(),
        "tiles": {"rows": BASE.rows, "query_block": QUERY_BLOCK, "kv_tile": KV_TILE, "vocab_block": VOCAB_BLOCK}})
