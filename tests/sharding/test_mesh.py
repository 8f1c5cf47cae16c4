"""Where arrays lie on a mesh, and what is refused before anything runs; the bits are test_contract/test_degrees.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model
from jax.sharding import Mesh, PartitionSpec

import jaxengine
from jaxengine.engine.weights import check_one_device
from jaxengine.models.params import abstract, by_path, declare, specs
from jaxengine.ops.kernels import XLA, checked_for, choose_kernels
from jaxengine.ops.linear import with_bias
from jaxengine.rl.global_norm import clip_by_global_norm, global_norm
from sharding.leaves import spread, tree_sum
from sharding.mesh import AXES, make_mesh, replicas, with_all_axes
from sharding.rules import spec_of


def test_rules_say_where_axes_lie_and_refuse_collisions():
    assert spec_of(("leaf", "vocab", None)) == PartitionSpec("tensor")
    assert spec_of((None, "heads")) == PartitionSpec(None, "tensor")
    assert spec_of((None,)) == PartitionSpec()
    with pytest.raises(ValueError, match="two of the axes .* 'tensor'"):
        spec_of(("leaf", "heads"))
    with pytest.raises(ValueError, match="'haeds'"):
        spec_of(("haeds",))


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_every_matrix_is_cut_by_leaves_and_nothing_else(family):
    config, _ = random_model(family, reduction_leaves=4)
    declared, placed, shapes = (by_path(of(config)) for of in (declare, specs, abstract))
    cut = {path for path, spec in placed.items() if spec != PartitionSpec()}
    assert cut == {path for path, parameter in declared.items() if parameter.axes[0] == "leaf"} and len(cut) > 4
    assert all(shapes[path].shape[0] == 4 for path in cut)


def test_meshes_have_all_axes_and_are_cut_into_replicas():
    device = np.array(jax.devices()[:1])
    mesh = with_all_axes(Mesh(device, ("tensor",)))
    assert mesh.axis_names == AXES and [m.shape["data"] for m in replicas(mesh)] == [1]
    with pytest.raises(ValueError, match="'fsdp'"):
        with_all_axes(Mesh(device, ("fsdp",)))
    with pytest.raises(ValueError, match="asks for 4096 devices.*jax_num_cpu_devices"):
        make_mesh(tensor=4096)


def test_what_devices_cannot_share_is_refused():
    config, params = random_model(reduction_leaves=2)
    mesh = make_mesh()
    assert checked_for(config, XLA, mesh).shape["tensor"] == 1
    with pytest.raises(ValueError, match="tensor_parallel_size must be"):
        jaxengine.LLM.from_params(config, params, tensor_parallel_size=0)
    with pytest.raises(ValueError, match="asks for 4096 devices"):
        jaxengine.LLM.from_params(config, params, tensor_parallel_size=4096)
    with pytest.raises(TypeError, match="mesh must be a jax.sharding.Mesh .* got 'tensor'"):
        jaxengine.LLM.from_params(config, params, mesh="tensor")
    with pytest.raises(ValueError, match="tensor_parallel_size=2, and the mesh has 1"):
        jaxengine.LLM.from_params(config, params, tensor_parallel_size=2, mesh=mesh)
    check_one_device(params)


def test_a_mesh_of_one_device_has_its_bits(tiny):
    """Scored through the mesh's own road: one shard_map a layer."""
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 1000, (2, 40)))
    mask = jnp.arange(40)[None] > jnp.array([[3], [20]])
    config = tiny.config
    plain = jaxengine.score(tiny.params, tokens, mask, config=config)
    meshed = jaxengine.score(tiny.params, tokens, mask, config=config, mesh=make_mesh())
    assert np.asarray(plain).tobytes() == np.asarray(meshed).tobytes()
    assert choose_kernels("auto", config, make_mesh()).split is not None


def test_sums_over_leaves_go_by_the_tree_forward_and_back():
    parts = jax.random.normal(jax.random.key(0), (8, 5, 7)) * 10.0 ** jnp.arange(8)[:, None, None]
    tree = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]))
    assert np.asarray(tree_sum(parts)).tobytes() == np.asarray(tree).tobytes()
    (back,) = jax.vjp(lambda x: spread(x, 8), parts[0])[1](parts)
    assert np.asarray(back).tobytes() == np.asarray(tree).tobytes()


def test_the_global_norm_is_that_of_optax_within_rounding():
    import optax

    _, params = random_model("Qwen2", reduction_leaves=4)
    assert np.isclose(global_norm(params), optax.global_norm(params), rtol=1e-6)
    for limit in (1.0, 1e6):
        ours, theirs = (
            clip(limit).update(params, optax.EmptyState())[0]
            for clip in (clip_by_global_norm, optax.clip_by_global_norm)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours, theirs)


@pytest.mark.parametrize("rows", [2, 8, 11])
def test_a_bias_has_its_rows_gradients_added_by_a_tree(rows):
    """XLA's own reduction has other bits for other numbers of outputs, and so at other degrees."""
    cotangents = jax.random.normal(jax.random.key(1), (rows, 24)) * 10.0 ** (jnp.arange(rows) % 7)[:, None]
    y, bias = jnp.ones((rows, 24)), jnp.arange(24.0).reshape(2, 12)
    out, pull = jax.vjp(with_bias, y, bias)
    assert np.asarray(out).tobytes() == np.asarray(y + bias.reshape(-1)).tobytes()
    padded = np.zeros((1 << (rows - 1).bit_length(), 24), np.float32)
    padded[:rows] = cotangents
    while len(padded) > 1:
        padded = padded[::2] + padded[1::2]
    assert np.asarray(pull(cotangents)[1]).tobytes() == padded.tobytes()
