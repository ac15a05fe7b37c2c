"The house's own rules: arrows point downwards, learning needs no lab, every notebook is a page to read."
import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "s3pet_nb"
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
BELOW = {"core": (), "model": ("core",), "data": ("core", "model"), "learn": ("core", "model"),
         "lab": ("core", "model", "data", "learn"), "cli": ("core", "model", "data", "learn", "lab")}
LAB = ("plotly", "IPython", "papermill", "nbconvert", "ipywidgets", "jupyter_client", "ray", "typer")


PAGES = {name: ROOT / "nbs" / f"{name}.ipynb" for name in ("core", "cli")}  # the notebook of each module
PAGES |= {f"{wing}.{path.stem[3:]}": path for wing in ("model", "data", "learn", "lab")
          for path in sorted((ROOT / "nbs" / wing).glob("*.ipynb"))}
FLOOR = {module: int(path.stem[:2]) if "." in module else 0 for module, path in PAGES.items()}
LONG = {  # exported cells above 35 lines, and why; this list may only shrink
    "learn.prune:prune-026": "twelve public arguments with a line each, above a body of ten lines",
}


def imports(module: str) -> set[tuple[str, str]]:
    "What `module` imports of this library, at any depth of its code: the module, and the name or ''."
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    package, seen = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("s3pet_nb.")]
            seen |= {(name.removeprefix("s3pet_nb."), "") for name in names}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Later":
            seen |= {(node.args[0].value, "")}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            within = package[:len(package) + 1 - node.level]
            home = ".".join([*within, node.module or ""]).strip(".")
        elif (node.module or "").split(".")[0] == "s3pet_nb":
            home = node.module.removeprefix("s3pet_nb").strip(".")
        else:
            continue
        for alias in node.names:
            inner = f"{home}.{alias.name}".strip(".")
            seen.add((inner, "") if inner in FLOOR else (home, alias.name))
    return seen


def test_every_notebook_of_a_wing_exports_one_module():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
               if path.stem not in ("__init__", "_modidx")}
    assert modules == set(FLOOR)


@pytest.mark.parametrize("module", FLOOR)
def test_imports_point_downwards(module):
    wing = module.split(".")[0]
    for other, _ in imports(module):
        there = other.split(".")[0]
        assert there in BELOW[wing] or there == "" or there == wing and FLOOR[other] < FLOOR[module], other


@pytest.mark.parametrize("module", FLOOR)
def test_no_star_and_no_private_name_of_another_module(module):
    private = {name for _, name in imports(module) if name == "*" or re.match(r"_(?!_)", name)}
    assert not private


def test_model_data_and_learn_need_no_lab():
    modules = ", ".join(f"s3pet_nb.{name}" for name in FLOOR if name.split(".")[0] not in ("lab", "cli"))
    code = f"import sys, {modules}; print([name for name in {LAB} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def exported_cells() -> dict[str, int]:
    "Lines of every exported cell, without blank ones and the directive, by module and id."
    lines = {}
    for module, path in PAGES.items():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and source.startswith("#| export"):
                lines[f"{module}:{cell['id']}"] = sum(bool(line.strip()) for line in source.splitlines()[1:])
    return lines


def test_cells_can_be_read():
    lines = exported_cells()
    assert {cell for cell, n in lines.items() if n > 35} == set(LONG) and len(LONG) <= 1
    assert statistics.median(lines.values()) <= 15


@pytest.mark.parametrize("module", FLOOR)
def test_a_module_has_tests_under_its_name(module):
    *wing, name = module.split(".")
    assert "def test_" in ROOT.joinpath("tests", *wing, f"test_{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_page(path):
    assert path.stat().st_size <= 400_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert any(cell["cell_type"] == "markdown" for cell in cells[:2])
    long = [line for source in sources for line in source.splitlines() if len(line) > 110]
    assert not long


PUBLISHED = [path for path in sorted((ROOT / "reports").glob("*/*/*.json"))
             if path.parts[-3] not in ("demo", "search", "prune", "probe")]  # what .gitignore lets through


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PUBLISHED],
                         ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/\w", text)
