"Scores of a probe against brute force from stored gradients, and what a probe leaves behind."
import math
from dataclasses import replace

import pytest
import torch
from torch.optim import Adam

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.learner import Checkpoint, Records, Stream
from s3pet_nb.learn.probe import SCORES, SELECTIONS, mean_ranks, probe
from s3pet_nb.learn.prune import Units, flat
from s3pet_nb.learn.train import TrainConfig
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.space import attach, make_space

CONFIG = TrainConfig(30, 1e-2, clip=math.inf, dropout=False)
RATES = {"A": 0.02, "B": 0.01, "vector": 0.002, "norm": 0.006, "adapter": 0.004}


@pytest.fixture(scope="module")
def asked():
    "A model, its space, and batches of it."
    model = tiny("bert")
    return model, make_space(model, "mix"), [example_batch(model, size=8, seed=seed) for seed in range(6)]


def ask(asked, score, **given):
    model, space, data = asked
    return probe(model, space, data, budget=0.01, score=score, **{"config": CONFIG, "callbacks": ()} | given)


def modules_of(gated):
    return [weight for name, weight in gated.trainable().items() if not name.startswith("head.")]


def stored(asked, steps, z=None, lr=1e-2, train=True):
    "Weights and gradients of each step of Adam on the open model, (steps, E) each, watched from outside."
    model, space, data = asked
    stream, thetas, grads = Stream(data), [], []
    with attach(model, space, seed=0) as gated:
        gated.z = torch.full((len(space),), z or 1.0)
        everything, weights = list(gated.trainable().values()), modules_of(gated)
        adam = Adam(everything, lr=lr)
        for k in range(steps):
            adam.param_groups[0]["lr"] = lr * (steps - k) / steps
            slope = torch.autograd.grad(gated(**next(stream)).loss, everything, materialize_grads=True)
            thetas.append(flat(weights).double())
            grads.append(flat(slope[:len(weights)]).double())
            if train:
                for weight, grad in zip(everything, slope):
                    weight.grad = grad
                adam.step()
    return torch.stack(thetas), torch.stack(grads)


def near(found, expected, tolerance=1e-6):
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


def open_at(asked):
    "Every gate of the open model that is trained, under a budget of a hundredth of the backbone."
    space = asked[1]
    return round(0.01 * space.n_backbone) / space.n_params


def test_scores_at_the_start_are_those_of_stored_gradients(asked):
    _, grads = stored(asked, 16, train=False)
    m, v = grads.mean(0), grads.square().mean(0)
    near(ask(asked, "gain").entries, 1e-2 * m.square() / v.sqrt().clamp_min(1e-30), 1e-5)
    near(ask(asked, "fisher").entries, v, 1e-5)
    sd = (v - m.square()).clamp_min(0).sqrt()
    there = sd > 1e-9
    near(ask(asked, "snr").entries[there], (m.abs() / sd)[there], 1e-3)


def test_a_gradient_of_nothing_scores_nothing(asked):
    model, space, _ = asked
    with attach(model, space) as gated:
        names = [name for name, weight in gated.trainable().items() for _ in range(weight.numel())]
    still = torch.tensor([name.endswith("lora.A") for name in names[:space.n_params]])
    for score in ("gain", "fisher", "snr"):
        entries = ask(asked, score).entries
        assert still.any() and (entries[still] == 0).all() and entries.isfinite().all()


def test_gain_along_is_that_of_moving_means_of_stored_gradients(asked):
    _, grads = stored(asked, 30, z=open_at(asked))
    m, v, total = torch.zeros(grads.shape[1]), torch.zeros(grads.shape[1]), 0.0
    for k, grad in enumerate(grads):
        m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad.square()
        total = total + (1e-2 * m.square() / v.sqrt().clamp_min(1e-30) if k >= 20 else 0.0)
    near(ask(asked, "gain_along").entries, total, 1e-4)


def test_allocation_is_judged_on_the_next_batch(asked):
    thetas, grads = stored(asked, 30, z=open_at(asked))
    near(ask(asked, "allocation").entries, -(grads[1:] * (thetas[1:] - thetas[:-1])).sum(0), 1e-4)


