"The hypergradient: closed forms, autograd through the whole virtual step, and what it must leave alone."

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import Parameter

from s3pet_nb.bilevel import ORDERS, hypergrad, hvp_exact, hvp_fd, moved
from s3pet_nb.core import UnknownName
from s3pet_nb.gate import ShiftedSigmoid

MIXED_ORDERS = [order for order in ORDERS if order != "first"]


def real(value):
    return Parameter(torch.tensor(value, dtype=torch.float64))


class Quadratic:
    "L_delta = h/2 d² + c a d, L_alpha = k/2 (d - t)² + m a d + a²/2, both counted."

    h, c, k, t, m, xi = 2.0, 3.0, 0.5, 1.0, -0.7, 0.1

    def __init__(self, d=0.7, a=-0.4):
        self.d, self.a, self.calls = real(d), real(a), []

    def loss_delta(self):
        self.calls.append("delta")
        return self.h / 2 * self.d ** 2 + self.c * self.a * self.d

    def loss_alpha(self):
        self.calls.append("alpha")
        return self.k / 2 * (self.d - self.t) ** 2 + self.m * self.a * self.d + self.a ** 2 / 2

    def expected(self):
        d, a = self.d.item(), self.a.item()
        virtual = d - self.xi * (self.h * d + self.c * a)
        v = self.k * (virtual - self.t) + self.m * a
        return self.m * virtual + a, self.xi * self.c * v


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("d, a", [(0.7, -0.4), (-2.0, 1.5), (0.0, 0.3)])
def test_a_quadratic_in_closed_form(order, d, a):
    q = Quadratic(d, a)
    result = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, order)
    direct, mixed = q.expected()
    assert abs(mixed) > 0.02
    assert result.delta_grads[0].item() == pytest.approx(q.h * d + q.c * a, rel=1e-12)
    assert result.loss_delta == pytest.approx(q.h / 2 * d ** 2 + q.c * a * d, rel=1e-12)
    assert type(result.loss_delta) is type(result.loss_alpha) is float
    if order == "first":
        assert result.mixed is None
        assert result.alpha_grad.item() == pytest.approx(direct, rel=1e-12)
    else:
        assert result.mixed.item() == pytest.approx(mixed, rel=1e-10)
        assert result.alpha_grad.item() == pytest.approx(direct - mixed, rel=1e-10)


def test_the_loss_of_alpha_is_the_one_after_the_virtual_step():
    q = Quadratic()
    result = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi)
    virtual = 0.7 - q.xi * (q.h * 0.7 + q.c * -0.4)
    wanted = q.k / 2 * (virtual - q.t) ** 2 + q.m * -0.4 * virtual + 0.08
    assert result.loss_alpha == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("order, calls", [
    ("first", ["delta", "alpha"]),
    ("second", ["delta", "alpha", "delta"]),
    ("central", ["delta", "alpha", "delta", "delta"]),
    ("exact", ["delta", "alpha", "delta"]),
])
def test_passes_are_the_calls_of_the_closures(order, calls):
    q = Quadratic()
    result = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, order)
    assert q.calls == calls
    assert result.passes == len(calls)


class Gated(nn.Module):
    "Two frozen layers with four gated rank-one changes each."

    def __init__(self, dtype):
        super().__init__()
        self.frozen = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).requires_grad_(False)
        self.A = nn.ParameterList([torch.randn(4, 6) / 2 for _ in range(2)])
        self.B = nn.ParameterList([torch.randn(4, 6) / 2 for _ in range(2)])
        self.to(dtype)

    def forward(self, H, z):
        z = z.to(H.dtype)
        for i in range(2):
            gates = z[4 * i:4 * i + 4]
            H = torch.tanh(self.frozen[i](H)) + (torch.tanh(H @ self.A[i].T) * gates) @ self.B[i]
        return H


