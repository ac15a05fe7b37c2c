"The house's own rules: arrows point downwards, searching needs no lab, every notebook is a page to read."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
API = sorted((ROOT / "nbs" / "api").glob("*.ipynb"))
FLOOR = {path.stem[3:]: int(path.stem[:2]) for path in API}
LAB = ("plotly", "IPython", "papermill", "nbconvert", "ipywidgets", "jupyter_client", "ray", "typer")


def imported(module: str) -> set[str]:
    "Names of this library's modules that `module` imports, at any depth of its code."
    tree = ast.parse((ROOT / "s3pet_nb" / f"{module}.py").read_text(encoding="utf-8"))
    found = {node.module.removeprefix("s3pet_nb.") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module and (node.level == 1 or node.module.startswith("s3pet_nb."))}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module in (None, "s3pet_nb") for alias in node.names if alias.name in FLOOR}
    return {name for name in found if name} | plain


def test_every_notebook_of_the_api_exports_one_module():
    modules = {path.stem for path in (ROOT / "s3pet_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(FLOOR)


@pytest.mark.parametrize("module", FLOOR)
def test_imports_point_downwards(module):
    upwards = {name for name in imported(module) if name in FLOOR and FLOOR[name] >= FLOOR[module]}
    assert not upwards


def test_searching_and_training_need_no_lab():
    modules = ", ".join(f"s3pet_nb.{name}" for name, floor in FLOOR.items() if floor < 20)
    code = f"import sys, {modules}; print([name for name in {LAB} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_page(path):
    assert path.stat().st_size <= 400_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert any(cell["cell_type"] == "markdown" for cell in cells[:2])
    long = [line for source in sources for line in source.splitlines() if len(line) > 110]
    assert not long


PUBLISHED = [path for path in sorted((ROOT / "reports").glob("*/*/*.json"))
             if path.parts[-3] not in ("demo", "search", "prune")]  # what .gitignore lets through


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PUBLISHED],
                         ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/\w", text)
