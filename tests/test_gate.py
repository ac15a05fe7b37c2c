"alpha -> p -> z: values to the bit, gradients in closed form, and nothing that is not finite."

import dataclasses
import math

import pytest
import torch

from s3pet_nb.budget import expected_size
from s3pet_nb.core import UnknownName
from s3pet_nb.gate import ShiftedSigmoid, binary_concrete, shifted_sigmoid

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
