"alpha -> p -> z: values to the bit, gradients in closed form, and nothing that is not finite."

import dataclasses
import math

import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.model.budget import expected_size
from s3pet_nb.model.gate import (GATES, Annealed, Gate, HardConcrete, ShiftedSigmoid, StraightThrough,
                                 binary_concrete, gate_of, gate_record, geometric, linear, shifted_sigmoid)

ENDS = torch.tensor([0.0, 5e-324, 2.3e-308, 1e-300, 1e-17, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)


def draws(seed, *shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alphas(seed, size, spread=1.0):
    noise = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise * spread).requires_grad_()


@pytest.mark.parametrize("scope", ["global", "local"])
def test_both_forms_have_every_bit_of_the_sigmoid(scope):
    for seed in range(50):
        alpha = alphas(seed, 1 + 37 * seed, spread=10.0 ** (seed % 4))
        zeta, tau = seed / 7 - 3, 0.1 + seed / 10
        p = shifted_sigmoid(alpha, zeta, tau, scope)
        assert p.dtype == torch.float64
        assert torch.equal(p, torch.sigmoid((alpha - zeta) / tau))


@pytest.mark.parametrize("seed", range(20))
def test_the_gradient_is_the_closed_form(seed):
    alpha, w = alphas(seed, 12), draws(seed + 100, 12) - 0.5
    zeta, tau = 0.3 * seed - 3, 0.5 + seed / 10
    p = torch.sigmoid((alpha.detach() - zeta) / tau)
    slope = p * (1 - p) / tau
    local, = torch.autograd.grad((w * shifted_sigmoid(alpha, zeta, tau, "local")).sum(), alpha)
    competing, = torch.autograd.grad((w * shifted_sigmoid(alpha, zeta, tau)).sum(), alpha)
    torch.testing.assert_close(local, slope * w, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(competing, slope * (w - (p * w).sum() / p.sum()), rtol=1e-11, atol=1e-15)
    assert (competing - local).abs().max() > 1e-3 * local.abs().max()


@pytest.mark.parametrize("size", [2, 916, 100_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e3])
def test_the_global_gradient_is_the_closed_form_to_1e_12(size, spread):
    "The scale of an entry is the larger of the two terms whose difference it is."
    alpha, w = alphas(size, size, spread), draws(size + 1, size) - 0.5
    gate = ShiftedSigmoid()
    n = (1 + 1_000 * draws(size + 2, size)).floor()
    zeta = gate.solve(alpha, n, int(max(n.min(), n.sum() // 5)))
    found, = torch.autograd.grad((w * gate.p(alpha, zeta)).sum(), alpha)
    p = torch.sigmoid(alpha.detach() - zeta)
    slope, average = p * (1 - p), math.fsum((p * w).tolist()) / math.fsum(p.tolist())
    scale = slope * torch.maximum(w.abs(), torch.full_like(w, abs(average)))
    assert slope.max() > 0
    assert ((found - slope * (w - average)).abs() <= 1e-12 * scale).all()


def test_the_gradient_is_the_numerical_one_with_the_stopped_sum_held_constant():
    alpha, w, step = alphas(1, 7), draws(2, 7), 1e-6
    stopped = torch.sigmoid(alpha.detach() - 0.4).sum()

    def loss(alpha):
        p = torch.sigmoid(alpha - 0.4)
        return (w * p * stopped / p.sum()).sum()

    moves = step * torch.eye(7, dtype=torch.float64)
    numerical = torch.stack([(loss(alpha + m) - loss(alpha - m)) / (2 * step) for m in moves]).detach()
    found, = torch.autograd.grad((w * shifted_sigmoid(alpha, 0.4)).sum(), alpha)
    torch.testing.assert_close(found, numerical, rtol=1e-7, atol=1e-10)
    assert torch.autograd.gradcheck(lambda a: shifted_sigmoid(a, 0.4, 1.3, "local"), (alpha,))


def test_equal_slopes_move_nothing_in_the_global_form_and_everything_in_the_local():
    alpha = alphas(3, 9)
    competing, = torch.autograd.grad(shifted_sigmoid(alpha, 0.0).sum(), alpha)
    local, = torch.autograd.grad(shifted_sigmoid(alpha, 0.0, scope="local").sum(), alpha)
    assert competing.abs().max() < 1e-15
    assert local.min() > 1e-3


def test_gates_that_are_all_shut_have_finite_values_and_gradients():
    alpha = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    p = shifted_sigmoid(alpha, 1e4)
    slope, = torch.autograd.grad(p.sum(), alpha)
    assert torch.equal(p, torch.zeros_like(p))
    assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("beta", [0.01, 0.1, 2 / 3, 1.0, 5.0, 100.0])
def test_a_sample_is_above_a_half_exactly_where_u_is_above_one_minus_p(beta):
    p, u = draws(5, 200_000), draws(6, 200_000)
    assert torch.equal(binary_concrete(p, u, beta) > 0.5, u > 1 - p)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_the_share_of_samples_above_a_half_is_p(p, beta):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z = binary_concrete(torch.full_like(u, p), u, beta)
    assert (z > 0.5).double().mean().item() == pytest.approx(p, abs=1.1e-5)


def within_sampling_error(share, p, draws):
    "Five standard deviations of a binomial share: one false alarm in two million."
    return abs(share - p) <= 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("kind", [ShiftedSigmoid, StraightThrough])
def test_the_share_of_samples_above_a_half_is_p_to_sampling_error(kind, beta):
    for i, p in enumerate([1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.999]):
        u = draws(i, 400_000)
        z = kind(beta=beta).z(torch.full_like(u, p), u)
        assert within_sampling_error((z > 0.5).double().mean().item(), p, 400_000)
    assert not within_sampling_error(0.052, 0.05, 400_000)


def test_samples_are_the_binary_concrete_formula():
    p, u = draws(7, 1_000), draws(8, 1_000)
    for beta in (0.5, 1.0, 3.0):
        odds = (u * p / ((1 - u) * (1 - p))) ** (1 / beta)
        torch.testing.assert_close(binary_concrete(p, u, beta), odds / (1 + odds), rtol=1e-10, atol=0)


def test_the_gradient_of_a_sample():
    p, u = (0.05 + 0.9 * draws(9, 20)).requires_grad_(), draws(10, 20)
    for beta in (0.5, 1.0, 3.0):
        assert torch.autograd.gradcheck(lambda p: binary_concrete(p, u, beta), (p,))
        z = binary_concrete(p, u, beta)
        slope, = torch.autograd.grad(z.sum(), p)
        torch.testing.assert_close(slope, (z * (1 - z) / (beta * p * (1 - p))).detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 100.0])
def test_the_ends_are_finite_and_on_the_right_side(dtype, beta):
    p, u = torch.meshgrid(ENDS.to(dtype), ENDS.to(dtype), indexing="ij")
    p = p.clone().requires_grad_()
    z = binary_concrete(p, u, beta)
    slope, = torch.autograd.grad(z.sum(), p)
    assert z.isfinite().all()
    assert slope.isfinite().all()
    assert 0 <= z.min() and z.max() <= 1
    assert (z[0, :-1] < 0.5).all()
    assert (z[-1, 5:] > 0.5).all()


def test_small_probabilities_are_not_lost_to_the_clamp():
    u = torch.tensor([0.5, 0.5], dtype=torch.float64)
    z = binary_concrete(torch.tensor([1e-20, 1e-200], dtype=torch.float64), u)
    torch.testing.assert_close(z, torch.tensor([1e-20, 1e-200], dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_gradient_flows_from_a_sample_to_alpha_at_any_spread():
    gate = ShiftedSigmoid()
    n = torch.full((200,), 100)
    for seed, spread in enumerate((0.0, 1.0, 30.0, 1e3)):
        alpha = alphas(seed, 200, spread)
        p = gate.p(alpha, gate.solve(alpha, n, 1_000))
        slope, = torch.autograd.grad(gate.z(p, draws(seed, 200)).square().sum(), alpha)
        assert slope.isfinite().all()
        assert slope.abs().max() > 0


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_the_exported_probabilities_meet_the_budget(share, scope):
    for seed in range(60):
        size = 1 + 13 * seed
        alpha = alphas(seed, size, spread=10.0 ** (seed % 5 - 1))
        n = (10 ** (6 * draws(seed + 1, size))).floor().long()
        gate = ShiftedSigmoid(tau=0.2 + seed % 4, scope=scope)
        B = int(n.min()) + int(share * int(n.sum() - n.min()))
        p = gate.p(alpha, gate.solve(alpha, n, B))
        assert B * (1 - 1e-9) < expected_size(p, n) <= B
        assert (p.detach() * n).sum().item() <= B


def test_at_the_start_p_is_uniform_and_with_the_whole_budget_it_is_one():
    alpha, n = torch.zeros(110, dtype=torch.float64), torch.arange(1, 111)
    gate = ShiftedSigmoid(tau=0.5)
    p = gate.p(alpha, gate.solve(alpha, n, 305))
    torch.testing.assert_close(p, torch.full_like(p, 305 / 6_105), rtol=1e-10, atol=0)
    assert torch.equal(gate.p(alpha, gate.solve(alpha, n, 6_105)), torch.ones_like(alpha))


def test_the_gate_passes_its_settings_on():
    alpha, u = alphas(1, 6), draws(2, 6)
    gate = ShiftedSigmoid(tau=2.0, beta=0.3, scope="local")
    p = gate.p(alpha, 0.5)
    assert torch.equal(p, torch.sigmoid((alpha - 0.5) / 2))
    assert torch.equal(gate.z(p, u), binary_concrete(p, u, 0.3))
    slope, = torch.autograd.grad(p.sum(), alpha)
    assert slope.min() > 0
    assert ShiftedSigmoid() == ShiftedSigmoid(1.0, 1.0, "global")
    with pytest.raises(dataclasses.FrozenInstanceError):
        gate.tau = 1.0


@pytest.mark.parametrize("name", ["tau", "beta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_have_to_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        ShiftedSigmoid(**{name: value})


def test_an_unknown_scope_names_the_near_one():
    with pytest.raises(UnknownName, match="did you mean 'global'"):
        ShiftedSigmoid(scope="globl")
    with pytest.raises(UnknownName, match="did you mean 'local'"):
        shifted_sigmoid(torch.zeros(2), 0.0, scope="locl")


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_straight_through_is_a_step_forwards_and_the_soft_sample_backwards(beta):
    p, u = draws(1, 10_000).requires_grad_(), draws(2, 10_000)
    w = draws(3, 10_000) - 0.5
    z, soft = StraightThrough(beta=beta).z(p, u), binary_concrete(p, u, beta)
    assert z.dtype == p.dtype
    assert torch.equal(z, (u > 1 - p).double())
    found, wanted = (torch.autograd.grad((w * sample).sum(), p)[0] for sample in (z, soft))
    assert torch.equal(found, wanted)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("beta", [0.1, 2 / 3, 3.0])
@pytest.mark.parametrize("low, high", [(-0.1, 1.1), (-1.0, 1.5)])
def test_hard_concrete_samples_are_louizos_formula(beta, low, high):
    gate = HardConcrete(beta, low, high)
    alpha, u = 12 * draws(1, 1_000) - 6, draws(2, 1_000)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + alpha) / beta)
    z, p = gate.z(gate.p(alpha), u), gate.p(alpha)
    torch.testing.assert_close(z, (s * (high - low) + low).clamp(0, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(p, torch.sigmoid(alpha - beta * math.log(-low / high)))
    torch.testing.assert_close(gate.expected(p), (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1))
    assert {0.0, 1.0} < set(z.tolist())


@pytest.mark.parametrize("beta", [0.1, 2 / 3, 1.0, 3.0])
def test_the_share_of_open_hard_concrete_gates_is_p_and_above_a_half_it_is_not(beta):
    gate = HardConcrete(beta=beta)
    for i, alpha in enumerate(torch.linspace(-6, 6, 9, dtype=torch.float64)):
        p, u = gate.p(alpha), draws(i, 400_000)
        z = gate.z(p.expand_as(u), u)
        assert within_sampling_error((z > 0).double().mean().item(), p.item(), 400_000)
    p = gate.p(torch.zeros((), dtype=torch.float64))
    above = (gate.z(p.expand_as(u), u) > 0.5).double().mean().item()
    assert within_sampling_error(above, 0.5, 400_000)
    assert not within_sampling_error(above, p.item(), 400_000)


def test_the_penalty_is_the_sum_of_p_and_its_gradient_the_closed_form():
    alpha = alphas(4, 50, spread=3.0)
    for weight in (0.0, 0.3):
        gate = HardConcrete(weight=weight)
        p = gate.p(alpha)
        penalty = gate.penalty(p)
        assert penalty.item() == pytest.approx(weight * p.sum().item(), rel=1e-14)
        slope, = torch.autograd.grad(penalty, alpha)
        torch.testing.assert_close(slope, (weight * p * (1 - p)).detach(), rtol=1e-12, atol=1e-16)


def test_a_weight_that_is_left_open_is_no_penalty_and_one_below_0_pays():
    p = HardConcrete().p(alphas(2, 30))
    assert HardConcrete(weight=None).penalty(p) == 0
    assert HardConcrete(weight=-0.1).penalty(p) == -0.1 * p.sum()
    assert gate_of(gate_record(HardConcrete(weight=None))) == HardConcrete(weight=None)


def test_the_gradient_of_a_hard_concrete_sample():
    gate, alpha, u = HardConcrete(), alphas(5, 200), draws(6, 200)
    z = gate.z(gate.p(alpha), u)
    slope, = torch.autograd.grad(z.sum(), alpha)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + alpha.detach()) / gate.beta)
    inside = (z > 0) & (z < 1)
    assert 20 < inside.sum() < 180
    wanted = torch.where(inside, 1.2 * s * (1 - s) / gate.beta, 0.0)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=0)


def test_nothing_shifts_a_hard_concrete_gate():
    alpha = alphas(7, 20)
    for B in (100, 500, 10**9):
        assert HardConcrete().solve(alpha, [100] * 20, B) == 0.0


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_every_gate_by_name_is_finite_for_alpha_over_a_thousand(name, beta):
    gate = GATES[name](beta=beta)
    assert isinstance(gate, Gate)
    alpha = torch.cat([torch.linspace(-1e3, 1e3, 101), torch.linspace(-1, 1, 20)]).double().requires_grad_()
    n = torch.full((121,), 384)
    p = gate.p(alpha, gate.solve(alpha, n, 10_000))
    assert ((0 <= p) & (p <= 1)).all()
    for u in (*ENDS, draws(1, 121)):
        z = gate.z(p, u.expand(121))
        assert ((0 <= z) & (z <= 1)).all()
        slope, = torch.autograd.grad((z * alpha.detach()).sum() + gate.penalty(p), alpha, retain_graph=True)
        assert slope.isfinite().all()
    expected = gate.expected(p)
    assert expected.shape == (121,)
    assert ((0 <= expected) & (expected <= 1)).all()


@pytest.mark.parametrize("name, made", [
    ("global", ShiftedSigmoid(beta=0.5)),
    ("local", ShiftedSigmoid(beta=0.5, scope="local")),
    ("straight-through", StraightThrough(beta=0.5)),
    ("hard-concrete", HardConcrete(beta=0.5)),
])
def test_names_make_gates_from_settings(name, made):
    gate = GATES[name](beta=0.5)
    assert gate == made and type(gate) is type(made)
    p = draws(1, 5)
    assert gate.at(0.0) is gate.at(1.0) is gate
    if name != "hard-concrete":
        assert torch.equal(gate.expected(p), p)
        assert gate.penalty(p).shape == () and gate.penalty(p) == 0


def test_unknown_gates_and_settings_name_the_near_ones():
    with pytest.raises(UnknownName, match="did you mean 'hard-concrete'"):
        GATES["hard_concrete"]
    with pytest.raises(UnknownName, match="setting of the gate HardConcrete 'wieght'; did you mean 'weight'"):
        GATES["hard-concrete"](wieght=0.1)
    for fixed in ("local", "global"):
        with pytest.raises(UnknownName, match="'scope'; choose one of beta, tau"):
            GATES[fixed](scope="local")


@pytest.mark.parametrize("settings, words", [
    (dict(beta=0.0), "beta must be a positive number"),
    (dict(low=0.0), "from below 0 to above 1"),
    (dict(low=-math.inf), "from below 0 to above 1"),
    (dict(high=1.0), "from below 0 to above 1"),
    (dict(high=math.nan), "from below 0 to above 1"),
    (dict(weight=-math.inf), "weight must be"),
    (dict(weight=math.nan), "weight must be"),
])
def test_hard_concrete_refuses_what_makes_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        HardConcrete(**settings)


def test_schedules_go_from_start_to_end():
    assert [linear(1.0, 0.2)(x) for x in (0.0, 0.5, 1.0)] == [1.0, 0.6, 0.2]
    assert [geometric(1.0, 0.01)(x) for x in (0.0, 1.0)] == [1.0, 0.01]
    assert geometric(1.0, 0.01)(0.5) == pytest.approx(0.1)
    for start, end in ((0.3, 0.07), (3.0, 1e-3)):
        assert [schedule(x) for schedule in (linear(start, end), geometric(start, end))
                for x in (0.0, 1.0)] == [start, end] * 2
    for wrong in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="positive"):
            geometric(*wrong)


@pytest.mark.parametrize("kind", [ShiftedSigmoid, StraightThrough])
def test_an_annealed_gate_is_the_plain_one_of_its_time_and_the_first_until_then(kind):
    gate = Annealed(kind(tau=2.0, scope="local"), tau=linear(1.0, 0.1), beta=geometric(1.0, 0.01))
    assert gate.at(0.0) == kind(1.0, 1.0, "local") and type(gate.at(0.5)) is kind
    assert gate.at(1.0) == kind(0.1, 0.01, "local")
    alpha, u, n = alphas(1, 30), draws(2, 30), torch.full((30,), 10)
    first = gate.at(0.0)
    zeta = gate.solve(alpha, n, 50)
    p = gate.p(alpha, zeta)
    assert zeta == first.solve(alpha, n, 50) != gate.at(0.5).solve(alpha, n, 50)
    assert torch.equal(p, first.p(alpha, zeta))
    assert torch.equal(gate.z(p, u), first.z(p, u))
    assert torch.equal(gate.expected(p), p) and gate.penalty(p) == 0
    assert Annealed(kind(tau=2.0), beta=linear(1, 0.5)).at(0.5) == kind(tau=2.0, beta=0.75)


def test_an_annealed_hard_concrete_gate_keeps_its_penalty():
    gate = Annealed(HardConcrete(weight=0.1), beta=linear(1.0, 0.5))
    p = draws(1, 10)
    assert gate.at(1.0) == HardConcrete(beta=0.5, weight=0.1)
    assert gate.penalty(p) == 0.1 * p.sum()
    assert torch.equal(gate.expected(p), HardConcrete(beta=1.0).expected(p))


def test_what_cannot_be_annealed_is_refused():
    with pytest.raises(ValueError, match="HardConcrete has no tau"):
        Annealed(HardConcrete(), tau=linear(1.0, 0.1))
    with pytest.raises(ValueError, match="beta must be a positive number"):
        Annealed(ShiftedSigmoid(), beta=linear(0.0, 1.0))
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress must be between 0 and 1"):
            Annealed(ShiftedSigmoid()).at(progress)


@pytest.mark.parametrize("gate", [ShiftedSigmoid(), HardConcrete(), StraightThrough(),
                                  Annealed(StraightThrough(), beta=linear(1.0, 0.1))])
def test_a_closed_gate_lets_neither_a_change_nor_a_gradient_through(gate):
    p = torch.linspace(0, 1, 1_001, dtype=torch.float64, requires_grad=True)
    z = gate.z(p, torch.full_like(p, 0.5))
    slope, = torch.autograd.grad(z.sum(), p)
    closed = gate.closed(z)
    assert z[closed].eq(0).all() and slope[closed].eq(0).all()
    assert gate.closed(z.detach()).eq(z == 0).all()


def test_hard_concrete_closes_and_straight_through_does_not():
    p = torch.full((1_000,), 0.2, dtype=torch.float64, requires_grad=True)
    u = torch.rand(1_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert HardConcrete().closed(HardConcrete().z(p, u)).any()
    assert not StraightThrough().closed(StraightThrough().z(p, u)).any()
