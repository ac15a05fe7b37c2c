"The hypergradient: closed forms, autograd through the whole virtual step, and what it must leave alone."

import json
import math
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import Parameter

from s3pet_nb.core import UnknownName
from s3pet_nb.learn import bilevel
from s3pet_nb.learn.bilevel import (ORDERS, Auto, Hypergradient, accumulate, hvp_exact, hvp_fd, hypergrad,
                                    moved)
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.gate import ShiftedSigmoid
from s3pet_nb.model.space import attach, make_space

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

    def loss(self, half, weights, rows=slice(None)):
        z = self.gate.z(self.gate.p(self.alpha, self.zeta), self.u)
        out = functional_call(self.net, weights, (self.X[half, rows], z))
        return (out - self.Y[half, rows]).square().sum() / self.Y[half].numel()

    def parts(self, half, cuts):
        for start, end in zip([0, *cuts], [*cuts, 16]):
            yield self.loss(half, {}, slice(start, end))

    def hypergrad(self, order, delta=None, cuts=None, **more):
        def losses(half):
            return lambda: self.loss(half, {}) if cuts is None else self.parts(half, cuts)

        return hypergrad(losses(0), losses(1), delta or self.delta, self.alpha, self.xi, order, **more)

    def through_the_step(self, keep_graph):
        "grad_alpha L_alpha with the virtual step inside the graph, or with its result as a constant."
        gradients = torch.autograd.grad(self.loss(0, self.trained), self.delta, create_graph=keep_graph)
        rates = [self.xi] * len(self.delta) if isinstance(self.xi, float) else self.xi
        virtual = {name: d - xi * g for (name, d), g, xi in zip(self.trained.items(), gradients, rates)}
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
        assert torch.equal(result.direct, first.direct)
        assert torch.equal(result.alpha_grad, first.direct - result.mixed)
    assert relative(problem.hypergrad("exact").alpha_grad, total) < 1e-11


def test_a_rate_of_its_own_for_each_weight_against_autograd_through_the_whole_step():
    problem = Problem(0, xi=[0.2, 0.01, 0.05, 0.0])
    total, direct = problem.through_the_step(True), problem.through_the_step(False)
    assert (direct - total).norm() > 1e-3 * direct.norm()
    assert relative(problem.hypergrad("first").alpha_grad, direct) < 1e-12
    assert relative(problem.hypergrad("exact").alpha_grad, total) < 1e-11
    for order, tolerance in (("central", 1e-3), ("second", 5e-2)):
        assert relative(problem.hypergrad(order).mixed, direct - total) < tolerance


@pytest.mark.parametrize("order", ORDERS)
def test_equal_rates_for_all_weights_are_one_rate(order):
    one, each = Problem(0, xi=0.05), Problem(0, xi=[0.05] * 4)
    assert relative(each.hypergrad(order).alpha_grad, one.hypergrad(order).alpha_grad) < 1e-9


def test_the_central_difference_is_nearer_than_the_one_sided():
    near = []
    for seed in range(5):
        problem = Problem(seed)
        exact = problem.hypergrad("exact").mixed
        near.append(relative(problem.hypergrad("central").mixed, exact)
                    < relative(problem.hypergrad("second").mixed, exact) / 10)
    assert all(near)


class Transformer:
    "A tiny model with every candidate of the Mix space, in float64, away from its start."

    xi = 0.01

    def __init__(self, gated):
        self.gated, draw = gated, torch.Generator().manual_seed(0)
        gated.pets.double()
        with torch.no_grad():
            for weight in gated.pets.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=draw)
            gated.alpha += torch.randn(len(gated.alpha), generator=draw)
        gated.meet(int(gated.n.sum() * 0.2))
        self.u = torch.rand(len(gated.alpha), dtype=torch.float64, generator=draw)
        self.batches = [example_batch(gated.model, 8, 10, seed) for seed in range(2)]
        self.trained = {name: weight for name, weight in gated.named_parameters()
                        if weight.requires_grad and weight is not gated.alpha}

    def loss(self, half, weights):
        self.gated.sample(self.u)
        return functional_call(self.gated, weights, kwargs=self.batches[half]).loss

    def hypergrad(self, order, **more):
        return hypergrad(lambda: self.loss(0, {}), lambda: self.loss(1, {}), list(self.trained.values()),
                         self.gated.alpha, self.xi, order, **more)

    def through_the_step(self):
        "grad_alpha L_alpha with the virtual step inside the graph."
        delta = list(self.trained.values())
        gradients = torch.autograd.grad(self.loss(0, self.trained), delta, create_graph=True)
        virtual = {name: d - self.xi * g for (name, d), g in zip(self.trained.items(), gradients)}
        return torch.autograd.grad(self.loss(1, virtual), self.gated.alpha)[0]


