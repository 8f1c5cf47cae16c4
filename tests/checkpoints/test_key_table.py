"""The key table: strict in both directions, everything checked before the first leaf, round trips by bits."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from checkpoints import key_table
from checkpoints.key_table import Entry
from checkpoints.safetensors_files import TensorFolder, open_folder, save_folder

BF16 = np.dtype(ml_dtypes.bfloat16)
QKV = ("l.q.weight", "l.k.weight", "l.v.weight")


def table() -> list[Entry]:
    """q, k and v of two, one and one heads of width 2 become one [D, N] leaf; the norm stays as it is."""
    return [
        Entry(
            target="layers.0.qkv",
            sources=QKV,
            shapes=((4, 3), (2, 3), (2, 3)),
            pack=lambda parts: np.concatenate(parts, axis=0).T,
            unpack=lambda leaf: np.split(leaf.T, (4, 6), axis=0),
        ),
        Entry("layers.0.norm", ("l.norm.weight",), ((3,),)),
    ]


def hugging_face_tensors() -> dict[str, np.ndarray]:
    shapes = {"l.q.weight": (4, 3), "l.k.weight": (2, 3), "l.v.weight": (2, 3), "l.norm.weight": (3,)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(BF16) for name, shape in shapes.items()}


def saved(path, tensors) -> TensorFolder:
    save_folder(path, tensors.items())
    return open_folder(path)


def test_leaves_come_packed_in_the_order_of_the_table(tmp_path):
    tensors = hugging_face_tensors()
    leaves = list(key_table.read(saved(tmp_path, tensors), table()))
    assert [target for target, _ in leaves] == ["layers.0.qkv", "layers.0.norm"]
    np.testing.assert_array_equal(leaves[0][1], np.concatenate([tensors[name] for name in QKV]).T)
    np.testing.assert_array_equal(leaves[1][1], tensors["l.norm.weight"])
    assert {leaf.dtype for _, leaf in leaves} == {BF16}


def test_read_then_write_gives_the_same_tensors_by_bits(tmp_path):
    tensors = hugging_face_tensors()
    leaves = dict(key_table.read(saved(tmp_path / "in", tensors), table()))
    save_folder(tmp_path / "out", key_table.unpacked(table(), leaves.__getitem__), max_shard_bytes=16)
    folder = open_folder(tmp_path / "out")
    assert set(folder.names) == set(tensors)
    for name, tensor in tensors.items():
        assert folder.read(name).tobytes() == tensor.tobytes() and folder.shape(name) == tensor.shape


def test_all_differences_come_in_one_error_before_any_leaf(tmp_path):
    tensors = hugging_face_tensors()
    del tensors["l.k.weight"]
    tensors["l.v.weight"] = np.zeros((3, 2), BF16)
    tensors["l.extra"] = np.zeros(1, BF16)
    packed = []
    entries = [
        Entry(e.target, e.sources, e.shapes, pack=lambda parts: packed.append(parts) or parts[0]) for e in table()
    ]
    with pytest.raises(ValueError) as error:  # at the call, before the first leaf
        key_table.read(saved(tmp_path, tensors), entries)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path} does not fit the model, 3 differences:"
    assert lines[1:] == [
        "  missing 'l.k.weight' (2, 3)",
        "  shape of 'l.v.weight': given (3, 2), the model needs (2, 3)",
        "  unexpected 'l.extra' (1,)",
    ]
    assert packed == []


def test_the_first_ten_differences_are_listed_and_the_rest_counted(tmp_path):
    tensors = hugging_face_tensors() | {f"extra.{i:02}": np.zeros(1, BF16) for i in range(12)}
    with pytest.raises(ValueError, match="12 differences") as error:
        key_table.read(saved(tmp_path, tensors), table())
    assert str(error.value).count("unexpected") == 10
    assert "'extra.09'" in str(error.value) and "'extra.10'" not in str(error.value)
    assert str(error.value).endswith("and 2 more")


def test_ignored_patterns_excuse_what_matches_and_nothing_else(tmp_path):
    tensors = hugging_face_tensors() | {"l.0.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    folder = saved(tmp_path, tensors)
    assert len(list(key_table.read(folder, table(), ignore=["*.rotary_emb.inv_freq"]))) == 2
    for ignore in ([], ["rotary_emb.inv_freq"], ["*.inv_freq.*"], ["*.ROTARY_emb.inv_freq"]):
        with pytest.raises(ValueError, match="unexpected 'l.0.rotary_emb.inv_freq'"):
            key_table.read(folder, table(), ignore=ignore)


def test_a_pattern_does_not_excuse_a_missing_key(tmp_path):
    tensors = hugging_face_tensors()
    del tensors["l.norm.weight"]
    with pytest.raises(ValueError, match="missing 'l.norm.weight'"):
        key_table.read(saved(tmp_path, tensors), table(), ignore=["*"])


def test_leaves_are_read_one_after_the_other(tmp_path):
    read = []

    class Watched(TensorFolder):
        def read(self, name):
            read.append(name)
            return super().read(name)

    folder = saved(tmp_path, hugging_face_tensors())
    folder.__class__ = Watched
    leaves = key_table.read(folder, table())
    assert read == []
    next(leaves)
    assert read == list(QKV)


@pytest.mark.parametrize(
    "extra, name",
    [
        (Entry("other", ("l.norm.weight",), ((3,),)), "l.norm.weight"),
        (Entry("layers.0.norm", ("n",), ((3,),)), "layers.0.norm"),
    ],
)
def test_a_table_that_names_something_twice_is_refused(tmp_path, extra, name):
    message = f"must name each target and each source once, 1 differences:\n  '{name}' is named 2 times"
    with pytest.raises(ValueError, match=message):
        key_table.read(saved(tmp_path / "in", hugging_face_tensors()), [*table(), extra])
    with pytest.raises(ValueError, match=message):
        key_table.unpacked([*table(), extra], lambda target: np.zeros(3, BF16))


def test_a_target_may_be_called_as_its_source(tmp_path):
    folder = saved(tmp_path, {"w": np.ones(2, BF16)})
    assert [target for target, _ in key_table.read(folder, [Entry("w", ("w",), ((2,),))])] == ["w"]


def test_an_entry_has_one_shape_for_each_source():
    with pytest.raises(ValueError, match="layers.0.qkv has 3 sources and 1 shapes"):
        Entry("layers.0.qkv", QKV, ((4, 3),))


def test_a_leaf_of_the_wrong_shape_is_not_written(tmp_path):
    leaves = {"layers.0.qkv": np.zeros((3, 8), BF16), "layers.0.norm": np.zeros(4, BF16)}
    with pytest.raises(ValueError, match=r"layers.0.norm \(4,\) unpacks to shapes \(\(4,\),\): .* have \(\(3,\),\)"):
        save_folder(tmp_path, key_table.unpacked(table(), leaves.__getitem__), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


# -- tensors that come as pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_pairs_in_any_order_are_packed_as_a_folder_is(tmp_path, order):
    tensors = hugging_face_tensors()
    pairs = [list(tensors.items())[place] for place in order]
    expected = dict(key_table.read(saved(tmp_path, tensors), table()))
    found = dict(key_table.packed(iter(pairs), table()))
    assert found.keys() == expected.keys()
    assert all(found[target].tobytes() == expected[target].tobytes() for target in expected)


def test_a_leaf_leaves_as_soon_as_it_is_whole():
    tensors = hugging_face_tensors()
    names = ["l.norm.weight", "l.v.weight", "l.k.weight", "l.q.weight"]
    asked = []
    pairs = ((asked.append(name) or name, tensors[name]) for name in names)
    leaves = key_table.packed(pairs, table())
    assert next(leaves)[0] == "layers.0.norm" and asked == names[:1]
    assert next(leaves)[0] == "layers.0.qkv" and asked == names


def test_all_that_is_wrong_with_pairs_is_listed():
    tensors = hugging_face_tensors()
    pairs = [("l.v.weight", tensors["l.v.weight"].T), ("l.extra", tensors["l.norm.weight"])]
    pairs += [("l.norm.weight", tensors["l.norm.weight"])] * 2
    with pytest.raises(ValueError) as error:
        list(key_table.packed(pairs, table()))
    assert str(error.value).splitlines()[1:] == [
        "  missing 'l.q.weight' (4, 3)",
        "  missing 'l.k.weight' (2, 3)",
        "  shape of 'l.v.weight': given (3, 2), the model needs (2, 3)",
        "  unexpected 'l.extra' (3,)",
        "  'l.norm.weight' is given twice",
    ]
    ignored = [*tensors.items(), ("l.inv_freq", np.zeros(2))]
    assert len(list(key_table.packed(ignored, table(), ignore=["*.inv_freq"]))) == 2


def test_names_that_carry_a_prefix_are_told(tmp_path):
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in hugging_face_tensors().items()}
    for read in (
        lambda: list(key_table.packed(wrapped.items(), table())),
        lambda: key_table.read(saved(tmp_path, wrapped), table()),
    ):
        with pytest.raises(ValueError, match="The names begin with '_orig_mod.'"):
            read()
