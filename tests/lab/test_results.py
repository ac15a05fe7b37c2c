"The statistics of a study, by hand and against scipy; and its tables, whatever names are in them."

import math
import random
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from written import EVIL, faulty_study, fill, make_study

from s3pet_nb.lab.results import (Outcome, averages, best_of, clustered, cost, difference_sentences,
                                  difference_table, differences, gates_frame, heat_frames, holm, learned,
                                  nothing_sentences, progress_text, rank_sentence, ranks, run_scores, runs_frame,
                                  save_tables, scores, seed_sentence, share_table, summary, sweep_frame, transfer,
                                  variance_parts, variance_shares, wide)
from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.lab.study import Study, checked

PARAMETERS = """\
run_folder = ""
task = "glue/cola"
budget = 1e-4
method = "greedy"
baselines = ["bitfit"]
width: int = None
seed = 0"""
ATTACK = "<img src=x onerror=alert(1)>"
ODD = "50%_x & y|z"


@pytest.fixture
def make(tmp_path):
    "Makes studies of a small template."
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})],
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    nbformat.write(notebook, tmp_path / "measure.ipynb")
    return lambda **content: checked("made", {"template": str(tmp_path / "measure.ipynb")} | content)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "reports"


def put(study, question, root, rows, **more):
    "The run folder of one question, with its result; `rows` are test scores by label, or whole rows."
    run = root / (study.folder or study.name) / question.id
    run.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, dict):
        rows = [{"label": label, "n_params": 2_000, "validation": test, "test": test, "seconds": 30.0}
                for label, test in rows.items()]
    Run(run).save_result({"task": question.params["task"], "metric": "accuracy", "budget": 2_000,
                          "n_backbone": 10_000_000, "rows": rows} | more)


def answer(study, root, tests):
    "All runs of a study in order; `tests` has, for each, its scores by label."
    for question, rows in zip(study.questions(), tests, strict=True):
        put(study, question, root, rows)
    return scores(study, root)


def searched(values):
    return [{"searched": value} for value in values]


def test_scores_that_are_equal_are_ties_whatever_averaging_leaves(make, root):
    score = 279 / 408
    tests = [{"searched": score, "random-1": score, "random-2": score, "random-3": score, "bitfit": score}] * 12
    study = make(seeds=list(range(12)))
    frame = answer(study, root, tests)
    assert np.mean([score] * 3) != score, "else there is nothing to be mended"
    assert (line := differences(study, frame).iloc[0]).ahead == 0 and line["mean"] == 0
    found = ranks(frame)
    assert found["rank"].tolist() == [2.0, 2.0, 2.0] and found.attrs["p"] is None


# ---------------------------------------------------------------------------- what says nothing


def row(label, test, why=None):
    return {"label": label, "n_params": 2_000, "validation": test, "test": test, "seconds": 30.0,
            "learned_nothing": why}


def half_silent(make, root):
    "Two seeds; in the second the search and one of two random structures learned nothing."
    study = make(seeds=[0, 1])
    return study, answer(study, root, [
        [row("searched", 0.8), row("random-1", 0.7), row("random-2", 0.6)],
        [row("searched", 0.5, "one class"), row("random-1", 0.5, "no better than one class"),
         row("random-2", 0.6)]])


def test_a_row_one_of_whose_trainings_learned_nothing_is_left_out_whole(make, root):
    "What is left of it would be the lucky ones: 0.8 for the search, where the other seed is at chance."
    study, frame = half_silent(make, root)
    assert learned(frame).empty and summary(frame).empty and differences(study, frame).empty
    beside = answer(study, root / "beside", [
        [row("searched", 0.8), row("random-1", 0.7), row("bitfit", 0.6)],
        [row("searched", 0.9), row("random-1", 0.7), row("bitfit", 0.5, "one class")]])
    assert summary(beside)[["row", "seeds", "mean"]].to_numpy().tolist() == [
        ["searched", 2, pytest.approx(0.85)], ["random", 2, pytest.approx(0.7)]]
    table = wide(study, beside)
    assert table[["row", "glue/cola"]].to_numpy().tolist() == [
        ["searched", "85.0 ± 7.1"], ["random", "70.0 ± 0.0"], ["bitfit", "1 of 2 learned nothing"]]


def test_a_sentence_says_how_many_learned_nothing(make, root):
    study, frame = half_silent(make, root)
    (sentence,) = nothing_sentences(frame)
    assert sentence.startswith("2 of 6 trainings learned nothing: ") and "1 of 2 of searched (one class)" in sentence
    assert "1 of 4 of random (no better than one class)" in sentence
    assert nothing_sentences(frame[:3]) == []


def test_a_result_of_before_counts_and_a_reason_that_is_no_text_does_not(make, root):
    study = make(seeds=[0, 1])
    frame = answer(study, root, [{"searched": 0.5}, [row("searched", 0.6, 3)]])
    assert frame.test.tolist() == [0.5] and nothing_sentences(frame) == []
    assert runs_frame(study, root).state.tolist() == ["done", "failed"]


def test_where_no_training_learned_the_papers_table_says_so(make, root):
    study = make(grid={"task": ["x", "y"]})
    frame = answer(study, root, [[row("searched", 0.8), row("bitfit", 0.5, "one class")],
                                 [row("searched", 0.5, "one class"), row("bitfit", 0.5, "one class")]])
    table = wide(study, frame)
    assert table[["row", "x", "y"]].to_numpy().tolist() == [
        ["searched", "80.0", "learned nothing"], ["bitfit", "learned nothing", "learned nothing"]]
    assert best_of(table.y, [True, True]) == [False, False] and best_of(table.x, [True, True]) == [True, False]


# ---------------------------------------------------------------------------- scores


def test_scores_have_one_row_per_trained_structure(make, root):
    study = make(seeds=[0, 1])
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.4, "random-2": 0.3}, {"searched": 0.6}])
    assert list(frame) == ["method", "label", "row", "seed", "structure", "source", "task", "metric", "run_id",
                           "budget", "n_params", "ratio", "validation", "test", "seconds", "learned_nothing"]
    assert frame.label.tolist() == frame.row.tolist() == ["searched", "random", "random", "searched"]
    assert frame.seed.tolist() == [0, 0, 0, 1] and frame.test.tolist() == [0.5, 0.4, 0.3, 0.6]
    assert (frame.ratio == 2e-4).all() and (frame.method == "").all() and (frame.source == "glue/cola").all()
    assert frame.attrs == {"study": "made", "done": 2, "asked": 2}
    assert frame.run_id.unique().tolist() == [question.id for question in study.questions()]


