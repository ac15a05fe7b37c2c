"What a table tells, checked on tables whose answer is known."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import analysis
from s3pet_nb.lab.table import Table, candidates_of, made_up
from s3pet_nb.learn.sample import SAMPLES
from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.space import make_space


def lora(candidates):
    return 0.04 * (candidates.module == "lora").to_numpy()


def flat(candidates):
    return np.zeros(len(candidates))


def varied(candidates):
    return 0.02 * np.random.default_rng(7).normal(size=len(candidates))


@pytest.fixture(scope="module")
def known():
    return made_up(lora, noise=0.02, K=300, seeds=3)


def test_components_are_those_of_a_two_way_analysis_of_variance():
    values = np.array([[1.0, 3.0], [2.0, 3.0], [6.0, 5.0]])
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    mean_squares = {"structure": 2 * np.var([2, 2.5, 5.5], ddof=1), "seed": 3 * np.var([3, 11 / 3], ddof=1),
                    "rest": (rest ** 2).sum() / 2}
    structure, seed, left = analysis.components(values)
    assert left == pytest.approx(mean_squares["rest"])
    assert structure == pytest.approx((mean_squares["structure"] - left) / 2)
    assert seed == pytest.approx(max(0, (mean_squares["seed"] - left) / 3))
    assert analysis.structure_share(values) == pytest.approx(structure / (structure + left))


def test_what_a_seed_does_to_all_sets_is_not_noise_of_a_training():
    values = np.random.default_rng(0).normal(size=(50, 2))
    shifted = analysis.components(values + [0.0, 10.0])
    assert shifted[0] == pytest.approx(analysis.components(values)[0]) and shifted[1] > 10
    assert shifted[2] == pytest.approx(analysis.components(values)[2])
    assert analysis.structure_share(np.array([[1.0, 3.0], [3.0, 1.0]])) == 0, "not below 0"


def test_tau_between_seeds_is_the_mean_over_pairs():
    values = np.array([[1, 1, 3], [2, 2, 2], [3, 3, 1]], dtype=float)
    assert analysis.seed_tau(values) == pytest.approx((1 - 1 - 1) / 3)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_ceiling_is_what_the_truth_reaches_and_above_one_training(seeds):
    tables = [made_up(varied, 0.04, K=200, seeds=seeds, draw=draw) for draw in range(20)]
    reached = [kendalltau(table.sets @ varied(table.candidates), table.means).statistic for table in tables]
    said = [analysis.tau_ceiling(table.scores.to_numpy()) for table in tables]
    assert np.mean(said) == pytest.approx(np.mean(reached), abs=0.015)
    assert np.mean(said) > np.mean([analysis.seed_tau(table.scores.to_numpy()) for table in tables]) + 0.1
    assert analysis.ceiling(-0.2) == 0 and analysis.ceiling(1.0) == pytest.approx(1)


def test_intervals_hold_what_was_put_in():
    many = made_up(varied, 0.0, K=5_000, draw=99)
    sd, inside = many.means.std(), []
    wanted = {"sd of structures": sd, "sd of a training": 0.04, "share of structure": sd ** 2 / (sd ** 2 + 0.04 ** 2)}
    for draw in range(10):
        told = analysis.spread(made_up(varied, 0.04, K=96, draw=draw)).set_index("number")
        inside.append([told.low[name] <= value <= told.high[name] for name, value in wanted.items()])
        assert (told.low <= told.estimate).all() and (told.estimate <= told.high).all()
    assert (np.sum(inside, axis=0) >= 8).all()


@pytest.mark.parametrize("table", [made_up(lora, 0.02, K=10), made_up(lora, 0.02, K=30, seeds=1)], ids=["sets", "seeds"])
@pytest.mark.parametrize("ask", [analysis.spread, analysis.effects, analysis.leave_out, analysis.best_tenth,
                                 analysis.more_is_better, analysis.surrogate])
def test_a_table_of_too_little_tells_nothing(ask, table):
    with pytest.raises(ValueError, match="needs at least 20 and 2"):
        ask(table)


def test_what_is_spent_in_the_classes_of_a_division_is_the_size(known):
    sizes = known.sets @ known.candidates.n.to_numpy() / known.B
    for of in analysis.CLASSES:
        assert np.allclose(analysis.spent(known, (of,)).sum(axis=1), sizes)
    with pytest.raises(UnknownName, match="kind"):
        analysis.spent(known, ("kinds",))


def test_what_explains_a_score_is_told_from_what_does_not(known):
    told = analysis.leave_out(known).set_index("model")
    assert told.R2["the mean"] <= 0 and told.R2["the truth"] > told.R2["kind"] > 0.9
    assert told.R2["depth"] < told.R2["size"] + 0.05
    gain, low, high = analysis.added(known, "kind", "size")
    assert low > 0.2 and gain == pytest.approx(told.R2["kind"] - told.R2["size"])
    gain, low, high = analysis.added(known)
    assert gain < 0.01, "place tells nothing here"


def test_a_table_of_noise_is_explained_by_nothing():
    told = analysis.leave_out(made_up(flat, 0.02)).set_index("model")
    assert (told.R2.drop("the truth") < 0.05).all()


def test_where_all_scores_are_equal_nothing_is_explained():
    told = analysis.leave_out(made_up(flat, 0.0, K=40)).set_index("model")
    assert told.R2["the truth"] == 0 and not told.R2.isna().any()


