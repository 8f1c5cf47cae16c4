"""Problems for a loop: each record once an epoch, in an order that stays, and iterators that say where they stand."""

import json

import pytest
from counting_loop import Numbers

from jaxengine.rl.loops.data import FromIterator, InEpochs, read_jsonl

RECORDS = [(f"{i}=", i) for i in range(10)]


def test_each_record_comes_once_an_epoch_in_another_order():
    problems = InEpochs(RECORDS, 4, seed=3)
    taken = [pair for i in range(10) for pair in problems(i)]  # four epochs; the first ends in the third batch
    epochs = [taken[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(RECORDS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert problems(7) == InEpochs(RECORDS, 4, seed=3)(7) != InEpochs(RECORDS, 4, seed=4)(7)


def test_an_order_stays():
    """In every process, on every machine, in every version of Python: a run that goes on depends on it."""
    assert [answer for _, answer in InEpochs(RECORDS, 10, seed=0)(1)] == [9, 0, 1, 7, 5, 8, 6, 3, 2, 4]


def test_a_batch_of_several_epochs():
    assert sorted(InEpochs(RECORDS, 20)(0)) == sorted(RECORDS * 2)


@pytest.mark.parametrize(
    "records, batch, error",
    [
        ([], 4, "records is empty"),
        (RECORDS, 0, "batch must be at least 1, got 0"),
        ([*RECORDS, "ab"], 4, "record 10 gives 'ab'"),
        ([("a", 1, 2)], 4, "record 0 gives"),
    ],
)
def test_records_that_are_no_problems_are_refused(records, batch, error):
    with pytest.raises(ValueError, match=error):
        InEpochs(records, batch)


def test_a_file_of_problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1+1=", "target": [2], "id": 7}\n\n{"question": "2\u2028", "target": 4}\n')
    assert read_jsonl(path, "question", "target") == [("1+1=", [2]), ("2\u2028", 4)]


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"prompt": "a"}', "line 2: needs the fields 'prompt' and 'answer', has fields prompt"),
        ("[1]", "line 2: needs .* has a list"),
        ('{"prompt": ', "line 2: no JSON object"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line, error):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": 1}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"problems.jsonl, {error}"):
        read_jsonl(path)


def test_an_iterator_goes_on_from_its_state():
    problems = FromIterator(Numbers(), 3)
    first, state = problems(0), json.loads(json.dumps(problems.get_state()))
    second = problems(1)
    assert problems(1) == second != first, "an iteration that failed may be tried again"
    other = FromIterator(Numbers(), 3)
    other.set_state(state)
    assert other(1) == second


def test_iterations_of_an_iterator_come_in_order():
    problems = FromIterator(Numbers(), 3)
    with pytest.raises(ValueError, match="iteration 2 was asked for, and the iterator stands before iteration 0"):
        problems(2)


class Failing(Numbers):
    """Raises once in the middle of the first batch, and ends after 5 records where it says so."""

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.count, self.ends = 0, ends

    def __next__(self):
        self.count += 1
        if self.ends and self.count > 5:
            raise StopIteration
        if not self.ends and self.count == 2:
            raise OSError("a disk went away")
        return super().__next__()


def test_no_record_is_lost_where_an_iterator_raises():
    problems = FromIterator(Failing(), 3)
    with pytest.raises(OSError, match="went away"):
        problems(0)
    assert problems(0) == FromIterator(Numbers(), 3)(0)


def test_the_end_of_an_iterator_is_named():
    problems = FromIterator(Failing(ends=True), 3)
    problems(0)
    with pytest.raises(ValueError, match="in iteration 1 after 2 of 3 records, has come to its end"):
        problems(1)


def test_a_state_that_no_file_keeps_is_refused_before_the_run():
    iterator = Numbers()
    for state in (object(), (1, 2), {1: 2}, float("nan")):
        iterator.get_state = lambda state=state: state
        with pytest.raises(TypeError, match="state must be bytes, or what JSON gives back"):
            FromIterator(iterator, 3)