def test_a_structure_that_is_drawn_or_found_anew_for_each_seed_has_a_name_of_its_own(make, root):
    frame = answer(make(seeds=[0, 1]), root, [{"searched": 0.5, "bitfit-cut": 0.4, "random-1": 0.4, "bitfit": 0.3}] * 2)
    assert frame.structure.tolist() == [
        name for seed in (0, 1) for name in (f"searched of seed {seed}", f"bitfit-cut of seed {seed}",
                                             f"random-1 of seed {seed}", "bitfit")]


def test_only_finished_runs_of_this_study_count(make, root):
    study = make(seeds=[0, 1, 2])
    first, second, third = study.questions()
    put(study, first, root, {"searched": 0.5})
    (root / "made" / second.id).mkdir()
    put(study, third, root, {"searched": 0.7})
    (root / "made" / third.id / "result.json").write_text('{"rows": [{"label"')
    stranger = root / "made" / "0123456789"
    stranger.mkdir()
    Run(stranger).save_result({"task": "glue/cola", "rows": [{"label": "searched", "test": 0.99}]})
    frame = scores(study, root)
    assert frame.test.tolist() == [0.5] and frame.attrs["done"] == 1 and frame.attrs["asked"] == 3


def test_a_study_reads_the_runs_of_the_folder_it_names(make, root):
    study = make(folder="elsewhere")
    put(study, study.questions()[0], root, {"searched": 0.5})
    assert (root / "elsewhere").is_dir() and len(scores(study, root)) == 1


def test_a_result_that_says_little_is_read_all_the_same(make, root):
    study = make(seeds=[0, 1, 2])
    first, second, third = study.questions()
    for question, result in ((first, {"rows": [{"label": "searched", "test": 0.5}]}), (second, {}),
                             (third, {"task": "t", "rows": None})):
        folder = root / "made" / question.id
        folder.mkdir(parents=True)
        Run(folder).save_result(result)
    frame = scores(study, root)
    assert frame.task.tolist() == ["glue/cola"] and frame.ratio.isna().all() and frame.attrs["done"] == 3
    assert wide(study, frame).to_numpy().tolist() == [["searched", "–", "50.0"]]
    assert cost(study, root).empty


def test_a_failed_score_is_missing_and_not_zero(make, root):
    frame = answer(make(seeds=[0, 1]), root, searched([None, 0.6]))
    assert summary(frame)[["seeds", "mean"]].to_numpy().tolist() == [[1, 0.6]]


@pytest.mark.parametrize("methods, rows", [
    ({}, ["searched", "random"]),
    ({"ours": {}}, ["ours", "random"]),
    ({"ours": {}, "theirs": {"params": {"budget": 0.5}}},
     ["ours", "random (ours)", "theirs", "random (theirs)"]),
    ({"random": {}}, ["random", "random (random)"]),
    ({"searched": {}}, ["searched", "random"]),
])
def test_a_row_is_a_method_or_a_label_and_never_two_things(make, root, methods, rows):
    study = make(methods=methods)
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.4}] * len(study))
    assert frame.row.tolist() == rows


def test_a_label_of_one_method_only_keeps_its_name(make, root):
    study = make(methods={"ours": {}, "theirs": {"params": {"budget": 0.5}}})
    frame = answer(study, root, [{"searched": 0.5, "bitfit": 0.4}, {"searched": 0.4}])
    assert frame.row.tolist() == ["ours", "bitfit", "theirs"]


def test_methods_that_ask_the_same_share_their_run(make, root):
    study = make(methods={"one": {}, "same": {}})
    frame = answer(study, root, searched([0.5, 0.5]))
    assert frame.row.tolist() == ["one", "same"] and frame.attrs["asked"] == frame.attrs["done"] == 1


def test_what_the_grid_varies_is_a_column_as_it_was_asked_for(make, root):
    study = make(grid={"task": ["glue/cola"], "budget": [1e-4, 2e-4], "method": ["greedy", "exact"]},
                 methods={"a": {}, "b": {"grid": {"baselines": [["bitfit", "lora"]], "budget": [0.5]}}})
    frame = answer(study, root, searched([0.5] * 6))
    assert list(frame)[2:9] == ["row", "budget", "params.method", "baselines", "seed", "structure", "source"]
    assert frame.budget.tolist() == [1e-4, 1e-4, 2e-4, 2e-4, 0.5, 0.5]
    assert frame["params.method"].tolist() == ["greedy", "exact"] * 3
    assert frame.baselines.tolist() == ["bitfit"] * 4 + ["bitfit, lora"] * 2


def test_a_seed_on_the_grid_is_a_seed(make, root):
    frame = answer(make(grid={"seed": [0, 1, 2]}), root, searched([0.5, 0.6, 0.7]))
    assert summary(frame).seeds.tolist() == [3] and "seed" not in summary(frame)


def test_a_parameter_that_is_none_groups_like_any_value(make, root):
    frame = answer(make(grid={"width": [None, 8]}, seeds=[0, 1]), root,
                   [{"searched": 0.5 + k / 10, "random-1": 0.4} for k in range(4)])
    assert summary(frame).query("row == 'searched'").seeds.tolist() == [2, 2]
    assert differences(make(grid={"width": [None, 8]}), frame).pairs.tolist() == [2, 2]
    assert ranks(frame).blocks.tolist() == [4, 4]
    assert wide(make(), frame).width.tolist() == ["–", "–", "8", "8"]


def test_five_hundred_runs_are_read_in_less_than_two_seconds(make, root, monkeypatch):
    study = make(grid={"task": [f"task-{k}" for k in range(50)]}, seeds=list(range(10)))
    questions = study.questions()
    for question in questions:
        put(study, question, root, {"searched": 0.5, "random-1": 0.4, "random-2": 0.3, "bitfit": 0.2})
    monkeypatch.setattr(Study, "questions", lambda self: questions)
    started = time.process_time()
    frame = scores(study, root)
    table = wide(study, frame)
    taken = time.process_time() - started
    assert len(frame) == 2_000 and table.shape == (3, 53) and taken < 2


# ---------------------------------------------------------------------------- statistics over seeds


