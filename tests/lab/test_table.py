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
from s3pet_nb.lab.study import study
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


def gathered(folder, grid="share: [0.05, 0.2]", draw=0):
    "Tables of a study whose results are made up: the score of a set is its size, plus its seed."
    folder.joinpath("small.yml").write_text(ASKED.format(grid=grid, draw=draw))
    asked = study(str(folder / "small.yml"))
    space = tables.space_of(asked.questions()[0].params)
    for question in asked.questions():
        B, numbers = round(question.params["share"] * space.n_params), question.params["first"] + np.arange(2)
        drawn = {f"random-{i}": SAMPLES["uniform"](space, B, int(i)) for i in numbers}
        rows = [{"label": label, "n_params": structure.n_params, "validation": 0.5, "steps": 3, "seconds": 1.0,
                 "test": structure.n_params + question.params["seed"], "learned_nothing": None}
                for label, structure in drawn.items()]
        rows.append(rows[0] | {"label": "bitfit", "n_params": 5, "test": 0.5})
        home = folder / "reports" / asked.name / question.id
        home.mkdir(parents=True)
        Run(home).save_result({
            "task": "agreement", "metric": "accuracy", "backbone": "minilm", "n_backbone": space.n_backbone,
            "budget": B, "space": {"name": "mix", "n_params": space.n_params}, "versions": {"torch": "2"},
            "rates": {"A": 0.02}, "data": {"rows": {"train": 32, "validation": 16, "test": 16}}, "rows": rows,
            "sets": {label: pack(structure.mask(space)).hex() for label, structure in drawn.items()}})
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
    assert not {"first", "seed", "data_dir", "lr", "budget"} & set(told)


@pytest.mark.parametrize("grid, draw, refused", [
    ("share: [0.05]", -1, "the same sets and rows under each seed, .* give draw a value from 0 on"),
    ("share: [0.05], times: [1.0, 2.0], vary: [[B]]", 0, "2 tables would be called 'agreement-5'; they differ in times"),
])
def test_runs_that_make_no_table_are_refused(tmp_path, grid, draw, refused):
    with pytest.raises(ValueError, match=refused):
        gathered(tmp_path, grid, draw)


def changed(table, **columns):
    "The table with another value in the first training."
    frame = table.frame.copy()
    for name, value in columns.items():
        frame[name] = [value, *frame[name][1:]]
    return replace(table, frame=frame)


def test_a_set_counts_only_under_every_seed_and_if_it_learned(runs):
    table = runs[1]["agreement-5"]
    assert Table(table.frame.iloc[1:], table.about).scores.shape == (3, 2)
    assert changed(table, learned=False).scores.shape == changed(table, learned=False).validation.shape == (3, 2)
    assert len(changed(table, learned=False).frame) == 8, "it stays in the file"


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
    card = (file.parent / "README.md").read_text(encoding="utf-8")
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
