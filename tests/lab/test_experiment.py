"What the templates share: rows of a task, structures to compare with, tables of how a run was run."
import json
import signal
import threading
import time
from dataclasses import replace
from html import unescape

import psutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.experiment import (PAPERS, Seeds, about, ahead, best_random, brought, budget_for, budget_text,
                                     compared_with, config_for, differences_from_paper, draw_seed, file_labels,
                                     machine_table, mark_equal, paper_line, pass_seconds, recipe_for, row_of,
                                     rows_seen, scoring, searched_on, setup_for, sizes_table, task_for,
                                     trainings_for, value_table)
from s3pet_nb.lab.page import report
from s3pet_nb.lab.run import RUN_MARK, RunFailed, execute
from s3pet_nb.lab.share import read
from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.lab.study import parameters, study
from s3pet_nb.data.setup import Setup
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.probe import probe
from s3pet_nb.learn.protocol import PROTOCOLS, RECIPES
from s3pet_nb.learn.train import BASELINES, TrainConfig, random_structure, retrain
from s3pet_nb.model.backbone import blueprint, load_backbone
from s3pet_nb.model.peft import to_peft
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
    assert "quick (--quick) takes about a quarter" in ahead(seconds, "standard")
    assert "standard and quick (--quick) are shorter" in ahead(seconds, "s3pet")
    assert ahead(seconds, "") == ahead(seconds, "quick")


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
        "lr", "evaluate_every", "n_train", "n_eval")


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
    ("prune", {"budget": 0.0}, "budget 5 % of the space (paper: 7.04e-05 of the backbone)"),
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


# --- what says nothing

def test_an_untrained_model_learned_nothing_and_its_row_says_so(setup):
    structure = random_structure(make_space(setup.model, "bias"), 500, 0)
    trained = retrain(setup.model, structure, setup.train, setup.validation, callbacks=(),
                      config=TrainConfig(steps=1, lr=1e-9, evaluate_every=1))
    row = row_of("random-1", trained, setup)
    assert row["learned_nothing"] in ("one class", "no better than one class") and list(row)[-1] == "learned_nothing"


@pytest.mark.parametrize(("tests", "reasons"), [
    ([0.5, 0.5, 0.5], ["all scores are equal"] * 3), ([0.5, 0.5, 0.6], [None] * 3), ([0.5], [None])])
def test_a_comparison_of_equal_scores_is_marked(tests, reasons):
    rows = [{"label": str(k), "test": test, "learned_nothing": None} for k, test in enumerate(tests)]
    assert [row["learned_nothing"] for row in mark_equal(rows)] == reasons
    assert [row["learned_nothing"] for row in rows] == [None] * len(tests), "what is given stays as it was"


def test_scores_are_equal_within_a_task_and_a_reason_of_its_own_stays():
    rows = [{"task": task, "test": test, "learned_nothing": why}
            for task, test, why in (("a", 0.5, "one class"), ("a", 0.5, None), ("a", 0.5, None), ("b", 0.5, None), ("b", 0.6, None),
                                    ("c", 0.7, None), ("c", 0.7, None))]
    assert [row["learned_nothing"] for row in mark_equal(rows)] == [
        "one class", "all scores are equal", "all scores are equal", None, None, None, None]


# --- what is drawn, and the best of it

def test_draws_differ_by_task_seed_and_number_and_are_the_same_everywhere():
    seeds = {draw_seed(task, seed, number) for task in ("a", "b") for seed in range(5) for number in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2 ** 32 for seed in seeds)
    assert draw_seed("agreement", 0, 1) == 69506650


def drawn(*scores):
    return [{"label": f"random-{k}", "validation": score, "test": 0.1 * k, "seconds": 2.0}
            for k, score in enumerate(scores, start=1)]


def test_the_best_of_k_is_chosen_by_validation_among_the_first_k():
    rows = [{"label": "searched", "validation": 0.99, "test": 0.9, "seconds": 1.0}, *drawn(0.5, 0.7, 0.9)]
    (best,) = best_random(rows, 2)
    assert (best["label"], best["test"], best["best_of"], best["seconds"]) == ("best-random", 0.2, 2, 4.0)
    assert best_random(rows, 9)[0]["best_of"] == 3
    assert best_random(rows, 1) == [] == best_random(rows[:2], 5)