def test_an_interval_by_hand(make, root):
    "0.5, 0.6, 0.8: mean 19/30, variance 7/300, half width 4.3027 sd / sqrt 3."
    frame = answer(make(seeds=[0, 1, 2]), root, searched([0.5, 0.6, 0.8]))
    line = summary(frame).iloc[0]
    sd = math.sqrt(7 / 300)
    assert line.seeds == 3 and line["mean"] == pytest.approx(19 / 30) and line["median"] == 0.6
    assert line.sd == pytest.approx(sd)
    assert line.low == pytest.approx(19 / 30 - 4.302653 * sd / math.sqrt(3), abs=1e-6)
    assert line.high == pytest.approx(19 / 30 + 4.302653 * sd / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.5, 0.6, 0.8], [0.1, 0.4, 0.2, 0.9, 0.5]])
def test_intervals_are_those_of_scipy(make, root, values):
    line = summary(answer(make(seeds=list(range(len(values)))), root, searched(values))).iloc[0]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (line.low, line.high) == pytest.approx((low, high))


@pytest.mark.filterwarnings("error")
def test_one_seed_has_no_spread_and_equal_seeds_have_none(make, root):
    line = summary(answer(make(seeds=[0]), root, searched([0.5]))).iloc[0]
    assert line["mean"] == 0.5 and np.isnan([line.sd, line.low, line.high]).all()
    line = summary(answer(make(seeds=[0, 1, 2]), root, searched([0.5] * 3))).iloc[0]
    assert [line.sd, line.low, line.high] == [0, 0.5, 0.5]


def test_several_of_a_kind_in_a_run_are_one_value(make, root):
    frame = answer(make(seeds=[0, 1]), root, [{"random-1": 0.1, "random-2": 0.3}, {"random-1": 0.4}])
    line = summary(frame).iloc[0]
    assert line.seeds == 2 and line["mean"] == pytest.approx(0.3)
    assert line.sd == pytest.approx(math.sqrt(0.02))


# ---------------------------------------------------------------------------- differences


def test_a_paired_interval_by_hand(make, root):
    "Gains 0.1, 0.2, 0.6 have mean 0.3 and variance 0.07: half width 4.3027 sqrt(0.07 / 3), t = 1.964."
    study = make(seeds=[0, 1, 2])
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.3, "random-2": 0.5},
                                 {"searched": 0.7, "random-1": 0.5}, {"searched": 0.8, "random-1": 0.2}])
    line, = differences(study, frame).to_dict("records")
    half = 4.302653 * math.sqrt(0.07 / 3)
    assert (line["row"], line["against"], line["task"]) == ("searched", "random", "glue/cola")
    assert (line["pairs"], line["ahead"]) == (3, 3) and line["mean"] == pytest.approx(0.3)
    assert line["low"] == pytest.approx(0.3 - half, abs=1e-6)
    assert line["high"] == pytest.approx(0.3 + half, abs=1e-6)
    assert line["p"] == pytest.approx(2 * stats.t.sf(0.3 / math.sqrt(0.07 / 3), 2))


def test_a_label_is_taken_from_the_same_run(make, root):
    study = make(seeds=[0, 1], methods={"a": {}, "b": {"params": {"budget": 0.5}}})
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.4}, {"searched": 0.9, "random-1": 0.2},
                                 {"searched": 0.6, "random-1": 0.4}, {"searched": 0.9}])
    found = differences(study, frame).set_index("row")
    assert found["mean"].to_dict() == pytest.approx({"a": 0.15, "b": 0.7})
    assert found.pairs.to_dict() == {"a": 2, "b": 1}


def test_a_method_is_paired_by_task_grid_point_and_seed(make, root):
    study = make(seeds=[0, 1], grid={"task": ["x", "y"], "budget": [0.1, 0.2]}, against="b",
                 methods={"a": {}, "b": {"params": {"method": "exact"}}})
    value, rng = {}, random.Random(0)
    for question in study.questions():
        asked, test = question.params, rng.random()
        value[question.method, asked["task"], asked["budget"], asked["seed"]] = test
        put(study, question, root, {"searched": test, "random-1": 0.4})
    found = differences(study, scores(study, root))
    assert set(found.row) == {"a"} and len(found) == 2 * 3
    for line in found[found.task == "all"].itertuples():
        assert line.pairs == 4 and line.tasks == 2 and line.unit == "sd" and math.isnan(line.low)
    for line in found[found.task != "all"].itertuples():
        keys = [(line.task, line.budget, seed) for seed in (0, 1)]
        ours, theirs = ([value[method, *key] for key in keys] for method in ("a", "b"))
        test = stats.ttest_rel(ours, theirs)
        assert line.pairs == len(keys) and line.p == pytest.approx(test.pvalue)
        assert (line.low, line.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert line.ahead == sum(a > b for a, b in zip(ours, theirs))


def test_a_method_without_the_grid_stands_beside_every_point(make, root):
    study = make(seeds=[0, 1], grid={"budget": [0.1, 0.2]}, against="whole",
                 methods={"ours": {}, "whole": {"grid": {"budget": None}, "params": {"budget": 1.0}}})
    frame = answer(study, root, searched([0.5, 0.6, 0.3, 0.7, 0.8, 0.5]))
    found = differences(study, frame)
    assert found.budget.tolist() == [0.1, 0.2] and found["mean"].tolist() == pytest.approx([0.2, 0.3])


def test_missing_runs_leave_the_pairs_that_are_there(make, root):
    study = make(seeds=[0, 1, 2], against="b", methods={"a": {}, "b": {"params": {"budget": 0.5}}})
    for k, question in enumerate(study.questions()):
        if k not in (0, 5):
            put(study, question, root, {"searched": k / 10})
    line, = differences(study, scores(study, root)).to_dict("records")
    assert line["pairs"] == 1 and line["mean"] == pytest.approx(-0.1) and line["ahead"] == 0
    assert np.isnan([line["low"], line["high"], line["p"]]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_equal_differences_have_no_p(make, root, gain):
    "A t statistic of no variance is infinite or none; a p of 0 would claim what two seeds cannot show."
    study = make(seeds=[0, 1])
    frame = answer(study, root, [{"searched": x + gain, "random-1": x} for x in (0.5, 0.7)])
    line, = differences(study, frame).to_dict("records")
    assert line["mean"] == pytest.approx(gain) and math.isnan(line["p"])


def test_a_label_of_one_method_is_paired_with_the_others_too(make, root):
    study = make(seeds=[0, 1], against="bitfit", methods={"a": {}, "b": {"params": {"budget": 0.5}}})
    frame = answer(study, root, [{"searched": 0.5, "bitfit": 0.4}, {"searched": 0.7},
                                 {"searched": 0.6, "bitfit": 0.3}, {"searched": 0.4}])
    found = differences(study, frame).set_index("row")
    assert found["mean"].to_dict() == pytest.approx({"a": 0.2, "b": 0.2})
    assert found.pairs.to_dict() == {"a": 2, "b": 2} and found.ahead.to_dict() == {"a": 2, "b": 2}


def test_a_method_that_has_not_run_is_not_mistaken_for_a_label(make, root):
    study = make(seeds=[0, 1], methods={"a": {}, "random": {"params": {"budget": 0.5}}})
    for question in study.questions()[::2]:
        put(study, question, root, {"searched": 0.5, "random-1": 0.4})
    assert differences(study, scores(study, root)).empty


def test_against_something_that_no_run_has_gives_no_line(make, root):
    study = make(against="bitfit")
    assert differences(study, answer(study, root, [{"searched": 0.5, "random-1": 0.4}])).empty


def test_a_single_task_is_not_said_twice(make, root):
    study = make(seeds=[0, 1])
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.4}] * 2)
    assert differences(study, frame).task.tolist() == ["glue/cola"]