@pytest.fixture(params=["bert", "gpt2", "llama"])
def transformer(request):
    calm = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) if request.param == "bert" else {}
    model = tiny(request.param, attn_implementation="eager", **calm).double()
    with attach(model, make_space(model)) as gated:
        yield Transformer(gated)


def check_the_differences(problem, radius, second, central):
    "Both differences are within these bounds of the exact mixed term, relative to it."
    exact = problem.hypergrad("exact").mixed
    assert exact.norm() > 0
    for order, bound in (("second", second), ("central", central)):
        assert relative(problem.hypergrad(order, radius=radius).mixed, exact) < bound


def test_the_orders_agree_on_a_transformer(transformer):
    check_the_differences(transformer, 1e-2, second=0.5, central=0.1)
    check_the_differences(transformer, 1e-3, second=0.05, central=2e-3)


def test_the_exact_order_is_autograd_through_the_whole_step_of_a_transformer(transformer):
    "The gates of a model are float32, hence the bound."
    found, total = transformer.hypergrad("exact"), transformer.through_the_step()
    assert found.share > 1e-3
    assert relative(found.alpha_grad, total) < 1e-6
    assert relative(found.mixed, found.direct - total) < 1e-3


def multiplied(loss, delta, alpha, v, eps, start=None, reduce=list):
    "The slip: a difference of slopes times the length of the move."
    return hvp_fd(loss, delta, alpha, v, eps, start, reduce) * eps ** 2


class QuadraticProblem:
    def hypergrad(self, order, **more):
        q = Quadratic()
        return hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, order, **more)


def check_is_caught(problem, monkeypatch):
    check_the_differences(problem, 1e-3, second=0.05, central=2e-3)
    monkeypatch.setattr(bilevel, "hvp_fd", multiplied)
    for order in ("second", "central"):
        found, exact = problem.hypergrad(order), problem.hypergrad("exact")
        assert relative(found.mixed, exact.mixed) > 0.9
    with pytest.raises(AssertionError):
        check_the_differences(problem, 1e-3, second=0.05, central=2e-3)


@pytest.mark.parametrize("problem", [QuadraticProblem, lambda: Problem(0), lambda: Problem(1)])
def test_multiplying_by_eps_where_one_must_divide_is_caught(problem, monkeypatch):
    check_is_caught(problem(), monkeypatch)


def test_multiplying_by_eps_is_caught_on_a_transformer(transformer, monkeypatch):
    check_is_caught(transformer, monkeypatch)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cuts", [[], [8], [1, 5, 11]])
def test_a_loss_in_parts_is_the_whole_loss(order, cuts):
    for seed in range(3):
        problem = Problem(seed)
        whole, in_parts = problem.hypergrad(order), problem.hypergrad(order, cuts=cuts)
        assert relative(in_parts.direct, whole.direct) < 1e-12
        for one, other in zip(in_parts.delta_grads, whole.delta_grads, strict=True):
            assert relative(one, other) < 1e-12
        assert in_parts.loss_delta == pytest.approx(whole.loss_delta, rel=1e-12)
        assert in_parts.loss_alpha == pytest.approx(whole.loss_alpha, rel=1e-12)
        assert in_parts.passes == whole.passes == ORDERS[order]
        if order != "first":  # a difference of slopes is divided by a small move, and so is its rounding
            assert relative(in_parts.mixed, whole.mixed) < (1e-12 if order == "exact" else 1e-9)
            assert relative(in_parts.alpha_grad, whole.alpha_grad) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_one_graph_is_alive_at_a_time(order):
    d, a, saved, most = real([0.3, -0.7]), real([0.2, 0.5]), [], [0]

    def part(x):
        hidden = a * d * x  # kept by the graph for the slope of its square
        saved.append(weakref.ref(hidden))
        return hidden.square().sum()

    def parts():
        for x in (1.0, 2.0, 3.0):
            most[0] = max(most[0], sum(hidden() is not None for hidden in saved))
            yield part(x)
        most[0] = max(most[0], sum(hidden() is not None for hidden in saved))

    hypergrad(parts, parts, [d], a, 0.1, order)
    assert len(saved) == 3 * ORDERS[order]
    assert most == [0]
    assert accumulate(lambda: list(parts()), lambda part: torch.autograd.grad(part, [d]))
    assert most == [3]


