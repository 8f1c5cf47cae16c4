"""What tests of shared leaves run and check."""

from conftest import run_script


def run(*arguments: str) -> dict[str, dict[str, str]]:
    return run_script("test_contract/mesh_run.py", *arguments)


def check(found: dict[str, dict[str, str]]) -> None:
    one, *others = found.values()
    assert len(one) == 6 and others and all(other == one for other in others), found
