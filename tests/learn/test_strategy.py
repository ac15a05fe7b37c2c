"Ways of searching: each against the published one, against brute force, and through an interruption."
import numpy as np
import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.bilevel import slopes
from s3pet_nb.learn.learner import Callback, Checkpoint, Records
from s3pet_nb.learn.optim import DECAYS, Stepper
from s3pet_nb.learn.search import SearchConfig, search
from s3pet_nb.learn.strategy import (GONE, SHRINKING, STRATEGIES, Signal, Strategy, StrategyStep, polarisation)
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.budget import expected_size
from s3pet_nb.model.gate import HardConcrete, ShiftedSigmoid
from s3pet_nb.model.space import attach, make_space

B = 200


def batches(model, n=8):
    return [example_batch(model, size=4, seed=seed) for seed in range(n)]


def searched(strategy, model=None, order="first", log=None, callbacks=(), checkpoint=None, gate=ShiftedSigmoid(),
             alpha=None, **numbers):
    "A search by a strategy, or by the search's own step if that is None."
    numbers = {"steps": 8, "lr": 1e-2, "evaluate_every": 2, "measure_every": 0} | numbers
    model = model or tiny("bert")
    data = batches(model)
    how = {"step": strategy.step} if strategy else {}
    watch = [*callbacks, *(strategy.callbacks() if strategy else [])]
    return search(model, make_space(model), data[::2], data[1::2], data[:1], B, gate, order, alpha=alpha,
                  config=SearchConfig(**numbers), callbacks=watch, log=log, checkpoint=checkpoint, **how)


def same(one, other):
    return one.history.keys() == other.history.keys() and all(
        torch.equal(one.history[step], other.history[step]) for step in one.history)


@pytest.mark.parametrize("order, gate", [("first", ShiftedSigmoid()), ("second", ShiftedSigmoid()),
                                         ("auto", ShiftedSigmoid()), ("first", HardConcrete(weight=None))],
                         ids=["first", "second", "auto", "L0"])
def test_the_published_settings_are_the_published_search_bit_for_bit(order, gate):
    numbers = {"order": order, "gate": gate, "measure_every": 2}
    plain, other = searched(None, **numbers), searched(Strategy(), **numbers)
    assert same(plain, other) and plain.passes == other.passes and plain.scores == other.scores


def test_alpha_stays_until_delta_is_warm_and_a_step_is_one_pass():
    records = Records()
    result = searched(Strategy(warm=0.5), log=records)
    steps = [record for record in records if record["event"] == "step"]
    assert [step["passes"] for step in steps] == [1] * 4 + [2] * 4 and result.passes == 12
    assert all((result.history[step] == 0).all() for step in range(5)) and (result.history[5] != 0).all()
    assert all("loss_alpha" not in step for step in steps[:4])


class Grads(Callback):
    "Keeps the gradients of alpha that a search is stepped with."

    def __init__(self):
        self.all = []

    def before_fit(self, learner):
        step, guide = learner.take_step, learner.take_step.guide
        step.guide = lambda grad: (self.all.append(grad.clone()), guide(grad))


def roughened(gated, seed=0):
    "Modules and a head that do something, and gates that differ."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in gated.trainable().values():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        gated.alpha += torch.randn(len(gated.alpha), dtype=torch.float64, generator=generator)


def gradients(strategy, batches_alpha):
    "The gradient of alpha's loss that a step sees, and the same by central differences, both (N,)."
    model = tiny("bert")
    with attach(model, make_space(model), ShiftedSigmoid(scope="local")) as gated:
        roughened(gated)
        step = StrategyStep(gated, B, "first", SearchConfig(10, measure_every=0, dropout=False), strategy)
        u, noise = step.noise()
        *_, seen, _ = slopes(lambda: step.penalised(batches_alpha, u, noise), [gated.alpha])
        at, eps, brute = gated.alpha.detach().clone(), 0.02, torch.zeros_like(gated.alpha)

        def loss():
            total = 0.0
            for draw in step.draws:
                gated.sample(draw)
                total += sum(gated(**batch).loss.item() for batch in batches_alpha)
            return total / len(step.draws) / len(batches_alpha)

        with torch.no_grad():
            for i in range(len(at)):
                for sign in (1, -1):
                    gated.alpha.copy_(at)
                    gated.alpha[i] += sign * eps
                    brute[i] += sign * loss() / (2 * eps)
        return seen, brute, len(step.draws)


