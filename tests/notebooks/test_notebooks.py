"""The notebooks import, plot and hold no output; they run from top to bottom as they are."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.pipeline.job_helpers import job_settings, run_fake, write_shards

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ["01_quickstart", "02_a_run"]


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def executed(name: str) -> NotebookNode:
    """The notebook after running all of it where Jupyter would run it: in its own folder."""
    notebook = read(name)
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def complaints(notebook: NotebookNode) -> str:
    """What a user would see in red."""
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stderr")


def num_plots(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """The output of a small job: three shards, one row of which is no JSON."""
    shards = write_shards(tmp_path / "in")
    first = shards / "0.jsonl"
    first.write_bytes(first.read_bytes() + b"not JSON\n")
    run_fake(job_settings(shards, tmp_path / "out", max_reject_fraction=0.5))
    return tmp_path / "out"


@pytest.fixture
def jupyter_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout is what is imported, and nothing of the user's own Jupyter or matplotlib has a say."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_they_hold_no_output_and_define_nothing(name: str):
    for cell in read(name).cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs
        assert cell.execution_count is None
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda), (
                "what is worth a name is worth a module"
            )


@pytest.mark.usefixtures("jupyter_home")
def test_the_quickstart_runs_on_the_embedded_model():
    notebook = executed("01_quickstart")
    assert "Paris" in printed(notebook)
    assert not complaints(notebook)
    assert num_plots(notebook) == 1


@pytest.mark.usefixtures("jupyter_home")
def test_a_run_opens(small_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIDEMILL_RUN", str(small_run))
    notebook = executed("02_a_run")
    assert f"{small_run} is finished" in printed(notebook)
    assert not complaints(notebook)
    assert num_plots(notebook) == 3
    tables = [output.data["text/plain"] for output in outputs(notebook) if "data" in output]
    assert any("not_json" in table for table in tables), "the rejected row is shown"
    assert any("num_rows_committed" in table for table in tables)


@pytest.mark.usefixtures("jupyter_home")
def test_a_run_in_progress_opens(small_run: Path, monkeypatch: pytest.MonkeyPatch):
    """The same run without its last word: as another process sees it before it ends."""
    (small_run / "manifest.json").unlink()
    (_,) = [path.unlink() for path in small_run.glob("_state/*/shards/*2.json")]
    monkeypatch.setenv("TIDEMILL_RUN", str(small_run))
    notebook = executed("02_a_run")
    assert f"{small_run} is not finished" in printed(notebook)
    assert num_plots(notebook) == 3
