"What the templates share: rows of a task, structures to compare with, tables of how a run was run."
from dataclasses import replace

import pandas as pd
import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.experiment import (PAPERS, about, ahead, budget_for, budget_text, compared_with, config_for,
                                     differences_from_paper, machine_table, paper_line, pass_seconds, recipe_for,
                                     row_of, scoring, setup_for, sizes_table, task_for, value_table)
from s3pet_nb.lab.store import Run
from s3pet_nb.lab.study import parameters, study
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.protocol import PROTOCOLS, RECIPES
from s3pet_nb.learn.train import BASELINES, TrainConfig, random_structure, retrain
from s3pet_nb.model.backbone import blueprint
from s3pet_nb.model.space import make_space

RULES = PROTOCOLS["s3pet"]


@pytest.fixture(scope="module")
def model():
    return blueprint("minilm")


@pytest.fixture(scope="module")
def setup():
    return setup_for("agreement", "minilm", RULES, "cpu", seed=1, n_train=32, n_eval=16)


@pytest.fixture
def own_rows(tmp_path):
    path = tmp_path / "own.csv"
    pd.DataFrame({"text": [f"day {i}" for i in range(60)], "label": ["ab"[i % 2] for i in range(60)]}).to_csv(
        path, index=False)
    return str(path)


def test_the_first_rows_are_used_and_all_rows_are_known(setup):
    used, whole = setup.splits, setup.whole
    assert setup.task.name == "agreement" and used.sizes["train"] == 32 and used.sizes["test"] == 16
    assert used.train["label"] == whole.train.select(range(32))["label"]
    with pytest.raises(UnknownName, match="did you mean 'agreement'"):
        setup_for("agrement", "minilm", RULES)


def test_what_is_0_or_empty_is_left_to_the_protocol_and_the_task(own_rows):
    rules = replace(RULES, batch_size=4, max_length=16)
    left = setup_for(own_rows, "minilm", rules, "cpu", seed=0, n_train=0, n_eval=0, data_dir="", form="", workers=0)
    assert (left.batch_size, left.max_length) == (4, 16) and left.splits.sizes == left.whole.sizes
    given = setup_for(own_rows, "minilm", rules, "cpu", batch_size=2, max_length=8)
    assert (given.batch_size, given.max_length) == (2, 8)


def test_a_protocol_may_score_a_task_in_its_own_way(own_rows):
    rules = replace(RULES, metrics={"own": "f1"})
    assert task_for(own_rows, RULES).metric == "accuracy"
    assert task_for(own_rows, rules).metric == "f1"
    assert setup_for(own_rows, "minilm", rules, "cpu").task.metric == "f1"


def test_a_budget_is_a_share_of_the_space_where_none_is_given(setup):
    space = make_space(setup.model, "mix")
    assert budget_for(space) == int(0.05 * space.n_params) and budget_for(space, share=1.0) == space.n_params
    assert budget_for(space, 1e-3, share=0.5) == int(1e-3 * space.n_backbone)
    assert budget_text(4_358, space) == ("The budget is 4,358 parameters: 5.0% of the space, "
                                         "0.019% of the backbone.")
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"share is {share}; give a share of the space above 0"):
            budget_for(space, share=share)


