"""Run the notebooks of this folder from a fresh kernel, and write their outputs into them.

    python examples/notebooks/execute.py                  # all of them
    python examples/notebooks/execute.py digits.ipynb

`hub_checkpoint.ipynb` downloads its checkpoint, or reads the folder that SOURCE names.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS = 300  # for one cell
_NUMBER = re.compile(r"\d[\d,.]*(e[-+]\d+)?%?")


def executed(path: Path) -> Any:
    """The notebook with the outputs of a run; raises the error of a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Without what differs from run to run and tells nothing: times, and warnings of libraries."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def texts(notebook: Any) -> list[str]:
    """What each code cell prints, every number as #, and the kinds of what it shows."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [x.text if "text" in x else " ".join(sorted(x.data)) for x in cell.outputs]
            words = _NUMBER.sub("#", "".join(parts))
            found.append(" ".join(words.split()))
    return found


if __name__ == "__main__":
    for given in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        nbformat.write(executed(FOLDER / given), FOLDER / given)
        print(given, f"{(FOLDER / given).stat().st_size / 1e3:.0f} kB")