# ---------------------------------------------------------------------------- several tasks, several methods


def test_gains_over_tasks_are_in_standard_deviations_of_each_task(make, root):
    "The gain is one sd of a task whatever its metric moves by; the mean is over tasks, not over pairs."
    study = make(seeds=[0, 1, 2], grid={"task": ["x", "y", "z"]})
    scale = {"x": 0.3, "y": 0.001, "z": 0.05}
    for question in study.questions():
        task, seed = question.params["task"], question.params["seed"]
        if task == "z" and seed == 2:
            continue
        put(study, question, root, {"searched": 0.5 + scale[task] * (1 + 0.1 * seed), "random-1": 0.5})
    found = differences(study, scores(study, root))
    whole = found[found.task == "all"].iloc[0]
    expected = []
    for task, seeds in (("x", 3), ("y", 3), ("z", 2)):
        gains = scale[task] * (1 + 0.1 * np.arange(seeds))
        expected.append(gains.mean() / np.concatenate([gains, np.zeros(seeds)]).std(ddof=1))
    assert whole["mean"] == pytest.approx(np.mean(expected)) and (whole.tasks, whole.pairs) == (3, 8)
    assert whole.low <= whole["mean"] <= whole.high
    sentence, = difference_sentences(found)
    assert "in 8 of 8 pairs of 3 tasks" in sentence and "sd of a task’s scores" in sentence and "points" not in sentence


def test_an_interval_over_tasks_knows_that_seeds_of_a_task_go_together():
    "Tasks differ in what a method gains there, on average nothing; pairs taken as independent claim too much."
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(60):
        clusters = [effect + 0.2 * rng.normal(size=5) for effect in rng.normal(size=10)]
        line, pairs = clustered(clusters), np.concatenate(clusters)
        covered += line["low"] <= 0 <= line["high"]
        naive += stats.ttest_1samp(pairs, 0).pvalue > 0.05
    assert covered >= 52 and naive < covered - 6, (covered, naive)


def test_the_interval_over_tasks_is_the_same_every_time_and_needs_three():
    clusters = [np.array([0.1, 0.3]), np.array([0.2]), np.array([0.5, 0.6, 0.7])]
    assert clustered(clusters) == clustered(clusters)
    assert clustered(clusters)["mean"] == pytest.approx((0.2 + 0.2 + 0.6) / 3)
    assert np.isnan([clustered(clusters[:2])[name] for name in ("low", "high", "p")]).all()
    six = [np.array([gain]) for gain in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    assert clustered(six)["p"] == pytest.approx(2 / 2 ** 6), "Wilcoxon's exact p of six gains of one sign"


def test_a_task_whose_scores_are_all_equal_has_no_size(make, root):
    study = make(seeds=[0, 1], grid={"task": ["x", "y"]})
    frame = answer(study, root, [{"searched": 0.5, "random-1": 0.5}, {"searched": 0.6, "random-1": 0.4}] * 2)
    whole = differences(study, frame).iloc[-1]
    assert (whole.task, whole.tasks, whole.equal, whole.pairs) == ("all", 1, 1, 2) and math.isfinite(whole["mean"])
    assert "tasks left out because all their scores are equal: 1." in difference_sentences(differences(study, frame))[0]


@pytest.mark.parametrize(("p", "corrected"), [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the worked example of Wikipedia's page
    ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02]), ([math.nan, 0.01, 0.02], [math.nan, 0.02, 0.02]), ([], [])])
def test_holm_by_hand(p, corrected):
    np.testing.assert_allclose(holm(p), corrected)


def test_methods_that_are_compared_with_one_are_corrected_together(make, root):
    study = make(seeds=[0, 1, 2, 3], against="c",
                 methods={name: {"params": {"budget": value}} for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))})
    rng = np.random.default_rng(3)
    frame = answer(study, root, searched([0.5 + 0.1 * (k % 3 == 0) + 0.02 * rng.normal() for k in range(12)]))
    found = differences(study, frame)
    assert found.holm.tolist() == holm(found.p).tolist() and (found.holm >= found.p).all()
    assert all("after Holm’s correction for 2 comparisons" in text for text in difference_sentences(found))


# ---------------------------------------------------------------------------- ranks


def test_ranks_share_ties_and_need_whole_blocks(make, root):
    study = make(seeds=[0, 1, 2])
    frame = answer(study, root, [{"searched": 0.5, "bitfit": 0.5, "lora": 0.1},
                                 {"searched": 0.9, "bitfit": 0.2, "lora": 0.3},
                                 {"searched": 0.1, "lora": 0.2}])
    found = ranks(frame)
    assert found.drop(columns=["low", "high"]).to_dict("list") == {
        "row": ["searched", "bitfit", "lora"], "rank": [1.25, 2.25, 2.5], "tasks": [1, 1, 1], "blocks": [2, 2, 2]}
    assert found[["low", "high"]].isna().all(axis=None)
    assert found.attrs["p"] is None


