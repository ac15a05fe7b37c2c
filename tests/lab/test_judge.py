"Judging a method by a table: against brute force, and on tables whose answer is known."
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import judge
from s3pet_nb.lab.analysis import components
from s3pet_nb.lab.plot import P_COLUMNS
from s3pet_nb.lab.store import Run
from s3pet_nb.lab.study import parameters, study
from s3pet_nb.lab.table import made_up, trained_by


def varied(candidates):
    return 0.02 * np.random.default_rng(7).normal(size=len(candidates))


@pytest.fixture(scope="module")
def known():
    return made_up(varied, 0.02)


@pytest.mark.parametrize("validation", [[3, 1, 5, 2, 4], [1, 1, 2, 2, 2]], ids=["apart", "ties"])
def test_best_of_k_is_the_mean_over_all_choices_of_k(validation):
    validation, test = np.array(validation, dtype=float), np.array([0.1, 0.5, 0.4, 0.9, 0.3])
    for k in range(1, 6):
        reached = [test[list(some)][validation[list(some)] == validation[list(some)].max()].mean()
                   for some in combinations(range(5), k)]
        assert judge.best_random(validation[:, None], test[:, None])[k - 1] == pytest.approx(np.mean(reached))


def test_best_of_k_is_the_mean_over_seeds_and_its_weights_are_probabilities():
    rng = np.random.default_rng(0)
    validation, test = rng.normal(size=(300, 2)), rng.normal(size=(300, 2))
    apart = [judge.best_random(validation[:, [seed]], test[:, [seed]]) for seed in (0, 1)]
    assert np.allclose(judge.best_random(validation, test), np.mean(apart, axis=0))
    assert np.allclose(judge.kept(300).sum(axis=1), 1)


def test_worth_is_the_inverse_of_best_of_k():
    curve = np.array([1.0, 2.0, 1.5, 3.0] + [3.5] * 16)
    assert [judge.worth(score, curve) for score in (1.0, 1.5, 2.0, 2.5, 3.0)] == [1, 1.5, 2, 3.5, 4]
    assert judge.worth(0.9, curve) == 0, "one random set is better"
    assert judge.worth(3.6, curve) == float("inf")
    rising = np.arange(20.0)
    assert judge.worth(4.0, rising) == 5 and judge.worth(4.5, rising) == float("inf"), "not told above a quarter"


def test_equal_scores_are_equal():
    for level in (0.5, 0.91, 1.0):
        curve = judge.best_random(np.random.default_rng(0).random((96, 2)), np.full((96, 2), level))
        assert judge.worth(level, curve) == 1


def test_the_best_tenth_is_scored_by_a_seed_that_did_not_choose_it():
    noise = np.random.default_rng(0).normal(size=(1_000, 2))
    assert abs(judge.top_tenth(noise)) < 0.3, "luck does not count"
    assert judge.top_tenth(np.repeat(np.arange(20.0)[:, None], 2, axis=1)) == 18.5


def test_residuals_have_the_noise_of_a_training(known):
    values = known.scores.to_numpy()
    assert np.var(judge.residuals(values)) == pytest.approx(components(values)[2])


def test_scores_that_know_the_truth_reach_the_ceiling_and_noise_reaches_nothing(known):
    truth = varied(known.candidates)
    told = judge.judge(known, truth).set_index("number")
    assert told.low["ceiling of tau"] < told.estimate["tau"] < told.high["ceiling of tau"]
    assert judge.judge(known, -truth).estimate[0] == -told.estimate["tau"]
    guess = judge.judge(known, np.random.default_rng(3).normal(size=len(truth))).set_index("number")
    assert abs(guess.estimate["tau"]) < told.low["tau"]
    by_name = dict(reversed(list(zip(known.candidates.name, truth))))
    pd.testing.assert_frame_equal(judge.judge(known, by_name), judge.judge(known, truth))


