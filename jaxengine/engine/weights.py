"""New weights for a running engine: checked whole before anything changes, and copied only where they lie elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxengine.config import ModelConfig
from jaxengine.device import steps
from jaxengine.device.resharding import cut_alike
from jaxengine.models.params import Decoder, abstract, shardings
from jaxengine.ops.kernels import Kernels

SHOWN = 10  # differences that an error lists


def check_fits(params: Decoder, model_config: ModelConfig) -> None:
    """Raises ValueError listing the first ten leaves whose presence, shape or dtype is not what `config` declares."""
    given, declared = _named(params), _named(abstract(model_config))
    wrong = [
        f"{path}: given {given.get(path, 'nothing')}, declared {declared.get(path, 'nothing')}"
        for path in sorted(given.keys() | declared.keys())
        if given.get(path) != declared.get(path)
    ]
    if wrong:
        raise ValueError(f"params do not fit config, {len(wrong)} leaves differ:\n  " + "\n  ".join(wrong[:SHOWN]))


def placed(params: Any, like: Any) -> Any:
    """`params` where the weights `like` lie (arrays, or their shardings).

    Leaves that are there already share their memory and nothing is copied; others travel from device to device, those
    that are cut in another way one after the other, so that the devices they come from hold one more leaf and not one
    more model. device_put only marks the former as committed to their device: a step compiled for committed weights
    would be compiled again for weights that are not.
    """
    return jax.tree.map(_placed, params, jax.tree.map(_sharding, like))


def _placed(leaf: Any, home: jax.sharding.Sharding) -> Any:
    cut = cut_alike(leaf, home)
    moved = jax.device_put(cut, home)
    return moved if cut is leaf else jax.block_until_ready(moved)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf if isinstance(leaf, jax.sharding.Sharding) else leaf.sharding


def homes(params: Any, model_config: ModelConfig, kernels: Kernels) -> Any:
    """Where an engine's weights lie, as shardings: cut by leaves on the kernels' mesh, else each on one device.

    That is the one where it is, the first of those that share it, or the default device.
    """
    if kernels.split is not None:
        return shardings(model_config, kernels.split)
    return jax.tree.map(_one_device, params)


def _one_device(leaf: Any) -> jax.sharding.Sharding:
    if isinstance(leaf, jax.Array) and len(leaf.devices()) == 1:
        return leaf.sharding
    devices = leaf.devices() if isinstance(leaf, jax.Array) else jax.local_devices()[:1]
    return jax.sharding.SingleDeviceSharding(min(devices, key=lambda device: device.id))


def prepared(params: Any, model_config: ModelConfig, like: Any, *, cast: bool = False) -> Decoder:
    """`params` checked, and placed where the weights `like` lie.

    With `cast`, floating leaves are rounded to the declared dtype first. Raises ValueError, listing the first ten
    leaves, where leaves are missing, misnamed, of another shape or dtype, or not finite; TypeError for what is no
    pytree of arrays.
    """
    if cast:
        params = _cast(params, model_config)
    check_fits(params, model_config)
    ready = placed(params, like)
    finite = jax.device_get(steps.all_finite(ready))
    wrong = [path for path, good in zip(_named(ready), jax.tree.leaves(finite), strict=True) if not good]
    if wrong:
        raise ValueError(
            f"{len(wrong)} leaves hold NaN or infinity, so the weights stay as they were:\n  "
            + "\n  ".join(wrong[:SHOWN])
        )
    return ready


def check_one_device(params: Any) -> None:
    """Raises ValueError for weights that are cut over several devices, where no mesh is given: XLA would share out the
    work in its own way, with its own bits.
    """
    cut = [
        path
        for path, leaf in _leaves(params)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and not leaf.sharding.is_fully_replicated
    ]
    if cut:
        raise ValueError(
            f"{len(cut)} leaves lie on several devices, {cut[0]} for one: give the mesh that is to score them "
            "(mesh=), or bring them to one device"
        )


def check_alive(params: Decoder | None) -> None:
    """Raises RuntimeError where there are no weights, or a leaf was donated to another computation."""
    if params is None:
        raise RuntimeError("there are no weights here: give some to update_params first")
    gone = [path for path, leaf in _leaves(params) if getattr(leaf, "is_deleted", bool)()]
    if gone:
        raise RuntimeError(
            f"the weights are gone, {gone[0]} and {len(gone) - 1} others: they were donated to another computation "
            "(a training step with donate_argnums?). Give live ones to update_params first"
        )


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def _named(params: Any) -> dict[str, str]:
    """Each leaf's name, and its dtype and shape as text."""
    named = {}
    for path, leaf in _leaves(params):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"params must be a pytree of arrays, {path or 'params'} is {type(leaf).__name__}")
        named[path] = f"{leaf.dtype}{list(leaf.shape)}"
    return named


def _cast(params: Any, model_config: ModelConfig) -> Any:
    declared = {path: leaf.dtype for path, leaf in _leaves(abstract(model_config))}

    def cast(path, leaf):
        dtype = declared.get(jax.tree_util.keystr(path, simple=True, separator="."))
        return leaf.astype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