def test_ranks_and_friedman_are_those_of_scipy(make, root):
    study = make(seeds=list(range(12)))
    table = np.random.default_rng(0).integers(0, 5, (12, 4)) / 10
    frame = answer(study, root, [dict(zip(("searched", "a", "b", "c"), map(float, line))) for line in table])
    found = ranks(frame)
    expected = dict(zip(("searched", "a", "b", "c"), stats.rankdata(-table, axis=1).mean(axis=0)))
    assert found.set_index("row")["rank"].to_dict() == pytest.approx(expected)
    assert found["rank"].is_monotonic_increasing
    assert found.attrs["p"] == pytest.approx(stats.friedmanchisquare(*table.T).pvalue)


def test_seeds_of_a_task_are_one_witness_of_its_ranks(make, root):
    "Twelve tasks with three seeds each: ranks within the seeds, their mean within the task, blocks are tasks."
    tasks = [f"t{k}" for k in range(12)]
    study = make(seeds=[0, 1, 2], grid={"task": tasks})
    table = np.random.default_rng(1).random((3, 12, 3))
    frame = answer(study, root, [dict(zip(("searched", "a", "b"), map(float, line)))
                                 for seed in table for line in seed])
    by_task = stats.rankdata(-table, axis=2).mean(axis=0)
    found = ranks(frame)
    expected = dict(zip(("searched", "a", "b"), by_task.mean(axis=0)))
    assert found.set_index("row")["rank"].to_dict() == pytest.approx(expected)
    assert found.tasks.eq(12).all() and found.blocks.eq(36).all()
    assert found.attrs["p"] == pytest.approx(stats.friedmanchisquare(*by_task.T).pvalue)
    assert (found.low < found["rank"]).all() and (found["rank"] < found.high).all()


@pytest.mark.filterwarnings("error")
def test_rows_that_never_differ_have_equal_ranks_and_no_p(make, root):
    frame = answer(make(seeds=list(range(12))), root, [{"searched": 0.5, "a": 0.5, "b": 0.5}] * 12)
    assert ranks(frame)["rank"].tolist() == [2, 2, 2] and ranks(frame).attrs["p"] is None


def test_ranks_without_a_whole_block_are_missing(make, root):
    frame = answer(make(seeds=[0, 1]), root, [{"searched": 0.5}, {"bitfit": 0.5}])
    assert ranks(frame).blocks.tolist() == [0, 0] and ranks(frame)["rank"].isna().all()


# ---------------------------------------------------------------------------- whose noise it is


def crossed(draw, sizes, sds, rest):
    "A score for each combination of levels: an effect of each level of each factor, and noise."
    effects = [draw.normal(0, sd, size) for sd, size in zip(sds, sizes)]
    index = pd.MultiIndex.from_product([range(size) for size in sizes], names=["split_seed", "init_seed", "order_seed"])
    return pd.Series([sum(effect[k] for effect, k in zip(effects, at)) + draw.normal(0, rest) for at in index], index)


def test_shares_of_the_variance_are_those_of_a_simulated_truth():
    "Means over 200 simulated studies of 4 x 5 x 3 runs; the estimates are unbiased but where they are cut off at 0."
    draw, truth = np.random.default_rng(0), {"split_seed": 4.0, "init_seed": 2.0, "order_seed": 1.0, "rest": 0.5}
    sds = [truth[name] ** 0.5 for name in ("split_seed", "init_seed", "order_seed")]
    found = pd.DataFrame([variance_parts(crossed(draw, (4, 5, 3), sds, 0.5 ** 0.5)) for _ in range(200)]).mean()
    assert found.to_dict() == pytest.approx(truth, rel=0.25) and found.idxmax() == "split_seed"


def test_variance_parts_by_hand():
    "Two by two: squares 0.04 and 0.01 of the factors, 0.0025 of what they do together; one degree each."
    cells = pd.Series({(0, 0): 0.5, (0, 1): 0.65, (1, 0): 0.75, (1, 1): 0.8}).rename_axis(["split_seed", "init_seed"])
    parts = variance_parts(cells)
    assert parts == pytest.approx({"split_seed": (0.04 - 0.0025) / 2, "init_seed": (0.01 - 0.0025) / 2, "rest": 0.0025})


@pytest.mark.parametrize("lost", [1, 3])
def test_a_design_that_is_not_crossed_has_no_shares(lost):
    cells = crossed(np.random.default_rng(0), (2, 2, 2), (1, 1, 1), 1)
    assert variance_parts(cells.iloc[lost:]) == {}
    assert variance_parts(cells.xs(0, level="order_seed").xs(0, level="init_seed")) == {}, "one factor leaves no rest"


@pytest.fixture
def make_seeds(tmp_path):
    parameters = PARAMETERS + "\nsplit_seed = -1\ninit_seed = -1"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})],
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    nbformat.write(notebook, tmp_path / "seeds.ipynb")
    return lambda **content: checked("made", {"template": str(tmp_path / "seeds.ipynb")} | content)


def test_seeds_of_parts_are_repetitions_and_no_points_of_the_grid(make_seeds, root):
    study = make_seeds(grid={"split_seed": [-1, 5], "init_seed": [1, 2, 3]})
    frame = answer(study, root, [{"searched": 0.5 + 0.1 * k, "random-1": 0.4} for k in range(6)])
    assert frame[["seed", "split_seed", "init_seed"]].drop_duplicates().to_numpy().tolist() == [
        [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 5, 1], [0, 5, 2], [0, 5, 3]], "what is left out is the seed"
    assert summary(frame).seeds.tolist() == [6, 6] and len(wide(study, frame)) == 2
    assert differences(study, frame).pairs.tolist() == [6] and ranks(frame).blocks.tolist() == [6, 6]
    assert {"split_seed", "init_seed"} <= set(runs_frame(study, root))


def test_a_method_is_paired_by_every_seed(make_seeds, root):
    study = make_seeds(grid={"split_seed": [1, 2]}, against="b", methods={"a": {}, "b": {"params": {"budget": 0.5}}})
    frame = answer(study, root, searched([0.5, 0.9, 0.4, 0.6]))
    line, = differences(study, frame).to_dict("records")
    assert (line["pairs"], line["mean"]) == (2, pytest.approx(0.2))
    assert line["high"] - line["mean"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.1)


def test_shares_are_shown_in_per_cent_with_what_they_are(make_seeds, root):
    study = make_seeds(grid={"split_seed": [1, 2], "init_seed": [1, 2, 3]})
    frame = answer(study, root, searched([0.5, 0.5, 0.5, 0.7, 0.7, 0.7]))
    found = variance_shares(frame)
    assert share_table(found).iloc[0].to_dict() == {"row": "searched", "task": "glue/cola", "runs": 6, "sd": "14.1",
                                                    "split_seed": "100%", "init_seed": "0%", "rest": "0%"}
    assert seed_sentence(found).startswith("A crossed design of split_seed and init_seed")
    one = make_seeds(grid={"split_seed": [1, 2]})
    assert "at least two seeds" in seed_sentence(variance_shares(answer(one, root, searched([0.5, 0.6]))))


