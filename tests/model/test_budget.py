"Budgets as counts, and the shift that meets them: numbers, limits, and a second solver."

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.special import expit

from s3pet_nb.model.budget import check_budget, expected_size, resolve_budget, solve_zeta

T5_LARGE = 737_668_096
MIX = np.repeat([3_072, 1_384, 1_024, 3_168], [288, 410, 122, 96])


@pytest.mark.parametrize("B, n_backbone, count", [
    (0.29, 100, 29),
    (0.57, 100, 57),
    (1e-4, 1_000_000, 100),
    (1.389e-4, T5_LARGE, 102_462),
    (0.999, 1_000, 999),
    (np.float64(0.29), 100, 29),
    (np.float32(0.29), 100, 29),
    (Fraction(1, 3), 10, 3),
    (1, 100, 1),
    (1.0, 100, 1),
    (102_458, T5_LARGE, 102_458),
    (np.int64(25_670), T5_LARGE, 25_670),
    (1e22, 100, 10**22),
])
def test_a_budget_is_a_count_and_a_ratio_is_taken_as_written(B, n_backbone, count):
    resolved = resolve_budget(B, n_backbone)
    assert resolved == count
    assert type(resolved) is int


def test_every_two_digit_ratio_is_exact():
    assert [resolve_budget(i / 100, 100) for i in range(1, 100)] == list(range(1, 100))


@pytest.mark.parametrize("B, words", [
    (0, "not a positive number"),
    (0.0, "not a positive number"),
    (-1e-4, "not a positive number"),
    (-3, "not a positive number"),
    (math.nan, "not a positive number"),
    (math.inf, "not a positive number"),
    (True, "not a positive number"),
    ("1e-3", "not a positive number"),
    (None, "not a positive number"),
    (1j, "not a positive number"),
    (1.5, "not a whole number"),
    (1e-9, "is 0 parameters"),
])
def test_what_is_no_budget_is_refused(B, words):
    with pytest.raises(ValueError, match=words):
        resolve_budget(B, 1_000_000)


def test_budgets_at_the_limits_pass_and_beyond_them_are_refused_with_both_limits():
    n = torch.tensor([384, 768, 1_536])
    check_budget(384, n)
    check_budget(2_688, n)
    with pytest.raises(ValueError, match="no module fits.* 384 to 2,688"):
        check_budget(383, n)
    with pytest.raises(ValueError, match="nothing to search.* 384 to 2,688"):
        check_budget(2_689, n)
    with pytest.raises(ValueError, match="no module fits"):
        check_budget(math.nan, n)


@pytest.mark.parametrize("n", [[], [3, 0], [3, -1], [[3, 4]], [math.nan]])
def test_sizes_have_to_be_positive_numbers_in_a_vector(n):
    with pytest.raises(ValueError, match="sizes"):
        check_budget(3, n)
    with pytest.raises(ValueError, match="sizes"):
        solve_zeta(np.zeros(np.shape(n)), n, 3)


def test_expected_size_sums_in_float64_and_refuses_to_broadcast():
    p = torch.full((1_000_000,), 0.1, dtype=torch.float32, requires_grad=True)
    n = torch.ones(1_000_000, dtype=torch.int64)
    assert expected_size(p, n) == pytest.approx(1e6 * float(np.float32(0.1)), rel=1e-12)
    assert type(expected_size([0.5], [4])) is float
    with pytest.raises(ValueError, match="one of each"):
        expected_size([0.5], [4, 4])


def halve(alpha, n, B, tau):
    "zeta by plain halving, with sums rounded once."
    low, high = float(alpha.min()) - 60 * tau, float(alpha.max()) + 60 * tau
    for _ in range(300):
        middle = (low + high) / 2
        p = [1 / (1 + math.exp(min((middle - a) / tau, 700))) for a in alpha]
        too_big = math.fsum(p_i * n_i for p_i, n_i in zip(p, n)) > B
        low, high = (middle, high) if too_big else (low, middle)
    return high