def test_a_protocol_says_what_a_training_is_not_told(setup):
    quick = PROTOCOLS["quick"]
    left = config_for(replace(setup, batch_size=16), quick, 1e-4, compute=Compute(accumulate=2))
    assert (left.steps, left.evaluate_every, left.take) == (quick.examples // 32, 15, "best")
    assert left.rates == RECIPES[quick.recipe].rates
    told = config_for(setup, quick, 1e-4, steps=7, lr=0.5, evaluate_every=3, seed=9)
    assert (told.steps, told.lr, told.rates, told.evaluate_every, told.seed) == (7, 0.5, {}, 3, 9)
    assert recipe_for(RULES, "") is None and recipe_for(RULES, "even") == RECIPES["even"]


def test_the_time_ahead_is_passes_times_seconds_and_names_what_is_shorter(setup):
    config = config_for(setup, PROTOCOLS["quick"], 1e-4, steps=60, evaluate_every=20)
    assert scoring(setup, config) == pytest.approx(16 * 3 / (setup.batch_size or setup.task.batch_size) / 3)
    seconds = {"the search": 60.0, "4 trainings": 120.0}
    assert ahead(seconds, "quick") == ("This takes about 3 min 0 s on this machine: the search 1 min 0 s, "
                                           "4 trainings 2 min 0 s.")
    assert "--quick takes about a quarter" in ahead(seconds, "standard")
    assert "--standard and --quick are shorter" in ahead(seconds, "s3pet")


def test_timing_a_pass_leaves_model_and_random_numbers_as_they_were(setup):
    before = {name: weight.clone() for name, weight in setup.model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert pass_seconds(setup, make_space(setup.model, "bias")) > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(weight, before[name]) for name, weight in setup.model.state_dict().items())


def test_sizes_are_by_split(setup):
    sizes = sizes_table(setup).data
    assert list(sizes.index)[:3] == ["train", "validation", "test"] and sizes["rows used"]["train"] == 32
    assert sizes["rows there are"].to_dict() == setup.whole.sizes
    assert "agreement" in sizes_table(setup).to_html()


def test_a_result_says_on_what_it_was(setup):
    said = about(setup, make_space(setup.model, "mix"), "minilm")
    assert (said["task"], said["metric"], said["backbone"]) == ("agreement", "accuracy", "minilm")
    assert said["space"]["name"] == "mix" and said["data"]["rows"] == setup.splits.sizes


def test_a_line_has_every_test_split(setup, model):
    structure = random_structure(make_space(model, "mix"), 5000, seed=3)
    trained = retrain(setup.model, structure, setup.train, setup.validation, lambda *_: 0.5, TrainConfig(1, 1e-3))
    row = row_of("random", trained, setup)
    assert row["label"] == "random" and row["validation"] == 0.5 and 0 <= row["test"] <= 1


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


PAPER = {"search": {"protocol": "s3pet", "budget": 1.389e-4, "order": "central", "stop_after": 0,
                    "dropout": True},
         "prune": {"protocol": "lawton", "budget": 7.0e-5, "dropout": True}}
LEFT = ("search_steps", "prune_steps", "retrain_steps", "batch_size", "max_length", "search_lr", "prune_lr",
        "lr", "evaluate_every", "n_train")


@pytest.mark.parametrize("template, name", [("search", "S3PET"), ("prune", "Lawton et al.")])
def test_the_numbers_of_the_paper_differ_in_none(template, name):
    known = parameters(template)
    params = known | {each: type(known[each])(0) for each in LEFT if each in known} | PAPER[template]
    assert differences_from_paper(params) == []
    assert paper_line(params) == f"All numbers are those of {name}."
    assert set(params) & set(PAPERS[name]) >= {"budget", "lr", "dropout", "batch_size", "retrain_steps"}


@pytest.mark.parametrize("template, changed, says", [
    ("search", {"budget": 2e-4}, "budget 0.0002 (paper: 0.000138894)"),
    ("search", {"order": "auto"}, "order auto (paper: central)"),
    ("search", {"stop_after": 4}, "stop_after 4 (paper: never)"),
    ("search", {"dropout": False}, "dropout False (paper: True)"),
    ("search", {"search_lr": 1e-2}, "search_lr 0.01 (paper: 0.0003)"),
    ("search", {"lr": 1e-3}, "lr 0.001 (paper: 0.0003)"),
    ("search", {"retrain_steps": 300}, "retrain_steps 300 (paper: the protocol's)"),
    ("search", {"recipe": "default"}, "recipe default (paper: one rate)"),
    ("search", {"n_train": 4480}, "n_train 4480 (paper: all rows)"),
    ("prune", {"criterion": "random"}, "criterion random (paper: first-order)"),
    ("prune", {"budget": 0.0}, "budget 0 (paper: 7.03508e-05)"),
    ("prune", {"lr": 1e-3}, "lr 0.001 (paper: the protocol's)")])
def test_each_difference_from_the_paper_is_said(template, changed, says):
    params = {"criterion": "first-order"} if template == "prune" else {"gate": "global"}
    params |= PAPER[template] | {"lr": 0.0, "task": "agreement", "something": 3}
    assert differences_from_paper(params | changed) == [says]
    assert paper_line(params | changed).endswith(f" in {says}.")


@pytest.mark.parametrize("name", ["s3pet-table-2", "s3pet-figure-2", "prune-table-1", "prune-table-2"])
def test_the_studies_of_the_papers_differ_in_nothing(name):
    for question in study(name).questions():
        assert differences_from_paper(question.params) == [], question.params


def test_tables_escape_what_they_show(tmp_path):
    assert "&lt;b&gt;" in value_table({"task": "<b>"}, "parameter")
    run = Run(tmp_path)
    run.save_result({"device": "cpu", "seconds": 1.5, "rows": [1], "versions": {"torch": "2.13.0"}})
    shown = machine_table(run)
    assert "2.13.0" in shown and "device" in shown and "rows" not in shown