# ---------------------------------------------------------------------------- tables


def two_tasks(make, root, **content):
    study = make(seeds=[0, 1], grid={"task": ["x", "y"]}, **content)
    frame = answer(study, root, [{"searched": 0.5, "bitfit": 0.2}, {"searched": 0.7},
                                 {"searched": 0.6, "bitfit": 0.4}, {"searched": 0.7}])
    return study, frame


def test_the_wide_table_is_the_papers(make, root):
    study, frame = two_tasks(make, root)
    assert wide(study, frame).to_dict("records") == [
        {"row": "searched", "ratio, 1e-4": "2.00", "x": "55.0 ± 7.1", "y": "70.0 ± 0.0", "mean rank": "1.0"},
        {"row": "bitfit", "ratio, 1e-4": "2.00", "x": "30.0 ± 14.1", "y": "–", "mean rank": "–"}]


TABLE_2 = {  # S3PET-M with 1.39 of 10,000
    "glue/cola": 59.34, "glue/sst2": 95.84, "glue/mrpc": 92.13, "glue/qqp": 88.04, "glue/stsb": 91.58,
    "glue/mnli": 89.14, "glue/qnli": 94.12, "superglue/boolq": 84.92, "superglue/cb": 92.86,
    "superglue/copa": 70.50, "superglue/multirc": 76.38, "superglue/record": 86.10, "superglue/rte": 86.69,
    "superglue/wic": 71.63}


def test_the_averages_are_those_of_table_2(make, root):
    study = make(grid={"task": list(TABLE_2)})
    frame = answer(study, root, searched([score / 100 for score in TABLE_2.values()]))
    line = wide(study, frame).iloc[0]
    assert list(line.index[-4:]) == ["average of GLUE", "average of SuperGLUE",
                                     "average of SuperGLUE without COPA", "mean rank"]
    assert line.iloc[-4:-1].tolist() == ["87.2", "81.3", "83.1"]  # 87.17, 81.30, 83.10 in the paper


def test_an_average_is_there_where_its_tasks_are(make, root):
    tasks = ["glue/cola", "glue/rte", "superglue/copa", "superglue/rte", "superglue/wic"]
    study = make(grid={"task": tasks})
    frame = answer(study, root, [{"searched": 0.5, "bitfit": 0.4}, {"searched": 0.7, "bitfit": 0.4},
                                 {"searched": 0.1}, *[{"searched": 0.6, "bitfit": 0.3}] * 2])
    assert wide(study, frame).iloc[:, -4:-1].to_numpy().tolist() == [
        ["60.0", "43.3", "60.0"], ["40.0", "–", "30.0"]]


@pytest.mark.parametrize("tasks, names", [
    (["glue/cola"], []), (["glue/cola", "glue/rte"], []), (["own", "other"], []),
    (["glue/mrpc", "superglue/rte", "superglue/multirc"], []),
    (["glue/cola", "glue/rte", "superglue/copa", "superglue/cb"], ["average of GLUE", "average of SuperGLUE"]),
    (["glue/cola", "glue/rte", "superglue/cb", "superglue/wic", "own"], []),
    (["glue/cola", "glue/rte", "superglue/cb", "superglue/wic"], ["average of GLUE", "average of SuperGLUE"])])
def test_a_table_has_the_averages_of_its_tasks(tasks, names):
    assert list(averages(tasks)) == names


def test_medians_where_the_study_wants_them(make, root):
    study, frame = two_tasks(make, root, statistic="median")
    assert wide(study, frame).iloc[0].tolist() == ["searched", "2.00", "55.0", "70.0", "1.0"]


def test_over_tasks_there_are_ranks_and_no_average(make, root):
    "One task's scores lie a hundred times closer; an average would be the other's alone."
    study = make(grid={"task": ["x", "y", "z"]})
    frame = answer(study, root, [{"searched": 0.9, "a": 0.5, "b": 0.1}, {"searched": 0.501, "a": 0.502, "b": 0.503},
                                 {"searched": 0.501, "a": 0.502, "b": 0.5}])
    table = wide(study, frame)
    assert table["mean rank"].tolist() == ["2.0", "1.7", "2.3"]
    assert best_of(table["mean rank"], [True] * 3, lowest=True) == [False, True, False]


def test_the_size_is_a_count_where_the_backbone_has_none(make, root):
    study = make()
    put(study, study.questions()[0], root, [{"label": "searched", "n_params": 21_500, "test": 0.5}],
        n_backbone=None)
    assert wide(study, scores(study, root)).to_dict("records") == [
        {"row": "searched", "parameters": "21,500", "glue/cola": "50.0"}]


def test_full_fine_tuning_has_a_readable_ratio(make, root):
    study = make()
    put(study, study.questions()[0], root, [{"label": "finetune", "n_params": 10_000_000, "test": 0.5}])
    assert wide(study, scores(study, root))["ratio, 1e-4"].tolist() == ["10,000"]


def test_transfer_has_sources_down_and_targets_across(make, root):
    study = make(seeds=[0, 1], grid={"task": ["x", "y"]})
    for question in study.questions():
        seed, source = question.params["seed"], question.params["task"]
        rows = [{"label": label, "task": target, "metric": f"metric of {target}", "n_params": 10,
                 "test": (0.5 if label == "searched" else 0.3) + 0.1 * seed + 0.1 * (source == target)}
                for label in ("searched", "random-1") for target in ("x", "y", "z")]
        put(study, question, root, rows)
    frame = scores(study, root)
    assert frame.groupby("task").metric.unique().explode().to_dict() == {t: f"metric of {t}" for t in "xyz"}
    found = transfer(frame)
    assert list(found) == ["row", "source", "x", "y", "z"]
    assert found.source.tolist() == ["x", "", "y"]
    assert found.row.tolist() == ["searched", "random", "searched"]
    assert found[["x", "y", "z"]].to_numpy() == pytest.approx(
        np.array([[0.65, 0.55, 0.55], [0.40, 0.40, 0.35], [0.55, 0.65, 0.55]]))
    paired = differences(study, frame)  # of each target and seed, the mean over the sources
    assert paired.task.tolist() == ["x", "y", "z", "all"] and paired.pairs.tolist() == [2, 2, 2, 6]
    assert paired["mean"].tolist()[:3] == pytest.approx([0.2] * 3)
    assert paired.unit.tolist() == ["points"] * 3 + ["sd"]