def test_a_set_is_placed_among_the_random_ones(known):
    values = known.scores.to_numpy()
    told = judge.judge(known, trained=dict(known.scores.median())).set_index("number")
    assert 40 < told.estimate["percentile"] < 60 and told.estimate["worth"] < 3
    assert told.estimate["regret"] == pytest.approx(judge.top_tenth(values) - known.scores.median().mean())
    best = judge.judge(known, trained=dict(known.scores.max() + 0.1)).set_index("number")
    assert best.estimate["percentile"] == 100 and best.high["regret"] < 0
    assert best.estimate["worth"] == best.low["worth"] == best.high["worth"] == np.inf
    worst = judge.judge(known, trained=dict(known.scores.min())).set_index("number")
    assert worst.estimate["worth"] == worst.high["worth"] == 0 and worst.estimate["percentile"] < 2
    assert (told.low <= told.estimate).all() and (told.estimate <= told.high).all()


def test_an_interval_holds_the_noise_of_the_trainings_of_the_chosen_set(known):
    told = judge.judge(known, trained=dict(known.scores.mean())).set_index("number")
    width = told.high["regret"] - told.low["regret"]
    assert width > 2 * 1.96 * 0.8 * 0.02 / 2 ** 0.5


def test_intervals_of_regret_hold_the_truth():
    "The truth is the mean of what the best tenth by one training is worth, on very many sets."
    many = made_up(varied, 0.02, K=20_000, draw=99)
    worth, inside = many.sets @ varied(many.candidates), 0
    true = judge.top_tenth(many.scores.to_numpy()) - many.scores.to_numpy().mean()
    for draw in range(20):
        table = made_up(varied, 0.02, K=96, draw=draw)
        shift = table.scores.mean() - (table.sets @ varied(table.candidates)).mean()  # of the seeds
        noise = 0.02 * np.random.default_rng(draw).normal(size=2)
        told = judge.judge(table, trained=dict(worth.mean() + shift + noise)).set_index("number")
        inside += told.low["regret"] <= true <= told.high["regret"]
    assert inside >= 16


def test_random_sets_are_those_of_one_sample(known):
    half = known.frame.assign(sample=np.where(known.frame.number < 100, "uniform", "stratified"))
    mixed = replace(known, frame=half)
    alone = replace(known, frame=known.frame[known.frame.number < 100])
    truth = varied(known.candidates)
    pd.testing.assert_frame_equal(judge.judge(mixed, truth), judge.judge(alone, truth))
    with pytest.raises(UnknownName, match="unknown sample of the table 'filled'"):
        judge.judge(mixed, truth, sample="filled")


@pytest.mark.parametrize("asked, refused", [
    ({}, "nothing to judge"),
    ({"scores": [1.0, 2.0]}, "the table has 36 candidates: give a number for each"),
    ({"scores": [float("nan")] * 36}, "36 of them not finite"),
    ({"scores": {"encoder.0.q.lora": 1.0}}, "35 candidates are either scored or in the table, and not both"),
    ({"trained": {0: float("nan"), 1: 0.5}}, "give finite scores in the same unit"),
    ({"trained": {0: 81.0, 1: 82.0}}, "not in percent"),
    ({"trained": {0: 0.5}}, r"from the seeds \[0\], and those of the table are \[0, 1\]; train it from the same"),
])
def test_what_cannot_be_judged_is_refused(known, asked, refused):
    with pytest.raises(ValueError, match=refused):
        judge.judge(known, **asked)


ASKED = """
title: a method
template: search
params: {n_random: 2, baselines: [], split_seed: 0, protocol: quick, lr: 0.0}
seeds: [0, 1]
methods: {one: {params: {order: first}}, other: {params: {order: exact}}}
"""


