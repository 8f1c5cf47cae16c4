"""What a client knows to ask for and may not do here is refused in words, and the README lists it."""

import pytest
from attacks import README
from not_here import NOT_HERE, table


@pytest.mark.parametrize("line", NOT_HERE, ids=lambda line: f"{line[0]}: {line[1]}")
def test_what_it_gets(served, line):
    _, _, where, body, status, code, _ = line
    method, path = where.split()
    response = served.admin.request(method, path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code) and len(error["message"]) > 10


def test_the_readme_lists_it():
    assert table() in README.read_text(), "python tests/server/not_here.py writes the table"
    assert len({line[0] for line in NOT_HERE}) >= 7
