"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

import json
import pathlib

import pytest

import parastep

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[3] / "workflows" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == (
            [],
            None,
        )


def shown(cell):
    """The texts of a cell's outputs, and the kinds of what it displays."""
    texts, kinds = "", set()
    for output in cell.outputs:
        texts += output.get("text", "")
        kinds |= set(output.get("data", {}))
    return texts, kinds


def test_steps_at_once(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # The kernel is to find the package that is tested, wherever it runs.
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(parastep.__file__).parents[1]))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel draws inline
    (path,) = NOTEBOOKS
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts, kinds = zip(*map(shown, cells))
    print(*texts)
    everything = "".join(texts)
    assert "pipeline: True" in everything
    assert "rank 2 was left out" in everything and "no more memory" in everything
    dial = next(text for text in texts if " steps instead" in text)
    assert "inf dB" in dial.splitlines()[0] and dial.count("rounds") == 4
    assert sum("text/html" in kind for kind in kinds) == 2  # a report and a plan
    assert sum("image/png" in kind for kind in kinds) == 3  # two grids and a figure
    bars = [text for text in texts if "30/30" in text]
    assert [bar.count("  0%|") for bar in bars] == [1, 2, 1]  # one a call, the leader's
