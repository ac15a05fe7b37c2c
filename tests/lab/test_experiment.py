"What the templates share: rows of a task, structures to compare with, tables of how a run was run."
from dataclasses import replace

import pandas as pd
import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.experiment import compared_with, machine_table, read_rows, sizes_table, value_table
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.protocol import PROTOCOLS
from s3pet_nb.learn.train import BASELINES, random_structure
from s3pet_nb.model.backbone import blueprint
from s3pet_nb.model.space import make_space

RULES = PROTOCOLS["s3pet"]


@pytest.fixture(scope="module")
def model():
    return blueprint("minilm")


@pytest.fixture
def own_rows(tmp_path):
    path = tmp_path / "own.csv"
    pd.DataFrame({"text": [f"day {i}" for i in range(60)], "label": ["ab"[i % 2] for i in range(60)]}).to_csv(
        path, index=False)
    return str(path)


def test_the_first_rows_are_used_and_all_rows_are_known():
    task, whole, used = read_rows("agreement", RULES, seed=1, n_train=32, n_eval=16)
    assert task.name == "agreement" and used.sizes["train"] == 32 and used.sizes["test"] == 16
    assert used.train["label"] == whole.train.select(range(32))["label"]
    assert read_rows("agreement", RULES).used.sizes == whole.sizes
    with pytest.raises(UnknownName, match="did you mean 'agreement'"):
        read_rows("agrement", RULES)


def test_a_protocol_may_score_a_task_in_its_own_way(own_rows):
    rules = replace(RULES, metrics={"own": "f1"})
    assert read_rows(own_rows, RULES).task.metric == "accuracy"
    assert read_rows(own_rows, rules).task.metric == "f1"


def test_sizes_are_by_split_and_of_several_tasks_by_task(own_rows):
    source, target = read_rows("agreement", RULES, n_train=32), read_rows(own_rows, RULES)
    alone = sizes_table(source, source).data
    assert list(alone.index)[:3] == ["train", "validation", "test"] and alone["rows used"]["train"] == 32
    both = sizes_table(source, source, target).data
    assert list(both.index.names) == ["task", "split"] and both.index.is_unique
    assert both.loc[("own", "train"), "rows used"] == target.used.sizes["train"]


def test_baselines_come_whole_and_cut_and_files_by_task_and_method(model, tmp_path):
    structure = random_structure(make_space(model, "mix"), 5000, seed=3)
    structure.save(tmp_path / "a.json")
    files = [str(tmp_path / "a.json")] * 2
    chosen = compared_with(model, 8000, ["lora-r8", "bitfit", "finetune"], True, files, seed=7)
    cut = [name for name in ("lora-r8", "bitfit") if BASELINES[name](model).n_params > 8000]
    assert "lora-r8" in cut and chosen["finetune"] is None
    assert [name for name in chosen if name.endswith("-cut")] == [f"{name}-cut" for name in cut]
    assert chosen["lora-r8-cut"] == BASELINES["lora-r8"].cut(model, 8000, 7)
    assert list(chosen)[-2:] == ["random-1", "random-2"] and chosen["random-1"] == structure
    assert "lora-r8-cut" not in compared_with(model, 8000, ["lora-r8"], False, [], seed=7)


def test_tables_escape_what_they_show(tmp_path):
    assert "&lt;b&gt;" in value_table({"task": "<b>"}, "parameter").data
    run = Run(tmp_path)
    run.save_result({"device": "cpu", "seconds": 1.5, "rows": [1], "versions": {"torch": "2.13.0"}})
    shown = machine_table(run).data
    assert "2.13.0" in shown and "device" in shown and "rows" not in shown
