"""The notebook of the documentation, executed by a Jupyter kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import tiny_run
from jaxrl.telemetry.rollouts import rollout_files

ROOT = Path(__file__).parents[1]
SEEN = """
import json
moved = [logprob(state.params, each) - each.logprobs.sum() for each in rollouts]
print(json.dumps([np.corrcoef(flat, np.array(moved))[0, 1], flat.std(), len(steps), str(run)], default=float))
"""


@pytest.mark.slow
def test_the_notebook_runs_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its update moves answers with their advantages; a last cell of the test says so."""
    for name, value in tiny_run.environment(PYTHONPATH=str(ROOT)).items():
        monkeypatch.setenv(name, value)
    make = [sys.executable, "-m", "recipes.demo", "runs/demo", "--steps", "150"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SEEN))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    drawn = [out for cell in codes for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(drawn) == 2
    correlation, spread, steps, run = json.loads(codes[-1].outputs[0].text)
    assert spread > 0
    assert correlation > 0.1
    assert (steps, run) == (4, "runs/notebook")
    assert len(rollout_files(tmp_path / run)) == 4