def test_gain_after_is_of_fresh_batches_at_the_end_of_the_training(asked):
    thetas, _ = stored(asked, 30, z=open_at(asked))
    model, space, data = asked
    found = ask(asked, "gain_after", batches=6)
    assert found.passes == 36
    grads = torch.cat([stored(asked, 30, z=open_at(asked))[1][:0], after(asked, 30)])
    near(found.entries, 1e-2 * grads.mean(0).square() / grads.square().mean(0).sqrt().clamp_min(1e-30), 1e-3)


def after(asked, steps):
    "Gradients of six batches after a training, (6, E)."
    model, space, data = asked
    stream = Stream(data)
    with attach(model, space, seed=0) as gated:
        gated.z = torch.full((len(space),), open_at(asked))
        everything, weights = list(gated.trainable().values()), modules_of(gated)
        adam = Adam(everything, lr=1e-2)
        for k in range(steps):
            adam.param_groups[0]["lr"] = 1e-2 * (steps - k) / steps
            adam.zero_grad()
            gated(**next(stream)).loss.backward()
            adam.step()
        return torch.stack([flat(torch.autograd.grad(gated(**next(stream)).loss, weights)).double()
                            for _ in range(6)])


def test_allocation_of_all_weights_telescopes_to_the_fall_of_the_loss():
    "On one batch, with the head still: the sum over steps is the fall of the loss, within its second order."
    model = tiny("bert")
    space, data = make_space(model, "bias"), [example_batch(model, size=8)]
    falls = {}
    for lr in (4e-3, 2e-3):
        config = replace(CONFIG, lr=lr, rates={"head": 0.0})
        log = Records()
        found = probe(model, space, data, budget=space.n_params, score="allocation", config=config, callbacks=(),
                      log=log)
        losses = [record["loss"] for record in log if record["event"] == "step"]
        falls[lr] = (losses[0] - losses[-1], found.entries.sum().item())
    errors = {lr: abs(said - fall) for lr, (fall, said) in falls.items()}
    assert all(error < 0.1 * falls[lr][0] for lr, error in errors.items())
    assert errors[2e-3] < 0.6 * errors[4e-3], "the error is of second order in the rate"


