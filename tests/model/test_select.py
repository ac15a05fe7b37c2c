"Selection under a budget against every set there is, and against methods that share nothing with it."
import math
from itertools import product

import numpy as np
import pytest
import torch

from s3pet_nb.model.select import fill, gap, select

KNAPSACK = ("greedy", "exact")


def instance(rng: np.random.Generator, size: int, largest: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    "Probabilities, sizes and a budget; every third instance has few distinct sizes, every fourth ties in p."
    p, n = rng.random(size), rng.integers(1, largest, size)
    if rng.random() < 1 / 3:
        n = rng.choice([384, 768, 1_248], size)
    if rng.random() < 1 / 4:
        p = rng.choice([0.0, 0.2, 0.5, 1.0], size)
    return torch.tensor(p), torch.tensor(n), int(rng.integers(n.min(), n.sum() + 1))


def test_the_exact_selection_is_the_best_of_all_sets():
    rng, sets = np.random.default_rng(0), np.array(list(product([0.0, 1.0], repeat=14)))
    beaten = 0
    for _ in range(1_000):
        p, n, B = instance(rng, 14, 100)
        keep = select(p, n, B, "exact")
        assert int(n[keep].sum()) <= B
        best = (sets @ p.numpy())[sets @ n.numpy() <= B].max()
        np.testing.assert_allclose(float(p[keep].sum()), best, rtol=1e-12)
        greedy = float(p[select(p, n, B)].sum())
        assert gap(p, n, B) == pytest.approx((best - greedy) / (best or 1), abs=1e-12)
        beaten += greedy < best * (1 - 1e-9)
    assert beaten > 300


def dropped_one_by_one(score: list[float], n: list[int], B: int) -> list[bool]:
    "Pruning as the paper tells it: the lowest unit goes, the first of several, until the rest is within B."
    keep = [True] * len(n)
    while sum(size for size, kept in zip(n, keep) if kept) > B:
        lowest = min((i for i, kept in enumerate(keep) if kept), key=lambda i: score[i])
        keep[lowest] = False
    return keep


def test_drop_is_what_removing_units_one_by_one_leaves():
    rng, empty, tied = np.random.default_rng(4), 0, 0
    for i in range(500):
        _, n, B = instance(rng, int(rng.integers(2, 60)), 300)
        score = torch.tensor(rng.normal(size=len(n)))
        if i % 2:
            score = score.round() + 0.0 * rng.choice([-1, 1])
            tied += len(score.unique()) < len(score)
        wanted = dropped_one_by_one(score.tolist(), n.tolist(), B)
        if not any(wanted):
            empty += 1
            last = int(n[torch.argsort(score, stable=True)[-1]])
            with pytest.raises(ValueError, match=f"keeps nothing: .* has {last:,}; choose at least that"):
                select(score, n, B, "drop")
            assert select(score, n, last, "drop").sum() == 1
            continue
        keep = select(score, n, B, "drop")
        assert keep.tolist() == wanted
        if not keep.all():
            gone = torch.argsort(score, stable=True)[(~keep).sum() - 1]
            assert n[keep].sum() <= B < n[keep].sum() + n[gone]
    assert empty > 10 and tied > 100


def test_drop_refuses_what_the_other_selections_refuse():
    score, n = torch.tensor([-0.1, -3.0, -2.0]), torch.tensor([4, 2, 8])
    assert select(score, n, 14, "drop").all()
    assert select(score, n, 12, "drop").tolist() == [True, False, True]
    for B in 1, 15:
        with pytest.raises(ValueError, match="choose 2 to 14"):
            select(score, n, B, "drop")
    with pytest.raises(ValueError, match="3 finite numbers"):
        select(torch.tensor([0.1, math.nan, 0.2]), n, 8, "drop")


def highest_sum(p: np.ndarray, n: np.ndarray, B: int) -> float:
    "The knapsack by dynamic programming over every whole budget up to B."
    best = np.zeros(B + 1)  # best[b]: highest sum of p within b
    for worth, size in zip(p, n):
        best[size:] = np.maximum(best[size:], best[:max(B + 1 - size, 0)] + worth)
    return float(best[-1])


def test_the_exact_selection_agrees_with_a_method_that_shares_nothing_with_it():
    rng = np.random.default_rng(1)
    for _ in range(20):
        p, n, B = instance(rng, 110, 5_000)
        keep = select(p, n, B, "exact")
        assert int(n[keep].sum()) <= B
        assert float(p[keep].sum()) == pytest.approx(highest_sum(p.numpy(), n.numpy(), B), abs=5e-6)


def test_small_probabilities_are_not_lost_to_the_solvers_tolerance():
    p, n = torch.tensor([0.02, 1e-9, 3e-9, 2e-9], dtype=torch.float64), torch.tensor([5000, 100, 100, 100])
    assert select(p, n, 150, "exact").tolist() == select(p, n, 150).tolist() == [False, False, True, False]
    assert gap(p, n, 150) == 0


def test_a_solver_that_gives_up_is_not_believed(monkeypatch):
    from s3pet_nb.model import select as module

    class GaveUp:
        success, message = False, "Time limit reached."

    monkeypatch.setattr(module, "milp", lambda *given, **more: GaveUp)
    with pytest.raises(RuntimeError, match="Time limit reached.; choose 'greedy'"):
        select(torch.ones(2), torch.tensor([1, 2]), 2, "exact")


@pytest.mark.parametrize("method", KNAPSACK)
def test_no_selection_is_above_the_budget_or_depends_on_chance(method):
    rng = np.random.default_rng(2)
    for _ in range(30):
        p, n, B = instance(rng, 40, 20_000)
        keep = select(p, n, B, method)
        assert int(n[keep].sum()) <= B
        assert torch.equal(select(p, n, B, method), keep)
    n = torch.tensor([3, 2, 2, 2, 1])
    assert select(torch.ones(5), n, 5, method).tolist()[-1] is (method == "exact"), "greedy takes 3 and 2"
    assert select(torch.full((5,), 0.5), torch.full((5,), 7), 20, method).sum() == 2


@pytest.mark.parametrize("method", KNAPSACK)
def test_a_selection_within_the_limits_of_the_budget(method):
    p, n = torch.tensor([0.1, 1e-3, 0.9]), torch.tensor([4, 2, 8])
    assert select(p, n, 14, method).all(), "the whole space fits"
    assert select(p, n, 2, method).tolist() == [False, True, False]
    for B in 1, 15:
        with pytest.raises(ValueError, match="choose 2 to 14"):
            select(p, n, B, method)
    for wrong in torch.tensor([0.1, math.nan, 0.2]), torch.tensor([0.1, 0.2]):
        with pytest.raises(ValueError, match="3 finite numbers"):
            select(wrong, n, 8, method)


def test_the_gap_where_nothing_has_a_probability_is_zero():
    assert gap(torch.zeros(3), torch.tensor([1, 2, 3]), 3) == 0


def filled_one_by_one(keep: list[bool], p: list[float], n: list[int], B: int) -> list[bool]:
    "Every one that is not there is offered once, by falling p, and taken if it fits."
    keep, left = list(keep), B - sum(size for size, kept in zip(n, keep) if kept)
    for i in sorted(range(len(n)), key=lambda i: -p[i]):
        if not keep[i] and n[i] <= left:
            keep[i], left = True, left - n[i]
    return keep


def test_fill_offers_each_once_by_falling_p():
    rng = np.random.default_rng(7)
    for _ in range(500):
        p, n, B = instance(rng, int(rng.integers(2, 60)), 300)
        some = torch.zeros(len(n), dtype=torch.bool)
        if n[0] <= B:
            some[0] = True
        assert fill(some, p, n, B).tolist() == filled_one_by_one(some.tolist(), p.tolist(), n.tolist(), B)
        assert select(p, n, B).tolist() == filled_one_by_one([False] * len(n), p.tolist(), n.tolist(), B)
        assert some.sum() <= 1, "the set that is given stays as it is"


def test_the_exact_sum_leaves_out_what_is_below_zero():
    p, n = torch.tensor([1.0, -5.0, -0.5]), torch.tensor([1, 1, 1])
    assert select(p, n, 3, "exact").tolist() == [True, False, False]
    assert select(p, n, 3, "greedy").tolist() == [True, True, True]
