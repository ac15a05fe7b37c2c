"""The built wheel is whole: in an empty environment, from an unrelated folder, `s3pet search` is complete.

The environment is new and holds nothing but the wheel. The two gigabytes that it requires are not installed
again: a .pth file lends it the packages of the environment that runs the tests, behind its own. A plain path
in a .pth file does not carry over an editable install, so the library can only come from the wheel. The page
templates of nbconvert are lent in the same way: they are files of an environment, outside its packages.
"""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from s3pet_nb.lab.table import made_up

ROOT = Path(__file__).parent.parent
SOURCES = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "s3pet_nb",
           "nbs/experiments", "nbs/studies", "nbs/tutorials"]


def call(*words, **options) -> str:
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built from a copy, so that the checkout stays clean."
    copy = tmp_path_factory.mktemp("source")
    for source in SOURCES:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, copy / source)
    made_up(lambda candidates: 0.1 * candidates.layer.to_numpy(), 0.01, K=5).save(copy / "reports" / "table-made-up")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    call(*pip, "-w", copy / "dist", copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    "An unrelated working folder, and no way back to the checkout."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    return tmp_path


def test_templates_and_studies_travel_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for source, target, pattern in (("experiments", "templates", "*.ipynb"), ("studies", "studies", "*.yml"),
                                    ("tutorials", "tutorials", "*.ipynb"), ("tutorials", "tutorials", "*.json")):
        names = [path.name for path in (ROOT / "nbs" / source).glob(pattern)]
        assert names and {f"s3pet_nb/{target}/{name}" for name in names} <= inside
    for module in (ROOT / "s3pet_nb").glob("*.py"):
        assert f"s3pet_nb/{module.name}" in inside
    assets = {path.name for path in (ROOT / "s3pet_nb" / "lab" / "assets").iterdir()}
    assert assets >= {"live.js", "page.css"} and {f"s3pet_nb/lab/assets/{name}" for name in assets} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith(("tests", "nbs", "build"))]


def test_the_library_comes_from_the_wheel(environment, elsewhere):
    home = call(environment / "bin" / "python", "-c", "import s3pet_nb; print(s3pet_nb.__file__)").strip()
    assert Path(home).is_relative_to(environment)
    assert "demo" in call(environment / "bin" / "s3pet", "--help")


def test_the_tutorials_come_with_the_files_that_they_read(environment, elsewhere):
    shown = call(environment / "bin" / "python", "-c",
                 "from s3pet_nb.lab.study import shipped; print(*shipped('tutorials').values(), sep='\\n')")
    found = [Path(line) for line in shown.splitlines()]
    assert all(path.is_relative_to(environment) for path in found)
    there = {path.name for pattern in ("*.ipynb", "*.json") for path in (ROOT / "nbs" / "tutorials").glob(pattern)}
    assert {path.name for path in found} == there > {"01_first_search.ipynb", "agreement-seed-0.json"}


def test_a_table_is_read_from_the_wheel_by_its_name(wheel, environment, elsewhere):
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"s3pet_nb/tables/table-made-up/{name}" for name in ("table.parquet", "table.md")} <= inside
    shown = call(environment / "bin" / "python", "-c", "import s3pet_nb; print(s3pet_nb.Table.load('made-up'))")
    assert shown.startswith("Table of 5 sets, 2 seeds: made up")


def test_search_runs_from_any_folder(environment, elsewhere):
    smoke = ["n_train=64", "n_eval=64", "n_random=1", "batch_size=8", "evaluate_every=2"]
    printed = call(environment / "bin" / "s3pet", "search", "--task", "agreement", "--backbone", "minilm",
                   "--budget", "2e-4", "--seed", "1", "--steps", "4", "--retrain-steps", "4",
                   *[word for setting in smoke for word in ("--set", setting)],
                   env={**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"})
    (folder,) = (elsewhere / "reports" / "search").glob("[!.]*")
    assert {"params.json", "log.jsonl", "structure.json", "result.json", "run.ipynb", "report.html"} <= {
        path.name for path in folder.iterdir()}
    result = json.loads((folder / "result.json").read_text())
    searched = next(row for row in result["rows"] if row["label"] == "searched")
    assert 0 < searched["n_params"] <= result["budget"]
    assert printed.splitlines()[-1] == f"report: {folder.relative_to(elsewhere) / 'report.html'}"