@pytest.mark.parametrize("order", ORDERS)
def test_a_loss_without_parts_is_refused(order):
    q = Quadratic()
    with pytest.raises(ValueError, match="no parts"):
        hypergrad(lambda: [], q.loss_alpha, [q.d], q.a, q.xi, order)
    with pytest.raises(ValueError, match="no parts"):
        hypergrad(q.loss_delta, lambda: iter([]), [q.d], q.a, q.xi, order)
    assert q.d.item() == 0.7


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_averaged_over_two_halves_are_those_of_the_mean_loss(order):
    "Two processes in one: each list of gradients is averaged with the other's before anything is made of it."
    problem, seen = Problem(5), []
    halves = [slice(0, 8), slice(8, 16)]

    def gradient_lists(rows, others):
        "The lists that one process makes, given the averages of the lists before."
        turn = iter(others)

        def reduce(tensors):
            seen.append([tensor.clone() for tensor in tensors])
            return next(turn, tensors)

        seen.clear()
        hypergrad(lambda: 2 * problem.loss(0, {}, rows), lambda: 2 * problem.loss(1, {}, rows), problem.delta,
                  problem.alpha, problem.xi, order, reduce=reduce)
        return list(seen)

    averages = []
    for i in range(ORDERS[order]):
        mine, theirs = (gradient_lists(rows, averages)[i] for rows in halves)
        averages.append([(one + other) / 2 for one, other in zip(mine, theirs, strict=True)])
    turn = iter(averages)
    found = hypergrad(lambda: problem.loss(0, {}, halves[0]), lambda: problem.loss(1, {}, halves[0]),
                      problem.delta, problem.alpha, problem.xi, order, reduce=lambda tensors: next(turn))
    whole = problem.hypergrad(order)
    assert relative(found.alpha_grad, whole.alpha_grad) < 1e-10
    assert relative(found.direct, whole.direct) < 1e-12
    assert found.loss_delta == pytest.approx(whole.loss_delta, rel=1e-12)
    assert found.loss_alpha == pytest.approx(whole.loss_alpha, rel=1e-12)
    assert all(relative(f, w) < 1e-12 for f, w in zip(found.delta_grads, whole.delta_grads, strict=True))
    if order != "first":
        assert relative(found.mixed, whole.mixed) < 1e-8


def test_the_radius_is_how_far_the_weights_move():
    problem, at = Problem(0), []

    def loss_delta():
        at.append([d.detach().clone() for d in problem.delta])
        return problem.loss(0, {})

    for radius in (0.01, 1e-4):
        at.clear()
        hypergrad(loss_delta, lambda: problem.loss(1, {}), problem.delta, problem.alpha, 0.05, "central",
                  radius)
        for moved_by in at[1:]:
            far = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(moved_by, at[0])))
            assert far == pytest.approx(radius, rel=1e-9)


def test_the_share_is_that_of_the_mixed_term_in_the_direct_gradient():
    q = Quadratic()
    direct, mixed = q.expected()
    found = hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi, "central")
    assert found.direct.item() == pytest.approx(direct, rel=1e-12)
    assert found.share == pytest.approx(abs(mixed / direct), rel=1e-9)
    assert hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, q.xi).share is None
    zero, one = torch.zeros(2), torch.ones(2)
    assert Hypergradient(one, zero, [], 0.0, 0.0, 2).share == 0.0
    assert Hypergradient(zero, zero, [], 0.0, 0.0, 2).share == 0.0
    assert Hypergradient(zero, one, [], 0.0, 0.0, 4).share == math.inf


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


