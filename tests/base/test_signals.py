"""Signals that are heeded later."""

import signal

import pytest

from jaxengine.base.signals import noted
from jaxengine.distributed import draining

CHOSEN = signal.SIGUSR1


def test_a_signal_is_noted_and_what_was_before_comes_back(capsys):
    came = []
    before = signal.signal(CHOSEN, lambda *_: came.append("outside"))
    try:
        with noted(CHOSEN, "later") as is_told:
            assert not is_told()
            signal.raise_signal(CHOSEN)
            signal.raise_signal(CHOSEN)
            assert is_told() and not came
        signal.raise_signal(CHOSEN)
    finally:
        signal.signal(CHOSEN, before)
    assert came == ["outside"] and capsys.readouterr().err == "later\nlater\n"


def test_the_second_may_be_heeded_at_once(capsys):
    with pytest.raises(KeyboardInterrupt), noted(CHOSEN, "later", then=signal.default_int_handler) as is_told:
        signal.raise_signal(CHOSEN)
        assert is_told()
        signal.raise_signal(CHOSEN)
    assert capsys.readouterr().err == "later\n"


def test_draining_ends_the_process_after_what_is_under_way():
    done = []
    with pytest.raises(SystemExit) as ended, draining():
        signal.raise_signal(signal.SIGTERM)
        done.append("all")
    assert ended.value.code == 143 and done == ["all"]
    with draining():
        done.append("again")
    assert done == ["all", "again"]