@pytest.mark.parametrize("strategy, draws", [(Strategy(), 1), (Strategy(samples=0), 1), (Strategy(samples=3), 3),
                                             (Strategy(samples=2, alpha_batches=2), 2)],
                         ids=["one", "none", "three", "batches"])
def test_alphas_gradient_is_that_of_the_mean_loss_over_its_gates_and_batches(strategy, draws):
    data = batches(tiny("bert"))[:strategy.alpha_batches]
    seen, brute, n_draws = gradients(strategy, data)
    assert n_draws == draws
    assert (seen - brute).norm() < 0.02 * brute.norm() > 0


def test_the_first_sample_is_the_published_one():
    model = tiny("bert")
    with attach(model, make_space(model)) as gated:
        steps = [StrategyStep(gated, B, "first", SearchConfig(10), Strategy(samples=samples)) for samples in (1, 3)]
        (u, noise), (other, same_noise) = (step.noise() for step in steps)
    assert torch.equal(u, other) and noise == same_noise
    draws = steps[1].draws
    assert torch.equal(draws[0], u) and not torch.equal(draws[1], u) and not torch.equal(draws[2], draws[1])


@pytest.mark.parametrize("strategy, passes", [
    (Strategy(samples=3), 8 * 4), (Strategy(samples=0), 8 * 2), (Strategy(alpha_batches=2), 8 * 3),
    (Strategy(samples=2, alpha_batches=2, warm=0.5), 4 + 4 * 5), (Strategy(level="mixed", samples=2), 8 * 3),
    (Strategy(level="one", warm=0.25), 8)])
def test_every_pass_counts(strategy, passes):
    assert searched(strategy).passes == passes


def test_mixed_levels_use_the_gradient_that_the_first_pass_has_anyway():
    model = tiny("bert")
    data = batches(model)
    with attach(model, make_space(model)) as gated:
        roughened(gated)
        step = StrategyStep(gated, B, "first", SearchConfig(10, dropout=False), Strategy(level="mixed"))
        guided, parts, state = [], [], step.generator.get_state()
        step.guide = guided.append
        u, noise = step.noise()
        for batch in data[:2]:
            parts.append(slopes(lambda batch=batch: step.losses([batch], u, noise), [gated.alpha])[0])
        step.generator.set_state(state)
        step.take(data[:1], data[1:2])
    assert torch.allclose(guided[0], (parts[0] + parts[1]) / 2) and parts[0].norm() > 0


def test_one_level_is_one_pass_and_sees_both_halves():
    seen = []

    class Seen(Callback):
        def before_fit(self, learner):
            step, losses = learner.take_step, learner.take_step.losses
            step.losses = lambda batch, *rest: (seen.append(batch[0]["input_ids"]), losses(batch, *rest))[1]

    model = tiny("bert")
    result = searched(Strategy(level="one"), model, callbacks=[Seen()], steps=4)
    data = batches(model)
    assert result.passes == 4 == len(seen)
    assert all(torch.equal(ids, data[k]["input_ids"]) for ids, k in zip(seen, (0, 3, 4, 7)))


def test_a_normalised_gradient_counts_by_its_direction():
    model = tiny("bert")
    grads, signal = Grads(), []

    class Stepped(Callback):
        def before_fit(self, learner):
            stepper = learner.take_step.step_alpha
            step = stepper.step
            stepper.step = lambda many: (signal.append(many[0].clone()), step(many))

    searched(Strategy(normalised=True), model, callbacks=[grads, Stepped()], steps=3, evaluate_every=1)
    for raw, used in zip(grads.all, signal, strict=True):
        assert used.norm() == pytest.approx(1) and torch.allclose(used * raw.norm(), raw)