@pytest.fixture
def searched(known, tmp_path):
    """A study of two methods whose results are made up, its folder, and a table that can judge them.

    The first method knows what modules are worth, the other has it backwards; what the first found reaches the
    highest score of the table under either seed, what the other found the lowest.
    """
    tmp_path.joinpath("methods.yml").write_text(ASKED)
    asked, space = study(str(tmp_path / "methods.yml")), known.candidates
    rows = {"train": 32, "validation": 16, "test": 16}
    table = replace(known, about=known.about | {
        "task": "agreement", "metric": "accuracy", "form": "head", "backbone": "minilm", "rows": rows,
        "training": trained_by(parameters("train") | {"split_seed": 0})})
    for question in asked.questions():
        seed, sign = question.params["seed"], 1 if question.method == "one" else -1
        folder = tmp_path / "reports" / asked.name / question.id
        folder.mkdir(parents=True)
        run = Run(folder)
        ends = sign * (sign * table.scores[seed]).max(), table.scores[seed].median()
        run.save_result({
            "task": "agreement", "metric": "accuracy", "form": "head", "backbone": "minilm", "budget": table.B,
            "space": {"name": "mix", "candidates": len(space)}, "data": {"rows": rows},
            "search": {"passes": 20 + 20 * seed, "steps": 10},
            "rows": [{"label": label, "test": score, "steps": 10, "n_params": 4, "learned_nothing": None} | more
                     for label, score, more in (("searched", ends[0], {}), ("random-1", ends[1], {}),
                                                ("random-2", ends[1], {}), ("best-random", ends[1], {"best_of": 3}))]})
        gates = space.assign(kind="linear", p=sign * varied(space), alpha=0.0, selected=False)
        gates[P_COLUMNS].to_csv(run.folder / "gates.csv", index=False)
    return asked, tmp_path / "reports", table


def test_the_methods_of_a_study_are_judged_by_the_table_of_their_task(searched):
    asked, reports, table = searched
    told = judge.judge_study(asked, {"small": table}, reports).set_index(["method", "kind", "number"])
    assert set(told.table) == {"small"} and set(told.index.get_level_values("kind")) == {"searched", "random", "best-random"}
    said = told.estimate
    truth = judge.judge_scores(table, varied(table.candidates)).set_index("number").estimate
    assert said["one", "searched", "tau"] == truth["tau"] == -said["other", "searched", "tau"] > 0.3
    assert said["one", "searched", "ceiling of tau"] == truth["ceiling of tau"]
    assert said["one", "searched", "percentile"] > 99 and said["other", "searched", "percentile"] < 1
    assert 40 < said["one", "random", "percentile"] < 60
    assert said["one", "searched", "cost"] == 1 + (20 + 40) / 2 / 10, "passes over steps, and the training itself"
    assert said["one", "random", "cost"] == 1 and said["one", "best-random", "cost"] == 3
    assert ("one", "random", "tau") not in told.index


@pytest.mark.parametrize("change, refused", [
    ({"budget": 59}, "no table is of 'agreement', 'mix' and 60 parameters; there are small"),
    ({"rows": {"train": 31}}, "not trained as the sets of table 'small': they differ in rows"),
    ({"training": trained_by(parameters("train") | {"split_seed": 0, "precision": "bf16", "lr": 0.1})},
     "they differ in recipe, lr, warmup, clip, precision; run the study with the table's"),
    ({"training": trained_by(parameters("train") | {"split_seed": 1})}, "they differ in split_seed"),
], ids=["budget", "rows", "training", "split"])
def test_a_run_that_a_table_cannot_judge_is_refused(searched, change, refused):
    asked, reports, table = searched
    with pytest.raises(ValueError, match=refused):
        judge.judge_study(asked, {"small": replace(table, about=table.about | change)}, reports)


def test_scores_are_those_that_a_run_has(searched):
    asked, reports, table = searched
    run = Run(next(path for path in (reports / asked.name).iterdir()))
    assert set(judge.scores_of(run, run.result)) == set(table.candidates.name)
    probed = run.result | {"kept": [{"name": "a", "score": 0.5}, {"name": "b", "score": 0.0}]}
    assert judge.scores_of(run, probed) == {"a": 0.5, "b": 0.0}
    pruned = run.result | {"kept": [{"name": "a", "n": 3}]}
    assert judge.scores_of(run, pruned) == judge.scores_of(run, run.result)
    (run.folder / "gates.csv").unlink()
    assert judge.scores_of(run, pruned) == {}


def test_a_study_without_runs_is_judged_by_nothing(searched, tmp_path):
    asked, _, table = searched
    assert judge.judge_study(asked, {"small": table}, tmp_path / "none").empty


def test_of_several_runs_tau_is_the_mean(known):
    truth, rng = varied(known.candidates), np.random.default_rng(0).normal(size=len(known.candidates))
    apart = [judge.judge_scores(known, scores).estimate[0] for scores in (truth, rng)]
    assert judge.judge_scores(known, truth, rng).estimate[0] == pytest.approx(np.mean(apart))
