"""Broken, hostile and foreign model folders. Each error names the file; nothing is half opened and no code runs."""

import json
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from checkpoints.model_folder import read_config
from checkpoints.safetensors_files import open_folder, save_folder

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_file(folder: Path, header: dict | bytes, num_bytes: int = 8, length: int | None = None) -> Path:
    """A safetensors file made by hand: any header, `num_bytes` of tensors, and the header length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def two_shards(folder: Path) -> dict:
    """Tensors a and b in a shard each; the index as a dict."""
    save_folder(folder, [(name, np.ones(4, np.float32)) for name in "ab"], max_shard_bytes=1)
    return json.loads((folder / INDEX).read_text())


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_file_cut_at_any_byte_is_refused_with_its_name_and_both_sizes(tmp_path):
    save_folder(tmp_path, [("w", np.ones((4, 4), ml_dtypes.bfloat16))])
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    for left in reversed(range(size)):
        os.truncate(path, left)
        with pytest.raises(ValueError, match=rf"model\.safetensors is truncated: expected .* bytes.*, got {left}$"):
            open_folder(tmp_path)
    assert left == 0


def test_a_truncated_file_says_how_many_bytes_it_should_have(tmp_path):
    path = write_file(tmp_path, {"w": ENTRY})
    size = path.stat().st_size
    os.truncate(path, size - 3)
    with pytest.raises(ValueError, match=f"is truncated: expected {size} bytes, got {size - 3}"):
        open_folder(tmp_path)


def test_every_flipped_bit_of_a_header_is_found_or_harmless(tmp_path):
    """What we accept the format's own reader accepts too, and an error is always a ValueError with the file's name."""
    other = {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]}
    path = write_file(tmp_path, {"__metadata__": {"format": "pt"}, "w": ENTRY, "v": other}, num_bytes=12)
    good = path.read_bytes()
    refused = 0
    for position in range(8 * (len(good) - 12)):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        try:
            folder = open_folder(tmp_path)
        except ValueError as error:
            assert "model.safetensors" in str(error)
            refused += 1
            continue
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(folder.names)
            for name in folder.names:
                assert folder.read(name).tobytes() == file.get_tensor(name).tobytes()
    assert refused > len(good)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"not JSON at all", "is corrupt: the header must begin with '{'"),
        (b'{"w": ', "the header of .*model.safetensors is not valid JSON"),
        (b'{"\xff": 1}', "the header of .*model.safetensors is not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "is not valid JSON: nested too deeply"),
        (
            b'{"w": ' + json.dumps(ENTRY).encode() + b', "w": ' + json.dumps(ENTRY).encode() + b"}",
            "key 'w' is given twice",
        ),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "is not valid JSON"),
        ({"w": [1, 2]}, "tensor 'w' must have dtype, shape and data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "tensor 'w' must have dtype, shape and data_offsets"),
        ({"w": ENTRY | {"code": "import os"}}, "tensor 'w' must have dtype, shape and data_offsets"),
        ({"w": ENTRY | {"shape": [-2]}}, r"tensor 'w' has shape \[-2\]"),
        ({"w": ENTRY | {"shape": [2.0]}}, r"tensor 'w' has shape \[2.0\]"),
        ({"w": ENTRY | {"shape": [True, 2]}}, r"tensor 'w' has shape \[True, 2\]"),
        ({"w": ENTRY | {"shape": [2] + [1] * 64}}, "tensor 'w' has shape .*at most 8"),
        ({"w": ENTRY | {"shape": [0], "data_offsets": [0, 0]}}, r"tensor 'w' has shape \[0\]"),
        ({"w": ENTRY | {"shape": None}}, "tensor 'w' has shape None"),
        ({"w": ENTRY | {"data_offsets": [0]}}, r"tensor 'w' has data_offsets \[0\]"),
        ({"w": ENTRY | {"data_offsets": [-8, 0]}}, r"tensor 'w' has data_offsets \[-8, 0\]"),
        ({"w": ENTRY | {"data_offsets": "08"}}, "tensor 'w' has data_offsets '08'"),
        (
            {"w": ENTRY | {"data_offsets": [8, 0]}},
            r"tensor 'w' has data_offsets \[8, 0\], -8 bytes: F32 of shape \(2,\) has 8",
        ),
        ({"w": ENTRY | {"shape": [3]}}, r"data_offsets \[0, 8\], 8 bytes: F32 of shape \(3,\) has 12"),
        ({"w": ENTRY | {"shape": [2**62, 2**62]}}, "8 bytes: F32 of shape"),
        ({"w": ENTRY, "__metadata__": {"format": 1}}, "__metadata__ must map strings to strings"),
        ({"w": ENTRY, "__metadata__": []}, "__metadata__ must map strings to strings"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header, message):
    write_file(tmp_path, header)
    with pytest.raises(ValueError, match=message) as error:
        open_folder(tmp_path)
    assert "model.safetensors" in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_an_impossible_header_length_is_refused_before_it_is_allocated(tmp_path, length):
    write_file(tmp_path, {"w": ENTRY}, length=length)
    with pytest.raises(
        ValueError, match=f"model.safetensors is corrupt: header length {length}, allowed are 2 to 100000000"
    ):
        open_folder(tmp_path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    size = write_file(tmp_path, {"w": ENTRY}, length=90_000_000).stat().st_size
    with pytest.raises(
        ValueError, match=f"is truncated: expected at least 90000008 bytes .the header alone., got {size}"
    ):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "offsets, num_bytes, message",
    [
        ([[0, 8], [0, 8]], 8, "tensors 'a' and 'b' overlap by 8 bytes"),
        ([[0, 8], [4, 12]], 12, "tensors 'a' and 'b' overlap by 4 bytes"),
        ([[4, 12], [0, 8]], 12, "tensors 'b' and 'a' overlap by 4 bytes"),
        ([[0, 8], [12, 20]], 20, "4 bytes before tensor 'b' belong to no tensor"),
        ([[0, 8], [8, 16]], 20, "expected .* bytes, got"),
        ([[0, 8], [8, 16]], 12, "is truncated: expected .* bytes, got"),
        ([[0, 8], [2**70, 2**70 + 8]], 16, f"{2**70 - 8} bytes before tensor 'b' belong to no tensor"),
    ],
)
def test_tensors_take_up_each_byte_once(tmp_path, offsets, num_bytes, message):
    write_file(
        tmp_path, {name: ENTRY | {"data_offsets": pair} for name, pair in zip("ab", offsets, strict=True)}, num_bytes
    )
    with pytest.raises(ValueError, match=f"model.safetensors (is corrupt: )?{message}"):
        open_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "BOOL", "F8_E4M3", "f32", "O", None, ["F32"]])
def test_an_unsupported_dtype_is_named_with_its_tensor(tmp_path, dtype):
    write_file(tmp_path, {"layers.0.w": ENTRY | {"dtype": dtype}})
    with pytest.raises(ValueError) as error:
        open_folder(tmp_path)
    assert f"model.safetensors: tensor 'layers.0.w' has dtype {dtype!r}: supported are BF16, F16, F32" in str(
        error.value
    )


def test_a_missing_shard_is_named_with_the_index(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD_2).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD_2} is missing, and {INDEX} names it"):
        open_folder(tmp_path)


def test_a_broken_second_shard_is_found_before_the_first_is_read(tmp_path):
    two_shards(tmp_path)
    os.truncate(tmp_path / SHARD_2, 40)
    with pytest.raises(ValueError, match=f"{SHARD_2} is truncated"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": SHARD_1, "b": SHARD_1}, f"{SHARD_1} has no tensor 'b'"),
        ({"a": SHARD_2, "b": SHARD_1}, f"{SHARD_2} has no tensor 'a' .2 such"),
        ({"a": SHARD_1, "b": SHARD_2, "c": SHARD_2}, f"{SHARD_2} has no tensor 'c'"),
        ({"a": SHARD_1}, None),
        ({}, "must have a weight_map"),
        (None, "must have a weight_map"),
        ([SHARD_1], "must have a weight_map"),
        ({"a": 1, "b": SHARD_2}, "puts 'a' into 1"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, message):
    two_shards(tmp_path)
    write_index(tmp_path, weight_map)
    if message is None:  # one shard that agrees with the index; the other file is not of this model
        assert open_folder(tmp_path).names == ("a",)
        return
    with pytest.raises(ValueError, match=message) as error:
        open_folder(tmp_path)
    assert INDEX in str(error.value)


def test_a_tensor_that_the_index_leaves_out_is_refused(tmp_path):
    save_folder(tmp_path, [("a", np.ones(1, np.float32)), ("b", np.ones(1, np.float32))])
    write_index(tmp_path, {"a": "model.safetensors"})
    with pytest.raises(ValueError, match=f"{INDEX} is wrong: it does not put 'b' into model.safetensors, which has it"):
        open_folder(tmp_path)


def test_an_index_that_is_no_json_is_named(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=f"{INDEX} is not valid JSON"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/x.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "..",
        "",
        "../",
        ".hidden.safetensors",
        "pytorch_model.bin",
        "x.safetensors\n",
        "x\0.safetensors",
        "\ud800.safetensors",
    ],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(tmp_path, shard):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_folder(tmp_path / "other", [("a", np.ones(1, np.float32))])
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "x.safetensors", folder / ".hidden.safetensors"):
        place.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())  # it would open if it were tried
    write_index(folder, {"a": shard})
    with pytest.raises(ValueError, match=f"{INDEX} puts 'a' into .* expected the plain name of a safetensors file"):
        open_folder(folder)


def test_a_shard_that_is_no_regular_file_is_refused(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD_1).unlink()
    os.mkfifo(tmp_path / SHARD_1)  # opening it would wait for ever
    with pytest.raises(ValueError, match=f"{SHARD_1} is not a regular file"):
        open_folder(tmp_path)


def test_a_folder_with_two_models_is_refused(tmp_path):
    two_shards(tmp_path)
    write_file(tmp_path, {"a": ENTRY})
    with pytest.raises(ValueError, match=f"has both model.safetensors and {INDEX}"):
        open_folder(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} is missing: {SHARD_1} is one of several shards"):
        open_folder(tmp_path)
    (tmp_path / SHARD_1).rename(tmp_path / "x.safetensors")
    (tmp_path / SHARD_2).rename(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="has 2 safetensors files, x.safetensors and others"):
        open_folder(tmp_path)


class Planted:
    """Unpickled, it makes a file: the proof that something ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_a_pickle_is_never_opened(tmp_path, name):
    proof = tmp_path / "proof"
    (tmp_path / name).write_bytes(pickle.dumps(Planted(proof)))
    with pytest.raises(
        ValueError, match=f"{name} is a pickle, which can run code .*; only safetensors are read. To convert it"
    ):
        open_folder(tmp_path)
    assert not proof.exists()


def test_a_pickle_under_the_name_of_safetensors_is_never_unpickled(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Planted(proof)))
    with pytest.raises(ValueError, match="model.safetensors is corrupt: header length"):
        open_folder(tmp_path)
    assert not proof.exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Planted(proof)))
    save_folder(tmp_path, [("w", np.ones(1, np.float32))])
    assert open_folder(tmp_path).names == ("w",)
    assert not proof.exists()


def test_a_git_lfs_pointer_says_what_to_do(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match="model.safetensors is a git-lfs pointer .* `git lfs pull`"):
        open_folder(tmp_path)


def test_folders_without_tensors_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tensors: expected model.safetensors"):
        open_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "wrap", [lambda config: config, lambda config: {"text_config": config}, lambda config: {"parts": [1, [config]]}]
)
def test_a_folder_that_brings_code_is_refused_and_the_code_never_runs(tmp_path, name, wrap):
    (tmp_path / "modeling_planted.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(wrap({"auto_map": {"AutoModelForCausalLM": "modeling_planted.Planted"}})))
    with pytest.raises(
        ValueError, match=f"{name} has an auto_map.*remote code is never run, there is no trust_remote_code"
    ):
        read_config(tmp_path)
    assert not (tmp_path / "proof").exists()