def test_a_row_that_was_not_moved_has_one_line(make, root):
    study = make(methods={"moved": {"grid": {"task": ["a", "b"]}}, "at home": {"grid": {"task": ["x", "y"]}}},
                 against="at home")
    for question in study.questions():
        targets = ["x", "y"] if question.method == "moved" else [question.params["task"]]
        test = 0.6 if question.method == "at home" else 0.5
        put(study, question, root, [{"label": "searched", "task": target, "n_params": 10, "test": test}
                                    for target in targets])
    frame = scores(study, root)
    assert transfer(frame).to_numpy().tolist() == [
        ["moved", "a", 0.5, 0.5], ["moved", "b", 0.5, 0.5], ["at home", "", 0.6, 0.6]]
    found = differences(study, frame)
    assert found.row.unique().tolist() == ["moved"] and found["mean"].tolist()[:2] == pytest.approx([-0.1] * 2)
    assert found["mean"].iloc[2] == pytest.approx(-math.sqrt(2)), "two scores differ by the root of two of their sd"


def test_a_grid_of_counts_is_readable(make, root):
    study = make(grid={"budget": [3_400_000, 2e-4], "width": [None]})
    frame = answer(study, root, searched([0.5, 0.6]))
    table = wide(study, frame)
    assert table.budget.tolist() == ["3,400,000", "0.0002"] and table.width.tolist() == ["–", "–"]


def test_cost_says_what_searching_took(make, root):
    study = make(seeds=[0, 1], grid={"budget": [0.1, 0.2]})
    more = [{"search": {"seconds": 60.0, "passes": 900}}, {"prune": {"seconds": 15.0}},
            {"probe": {"seconds": 120.0, "passes": 1_100}}, {}]
    for question, said in zip(study.questions(), more):
        put(study, question, root, {"searched": 0.5, "random-1": 0.4}, **said)
    for question, peak in zip(study.questions()[::2], [1_000.0, 2_000.0]):  # those of the first budget
        for phase, step, memory in ("search", 1, peak - 1), ("search", 2, peak), ("searched", 1, 500.0):
            Run(root / study.name / question.id).log(
                {"event": "step", "phase": phase, "step": step, "memory_mb": 9_000.0, "phase_memory_mb": memory})
    found = cost(study, root)
    assert list(found) == ["row", "budget", "task", "runs", "search_seconds", "retrain_seconds", "ratio",
                           "passes", "search_memory_mb", "retrain_memory_mb", "memory_ratio"]
    first, second = found.to_numpy().tolist()
    assert first == ["searched", 0.1, "glue/cola", 2, 90.0, 30.0, 3.0, 1_000.0, 1_500.0, 500.0, 3.0]
    assert second[:7] == ["searched", 0.2, "glue/cola", 1, 15.0, 30.0, 0.5]
    assert all(map(math.isnan, second[7:]))


def test_a_log_of_one_peak_tells_no_memory_of_the_training(make, root):
    study = make()
    put(study, study.questions()[0], root, {"searched": 0.5}, search={"seconds": 60.0, "passes": 900})
    for phase, memory in ("search", 800.0), ("searched", 900.0):
        Run(root / study.name / study.questions()[0].id).log(
            {"event": "step", "phase": phase, "step": 1, "memory_mb": memory})
    (line,) = cost(study, root).to_dict("records")
    assert line["search_memory_mb"] == 800 and math.isnan(line["retrain_memory_mb"])
    assert math.isnan(line["memory_ratio"])


def test_names_are_escaped_in_every_table(make, root, tmp_path):
    study = make(grid={"task": [ATTACK, "b"]}, methods={ODD: {}, "new\nline": {"params": {"budget": 0.5}}})
    answer(study, root, searched([0.5, 0.6, 0.7, 0.8]))
    paths = save_tables(study, root, tmp_path / "new" / "tables")
    assert [path.name for path in paths] == ["table.csv", "table.md", "table.tex", "scores.csv"]
    comma, marked, latex, every = (path.read_text(encoding="utf-8") for path in paths)
    assert "<" not in marked and "&lt;img src=x onerror=alert(1)&gt;" in marked
    assert r"50%\_x &amp; y\|z" in marked and "new line" in marked and len(marked.splitlines()) == 4
    assert r"50\%\_x \& y|z" in latex and r"\toprule" in latex
    again = pd.read_csv(paths[0], dtype=str)
    assert again[ATTACK].tolist() == ["50.0", "70.0"] and again.row.tolist() == [ODD, "new\nline"]
    assert ATTACK in comma and pd.read_csv(paths[3]).test.tolist() == [0.5, 0.6, 0.7, 0.8]
    assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_names_that_look_like_numbers_stay_as_they_are(make, root, tmp_path):
    study = make(methods={"007": {}, "1e5": {"params": {"budget": 0.5}}})
    answer(study, root, searched([0.5, 0.6]))
    marked = save_tables(study, root, tmp_path)[1].read_text()
    assert "| 007" in marked and "| 1e5" in marked and "| 50.0" in marked


def test_a_study_without_results_has_empty_tables(make, root, tmp_path):
    study = make(grid={"budget": [0.1, 0.2]}, seeds=[0, 1])
    frame = scores(study, root)
    assert frame.empty and frame.attrs == {"study": "made", "done": 0, "asked": 4}
    made = [summary(frame), differences(study, frame), ranks(frame), wide(study, frame), transfer(frame),
            cost(study, root)]
    assert all(table.empty for table in made)
    assert all("budget" in table for table in made if "blocks" not in table)
    assert ranks(frame).attrs["p"] is None
    assert all(path.is_file() for path in save_tables(study, root, tmp_path))


# ---------------------------------------------------------------------------- every run, and what a page says


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return faulty_study(tmp_path_factory.mktemp("studies"))


def test_every_run_has_a_state_and_a_reason(faulty):
    study, root, runs = faulty
    frame = runs_frame(study, root)
    assert frame.state.value_counts().to_dict() == {"done": 66, "missing": 5, "failed": 1}
    assert frame.why[:3].tolist() == [f"ValueError: no column {EVIL}", "its result.json cannot be read", ""]
    assert progress_text(frame[frame.state == "done"]) == "All 66 runs are done."
    assert progress_text(frame[frame.state == "done"].head(1)) == "The one run is done."


