"""Tensors of a model folder: round trips by bits, what is read and when, what a save leaves behind."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints.safetensors_files import open_folder, save_folder

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]
INDEX = "model.safetensors.index.json"
MIB = 2**20


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """An array of every kind of bits: NaNs with payloads, infinities and denormals must survive too."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same_bits(left: np.ndarray, right: np.ndarray) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    np.testing.assert_array_equal(bits(left), bits(right))


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=8),
    st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_round_trip_by_bits_with_any_dtypes_shapes_and_shard_size(kinds, max_shard_bytes):
    tensors = {f"t.{i}": random_bits(tuple(shape), dtype, seed=i) for i, (dtype, shape) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as path:
        save_folder(path, tensors.items(), max_shard_bytes=max_shard_bytes)
        with open_folder(path) as folder:
            assert set(folder.names) == set(tensors)
            for name, tensor in tensors.items():
                assert (folder.dtype(name), folder.shape(name)) == (tensor.dtype, tensor.shape)
                assert_same_bits(folder.read(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_shard_is_one_file_that_the_formats_own_reader_opens(tmp_path, dtype):
    tensor = random_bits((4, 3), dtype)
    save_folder(tmp_path, [("w", tensor), ("scalar", random_bits((), dtype))])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same_bits(file.get_tensor("w"), tensor)
        assert file.get_tensor("scalar").shape == ()


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    save_folder(tmp_path, [("a", np.ones(1, np.float32)), ("b", np.ones(1, np.float32))], max_shard_bytes=1)
    (tmp_path / "new").touch()
    assert {entry.stat().st_mode for entry in tmp_path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_many_shards_have_an_index_in_hugging_face_form(tmp_path):
    tensors = {f"layers.{i}.w": random_bits((8, 8), DTYPES[2], seed=i) for i in range(5)}  # 256 bytes each
    save_folder(tmp_path, tensors.items(), max_shard_bytes=512)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 256}
    assert list(index["weight_map"].values()) == [f"model-{n:05}-of-00003.safetensors" for n in (1, 1, 2, 2, 3)]
    assert {entry.name for entry in tmp_path.iterdir()} == {*index["weight_map"].values(), INDEX}
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert_same_bits(file.get_tensor(name), tensors[name])


def test_a_tensor_larger_than_a_shard_has_a_shard_of_its_own(tmp_path):
    save_folder(
        tmp_path,
        [(name, np.zeros(size, np.float32)) for name, size in (("a", 2), ("b", 100), ("c", 2))],
        max_shard_bytes=64,
    )
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3


def test_views_are_written_as_they_look(tmp_path):
    base = random_bits((6, 8), DTYPES[0])
    views = {"transposed": base.T, "strided": base[::2, 1:5], "reversed": base[::-1]}
    save_folder(tmp_path, views.items())
    folder = open_folder(tmp_path)
    for name, view in views.items():
        assert_same_bits(folder.read(name), view)


def test_a_read_is_a_read_only_view_that_outlives_the_folder(tmp_path):
    tensor = random_bits((16, 16), DTYPES[0])
    save_folder(tmp_path, [("w", tensor)])
    with open_folder(tmp_path) as folder:
        array = folder.read("w")
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    with pytest.raises(ValueError, match="closed"):
        folder.read("w")
    assert_same_bits(array, tensor)


def test_a_file_whose_header_has_an_odd_length_is_read_by_bits(tmp_path):
    """Old writers did not pad the header, so tensors begin at any byte."""
    tensor = random_bits((3, 5), DTYPES[2])
    header = b'{"w":{"dtype":"F32","shape":[3,5],"data_offsets":[0,60]}}'
    assert len(header) % 2
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + tensor.tobytes())
    assert_same_bits(open_folder(tmp_path).read("w"), tensor)


def test_opening_and_reading_one_tensor_allocates_none(tmp_path):
    save_folder(tmp_path, [(name, np.ones((8, MIB), np.float32)) for name in "ab"], max_shard_bytes=1)
    tracemalloc.start()
    array = open_folder(tmp_path).read("b")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array[7, -1] == 1 and array.nbytes == 32 * MIB
    assert peak < MIB


def test_a_shard_is_opened_when_its_first_tensor_is_read(tmp_path):
    save_folder(tmp_path, [("a", np.ones(4, np.float32)), ("b", np.ones(4, np.float32))], max_shard_bytes=1)
    folder = open_folder(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    np.testing.assert_array_equal(folder.read("a"), np.ones(4, np.float32))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        folder.read("b")


def test_a_file_that_shrank_after_it_was_opened_is_refused(tmp_path):
    save_folder(tmp_path, [("w", np.ones(2048, np.float32))])
    folder = open_folder(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 4096)
    with pytest.raises(ValueError, match="model.safetensors .* 4096"):
        folder.read("w")


def test_saving_holds_one_shard_and_the_next_tensor(tmp_path):
    tracemalloc.start()
    save_folder(tmp_path, ((f"t{i}", np.full(MIB // 4, i, np.float32)) for i in range(24)), max_shard_bytes=4 * MIB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    num_copies = 1 if safetensors.__version__ < "0.8" else 0  # of a shard, made by save_file
    assert peak < (5.5 + 4 * num_copies) * MIB


def test_a_save_that_fails_leaves_nothing_under_the_real_names(tmp_path):
    def tensors():
        yield "a", np.ones(4, np.float32)
        yield "b", np.ones(4, np.float32)
        raise RuntimeError("the trainer died")

    with pytest.raises(RuntimeError, match="the trainer died"):
        save_folder(tmp_path, tensors(), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_renames_leaves_a_folder_that_does_not_open(tmp_path, monkeypatch):
    replace = os.replace

    def replace_until_the_index(old, new):
        if Path(new).name == INDEX:
            raise OSError("power")
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_until_the_index)
    with pytest.raises(OSError, match="power"):
        save_folder(tmp_path, [("a", np.ones(4, np.float32)), ("b", np.ones(4, np.float32))], max_shard_bytes=1)
    with pytest.raises(FileNotFoundError, match=f"{INDEX} .*model-00001-of-00002.safetensors"):
        open_folder(tmp_path)


def test_tensors_that_are_there_are_never_replaced(tmp_path):
    save_folder(tmp_path, [("w", np.ones(4, np.float32))])
    with pytest.raises(FileExistsError, match="model.safetensors"):
        save_folder(tmp_path, [("w", np.zeros(4, np.float32))])
    np.testing.assert_array_equal(open_folder(tmp_path).read("w"), np.ones(4, np.float32))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([], "no tensors"),
        ([("w", np.ones(1, np.float32)), ("w", np.ones(1, np.float32))], "'w' .*twice"),
        ([("w", np.ones(1, np.float64))], "'w' .*float64: .*bfloat16, float16, float32"),
        ([("w", np.ones(1, ">f4"))], "'w' .*>f4"),
        ([("w", np.ones((2, 0), np.float32))], r"'w' .*\(2, 0\)"),
        ([("__metadata__", np.ones(1, np.float32))], "'__metadata__'"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        save_folder(tmp_path, tensors)
    assert list(tmp_path.iterdir()) == []


def test_max_shard_bytes_is_positive(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes .* 0"):
        save_folder(tmp_path, [("w", np.ones(1, np.float32))], max_shard_bytes=0)


def test_an_unknown_tensor_is_named(tmp_path):
    save_folder(tmp_path, [("w", np.ones(1, np.float32))])
    folder = open_folder(tmp_path)
    for lookup in (folder.read, folder.shape, folder.dtype):
        with pytest.raises(KeyError, match="'v'"):
            lookup("v")


def test_a_single_file_of_any_name_is_found(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "policy-00001-of-00001.safetensors")
    (tmp_path / "._policy.safetensors").write_bytes(b"left by another operating system")
    assert open_folder(tmp_path).names == ("w",)


def test_an_index_may_name_the_single_file(tmp_path):
    save_folder(tmp_path, [("w", np.ones(2, np.float32))])
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "model.safetensors"}}')
    assert open_folder(tmp_path).names == ("w",)


def test_files_linked_from_a_cache_are_read(tmp_path):
    """The hub's cache keeps the bytes in blobs/ and links to them from snapshots/."""
    tensors = {name: random_bits((2, 2), DTYPES[0], seed=ord(name)) for name in "ab"}
    save_folder(tmp_path / "saved", tensors.items(), max_shard_bytes=1)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "saved").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for name, tensor in tensors.items():
        assert_same_bits(open_folder(snapshot).read(name), tensor)
