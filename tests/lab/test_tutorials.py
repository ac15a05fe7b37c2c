"Every tutorial runs with small numbers, in a folder of tutorials alone, and ends with what it promises."
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from s3pet_nb.lab.explore import Learned, run_frame
from s3pet_nb.lab.run import ThisPython
from s3pet_nb.lab.store import run_folders
from s3pet_nb.lab.study import shipped
from s3pet_nb.model.structure import Structure

TUTORIALS = Path(__file__).parents[2] / "nbs" / "tutorials"
SMALL = {
    "01_first_search": dict(steps=6, evaluate_every=2, retrain_steps=4, n_train=64, n_eval=16),
    "02_read_a_structure": dict(steps=4, n_train=64, n_eval=16),
    "03_choose_a_budget": dict(steps=4, retrain_steps=2, n_train=64, n_eval=16),
    "04_transfer_a_structure": dict(steps=4, retrain_steps=2, n_train=64, n_eval=16),
    "05_prune_instead": dict(prune_steps=4, retrain_steps=2, n_train=64, n_eval=16),
    "06_add_a_module": dict(steps=4, n_train=64, n_eval=16),
    "07_add_a_backbone": dict(steps=6, n_batches=6),
    "08_your_own_task": dict(n_rows=300, steps=4, retrain_steps=5),
    "09_steer_a_search_live": dict(steps=24, evaluate_every=4, pause_at=3, stop_at=12, held=0.5, n_train=128,
                                   n_eval=16),
    "10_take_it_elsewhere": dict(retrain_steps=4, n_train=64, n_eval=16),
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "Executes a tutorial, once, where only tutorials and their files are: its notebook, the folder of its runs."
    done = {}

    def of(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            for path in shipped("tutorials").values():
                shutil.copyfile(path, folder / path.name)
            before = {path.name for path in folder.iterdir()}
            path = folder / f"{name}.ipynb"
            left = {"reports"} if "out" in papermill.inspect_notebook(path) else set()
            notebook = papermill.execute_notebook(
                path, folder / "executed.ipynb", SMALL[name], cwd=folder, progress_bar=False,
                kernel_name="python3", language="python", kernel_manager_class=ThisPython, start_timeout=180,
                store_widget_state=False, coalesce_streams=True)
            assert {path.name for path in folder.iterdir()} - before == {"executed.ipynb"} | left
            done[name] = notebook, folder / "reports"
        return done[name]
    return of


def outputs(notebook) -> list:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def said(notebook) -> str:
    "All text that a notebook shows."
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "")
                     for output in outputs(notebook))


def figures(notebook) -> int:
    return sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs(notebook))


def phases(run) -> list[str]:
    return list(dict.fromkeys(record["phase"] for record in run.records()))


def test_there_are_small_numbers_for_every_tutorial():
    found = {path.stem: set(papermill.inspect_notebook(path)) for path in TUTORIALS.glob("*.ipynb")}
    assert found.keys() == SMALL.keys()
    for name, small in SMALL.items():
        assert small.keys() <= found[name], name


@pytest.mark.parametrize("name", SMALL)
def test_what_is_committed_was_run_with_the_defaults(name):
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    assert "widgets" not in notebook.metadata
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook)
                if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert said(notebook).strip()


@pytest.mark.parametrize("name", ["01_first_search", "09_steer_a_search_live"])
def test_the_last_word_of_a_monitor_is_on_the_last_step(name):
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    steered = [said({"cells": [cell]}) for cell in notebook.cells if ".steer(" in cell.source]
    assert steered
    for shown in steered:
        steps = re.search(r"SearchResult: ([\d,]+)", shown)[1]
        last = re.findall(r"(?m)^run tutorials/.*$", shown)
        assert last and all(f" step {steps} of " in line and " left" not in line for line in last)


def test_the_structures_beside_the_tutorials_are_the_published_ones():
    published = TUTORIALS.parent.parent / "reports" / "agreement"
    for seed, run in enumerate(("dd7e53b1bb", "d46c1c7a8b")):
        own = (TUTORIALS / f"agreement-seed-{seed}.json").read_bytes()
        assert own == (published / run / "structure.json").read_bytes()


@pytest.mark.parametrize("name", ["01_first_search", "03_choose_a_budget", "04_transfer_a_structure",
                                  "08_your_own_task", "09_steer_a_search_live"])
def test_the_explorer_takes_what_a_tutorial_leaves_for_finished_and_whole(executed, name):
    runs = run_folders(executed(name)[1])
    assert set(run_frame(runs).state) == {"done"} and set(run_frame(runs).missing) == {""}
    for run in runs:
        assert Learned.of(run).note == "" and run.structure["modules"]
        assert "started" not in run.params, "the time parts runs of one question"