@pytest.mark.parametrize("error, state, why", [
    (None, "missing", "it has not ended"), ("{", "failed", "its error.json cannot be read"),
    ('{"error": "full"}', "failed", "full")])
def test_a_run_that_did_not_end_says_why(tmp_path, error, state, why):
    study = make_study(tmp_path, grid={}, seeds=[0], methods={})
    run, = fill(study, tmp_path / "reports")
    (run.folder / "result.json").unlink()
    if error:
        (run.folder / "error.json").write_text(error)
    assert runs_frame(study, tmp_path / "reports")[["state", "why"]].values.tolist() == [[state, why]]


def test_a_lost_or_torn_file_of_gates_is_named(faulty):
    study, root, runs = faulty
    for run, why in ((runs[3], "no gates.csv"), (runs[4], "a gates.csv that is cut off"),
                     (runs[5], "a gates.csv that cannot be read")):
        with pytest.raises(ValueError, match=why):
            gates_frame(run)
    assert gates_frame(runs[8]).attrs == {"budget": runs[8].result["budget"], "run": runs[8].id}
    sentences, frames = heat_frames(study, runs_frame(study, root))
    assert f"One run is left out for no gates.csv: {runs[3].id}." in sentences and len(sentences) == 3
    assert "S3PET, budget 5e-05: mean p over 10 runs" in frames and len(frames) == 6


def test_gates_cut_between_two_rows_are_no_shorter_space(tmp_path):
    study = make_study(tmp_path, grid={}, seeds=[0], methods={})
    run, = fill(study, tmp_path / "reports")
    lines = (run.folder / "gates.csv").read_text().splitlines(keepends=True)
    (run.folder / "gates.csv").write_text("".join(lines[:-3]))
    with pytest.raises(ValueError, match="cut off"):
        gates_frame(run)


@pytest.mark.parametrize("row", [{"test": 0.5}, {"label": "searched", "test": "n/a"}, "searched"])
def test_rows_that_make_no_sense_are_left_out_and_said(tmp_path, row):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, methods={}, seeds=[0, 1])
    root = tmp_path / "reports"
    runs = fill(study, root)
    write_json(runs[0].folder / "result.json", runs[0].result | {"rows": [row]})
    frame = runs_frame(study, root)
    assert "3 of 4 runs are done, 1 failed" in progress_text(frame)
    assert "a row without a label, or text for a number" in frame.why[0]
    assert set(scores(study, root).run_id) == {run.id for run in runs[1:]}


def test_ranks_without_a_common_block_say_so(tmp_path):
    methods = {"one": {"grid": {"budget": [1e-4]}}, "two": {"grid": {"budget": [2e-4]}}}
    study = make_study(tmp_path, grid={"task": ["glue/cola"]}, methods=methods, seeds=[0, 1])
    fill(study, tmp_path / "reports")
    frame = ranks(scores(study, tmp_path / "reports"))
    assert rank_sentence(frame) == "At no task, seed and point of the grid does every row have a score."


def test_prunings_show_the_share_they_kept(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, seeds=[0, 1],
                       methods={"S3PET": {}, "first-order": {"params": {"criterion": "first-order"}}})
    fill(study, tmp_path / "reports")
    runs = runs_frame(study, tmp_path / "reports")
    sentences, frames = heat_frames(study, runs)
    assert sentences == [] and list(frames) == [
        "S3PET: mean p over 4 runs", "first-order: mean share kept over 4 runs"]
    assert "share" in frames["first-order: mean share kept over 4 runs"]
    _, frames = heat_frames(study, runs, by_task=True)
    assert len(frames) == 4 and list(frames)[0] == "S3PET, task glue/cola: mean p over 2 runs"


def test_runs_that_only_moved_structures_have_no_heatmap(tmp_path):
    tasks = ["glue/cola", "glue/rte"]
    study = make_study(tmp_path, params={"targets": tasks}, grid={"task": tasks}, methods={}, seeds=[0, 1])
    fill(study, tmp_path / "reports")
    assert heat_frames(study, runs_frame(study, tmp_path / "reports")) == (
        ["No run has searched or pruned yet."], {})
    assert transfer(scores(study, tmp_path / "reports")).source.tolist() == ["glue/cola", "", "glue/rte"]


def test_a_sweep_has_one_point_for_what_no_budget_changes(faulty):
    study, root, _ = faulty
    found = scores(study, root)
    frame = sweep_frame(found)
    assert (frame[frame.label == "bitfit"].groupby(["row", "task"]).size() == 1).all()
    assert (frame[frame.label == "searched"].groupby(["row", "task"]).size() == 3).all()
    bitfit = frame[frame.label == "bitfit"].iloc[0]
    same = found[(found.row == bitfit.row) & (found.task == bitfit.task)]
    assert bitfit["mean"] == pytest.approx(same.groupby("seed").test.mean().mean())
    assert set(frame.line) == set(found.row)


def test_the_rows_of_an_outcome_are_in_the_order_of_the_study(faulty):
    study, root, runs = faulty
    outcome = Outcome.of(study, root)
    assert outcome.scores.method.drop_duplicates().tolist() == list(study.methods)
    searched = outcome.scores[outcome.scores.label == "searched"].set_index("run_id").test
    assert run_scores(outcome)[searched.index].equals(searched) and len(run_scores(outcome)) == 66


def test_differences_in_words(faulty):
    study, root, _ = faulty
    frame = differences(study, Outcome.of(study, root).scores)
    sentences, shown = difference_sentences(frame), difference_table(frame)
    assert len(sentences) == 6 and sentences[0].startswith("S3PET, budget 5e-05: ahead of random in ")
    assert len(shown) == len(frame) and list(shown)[:4] == ["row", "against", "budget", "task"]
    assert difference_sentences(frame.iloc[:0]) == [
        "There is no pair yet of a searched structure and what it is compared with."]


@pytest.mark.parametrize("texts, best", [
    (["59.3 ± 4.8", "61.0", "–"], [False, True, False]), (["7", "7"], [False, False]), (["7"], [True]),
    (["–", "–"], [False, False]), (["-1.0", "-2.0"], [True, False])])
def test_the_best_of_a_column(texts, best):
    assert best_of(pd.Series(texts), [True] * len(texts)) == best
