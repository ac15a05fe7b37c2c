"The files around the library say the same thing in every place."
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import s3pet_nb

ROOT = Path(__file__).parent.parent


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    words = settings()["requirements" if extra is None else f"extra_{extra}"].split()
    return {canonicalize_name(Requirement(word).name): Requirement(word) for word in words}


def pins() -> dict[str, Version]:
    text = (ROOT / "constraints.txt").read_text()
    found = re.findall(r"(?m)^([^#=\n]+)==(.+)$", text)
    assert len(found) == len([line for line in text.splitlines() if not line.startswith("#")])
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_pyproject_takes_its_metadata_from_settings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == settings()["lib_name"] == s3pet_nb.__name__
    assert set(project["project"]) == {"name", "license-files", "dynamic"}
    assert project["tool"]["nbdev"]["lib_path"] == settings()["lib_name"]


def test_setup_hands_over_what_settings_say():
    fields = ["name", "version", "description", "license", "author"]
    shown = subprocess.run([sys.executable, "setup.py", "--quiet", *(f"--{field}" for field in fields)],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    asked = settings()
    assert shown[:5] == [asked[name] for name in ("lib_name", "version", "description", "license", "author")]


def test_the_library_has_the_version_of_the_settings():
    assert s3pet_nb.__version__ == settings()["version"]


def test_every_requirement_has_a_lower_bound_that_its_pin_meets():
    pinned = pins()
    for extra in None, "demo", "ray", "dev":
        for name, requirement in requirements(extra).items():
            assert ">=" in str(requirement.specifier), f"{requirement} has no lower bound"
            assert name in pinned, f"{name} is not in constraints.txt"
            assert requirement.specifier.contains(pinned[name]), f"{pinned[name]} does not meet {requirement}"


def test_what_is_pinned_is_closed_under_requirements():
    "Every installed package that the project reaches is pinned, so that a later release changes nothing."
    pinned, seen = pins(), set()
    queue = [asked for extra in (None, "demo", "dev") for asked in requirements(extra).values()]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or not re.fullmatch(r"(?!nvidia-|cuda-|triton).*", name):
            continue
        seen.add(name)
        assert name in pinned, f"{name} is not in constraints.txt"
        for line in distribution(name).requires or []:
            below = Requirement(line)
            extras = requirement.extras or {""}
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(below)
    assert len(seen) > 100


def test_torch_is_pinned_without_a_build():
    assert pins()["torch"].local is None
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]


def test_environment_yml_gives_the_versions_of_constraints_txt():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert conda == [f"python={settings()['min_python']}", "pip"], "pip has the versions, conda none"
    assert pip == ["-c constraints.txt", "-e .[demo,dev]"]


def test_demo_and_test_head_the_readme():
    commands = re.findall(r"(?m)^(?:    )?(make [a-z]+)", (ROOT / "README.md").read_text())
    assert commands[:2] == ["make demo", "make test"]


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"(?m)^\.PHONY: (.*)$", makefile)[1].split()
    listed = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"],
                            capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(?m)^  make (\w+)\t\S", listed)) == set(phony)


@pytest.mark.parametrize("version, starts", [("3.10.14", False), ("3.11.0", True)])
def test_an_old_python_is_refused_in_one_sentence(tmp_path, version, starts):
    "A stand-in for python that answers the version check as that version would and then stops."
    major, minor, _ = version.split(".")
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "import sys; '
                        f'sys.version_info = ({major}, {minor}); exec(sys.argv[1])" "$2"\nexit 3\n')
    stand_in.chmod(0o755)
    for name in "Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt":
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    made = subprocess.run(["make", "setup", f"PYTHON={stand_in}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert ("older than Python 3.11" in made.stderr) is not starts
    assert ("installing into .venv" in made.stdout) is starts


@pytest.mark.parametrize("path, ignored", [
    ("reports/study/0a1b2c3d4e/result.json", False),
    ("reports/study/0a1b2c3d4e/structure.json", False),
    ("reports/study/0a1b2c3d4e/params.json", False),
    ("reports/study/0a1b2c3d4e/report.html", True),
    ("reports/study/0a1b2c3d4e/run.ipynb", True),
    ("reports/study/0a1b2c3d4e/log.jsonl", True),
    ("reports/demo/0a1b2c3d4e/result.json", True),
    ("reports/index.html", True),
    ("nbs/core.ipynb", False),
    (".venv/bin/python", True),
])
def test_of_a_published_study_only_the_numbers_are_committed(tmp_path, path, ignored):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    asked = subprocess.run(["git", "-C", str(tmp_path), "check-ignore", "-q", path])
    assert (asked.returncode == 0) is ignored