@pytest.mark.parametrize(("passes", "steps", "count"), [(320, 300, 1), (450.5, 300, 2), (600, 300, 2), (4, 100, 1)])
def test_trainings_for_the_passes_of_a_search(passes, steps, count):
    assert trainings_for(passes, steps) == count


# --- seeds

def test_a_seed_that_is_left_out_is_that_of_the_run():
    assert Seeds.of(4) == Seeds(4, 4, 4, 4) and Seeds.of(4, init=0, order=9) == Seeds(4, 0, 4, 9)


def test_a_seed_of_0_is_not_left_out():
    own = setup_for("agreement", "minilm", RULES, "cpu", n_train=32, n_eval=16, **Seeds.of(3, order=0).of_setup())
    same = setup_for("agreement", "minilm", RULES, "cpu", n_train=32, n_eval=16, seed=3)
    assert own.order_seed == 0 and own.splits.train["sentence"] == same.splits.train["sentence"]
    assert not next(iter(own.train))["input_ids"].equal(next(iter(same.train))["input_ids"])
    assert next(iter(own.delta))["input_ids"].equal(next(iter(same.delta))["input_ids"])


# --- structures from elsewhere

@pytest.fixture
def own_task(tmp_path):
    "A file of 300 different rows, of which each seed makes other splits."
    path = tmp_path / "own.csv"
    pd.DataFrame({"text": [f"row {i}" for i in range(300)], "label": ["ab"[i % 2] for i in range(300)]}).to_csv(
        path, index=False)
    return str(path)


def found_on(folder, model, task, seed, **params):
    "A structure file as a search with this seed leaves it, with its parameters beside it if there are any."
    folder.mkdir()
    drawn = replace(random_structure(make_space(model, "bias"), 500, 0), task="own", seed=seed)
    drawn.save(folder / "structure.json")
    if params:
        write_json(folder / "params.json", {"task": task, "seed": seed, **params})
    return str(folder / "structure.json")


def shared(one, other):
    return len(set(one["text"]) & set(other["text"]))


def test_test_rows_that_a_search_has_seen_are_counted(own_task, model, tmp_path):
    setup = setup_for(own_task, "minilm", RULES, "cpu", seed=0)
    file = found_on(tmp_path / "found", model, own_task, 1, protocol="s3pet")
    theirs = task_for(own_task, RULES).load(None, 1, RULES.split_rule("own"))
    (line,) = brought({"own-random-1": file}, setup, RULES)
    test = setup.splits.test
    assert line == {"label": "own-random-1", "on": "own", "task": "own", "seed": 1, "test_rows": len(test),
                    "train": shared(test, theirs.train), "validation": shared(test, theirs.validation)}
    assert line["validation"] > 0 and line["train"] > 0


def test_the_same_split_shares_no_row(own_task, model, tmp_path):
    setup = setup_for(own_task, "minilm", RULES, "cpu", seed=3)
    file = found_on(tmp_path / "found", model, own_task, 3, protocol="s3pet")
    (line,) = brought({"x": file}, setup, RULES)
    assert (line["train"], line["validation"]) == (0, 0)


def test_the_split_is_made_again_from_the_parameters_beside_the_structure(own_task, model, tmp_path):
    file = found_on(tmp_path / "found", model, own_task, 9, split_seed=2, n_eval=5, n_train=20)
    (_, splits), expected = searched_on(file, RULES), task_for(own_task, RULES).load(None, 2, RULES.split_rule("own"))
    assert splits.sizes["validation"] == 5 and splits.sizes["train"] == 20
    assert splits.validation["text"] == expected.validation["text"][:5]


def test_a_task_that_cannot_be_read_is_unknown_and_ends_nothing(setup, model, tmp_path):
    file = found_on(tmp_path / "found", model, "", 1)
    (line,) = brought({"x": file}, setup, RULES)
    assert "own" in line["unknown"] and "validation" not in line


