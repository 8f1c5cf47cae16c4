"""Arguments: which values are taken, and that a refusal names the field, the value and what is allowed."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.base.arguments import flag, integer, items, real

NAN, INF = float("nan"), float("inf")


def refused(call, *words: str) -> None:
    """The call raises a ValueError that has all of the words."""
    with pytest.raises(ValueError) as found:
        call()
    assert all(word in str(found.value) for word in words), str(found.value)


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7), jnp.int32(7), np.array(7)], ids=repr)
def test_integers_of_any_kind_are_pythons(value):
    assert integer("field", value) == 7 and type(integer("field", value)) is int


@pytest.mark.parametrize(
    "value", ["8", None, 1.5, 64.0, True, np.True_, np.float32(64), [64], np.array([64]), NAN], ids=repr
)
def test_what_is_no_integer(value):
    refused(lambda: integer("field", value), "field", "integer", f"{value!r:.80}")


@pytest.mark.parametrize(
    "value, low, high, words",
    [
        (0, 1, None, ["at least 1", "got 0"]),
        (-1, 0, 2**64 - 1, ["at least 0", f"at most {2**64 - 1}", "got -1"]),
        (2**64, 0, 2**64 - 1, ["at most", f"got {2**64}"]),
        (np.int64(5), None, 4, ["at most 4", "got 5"]),
    ],
)
def test_integers_out_of_range(value, low, high, words):
    refused(lambda: integer("field", value, low, high), "field", *words)
    assert integer("field", low if low is not None else high, low, high) is not None, "the ends belong to the range"


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), np.array(0.5)], ids=repr)
def test_numbers_of_any_kind_are_pythons(value):
    assert real("field", value, 0.0) == 0.5 and type(real("field", value, 0.0)) is float
    assert type(real("field", 1, 0.0)) is float


@pytest.mark.parametrize(
    "value", ["0.7", None, True, np.True_, NAN, INF, -INF, [0.5], np.array([0.5]), 1j, np.float32(INF)], ids=repr
)
def test_what_is_no_finite_number(value):
    refused(lambda: real("field", value, 0.0), "field", "finite number", f"{value!r:.80}")


@pytest.mark.parametrize(
    "value, low, high, open_low, words",
    [
        (-1e-9, 0.0, 1e6, False, ["at least 0.0", "at most 1000000.0", "got -1e-09"]),
        (1e39, 0.0, 1e6, False, ["at most 1000000.0", "got 1e+39"]),
        (0, 0.0, 1.0, True, ["greater than 0.0", "got 0.0"]),
        (1.01, 0.0, 1.0, True, ["at most 1.0", "got 1.01"]),
        (-2, -1.0, None, False, ["at least -1.0", "got -2.0"]),
    ],
)
def test_numbers_out_of_range(value, low, high, open_low, words):
    refused(lambda: real("field", value, low, high, open_low), "field", *words)
    end = low if high is None else high
    assert real("field", end, low, high, open_low) == end, "the ends belong to the range"


@pytest.mark.parametrize("value", [True, np.True_, jnp.array(True)], ids=repr)
def test_flags_of_any_kind_are_pythons(value):
    assert flag("field", value) is True and flag("field", not value) is False


@pytest.mark.parametrize("value", ["false", "", 0, 1, None, 1.0, np.int32(1), [True], np.array([True])], ids=repr)
def test_what_is_no_flag(value):
    refused(lambda: flag("field", value), "field", "True or False", f"{value!r:.80}")


def test_lists():
    assert items("field", np.array([3, 4]), "a list") == (3, 4) == items("field", (i for i in (3, 4)), "a list")
    refused(lambda: items("field", 5, "a list of token ids"), "field", "a list of token ids", "got 5")


def test_what_is_shown_of_a_value_is_short():
    for check in (integer, flag, lambda name, value: real(name, value, 0.0)):
        with pytest.raises(ValueError) as found:
            check("field", "x" * 10**6)
        assert len(str(found.value)) < 200