@pytest.mark.parametrize("kind", [list, tuple])
def test_many_weights_of_several_kinds_move_together_and_come_back(kind):
    draw, kinds = torch.Generator().manual_seed(0), (torch.float32, torch.float64, torch.bfloat16)
    weights = [Parameter(torch.randn(shape, generator=draw).to(dtype))
               for shape in ((), (5,), (2, 3)) for dtype in kinds]
    towards = kind(torch.randn(weight.shape, generator=draw).to(weight.dtype) for weight in weights)
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ZeroDivisionError), moved(kind(weights), towards, 0.25):
        for weight, old, direction in zip(weights, before, towards):
            torch.testing.assert_close(weight.detach(), old + 0.25 * direction)
        1 / 0
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before))


def test_no_weights_need_no_move():
    with moved([], [], 1.0):
        pass


def test_a_direction_that_does_not_fit_leaves_the_weights_as_they_were():
    weights = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    for direction in ([torch.ones(2)], [torch.ones(2), torch.ones(4)]):
        with pytest.raises(RuntimeError), moved(weights, direction, 1.0):
            pass
        assert all(torch.equal(weight, torch.ones_like(weight)) for weight in weights)


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
    for radius in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="radius a positive one"):
            hypergrad(q.loss_delta, q.loss_alpha, [q.d], q.a, 0.1, radius=radius)
    assert q.calls == []


def orders(auto, shares, first=1):
    "The orders of the steps from `first` on, where the measured share is this one at each."
    taken = []
    for step, share in enumerate(shares, start=first):
        taken.append(auto.order(step))
        if taken[-1] == auto.measure:
            auto.note(share)
    return taken


def test_auto_measures_now_and_then_while_the_share_is_small():
    taken = orders(Auto(every=4), [0.005] * 10)
    assert taken == [*["second"] + ["first"] * 3] * 2 + ["second", "first"]


def test_auto_stays_with_the_mixed_term_while_the_share_is_large():
    assert orders(Auto(every=4), [0.02] * 10) == ["second"] * 10
    assert orders(Auto(every=4), [0.01] * 6) == ["second"] * 6
    assert orders(Auto(every=4), [math.nan, math.inf] * 3) == ["second"] * 6


def test_auto_leaves_the_term_out_from_the_first_small_share_to_the_next_large_measurement():
    shares = [0.9, 0.005, 0.5, 0.5, 0.02, 0.02, 0.005, 0.5, 0.005, 0.5, 0.5]
    for measure in ("second", "central", "exact"):
        taken = orders(Auto(every=4, measure=measure), shares)
        assert set(taken) == {"first", measure}
        assert [step for step, order in enumerate(taken, start=1) if order == measure] == [1, 2, 5, 6, 7, 9]


def test_auto_measures_every_step():
    assert orders(Auto(every=1), [0.001] * 3) == ["second"] * 3


@pytest.mark.parametrize("at", range(1, 30))
def test_auto_decides_the_same_after_a_resume(at):
    draw = torch.Generator().manual_seed(at)
    shares = (0.02 * torch.rand(30, generator=draw)).tolist()
    whole = orders(Auto(every=4), shares)
    first, second = Auto(every=4), Auto(every=4)
    begun = orders(first, shares[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + orders(second, shares[at:], first=at + 1) == whole
    assert set(whole) == {"first", "second"}


@pytest.mark.parametrize("settings", [dict(every=0), dict(limit=0.0), dict(limit=-1.0), dict(limit=math.nan)])
def test_auto_refuses_settings_that_decide_nothing(settings):
    with pytest.raises(ValueError, match="every must be at least 1 and limit above 0"):
        Auto(**settings)


@pytest.mark.parametrize("measure, words", [("first", "choose"), ("secnd", "did you mean 'second'")])
def test_auto_refuses_an_order_that_measures_nothing(measure, words):
    with pytest.raises(UnknownName, match=words):
        Auto(measure=measure)
