"Tables of trained structures: gathered from runs, and kept as a file that others read."
import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import table as tables
from s3pet_nb.lab.store import Run
from s3pet_nb.lab.study import parameters, study
from s3pet_nb.lab.table import Table, gather, made_up
from s3pet_nb.learn.sample import SAMPLES
from s3pet_nb.model.space import pack

ASKED = """
title: two small tables
template: train
params: {{baselines: [bitfit], n_random: 2, split_seed: 0, draw: {draw}, sample: uniform}}
grid: {{first: [1, 3], {grid}}}
seeds: [0, 1]
"""


def gathered(folder, grid="share: [0.05, 0.2]", draw=0, change=lambda result, number: None):
    """Tables of a study whose results are made up: the score of a set is its size, plus its seed.

    `change` may change the result of each run, by its number.
    """
    folder.joinpath("small.yml").write_text(ASKED.format(grid=grid, draw=draw))
    asked = study(str(folder / "small.yml"))
    space = tables.space_of(asked.questions()[0].params)
    for k, question in enumerate(asked.questions()):
        B, numbers = round(question.params["share"] * space.n_params), question.params["first"] + np.arange(2)
        drawn = {f"random-{i}": SAMPLES["uniform"](space, B, int(i)) for i in numbers}
        rows = [{"label": label, "n_params": structure.n_params, "validation": 0.5, "steps": 3, "seconds": 1.0,
                 "test": structure.n_params + question.params["seed"], "learned_nothing": None}
                for label, structure in drawn.items()]
        rows.append(rows[0] | {"label": "bitfit", "n_params": 5, "test": 0.5})
        home = folder / "reports" / asked.name / question.id
        home.mkdir(parents=True)
        result = {
            "task": "agreement", "metric": "accuracy", "form": "head", "backbone": "minilm", "device": "cpu",
            "n_backbone": space.n_backbone, "budget": B, "space": {"name": "mix", "n_params": space.n_params},
            "versions": {"torch": "2"}, "rates": {"A": 0.02}, "stopped": [], "rows": rows,
            "data": {"rows": {"train": 32, "validation": 16, "test": 16}},
            "sets": {label: pack(structure.mask(space)).hex() for label, structure in drawn.items()}}
        change(result, k)
        Run(home).save_result(result)
    return space, gather(asked, folder / "reports")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return gathered(tmp_path_factory.mktemp("study"))


def test_a_study_gives_a_table_for_each_budget_with_every_set_under_every_seed(runs):
    space, found = runs
    assert list(found) == ["agreement-5", "agreement-20"]
    for table in found.values():
        assert table.scores.shape == (4, 2) and list(table.scores) == [0, 1]
        assert len(table.frame) == 8 and table.frame.number.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
        sizes = table.sets @ table.candidates.n.to_numpy()
        assert (table.scores[0] == sizes).all() and (table.scores[1] == sizes + 1).all(), "bits are the set"
        assert (table.means == sizes + 0.5).all() and (table.validation == 0.5).all(axis=None)
        assert (sizes <= table.B).all() and table.candidates.name.tolist() == [c.name for c in space.candidates]


def test_a_table_says_how_its_sets_were_trained(runs):
    told = runs[1]["agreement-5"].about["training"]
    assert told["recipe"] == "default" and told["head"] == "prior", "what the protocol gives"
    assert told["batch_size"] == 8 and told["draw"] == told["split_seed"] == 0 and told["dropout"] is False
    assert told["warmup"] == 0.06 and told["max_length"] == 32 and told["take"] == "best"
    assert not {"first", "seed", "data_dir", "lr", "budget", "device"} & set(told)


def test_what_the_protocol_gives_depends_on_the_rate():
    params = parameters("train") | {"max_length": 0, "batch_size": 0, "protocol": "s3pet", "task": "glue/rte"}
    told = tables.trained_by(params)
    assert told["recipe"] == "" and told["max_length"] > 0 and told["batch_size"] > 0 and told["clip"] == 2.0
    told = tables.trained_by(params | {"protocol": "quick", "lr": 0.001})
    assert told["recipe"] == "" and told["lr"] == 0.001


@pytest.mark.parametrize("grid, draw, refused", [
    ("share: [0.05]", -1, "the same sets and rows under each seed, .* give draw a value from 0 on"),
    ("share: [0.05], times: [1.0, 2.0], vary: [[B]]", 0, "2 tables would be called 'agreement-5'; they differ in times"),
])
def test_runs_that_make_no_table_are_refused(tmp_path, grid, draw, refused):
    with pytest.raises(ValueError, match=refused):
        gathered(tmp_path, grid, draw)


def other(name, value):
    "What makes the third run unlike the others."
    return lambda result, k: result.update({name: value}) if k == 2 else None