def test_rows_of_another_task_are_found_by_what_they_say(own_task, tmp_path):
    "The same sentences under another name of the file and of its column."
    other = tmp_path / "other.csv"
    pd.read_csv(own_task).rename(columns={"text": "line"}).to_csv(other, index=False)
    setup = setup_for(own_task, "minilm", RULES, "cpu", seed=0)
    task = task_for(str(other), RULES)
    theirs = task.load(None, 0, RULES.split_rule("other"))
    seen = rows_seen(task, theirs, setup)
    assert seen["validation"] == len(set(setup.splits.test["text"]) & set(theirs.validation["line"]))
    assert rows_seen(task, task.load(None, 1, RULES.split_rule("other")), setup)["validation"] > 0


def test_sentences_of_agreement_that_another_seed_has_seen_are_counted_whatever_their_squares_are_called():
    setup, other = (Setup.of("agreement", seed=seed) for seed in (0, 1))
    seen = rows_seen(other.task, other.whole, setup)
    splits, train = dict(setup.splits.items()), set(other.whole.train["sentence"])
    tests = [sentence for name in ("test", "test_unseen") for sentence in splits[name]["sentence"]]
    assert seen["train"] == sum(sentence in train for sentence in tests) > 0


def test_files_are_labelled_as_their_trainings_are(model, tmp_path):
    file = found_on(tmp_path / "found", model, "", 1)
    labels = file_labels([file, file])
    assert list(labels) == ["own-random-1", "own-random-2"] == list(compared_with(model, 500, [], False, [file, file], 0))


# --- the templates, whole

SHORT = {"n_train": 32, "n_eval": 32, "retrain_steps": 2, "evaluate_every": 2, "seed": 1, "baselines": []}


def rows_of(run):
    return [(row["label"], row["n_params"], row["validation"], row["test"]) for row in run.result["rows"]]


@pytest.mark.parametrize(("template", "steps"), [
    ("search", {"search_steps": 3}), ("prune", {"prune_steps": 6}),
    ("probe", {"probe_score": "gain", "probe_batches": 6})])
def test_a_template_trains_the_controls_and_says_what_it_found(template, steps, model, tmp_path):
    asked = SHORT | steps | {"equal_compute": True, "n_same_kinds": 1, "upper_first": True,
                             "structures": [found_on(tmp_path / "found", model, "agreement", 0, protocol="s3pet")]}
    run = execute(template, asked, tmp_path, template)
    paid = run.result[template]["trainings"]
    labels = [row["label"] for row in run.result["rows"]]
    assert paid > 1 and labels == ["searched", *(f"random-{k}" for k in range(1, paid + 1)), "same-kinds-1",
                                   "upper-layers", "own-random-1", "best-random"]
    drawn = [row for row in run.result["rows"] if row["label"].startswith("random")]
    best = run.result["rows"][-1]
    assert best["best_of"] == paid and best["validation"] == max(row["validation"] for row in drawn)
    assert all("learned_nothing" in row for row in run.result["rows"])
    (line,) = run.result["brought"]
    assert line["label"] == "own-random-1" and line["test_rows"] == 64 and "validation" in line


def test_seeds_that_are_left_out_are_the_runs_own(tmp_path):
    asked = SHORT | {"search_steps": 2, "n_random": 1}
    seeds = dict.fromkeys(("split_seed", "init_seed", "search_seed", "order_seed"), 1)
    left_out, given = (execute("search", asked | more, tmp_path, "search") for more in ({}, seeds))
    assert rows_of(left_out) == rows_of(given) and left_out.id != given.id


# --- a probe

PROBE = SHORT | {"probe_score": "gain_after", "probe_steps": 3, "probe_batches": 4, "select_by": "exact",
                 "n_random": 1, "baselines": ["bitfit"]}
CLOCK = "seconds", "memory_mb", "phase_memory_mb"  # what two runs of one question do not share


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    "A run of the template `probe`, on one thread, as this process is: more would add up in another order."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return execute("probe", PROBE, tmp_path_factory.mktemp("reports"), "probe")