@pytest.mark.parametrize("decay", DECAYS)
def test_rates_fall_as_asked_and_what_is_left_is_their_sum(decay):
    weight = torch.nn.Parameter(torch.zeros(3))
    stepper, rates, left = Stepper([weight], 0.1, 2.0, 10, decay=decay), [], []
    for _ in range(10):
        rates.append(stepper.lr)
        left.append(stepper.travel())
        stepper.step([torch.ones(3)])
    assert left == pytest.approx(np.cumsum(rates[::-1])[::-1]) and stepper.travel() == pytest.approx(0)
    assert rates[0] == 0.1 and sorted(rates, reverse=True) == rates
    assert (rates[-1] == 0.1) == (decay == "constant")


def step_of(strategy, gated, steps=10, **numbers):
    return StrategyStep(gated, B, "first", SearchConfig(steps, lr=1e-2, measure_every=0, **numbers), strategy)


def test_out_of_reach_is_what_all_rates_that_are_left_cannot_bring_back():
    model = tiny("bert")
    with attach(model, make_space(model)) as gated:
        step = step_of(Strategy(shrink="reach"), gated)
        assert not SHRINKING["reach"](step).any(), "all are equal"
        gated.alpha.data += torch.linspace(0, 3, len(gated.space), dtype=torch.float64)
        step.meet()
        chosen, gone = step.chosen(), SHRINKING["reach"](step)
        weakest, travel = gated.alpha[chosen].min(), 0.1 * sum((10 - k) / 10 for k in range(10))
        assert gone.any() and not (gone & chosen).any()
        assert torch.equal(gone, ~chosen & (gated.alpha < weakest - 2 * travel))


def test_closed_candidates_stay_closed_and_the_budget_is_held():
    model, records = tiny("bert"), Records()
    result = searched(Strategy(shrink="falling"), model, log=records, steps=12)
    sizes = [record["expected_size"] for record in records if record["event"] == "step"]
    assert all(0.99 * B < size <= B for size in sizes)
    space, before = make_space(model), torch.zeros(len(make_space(model)), dtype=torch.bool)
    for step, alpha in result.history.items():
        gone = alpha < GONE / 2
        assert not (before & ~gone).any(), "none comes back"
        assert not step or int(space.n[~gone].sum()) > B, "what is open can spend the budget"
        before = gone
    assert before.sum() > len(space) / 2 and result.p[~before].min() > result.p[before].max()
    assert (result.p[before] < 1e-12).all()


def test_what_is_gone_is_left_out_of_every_pass():
    model = tiny("bert")
    with attach(model, make_space(model)) as gated:
        gated.gone = torch.arange(len(gated.space)) % 2 == 0
        for u in (torch.rand(len(gated.space), dtype=torch.float64), None):
            gated.meet(B)
            gated.sample(u)
            assert (gated.z[gated.gone] == 0).all() and (gated.z[~gated.gone] > 0).all()
            assert torch.tensor(gated.closed).equal(gated.gone)
        gated.expect()
        assert (gated.z[gated.gone] == 0).all()
        gated.sample(None)
        gated(**batches(model)[0]).loss.backward()
        for i, pet in enumerate(gated.pets):
            assert all(weight.grad is None or not weight.grad.any() for weight in pet.parameters()) or not gated.gone[i]
        assert any(weight.grad.any() for weight in gated.pets[1].parameters())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_that_was_killed_goes_on_bit_for_bit(tmp_path, name):
    class Kill(Callback):
        def after_step(self, learner):
            if learner.step == 7:
                raise KeyboardInterrupt

    strategy, whole, log = STRATEGIES[name], Records(), Records()
    numbers = {"steps": 12, "evaluate_every": 3, "alpha_lr": 0.4}
    expected = searched(strategy, log=whole, **numbers)
    path = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        searched(strategy, callbacks=[Kill()], log=log, checkpoint=Checkpoint(path, 5), **numbers)
    again = searched(strategy, log=log, checkpoint=Checkpoint(path, 5), **numbers)
    assert same(expected, again) and expected.passes == again.passes and expected.scores == again.scores
    signals = [[record for record in records if record["event"] == "signal"] for records in (whole, log)]
    assert signals[0] == signals[1] and signals[0]