def test_rates_of_a_recipe_weigh_the_gain_and_loras_scale_drops_out(asked):
    model, space, data = asked
    config = replace(CONFIG, rates=RATES)
    even, rated = ask(asked, "gain").entries, ask(asked, "gain", config=config).entries
    with attach(model, space) as gated:
        paces = [(pace, weight.numel()) for pace, weight in zip(gated.paces().values(), gated.trainable().values())
                 if pace.kind != "head"]
    rate = torch.cat([torch.full((n,), RATES[pace.kind] * pace.factor) for pace, n in paces]).double()
    near(rated, even / 1e-2 * rate, 1e-5)
    lora = [rules.settings for rules in space.rules if rules.module == "lora"]
    assert lora == [{}], "its scale is 16"
    other = make_space(model, [replace(rule, settings={"lora_alpha": 1.0}) if rule.module == "lora" else rule
                               for rule in space.rules])
    near(probe(model, other, data, budget=0.01, score="gain", config=config, callbacks=()).score,
         ask(asked, "gain", config=config).score, 1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_the_score_of_a_module_is_the_sum_over_its_entries_and_its_columns(asked, score):
    found = ask(asked, score)
    columns = Units.of(asked[1], "structured")
    by_column = torch.bincount(columns.unit, weights=found.entries)
    summed = torch.zeros(len(asked[1]), dtype=torch.float64).index_add(0, columns.owners, by_column)
    torch.testing.assert_close(summed, found.score)
    firsts = [0, *asked[1].n.cumsum(0).tolist()]
    brute = [found.entries[start:end].sum() for start, end in zip(firsts, firsts[1:])]
    torch.testing.assert_close(torch.stack(brute), found.score)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_probed_and_is_left_as_it_was(family):
    model = tiny(family)
    space = make_space(model, "bias")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = probe(model, space, [example_batch(model)], budget=space.n_params // 3, score="gain_after", batches=2,
                  config=replace(CONFIG, steps=3), callbacks=())
    assert 0 < found.structure().n_params <= space.n_params // 3 and found.passes == 5
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_selections_are_those_of_their_names(asked):
    found, n = ask(asked, "gain"), asked[1].n
    masks = {by: found.structure(by=by).mask(asked[1]) for by in SELECTIONS}
    for by, mask in masks.items():
        assert n[mask].sum() <= found.budget
    falling = (found.score / n).argsort(descending=True)
    assert masks["density"][falling[0]] and masks["value"][found.score.argmax()]
    assert found.score[masks["exact"]].sum() >= max(found.score[masks[by]].sum() for by in ("density", "value"))
    assert found.structure(int(n.sum())).n_params == int(n.sum()) and len(found.structure(B=0.02)) > 0
    with pytest.raises(UnknownName, match="density"):
        found.structure(by="densty")


def test_accumulated_batches_are_one_gradient(asked):
    model, space, data = asked
    once = ask(asked, "gain", batches=3, config=replace(CONFIG, compute=Compute(accumulate=2)))
    joined = [{name: torch.cat([data[k][name], data[k + 1][name]]) for name in data[k]} for k in (0, 2, 4)]
    both = probe(model, space, joined, budget=0.01, score="gain", batches=3, config=CONFIG, callbacks=())
    near(once.entries, both.entries, 1e-4)


def test_bf16_is_near(asked):
    rough = ask(asked, "gain", config=replace(CONFIG, compute=Compute("bf16"))).score
    near(rough, ask(asked, "gain").score, 0.1)


class Killed(Exception):
    pass


@pytest.mark.parametrize("score, at", [("gain", 5), ("gain_along", 25), ("allocation", 7), ("gain_after", 33)])
def test_a_probe_that_was_killed_goes_on_to_the_same_scores(asked, tmp_path, score, at):
    class Kill:
        "Ends the run after so many steps of all phases."
        steps = 0

    from s3pet_nb.learn.learner import Callback

    class Killer(Callback):
        def after_step(self, learner):
            Kill.steps += 1
            if Kill.steps == at:
                raise Killed

    saved = lambda label: Checkpoint(tmp_path / f"{label}.pt", 2)
    whole = ask(asked, score)
    with pytest.raises(Killed):
        ask(asked, score, callbacks=[Killer()], checkpoint=saved)
    again = ask(asked, score, checkpoint=saved)
    assert torch.equal(again.entries, whole.entries) and again.passes == whole.passes


def test_the_log_has_the_space_and_the_scores(asked):
    log = Records()
    found = ask(asked, "gain_after", log=log)
    events = [record["event"] for record in log]
    assert events[0] == "space" and events.count("space") == 1 and events[-1] == "scores"
    assert log[-1]["score"] == found.score.tolist() and log[-1]["criterion"] == "gain_after"
    assert {record["phase"] for record in log if record["event"] == "step"} == {"probe-train", "probe"}


def test_mean_ranks_are_between_those_of_each(asked):
    one, other = ask(asked, "gain"), ask(asked, "fisher")
    assert torch.equal(mean_ranks([one, one]), mean_ranks([one]))
    assert mean_ranks([one])[(one.score / asked[1].n).argmax()] == len(asked[1])
    both = mean_ranks([one, other])
    torch.testing.assert_close(both, (mean_ranks([one]) + mean_ranks([other])) / 2)


@pytest.mark.parametrize("given, refused", [
    ({"score": "gains"}, "did you mean 'gain'"),
    ({"score": "gain", "batches": 0}, "batches is 0"),
    ({"score": "gain", "budget": 5}, "budget"),
])
def test_what_cannot_be_probed_is_refused_before_a_pass(asked, given, refused):
    model, space, data = asked
    with pytest.raises((LookupError, ValueError), match=refused):
        probe(model, space, data, **{"budget": 0.01, "callbacks": ()} | given)
