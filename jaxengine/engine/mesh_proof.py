"""Whether the devices of a mesh give the bits of one of them, on this machine: nothing is served where they do not.

The proof is as in scoring_proof.py, on one layer of the model's shape under random weights: the base decode step on the
mesh against the same step on its first device.
"""

import dataclasses
import threading

import jax
import numpy as np

from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import ModelConfig
from jaxengine.engine.probe import generated, random_params
from jaxengine.engine.step_variants import equal_bits
from jaxengine.ops.kernels import Kernels, choose_kernels

_proving = threading.Lock()
_held: set[tuple[ModelConfig, Kernels]] = set()


class MeshDiffersError(RuntimeError):
    """The devices of a mesh together give other bits than one of them."""


def check_mesh(model_config: ModelConfig, kernels: Kernels, report: Report = say_nothing) -> None:
    """Raises MeshDiffersError where the mesh of `kernels` gives other bits than one device; proven once a process."""
    if kernels.split is None:
        return
    with _proving:
        if (model_config, kernels) in _held:
            return
        report(f"proving that {kernels.split.degree} devices give the bits of one …")
        one_layer = dataclasses.replace(model_config, num_hidden_layers=1)
        expected = _logprobs(one_layer, choose_kernels(kernels.name, one_layer), kernels)
        found = _logprobs(one_layer, kernels, kernels)
        if not equal_bits(expected, found):
            raise MeshDiffersError(
                f"{kernels.split.degree} devices give other bits than one on this machine with kernels "
                f"{kernels.name!r}, {model_config.dtype}, reduction_leaves={model_config.reduction_leaves}: "
                f"{int((expected != found).sum())} of {expected.size} logprobs differ, so nothing is served"
            )
        _held.add((model_config, kernels))


def _logprobs(model_config: ModelConfig, kernels: Kernels, of: Kernels) -> np.ndarray:
    """Of the probe's tokens, under random weights on the first device of the mesh or on all of it."""
    assert of.split is not None
    first = next(device for device in of.split.mesh.devices.flat if device.process_index == jax.process_index())
    with jax.default_device(first):
        return generated(model_config, kernels, random_params(model_config, kernels))[1]