class Problem:
    "A small network under gates, with its two losses."

    def __init__(self, seed, dtype=torch.float64, xi=0.05):
        torch.manual_seed(seed)
        self.net, self.xi = Gated(dtype), xi
        self.alpha = Parameter(torch.randn(8, dtype=torch.float64))
        self.u = torch.rand(8, dtype=torch.float64)
        self.X, self.Y = torch.randn(2, 2, 16, 6, dtype=dtype)
        self.gate = ShiftedSigmoid()
        self.zeta = self.gate.solve(self.alpha, [12] * 8, 40)
        self.trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self.delta = list(self.trained.values())

    def loss(self, half, weights):
        z = self.gate.z(self.gate.p(self.alpha, self.zeta), self.u)
        return (functional_call(self.net, weights, (self.X[half], z)) - self.Y[half]).square().mean()

    def hypergrad(self, order, delta=None):
        losses = (lambda: self.loss(0, {}), lambda: self.loss(1, {}))
        return hypergrad(*losses, delta or self.delta, self.alpha, self.xi, order)

    def through_the_step(self, keep_graph):
        "grad_alpha L_alpha with the virtual step inside the graph, or with its result as a constant."
        gradients = torch.autograd.grad(self.loss(0, self.trained), self.delta, create_graph=keep_graph)
        virtual = {name: d - self.xi * g for (name, d), g in zip(self.trained.items(), gradients)}
        return torch.autograd.grad(self.loss(1, virtual), self.alpha)[0]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("seed", range(5))
def test_a_gated_network_against_autograd_through_the_whole_step(seed):
    problem = Problem(seed)
    total, direct = problem.through_the_step(True), problem.through_the_step(False)
    mixed = direct - total
    assert mixed.norm() > 1e-3 * direct.norm()
    first = problem.hypergrad("first")
    assert relative(first.alpha_grad, direct) < 1e-12
    for order, tolerance in (("exact", 1e-9), ("central", 1e-3), ("second", 5e-2)):
        result = problem.hypergrad(order)
        assert relative(result.mixed, mixed) < tolerance
        assert torch.equal(result.alpha_grad, first.alpha_grad - result.mixed)
    assert relative(problem.hypergrad("exact").alpha_grad, total) < 1e-11


def test_the_central_difference_is_nearer_than_the_one_sided():
    near = []
    for seed in range(5):
        problem = Problem(seed)
        exact = problem.hypergrad("exact").mixed
        near.append(relative(problem.hypergrad("central").mixed, exact)
                    < relative(problem.hypergrad("second").mixed, exact) / 10)
    assert all(near)


@pytest.mark.parametrize("order", MIXED_ORDERS)
def test_the_mixed_term_is_proportional_to_xi_where_the_step_is_small(order):
    small, smaller = Problem(0, xi=1e-6).hypergrad(order), Problem(0, xi=1e-7).hypergrad(order)
    assert relative(small.mixed, 10 * smaller.mixed) < 1e-3
    assert smaller.mixed.norm() > 0