def test_a_first_search(executed):
    notebook, folder = executed("01_first_search")
    (run,) = run_folders(folder)
    looks = [record["step"] for record in run.records() if record["event"] == "gates"]
    steps = [record["step"] for record in run.records()
             if record["event"] == "step" and record["phase"] == "search"]
    assert looks[0] == 0 and looks[-1] == steps[-1] and len(looks) > 2
    assert Structure.load(run.folder / "structure.json").n_params <= run.result["budget"]
    assert [row["label"] for row in run.result["rows"]] == ["searched", "random-1"]
    assert all(0 <= row["test/unseen"] <= 1 for row in run.result["rows"])
    assert phases(run) == ["search", "searched", "random-1"]
    assert figures(notebook) == 4


def test_read_a_structure(executed):
    notebook, _ = executed("02_read_a_structure")
    shown = said(notebook)
    assert "384 inputs + 384 outputs = 768 parameters" in shown and "Jaccard 0.25" in shown
    assert '"schema": 4' in shown and "test accuracy" in shown


def test_take_it_elsewhere(executed):
    shown = said(executed("10_take_it_elsewhere")[0])
    assert "logits agree to" in shown and "BertForSequenceClassification, at most" in shown
    assert "Structure s3pet-transferred" in shown and "Jaccard with what the search found" in shown


def test_choose_a_budget(executed):
    notebook, folder = executed("03_choose_a_budget")
    (run,) = run_folders(folder)
    assert phases(run) == ["search", "budget 5e-05", "budget 0.0002", "budget 0.0008"]
    assert [row["label"] for row in run.result["rows"]] == phases(run)[1:]
    shown = said(notebook)
    assert figures(notebook) == 3 and "last in" in shown and "Next in: encoder." in shown
    assert "under a budget of 4,542. Last in: " in " ".join(shown.split()) and "Explorer of 1 runs" in shown


def test_transfer_a_structure(executed):
    notebook, folder = executed("04_transfer_a_structure")
    (run,) = run_folders(folder)
    assert phases(run) == ["search", "transferred", "searched", "random-1"]
    assert [row["label"] for row in run.result["rows"]] == phases(run)[1:]
    assert "found on agreement, under a budget of 4,542" in said(notebook)
    assert "has no place of its size" in said(notebook)


def test_prune_instead(executed):
    notebook, folder = executed("05_prune_instead")
    (run,) = run_folders(folder)
    pruned = Structure.load(run.folder / "structure.json")
    assert sum(module["n"] for module in run.result["kept"]) == pruned.n_params <= run.result["budget"]
    assert [row["label"] for row in run.result["rows"]] == ["pruned", "gates", "random-1"]
    assert all(row["n_params"] <= run.result["budget"] for row in run.result["rows"])
    assert figures(notebook) == 2


def test_add_a_module(executed):
    notebook, folder = executed("06_add_a_module")
    (run,) = run_folders(folder)
    space = next(record for record in run.records() if record["event"] == "space")
    counts = pd.DataFrame(space["candidates"]).module.value_counts()
    assert counts.to_dict() == {"scale-shift": 36, "lora": 36, "bitfit": 36}
    with pytest.raises(ValueError, match="unknown PET module 'scale-shift'"):
        Structure.load(run.folder / "structure.json")
    assert figures(notebook) == 1


def test_add_a_backbone(executed):
    notebook, _ = executed("07_add_a_backbone")
    shown = said(notebook)
    assert "no row for backbone family 'distilbert'" in shown
    assert "of the distilbert backbone's 66,955,010" in shown and "TrainResult" in shown


def test_your_own_task(executed):
    notebook, folder = executed("08_your_own_task")
    (run,) = run_folders(folder)
    assert len(pd.read_csv(folder / "tickets.csv")) == SMALL["08_your_own_task"]["n_rows"]
    assert Structure.load(run.folder / "structure.json").task == "tickets"
    shown = said(notebook)
    assert "texts ('subject', 'message', 'agent')" in shown and "texts ('subject', 'message')," in shown
    assert "f1-macro" in shown and phases(run) == ["search", "searched"]
    assert "s3pet search --task reports/tickets_without_agent.csv --steps" in shown


def test_steer_a_search_live(executed):
    notebook, folder = executed("09_steer_a_search_live")
    whole, stopped = sorted(run_folders(folder), key=lambda run: run.params["name"] == "by code")
    small = SMALL["09_steer_a_search_live"]
    assert [record["event"] for record in stopped.records()
            if record["event"] in ("paused", "resumed", "stopped")] == ["paused", "resumed", "stopped"]
    steps = [record["step"] for record in stopped.records() if record["event"] == "step"]
    assert steps == list(range(1, steps[-1] + 1)) and small["stop_at"] <= steps[-1] < small["steps"]
    assert max(record["step"] for record in whole.records()) == small["steps"]
    assert stopped.checkpoint("search").exists() and whole.checkpoint("search").exists()
    assert Structure.load(stopped.folder / "structure.json").n_params <= stopped.result["budget"]
    assert figures(notebook) == 5