@pytest.mark.parametrize("change, refused", [
    (other("device", "cuda:0"), "runs on 'agreement' differ in device: cpu and cuda:0"),
    (other("versions", {"torch": "3"}), "differ in versions"),
    (other("data", {"rows": {"train": 31}}), "differ in rows"),
    (other("rates", {"A": 0.1}), "differ in rates"),
    (lambda result, k: result["rows"][0].update(n_params=7), "the space has changed since; run the study again"),
    (lambda result, k: result.update(sets={}), "no run of 'small' in .* is done .* run `s3pet study small` first"),
    (lambda result, k: result.pop("sets"), "no run of 'small' in"),
], ids=["device", "versions", "rows", "rates", "space", "none", "old"])
def test_runs_that_do_not_belong_together_are_refused(tmp_path, change, refused):
    with pytest.raises(ValueError, match=refused):
        gathered(tmp_path, "share: [0.05]", change=change)


def test_a_training_that_was_stopped_is_left_out(tmp_path):
    stop = other("stopped", [{"phase": "random-1", "step": 2, "steps": 9}])
    table = gathered(tmp_path, "share: [0.05]", change=stop)[1]["agreement-5"]
    assert len(table.frame) == 7 and table.scores.shape == (3, 2) and "1 trainings are left out" in repr(table)


def changed(table, **columns):
    "The table with another value in the first training."
    frame = table.frame.copy()
    for name, value in columns.items():
        frame[name] = [value, *frame[name][1:]]
    return replace(table, frame=frame)


def test_a_set_counts_only_under_every_seed(runs):
    table = runs[1]["agreement-5"]
    assert Table(table.frame.iloc[1:], table.about).scores.shape == (3, 2)
    for column in ("test", "validation"):
        broken = changed(table, **{column: float("nan")})
        assert broken.scores.shape == broken.validation.shape == (3, 2)
        assert (broken.scores.index == broken.validation.index).all() and len(broken.sets) == 3


def test_a_third_seed_that_has_begun_takes_no_set_away(runs):
    table = runs[1]["agreement-5"]
    begun = pd.concat([table.frame, table.frame.iloc[[0]].assign(seed=2)], ignore_index=True)
    assert list(replace(table, frame=begun).scores) == [0, 1] and len(replace(table, frame=begun).scores) == 4
    whole = pd.concat([table.frame, table.frame[table.frame.seed == 0].assign(seed=2)], ignore_index=True)
    assert list(replace(table, frame=whole).scores) == [0, 1, 2]


def test_a_training_that_learned_nothing_counts_and_is_said(runs):
    table = changed(runs[1]["agreement-5"], learned=False)
    assert table.unlearned == 1 and table.scores.shape == (4, 2) and "1 trainings learned nothing" in repr(table)


def test_a_set_that_was_drawn_twice_counts_once(runs):
    table = runs[1]["agreement-5"]
    twice = replace(table, frame=pd.concat([table.frame, table.frame.assign(sample="stratified", number=9)]))
    assert twice.scores.shape == (4, 2) and twice.only("stratified").scores.shape == (4, 2)
    assert set(twice.only("uniform").frame["sample"]) == {"uniform"}
    with pytest.raises(UnknownName, match="stratified"):
        table.only("stratified")


def test_pandas_and_pyarrow_alone_read_a_file_as_its_card_says(runs, tmp_path):
    table = runs[1]["agreement-5"]
    file = table.save(tmp_path / "table-agreement-5")
    card = (file.parent / "table.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert "s3pet_nb" not in code.replace('b"s3pet_nb"', "")
    block = "import sys; sys.modules['s3pet_nb'] = None\n" + code + "print(sets.sum(), N)\n"
    shown = subprocess.run([sys.executable, "-c", block], cwd=file.parent, capture_output=True, text=True, check=True)
    assert shown.stdout.split()[-2:] == [str(2 * int(table.sets.sum())), str(len(table.candidates))]
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card and file.stat().st_size < 50_000
    for said in ("| `A` | 0.02 |", "| `recipe` | default |", "3 steps each, on 32 train, 16 validation, 16 test rows"):
        assert said in card
    again = Table.read(file)
    pd.testing.assert_frame_equal(again.frame, table.frame, check_dtype=False)
    assert again.about == json.loads(json.dumps(table.about))


@pytest.mark.parametrize("place", ["site/s3pet_nb/tables", "site/reports"])
def test_a_table_that_is_shipped_is_loaded_by_name(runs, tmp_path, monkeypatch, place):
    monkeypatch.setattr(tables, "PACKAGE", tmp_path / "site" / "s3pet_nb")
    assert tables.shipped_tables() == {}
    runs[1]["agreement-5"].save(tmp_path / place / "table-agreement-5")
    assert len(Table.load("agreement-5").frame) == 8
    with pytest.raises(UnknownName, match="unknown table 'agreement5'; did you mean 'agreement-5'"):
        Table.load("agreement5")


def test_another_file_is_no_table(tmp_path):
    pd.DataFrame({"set": [b"x"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no table of trained structures"):
        Table.read(tmp_path / "other.parquet")


def test_a_made_up_table_has_what_was_put_in():
    table = made_up(lambda candidates: 0.1 * candidates.layer.to_numpy(), noise=0.0, K=50, seeds=3)
    true = table.sets @ (0.1 * table.candidates.layer.to_numpy())
    assert np.allclose(table.scores.to_numpy(), true[:, None]) and np.allclose(table.validation.to_numpy(), true[:, None])
    sizes = table.sets @ table.candidates.n.to_numpy()
    assert (sizes <= table.B).all() and len(np.unique(sizes)) > 4