def test_a_probe_by_its_template_is_that_of_the_library(probed):
    quick = PROTOCOLS["quick"]
    setup = setup_for("agreement", "minilm", quick, "cpu", 8, 32, seed=1, n_train=32, n_eval=32)
    space = make_space(setup.model, "mix")
    config = config_for(setup, quick, space.n_params / space.n_backbone, 3, evaluate_every=2, dropout=False, seed=1)
    result = probe(setup.model, space, setup.train, budget=2e-4, score="gain_after", batches=4, config=config,
                   callbacks=())
    frame = pd.read_csv(probed.folder / "scores.csv")
    assert frame.score.tolist() == result.score.tolist()
    assert frame.selected.tolist() == result.structure(by="exact").mask(space).tolist()
    kept = pd.DataFrame(probed.result["kept"])
    assert kept.score.tolist() == result.score.tolist()
    assert kept.n.tolist() == frame.n.where(frame.selected, 0).tolist()
    assert kept.n.sum() == probed.result["rows"][0]["n_params"] <= probed.result["budget"]


def test_a_probe_says_what_it_cost(probed):
    said = probed.result["probe"]
    expected = {"steps": 3, "batches": 4, "passes": 7, "rows": 56, "trainings": 4}
    assert said["seconds"] > 0 and expected.items() <= said.items()
    logged = [record for record in probed.records() if record["event"] == "step"]
    assert sum(record["passes"] for record in logged if record["phase"] in ("probe-train", "probe")) == 7
    assert [row["label"] for row in probed.result["rows"]] == ["searched", "random-1", "bitfit"]
    assert probed.result["rows"][0]["structure"] == probed.structure["method"] == "probe-gain_after"


def test_the_report_of_a_probe_is_like_that_of_a_search(probed):
    body = unescape(report(probed).read_text())
    for text in ("agreement on minilm", "Score of a module", "gain_after", "by score, the best sum",
                 "7 passes over 56 rows in ", "3.5 times the compute of a training", "passes pay for 4 trainings",
                 "Score gain_after at step 4, ranked", "Scores of the re-trained structures",
                 "s3pet probe --task agreement", "--score gain_after", "training of the open model",
                 "looks, nothing moves"):
        assert text in body, text
    assert body.count("Plotly.newPlot(") == 5 and 'class="failed"' not in body


def test_what_a_probe_found_can_be_exported(probed, tmp_path):
    tuned = read(probed.folder)
    assert tuned.structure.method == "probe-gain_after" and len(tuned.structure) == probed.result["rows"][0]["modules"]
    model, _ = load_backbone("minilm", tuned.head, tuned.n_labels)
    to_peft(model, tuned.structure, tmp_path / "peft", tuned.tensors, tuned.seed)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"]


def kill_in(phase, root):
    "Kill the kernel of the run under a root once this phase has taken two steps."
    def steps():
        logs = root.glob("probe/*/log.jsonl")
        return sum(f'"phase": "{phase}"' in line and '"event": "step"' in line
                   for log in logs for line in log.read_text().splitlines())

    def watch():
        while steps() < 2:
            time.sleep(0.01)
        for process in psutil.process_iter():
            try:
                if process.environ().get(RUN_MARK, "").startswith(str(root.resolve())):
                    process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_probe_that_was_killed_ends_with_the_same_bits(tmp_path):
    asked = PROBE | {"probe_steps": 12, "probe_batches": 12, "n_random": 0, "checkpoint_every": 1}
    whole = execute("probe", asked, tmp_path / "whole", "probe")
    for phase in "probe-train", "probe":
        killer = kill_in(phase, tmp_path / "killed")
        with pytest.raises(RunFailed, match="the kernel died"):
            execute("probe", asked, tmp_path / "killed", "probe")
        killer.join(10)
    run = execute("probe", asked, tmp_path / "killed", "probe")
    assert run.id == whole.id and rows_of(run) == rows_of(whole)
    for name in "scores.csv", "structure.json":
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    ours, theirs = (load_file(each.folder / "delta.safetensors") for each in (run, whole))
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [record | dict.fromkeys(CLOCK) for record in run.records()] == [
        record | dict.fromkeys(CLOCK) for record in whole.records()]


def test_a_probe_of_a_seed_of_its_own_leaves_the_trainings_as_they_were(probed, tmp_path):
    "Another search seed: other new weights while probing, so other scores; splits and trainings are the same."
    other = execute("probe", PROBE | {"search_seed": 5}, tmp_path, "probe")
    assert other.result["kept"] != probed.result["kept"] and rows_of(other)[1] != rows_of(probed)[1]
    assert rows_of(other)[2] == rows_of(probed)[2], "bitfit"
