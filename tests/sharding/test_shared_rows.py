"""From the logits on, devices share rows: with the bits and gradients of all rows on each, and fewer numbers travel."""

from conftest import run_script


def test_rows_that_are_shared_have_the_same_answers_and_gradients():
    found = run_script("sharding/shared_rows.py")
    too_few = found.pop("too few")
    assert set(found) == {"2", "4", "8"}
    for one in found.values():
        assert one["differ"] == [] and one["same gradient"]
        assert (one["exchanges"], one["gathers"]) == (1, 2)  # columns for rows; then floats, and the others as words
    assert too_few == [count for count in range(1, 40) if count % 8 or count < 16]
