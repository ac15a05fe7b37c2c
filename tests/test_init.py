"What can be imported from the package itself, and what that costs."
import re
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import s3pet_nb


@pytest.mark.parametrize("name", s3pet_nb.__all__)
def test_a_public_name_is_that_of_its_module(name):
    room, = (room for room, names in s3pet_nb.ROOMS.items() if name in names)
    assert getattr(s3pet_nb, name) is getattr(import_module(f"s3pet_nb.{room}"), name)


@pytest.mark.parametrize("name", [
    "load_backbone", "tiny", "make_space", "attach", "resolve_budget", "expected_size", "solve_zeta",
    "shifted_sigmoid", "binary_concrete", "select", "Structure", "search", "SearchConfig", "prune_search",
    "PruneConfig", "probe", "retrain", "BASELINES", "random_structure", "to_peft", "merge"])
def test_the_promised_names_are_there(name):
    assert name in s3pet_nb.__all__ and name in dir(s3pet_nb)


@pytest.mark.parametrize("module", ["s3pet_nb", "s3pet_nb.cli", "s3pet_nb.lab.study"])
def test_what_answers_a_mistyped_name_loads_nothing_heavy(module):
    heavy = ("torch", "numpy", "pandas", "transformers", "datasets", "plotly", "IPython")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_name_that_is_not_there_is_said_with_those_that_are():
    with pytest.raises(AttributeError, match="no attribute 'serch'; it has .*search"):
        s3pet_nb.serch
    with pytest.raises(ImportError):
        from s3pet_nb import serch  # noqa: F401


def test_the_readme_searches_in_a_few_lines(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = re.search(r"(?m)^    from s3pet_nb import .*\n(?:\n|    .*\n)+", readme)[0]
    code = textwrap.dedent(block).replace("steps=20", "steps=2").replace("evaluate_every=10", "evaluate_every=2")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = s3pet_nb.Structure.load("structure.json")
    assert 0 < found.n_params <= found.budget == 4542