@pytest.mark.parametrize("tau", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(5))
def test_zeta_is_the_one_that_halving_finds(seed, tau):
    rng = np.random.default_rng(seed)
    alpha = rng.normal(size=40) * 3
    n = rng.integers(1, 10_000, size=40)
    for B in rng.integers(n.min(), n.sum() // 2, size=5):
        found, by_halving = solve_zeta(alpha, n, int(B), tau), halve(alpha, n, int(B), tau)
        assert found == pytest.approx(by_halving, abs=1e-9 * tau)


@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("exponent", [-4, -1, 0, 1, 2, 3])
def test_expected_size_never_passes_the_budget_and_reaches_it(exponent, tau):
    rng = np.random.default_rng([exponent + 4, int(100 * tau)])
    for size in rng.integers(2, 400, size=20):
        spread, in_groups = rng.normal(size=size), rng.choice([-1.0, 0.0, 1.0], size=size)
        alpha = rng.choice([spread, in_groups]) * 10.0 ** exponent
        n = np.floor(10 ** rng.uniform(0, 6, size=size))
        most = n.sum() - 1
        top = min(n[alpha == alpha.max()].sum(), most)
        for B in map(int, {n.min(), top, rng.integers(n.min(), most), most}):
            zeta = solve_zeta(alpha, n, B, tau)
            reached = expected_size(expit((alpha - zeta) / tau), n)
            other = expected_size(torch.sigmoid((torch.tensor(alpha) - zeta) / tau), n)
            assert B * (1 - 1e-9) < min(reached, other)
            assert max(reached, other) <= B


def in_forty_digits(alpha, n, zeta, tau):
    "E[N] for exactly these floats."
    with localcontext() as context:
        context.prec, context.Emin = 40, -999_999
        zeta, tau = Decimal(zeta), Decimal(tau)
        gates = (1 / (1 + ((zeta - Decimal(a)) / tau).exp()) for a in alpha.tolist())
        return sum(gate * int(n_i) for gate, n_i in zip(gates, n))


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e3])
def test_the_budget_is_met_in_forty_digits(spread, tau):
    rng = np.random.default_rng([int(spread), int(tau * 100)])
    for alpha in (rng.uniform(-spread, spread, size=300), rng.choice([-spread, 0.0, spread], size=300)):
        n = np.floor(10 ** rng.uniform(0, 6, size=300))
        for B in (int(n.min()), int(n.sum()) // 50, int(n.sum()) - 1):
            reached = in_forty_digits(alpha, n, solve_zeta(alpha, n, B, tau), tau)
            assert B * (1 - Decimal("1e-9")) < reached <= B


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e3])
def test_a_million_candidates_of_sizes_over_six_orders(spread):
    rng = np.random.default_rng(int(spread))
    alpha = rng.uniform(-spread, spread, size=1_000_000)
    n = np.floor(10 ** rng.uniform(0, 6, size=1_000_000))
    for B in (int(n.min()), 12_345, int(n.sum() * 2e-2), int(n.sum()) - 1):
        p = expit(alpha - solve_zeta(alpha, n, B))
        in_any_order = [expected_size(p, n), np.cumsum(p * n)[-1], p @ n, np.cumsum((p * n)[::-1])[-1]]
        assert max(in_any_order) <= B
        assert min(in_any_order) > B * (1 - 1e-9)
        assert B * (1 - 1e-9) < math.fsum(p * n) <= B


def test_where_one_ulp_of_zeta_is_coarse_the_budget_still_holds():
    alpha = np.array([1e3, 1e3 + 1e-9, 999.0])
    n = np.array([100, 200, 300])
    for tau in (1e-10, 1e-12):
        for B in (100, 150, 250, 599):
            zeta = solve_zeta(alpha, n, B, tau)
            assert expected_size(expit((alpha - zeta) / tau), n) <= B


@pytest.mark.parametrize("place", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14, 1e-16, 1e-18])
def test_what_is_left_of_the_budget_is_a_few_steps_of_zeta(place, tau):
    alpha, n = np.full(1_000, place), np.full(1_000, 384)
    step = np.spacing(1e3) / tau if place else 1e-10
    for B in (384, 38_400, 200_000, 383_999):
        zeta = solve_zeta(alpha, n, B, tau)
        reached = expected_size(expit((alpha - zeta) / tau), n)
        assert reached <= B
        assert 1 - reached / B < max(1e-10, 20 * step)


def test_alpha_zero_gives_uniform_probabilities():
    p = expit(-solve_zeta(torch.zeros(916), torch.tensor(MIX), 102_462))
    assert p == pytest.approx(102_462 / MIX.sum(), rel=1e-10)


def test_a_shift_of_alpha_shifts_zeta_and_more_budget_lowers_it():
    alpha = np.random.default_rng(3).normal(size=916)
    zetas = [solve_zeta(alpha, MIX, B) for B in (2_000, 20_000, 200_000, 1_500_000)]
    assert zetas == sorted(zetas, reverse=True)
    assert solve_zeta(alpha + 5, MIX, 20_000) == pytest.approx(zetas[1] + 5, abs=1e-9)


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_with_the_whole_space_in_the_budget_every_gate_is_open(more):
    alpha = np.random.default_rng(4).normal(size=916) * 100
    zeta = solve_zeta(alpha, MIX, int(MIX.sum()) + more)
    assert zeta == pytest.approx(alpha.min() - 60, rel=1e-15)
    assert (expit(alpha - zeta) == 1).all()
    assert expected_size(expit(alpha - zeta), MIX) == MIX.sum()


def test_tensors_arrays_and_lists_agree_and_alpha_keeps_its_graph_to_itself():
    alpha = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    n = [10, 20, 30, 40]
    zeta = solve_zeta(alpha, torch.tensor(n), 25)
    assert type(zeta) is float
    assert zeta == solve_zeta(alpha.detach().numpy(), np.array(n), 25) == solve_zeta(alpha.tolist(), n, 25)
    assert solve_zeta(alpha.detach().to(torch.bfloat16), n, 25) == pytest.approx(zeta, abs=0.05)


@pytest.mark.parametrize("alpha, B, tau, words", [
    ([0, 0, 0], 9, 1.0, "no module fits.* 10 to 60"),
    ([0, 0, 0], math.nan, 1.0, "no module fits"),
    ([0, math.nan, 0], 30, 1.0, "finite"),
    ([0, math.inf, 0], 30, 1.0, "finite"),
    ([0, 0], 30, 1.0, "alpha must be 3"),
    ([0, 0, 0], 30, 0.0, "tau"),
    ([0, 0, 0], 30, -1.0, "tau"),
    ([0, 0, 0], 30, math.nan, "tau"),
])
def test_what_has_no_answer_is_refused(alpha, B, tau, words):
    with pytest.raises(ValueError, match=words):
        solve_zeta(alpha, [10, 20, 30], B, tau)
