"""A file that one process holds. A run's folder, with a second process: tests/rl/test_driver.py."""

import os
from pathlib import Path

import pytest

from jaxengine.base.files import held

OPEN = Path("/proc/self/fd")


def test_the_holder_is_named_and_not_the_one_before(tmp_path):
    path = tmp_path / "lock"
    path.write_text("12345678901234567890")
    with held(path):
        with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by process {os.getpid()} "):
            with held(path):
                pytest.fail("it is held twice")
    with held(path):
        pass


@pytest.mark.skipif(not OPEN.exists(), reason="open files are found in /proc")
def test_a_copy_of_the_open_file_holds_nothing(tmp_path):
    """A forked child has one, and may outlive the run."""
    path = tmp_path / "lock"
    with held(path):
        (number,) = (int(entry.name) for entry in OPEN.iterdir() if entry.exists() and entry.samefile(path))
        copy = os.dup(number)
    with held(path):
        os.close(copy)