@pytest.mark.parametrize("order", MIXED_ORDERS)
def test_single_precision_weights_under_double_precision_alpha(order):
    single, double = Problem(1, torch.float32), Problem(1, torch.float64)
    double.net.load_state_dict(single.net.state_dict())
    double.X, double.Y = single.X.double(), single.Y.double()
    double.alpha, double.u, double.zeta = single.alpha, single.u, single.zeta
    result = single.hypergrad(order)
    assert result.alpha_grad.dtype == result.mixed.dtype == torch.float64
    assert [g.dtype for g in result.delta_grads] == [torch.float32] * 4
    assert relative(result.mixed, double.hypergrad(order).mixed) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_alpha_on_the_cpu_and_weights_on_a_cuda_device(order):
    q = Quadratic()
    q.d = Parameter(torch.tensor(0.7, device="cuda"))
    result = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, order)
    direct, mixed = q.expected()
    assert result.alpha_grad.device.type == "cpu"
    assert result.delta_grads[0].device.type == "cuda"
    assert result.alpha_grad.item() == pytest.approx(direct - (0 if order == "first" else mixed), rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_their_grads_are_left_as_they_were(order, dtype):
    problem = Problem(2, dtype)
    before = [d.detach().clone() for d in problem.delta]
    places = [d.data_ptr() for d in problem.delta]
    marks = [torch.full_like(d, 7.0) for d in problem.delta[:2]]
    for d, mark in zip(problem.delta, marks):
        d.grad = mark
    alpha = problem.alpha.detach().clone()
    result = problem.hypergrad(order)
    assert all(torch.equal(d, b) for d, b in zip(problem.delta, before))
    assert [d.data_ptr() for d in problem.delta] == places
    assert torch.equal(problem.alpha, alpha)
    assert problem.alpha.grad is None
    assert problem.delta[0].grad is marks[0] and (marks[0] == 7).all() and (marks[1] == 7).all()
    assert all(d.grad is None for d in problem.delta[2:])
    assert not result.alpha_grad.requires_grad and not any(g.requires_grad for g in result.delta_grads)


@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_of_delta_is_the_one_of_the_first_pass(order):
    problem = Problem(3)
    plain = torch.autograd.grad(problem.loss(0, {}), problem.delta)
    found = problem.hypergrad(order)
    assert isinstance(found.delta_grads, list)
    assert all(torch.equal(f, p) for f, p in zip(found.delta_grads, plain, strict=True))
    assert found.loss_delta == problem.loss(0, {}).item()


@pytest.mark.parametrize("order, failing", [(order, i) for order in ORDERS for i in range(ORDERS[order])])
def test_weights_come_back_when_any_pass_fails(order, failing):
    q, seen = Quadratic(0.1, 0.2), []
    before = q.d.detach().clone()

    def failing_at(closure):
        def loss():
            seen.append(q.d.item())
            if len(seen) == failing + 1:
                raise FloatingPointError("loss is not finite")
            return closure()
        return loss

    with pytest.raises(FloatingPointError):
        hypergrad(failing_at(q.loss_delta), failing_at(q.loss_alpha), [q.d], q.a, q.xi, order)
    assert len(seen) == failing + 1
    assert torch.equal(q.d, before)


def test_moved_weights_keep_odd_bits():
    bits = torch.tensor([0.0, -0.0, 5e-324, float("nan"), float("inf"), 0.1], dtype=torch.float64)
    weight = Parameter(bits.clone())
    with moved([weight], [torch.ones(6, dtype=torch.float64)], 1e10):
        assert weight[0].item() == 1e10
    assert torch.equal(weight.detach().view(torch.int64), bits.view(torch.int64))


@pytest.mark.parametrize("order", ORDERS)
def test_a_loss_that_does_not_depend_on_a_variable_has_gradient_zero_for_it(order):
    d, unused, a = real([1.0, 2.0]), real(3.0), real([0.5, 0.5])
    plain = hypergrad(lambda: d.square().sum(), lambda: (d - 1).square().sum(), [d, unused], a, 0.1, order)
    assert torch.equal(plain.alpha_grad, torch.zeros_like(a))
    assert torch.equal(plain.delta_grads[1], torch.zeros_like(unused))
    for delta in ([d, unused], [d]):
        linear = hypergrad(lambda: d.sum(), lambda: (a * d).sum(), delta, a, 0.1, order)
        torch.testing.assert_close(linear.alpha_grad, (d - 0.1).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", MIXED_ORDERS)
def test_without_a_direction_the_mixed_term_is_zero_and_costs_nothing(order):
    q = Quadratic()
    result = hypergrad(q.loss_delta, lambda: q.a ** 2 / 2, [q.d], q.a, q.xi, order)
    assert result.mixed.item() == 0
    assert result.alpha_grad.item() == -0.4
    assert result.passes == 2 and q.calls == ["delta"]


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_virtual_step_only_the_direct_gradient_is_left(order):
    q = Quadratic()
    result = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, 0.0, order)
    assert result.alpha_grad.item() == pytest.approx(q.m * 0.7 - 0.4, rel=1e-12)


def test_delta_may_be_an_iterator():
    problem = Problem(4)
    once = problem.hypergrad("central", iter(problem.delta))
    assert torch.equal(once.alpha_grad, problem.hypergrad("central").alpha_grad)


def test_products_on_a_known_surface():
    d, a = real(3.0), real(2.0)
    v = [torch.tensor(5.0, dtype=torch.float64)]

    def loss():
        return a * d ** 3

    assert hvp_exact(loss, [d], a, v).item() == pytest.approx(135, rel=1e-12)
    assert hvp_fd(loss, [d], a, v, 1e-4).item() == pytest.approx(135, rel=1e-6)
    one_sided = hvp_fd(loss, [d], a, v, 1e-4, start=d.detach() ** 3).item()
    assert one_sided == pytest.approx(135, rel=1e-3)
    assert one_sided - 135 == pytest.approx(1e-4 * 5 ** 2 * 3 * 3, rel=1e-2)


def test_unknown_orders_and_impossible_rates_are_refused_before_any_pass():
    q = Quadratic()
    with pytest.raises(UnknownName, match="did you mean 'second'"):
        hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, "secnd")
    for xi in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="xi must be"):
            hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, xi)
    assert q.calls == []
