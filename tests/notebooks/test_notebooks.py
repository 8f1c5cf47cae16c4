"""The notebooks: short, stored without outputs, and every cell runs."""

import json
import pathlib
import time

import pytest

FOLDER = pathlib.Path(__file__).parent.parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_LINES = 90  # of code
LONGEST = 900  # seconds a notebook may take
SHORTENED = {  # in CI; whole in `pytest -m long tests/notebooks`
    "02_grpo_calc": {"iterations=160": "iterations=10"},
    "03_correctness_before_corrections": {"LAG = 14, 24, 4": "LAG = 3, 24, 2"},
    "06_real_model": {"HuggingFaceTB/SmolLM2-135M-Instruct": "calc", "= 30, 8,": "= 2, 4,"},
}
NEEDS_THE_HUB = {"06_real_model"}  # whole


def code_of(path: pathlib.Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_stripped(path):
    cells = code_of(path)
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert 0 < len(lines) <= MOST_LINES, f"{len(lines)} lines of code"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), (
        "strip the outputs before committing"
    )


def runs():
    for path in NOTEBOOKS:
        yield pytest.param(path, SHORTENED.get(path.stem), id=path.stem, marks=pytest.mark.notebook)
        if path.stem in SHORTENED and path.stem not in NEEDS_THE_HUB:
            yield pytest.param(path, None, id=f"{path.stem}-whole", marks=pytest.mark.long)


@pytest.mark.parametrize("path, shortened", runs())
def test_a_notebook_runs(path, shortened, tmp_path, capsys):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]' brings what runs notebooks")
    import nbformat

    text = path.read_text()
    for whole, short in (shortened or {}).items():
        assert whole in text, "what is to be shortened is not in the notebook"
        text = text.replace(whole, short)
    notebook, start = nbformat.reads(text, as_version=4), time.monotonic()
    nbclient.NotebookClient(
        notebook, timeout=LONGEST, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = sum("image/png" in output.get("data", {}) for cell in code_of_node(notebook) for output in cell.outputs)
    with capsys.disabled():
        print(f"\n{path.name}: {time.monotonic() - start:.0f} s, {pictures} pictures")
    assert pictures > 0, "where a person would rather look than read, there is a plot"


def code_of_node(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