def test_effects_are_those_that_were_put_in(known):
    told = analysis.effects(known).set_index("class")
    slope = (100 * lora(known.candidates) / known.candidates.n * known.B / 10).max()  # points for a tenth
    assert told.low["lora"] <= slope <= told.high["lora"] and told.p["lora"] < 1e-6
    assert told.effect["bitfit"] == pytest.approx(-told.effect["lora"]), "one question, asked twice"
    others = told.drop(["lora", "bitfit"])
    assert (others.p > 0.05).all() and (others.effect.abs() < 0.3).all()


def only_where(table, keep):
    "The table of the sets for which `keep`, of (K, N) bool, says so."
    names = table.scores.index[keep(table.sets)]
    return replace(table, frame=table.frame[table.frame["set"].isin(names)])


def test_nothing_is_said_of_a_class_that_no_set_spends_on():
    table = made_up(varied, 0.02, K=1_500)
    lora_q = ((table.candidates.module == "lora") & (table.candidates.role == "q")).to_numpy()
    told = analysis.effects(only_where(table, lambda sets: ~sets[:, lora_q].any(axis=1)))
    assert "lora q" not in set(told["class"]) and {"lora v", "lora wo"} < set(told["class"])


def test_a_space_of_one_kind_has_no_effect_of_kind():
    table = made_up(varied, 0.02, K=2_000)
    bitfit = (table.candidates.module == "bitfit").to_numpy()
    frame = table.frame.copy()
    cut = {packed: np.packbits(mask & ~bitfit).tobytes() for packed, mask in zip(table.scores.index, table.sets)}
    told = analysis.effects(replace(table, frame=frame.assign(set=frame["set"].map(cut))))
    assert set(told["of"]) == {"kind and role", "depth"}


def test_intervals_of_effects_hold_what_was_put_in_a_space_that_is_shipped():
    space = make_space(tiny("bert"), "mix")
    candidates = pd.DataFrame(candidates_of(space))
    slope, inside = {"lora": 3.0, "bitfit": 1.0, "lnfit": 1.0, "lowrank_adapter": 1.0}, []
    B = round(0.2 * space.n_params)
    for draw in range(12):
        rng, rows = np.random.default_rng(draw), []
        for k in range(120):
            mask = SAMPLES["stratified"](space, B, 1_000 * draw + k).mask(space).numpy()
            true = 0.1 * (mask * candidates.n / B * candidates.module.map(slope)).sum()
            rows += [{"set": np.packbits(mask).tobytes(), "sample": "stratified", "number": k, "seed": seed,
                      "validation": true, "test": true + 0.02 * rng.normal(), "learned": True} for seed in (0, 1)]
        table = Table(pd.DataFrame(rows), {"budget": B, "candidates": candidates.to_dict("records")})
        told = analysis.effects(table).set_index("class")
        inside.append(told.low["lora"] <= 2.0 <= told.high["lora"])
    assert sum(inside) >= 10
    with pytest.raises(ValueError, match="sets are too few to tell"):
        analysis.effects(replace(table, frame=table.frame[table.frame.number < 22]))


@pytest.mark.parametrize("worth, best, others", [
    (lambda candidates: 0.03 * (candidates.third == "upper").to_numpy(), "upper", ["lower", "middle"]),
    (lambda candidates: 0.03 * ((candidates.module == "lora") & (candidates.role == "v")).to_numpy(), "lora v",
     ["lora q", "lora wo", "bitfit q", "bitfit v"]),
], ids=["depth", "role of a kind"])
def test_a_place_is_told_from_those_beside_it(worth, best, others):
    told = analysis.effects(made_up(worth, 0.01, K=300)).set_index("class")
    assert told.low[best] > 0 and told.p[best] < 0.001 and (told.low[others] < 0.05).all()


def test_more_is_better_where_parameters_are_worth_something_and_not_where_composition_is():
    slope, low, high = analysis.more_is_better(made_up(lambda candidates: 0.01 * candidates.n.to_numpy(), 0.005, K=300))
    assert low < 6 < high and slope == pytest.approx(6, rel=0.05), "a tenth of the budget are 6 parameters"
    slope, low, high = analysis.more_is_better(made_up(flat, 0.01, K=300))
    assert low < 0 < high


def test_the_best_tenth_has_more_of_what_is_good(known):
    told = analysis.best_tenth(known).set_index("class")
    assert told.low["lora"] > 0 and told.more["lora"] == pytest.approx(told.best["lora"] - told["all"]["lora"])


def test_a_surrogate_is_used_only_where_it_is_better_than_the_mean():
    known = made_up(varied, 0.01, K=200)
    guess = analysis.surrogate(known)
    others = made_up(varied, 0.0, K=200, draw=1)
    off = guess(others.sets) - others.means - (known.means.mean() - (known.sets @ varied(known.candidates)).mean())
    assert (off ** 2).mean() ** 0.5 < 1.2 * guess.error < known.means.std() and 0.8 < (abs(off) <= guess.within).mean()
    assert guess.model in analysis.SURROGATES and 0 < guess.R2 < 1
    assert analysis.surrogate(made_up(flat, 0.02, K=100)) is None


def test_figures_have_a_point_for_each_set_and_class(known):
    assert len(analysis.draw_seeds(known).data[0].x) == len(known.sets)
    figure = analysis.draw_effects(analysis.effects(known))
    assert sum(len(trace.x) for trace in figure.data) == 2 + 6 + 3