def test_another_strategy_does_not_take_a_checkpoint_over(tmp_path):
    path = tmp_path / "search.safetensors"
    searched(Strategy(), checkpoint=Checkpoint(path))
    with pytest.raises(ValueError, match="strategy"):
        searched(Strategy(samples=2), checkpoint=Checkpoint(path))


def test_a_decided_search_stops_at_an_evaluation_but_not_at_the_first():
    space = make_space(tiny("bert"))
    alpha = torch.where(torch.arange(len(space)) % 5 == 0, 20.0, -20.0).double()
    records = Records()
    result = searched(Strategy(stop=0.5), alpha=alpha, steps=9, evaluate_every=2, log=records)
    stop, = [record for record in records if record["event"] == "early_stop"]
    assert result.steps == stop["step"] == 4 and list(result.scores) == [2, 4]
    assert stop["polarisation"] >= 0.5 and stop["saved"] == pytest.approx(5 / 9)
    assert searched(Strategy(stop=0.99), steps=9, evaluate_every=2).steps == 9


def test_polarisation_is_the_share_that_the_chosen_set_holds():
    p, n = torch.tensor([1.0, 0.5, 0.0]).double(), torch.tensor([2, 4, 8])
    assert polarisation(p, n, torch.tensor([True, False, True])) == 2 / 4
    assert polarisation(p, n, torch.ones(3, dtype=torch.bool)) == 1


def test_the_signal_is_the_mean_in_units_of_its_standard_error():
    rng, signal = np.random.default_rng(0), Signal(4)
    grads = rng.normal(size=(20, 4)) + np.array([0, 0, 3, 0])
    grads[:, 3] = 0
    for grad in grads:
        signal.see(torch.tensor(grad))
    t = np.abs(grads[:, :3].mean(0)) / (grads[:, :3].std(0, ddof=1) / 20 ** 0.5)
    assert signal.ratio()[:3].numpy() == pytest.approx(t) and signal.ratio()[3] == 0
    signal.forget()
    assert (signal.ratio() == 0).all()


def test_the_log_tells_signal_from_noise():
    "Gradients with a direction of their own have a high ratio, those around 0 have about 0.8."
    rng = np.random.default_rng(0)
    signal, noise = Signal(500), Signal(500)
    for _ in range(10):
        signal.see(torch.tensor(rng.normal(2, 1, 500)))
        noise.see(torch.tensor(rng.normal(0, 1, 500)))
    assert noise.ratio().mean() == pytest.approx(0.85, abs=0.1) and signal.ratio().mean() > 5


@pytest.mark.parametrize("settings, refused", [
    ({"warm": 1.0}, "warm is 1.0; give a share from 0 to below 1"),
    ({"stop": -0.1}, "stop is -0.1; give a share"),
    ({"samples": -1}, "samples is -1; give a count, or 0 for z = p"),
    ({"alpha_batches": 0}, "alpha_batches"),
    ({"level": "one", "samples": 0}, "level 'one' has no pass of alpha's own"),
])
def test_settings_that_make_no_sense_are_refused(settings, refused):
    with pytest.raises(ValueError, match=refused):
        Strategy(**settings)


@pytest.mark.parametrize("settings", [{"level": "three"}, {"decay": "flat"}, {"shrink": "reached"}])
def test_unknown_names_are_refused(settings):
    with pytest.raises(UnknownName):
        Strategy(**settings)


def test_expected_size_is_met_by_every_strategy():
    for strategy in STRATEGIES.values():
        result = searched(strategy)
        assert expected_size(result.p, result.space.n) <= B
        assert result.structure().n_params <= B
