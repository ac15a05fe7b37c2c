"Scores of a probe against brute force from stored gradients, and what a probe leaves behind."
import math
from dataclasses import replace

import pytest
import torch
from accidents import Kill, Killed, Stop, Watch
from torch.utils.data import DataLoader

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.learner import Checkpoint, Records
from s3pet_nb.learn.probe import SCORES, SELECTIONS, Along, Look, probe
from s3pet_nb.learn.prune import CRITERIA, Mean, ScoredStep, Scorer, Units, check_scores, flat
from s3pet_nb.learn.train import TrainConfig, TrainStep
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.budget import resolve_budget
from s3pet_nb.model.pet import LoRA
from s3pet_nb.model.space import attach, make_space
from s3pet_nb.model.structure import Structure

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


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def unit_gain(grads, m=None, v=None):
    "The gain of one step of Adam at a rate of 0.01."
    m, v = (grads.mean(0), grads.square().mean(0)) if m is None else (m, v)
    return 1e-2 * m.square() / v.sqrt().clamp_min(1e-30)


def near(found, expected, tolerance=1e-6):
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


def test_scores_at_the_start_are_those_of_stored_gradients(asked, watch):
    found = {score: ask(asked, score) for score in ("gain", "fisher", "snr")}
    grads = torch.stack(watch.grads[:16])
    assert torch.equal(torch.stack(watch.grads[16:32]), grads) and len(watch.grads) == 48
    assert all(torch.equal(theta, watch.thetas[0]) for theta in watch.thetas), "nothing moves"
    m, v = grads.mean(0), grads.square().mean(0)
    near(found["gain"].entries, unit_gain(grads))
    near(found["fisher"].entries, v)
    sd = (v - m.square()).clamp_min(0).sqrt()
    there = sd > 1e-4 * v.sqrt()
    torch.testing.assert_close(found["snr"].entries[there], (m.abs() / sd)[there])


def test_a_gradient_that_is_always_the_same_has_no_endless_signal(asked):
    model, space, data = asked
    found = probe(model, space, data[:1], budget=0.01, score="snr", batches=4, config=CONFIG, callbacks=())
    assert 1 < found.entries.max() <= 1.01e6


def test_gradients_at_the_start_are_the_models_own(asked, watch):
    model, space, data = asked
    ask(asked, "gain", batches=2)
    with attach(model, space) as gated:
        weights = [weight for name, weight in gated.trainable().items() if not name.startswith("head.")]
        for batch, seen in zip(data, watch.grads):
            near(seen, flat(torch.autograd.grad(gated(**batch).loss, weights, materialize_grads=True)), 1e-5)


def test_a_gradient_of_nothing_scores_nothing(asked):
    model, space, _ = asked
    with attach(model, space) as gated:
        names = [name for name, weight in gated.trainable().items() for _ in range(weight.numel())]
    still = torch.tensor([name.endswith("lora.A") for name in names[:space.n_params]])
    for score in ("gain", "fisher", "snr"):
        entries = ask(asked, score).entries
        assert still.any() and (entries[still] == 0).all() and entries.isfinite().all()


def test_gain_along_is_that_of_moving_means_of_stored_gradients(asked, watch):
    found = ask(asked, "gain_along")
    total = 0.0
    for k, grad in enumerate(watch.grads, start=1):
        weights = torch.tensor([0.05 * 0.95 ** (k - i) for i in range(1, k + 1)]).double()
        weights, seen = weights / weights.sum(), torch.stack(watch.grads[:k])
        if k > 20:
            total = total + unit_gain(None, weights @ seen, weights @ seen.square())
    assert len(watch.grads) == found.passes == 30
    near(found.entries, total)


def test_allocation_is_judged_on_the_next_batch(asked, watch):
    found = ask(asked, "allocation")
    thetas, grads = torch.stack(watch.thetas), torch.stack(watch.grads)
    assert len(grads) == found.passes == 30
    near(found.entries, -(grads[1:] * (thetas[1:] - thetas[:-1])).sum(0))


def test_gain_after_is_of_fresh_batches_at_the_end_of_the_training(asked, watch):
    found = ask(asked, "gain_after", batches=6)
    assert len(watch.grads) == found.passes == 36
    assert all(torch.equal(theta, watch.thetas[30]) for theta in watch.thetas[31:])
    near(found.entries, unit_gain(torch.stack(watch.grads[30:])))


def test_the_open_model_is_trained_with_what_a_structure_may_do(asked, monkeypatch):
    seen, gradients = [], TrainStep.gradients
    monkeypatch.setattr(TrainStep, "gradients",
                        lambda step, batches: seen.append(step.model.z.unique()) or gradients(step, batches))
    ask(asked, "gain_after", batches=2)
    B, space = resolve_budget(0.01, asked[1].n_backbone), asked[1]
    assert all(z.item() == pytest.approx(B / space.n_params) for z in seen) and len(seen) == 32
    ask(asked, "gain", batches=2)
    assert seen[-1].item() == 1


def test_allocation_of_all_weights_telescopes_to_the_fall_of_the_loss():
    "On one batch, with the head still: the sum over steps is the fall of the loss, within its second order."
    model = tiny("bert")
    space, data, errors = make_space(model, "bias"), [example_batch(model, size=8)], []
    for steps, lr in ((8, 4e-2), (16, 2e-2)):
        log, config = Records(), replace(CONFIG, steps=steps, lr=lr, rates={"head": 0.0})
        found = probe(model, space, data, budget=space.n_params, score="allocation", config=config, callbacks=(),
                      log=log)
        losses = [record["loss"] for record in log if record["event"] == "step"]
        fall = losses[0] - losses[-1]
        errors.append(abs(found.entries.sum().item() - fall) / fall)
    assert errors[1] < 0.7 * errors[0] and errors[1] < 0.2, "half the steps' size, half the error"


def test_rates_of_a_recipe_weigh_the_gain_and_loras_scale_drops_out(asked, monkeypatch):
    model, space, data = asked
    config = replace(CONFIG, rates=RATES)
    even, rated = ask(asked, "gain").entries, ask(asked, "gain", config=config).entries
    with attach(model, space) as gated:
        paces, sizes = gated.paces(), {name: weight.numel() for name, weight in gated.trainable().items()}
    parts = zip(Units.of(space, "unstructured").shapes, even.split(list(
        sizes[name] for name in Units.of(space, "unstructured").shapes)), strict=True)
    expected = torch.cat([part / 1e-2 * RATES[paces[name].kind] * paces[name].factor for name, part in parts])
    torch.testing.assert_close(rated, expected, rtol=1e-5, atol=0)
    monkeypatch.setattr(LoRA.__init__, "__defaults__", (1, 2.0, "zero"))
    near(ask(asked, "gain", config=config).entries, rated, 1e-5)


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
    worse = replace(found, entries=found.entries - found.entries.mean())
    kept = {by: worse.structure(int(n.sum()), by=by).mask(asked[1]) for by in SELECTIONS}
    assert (worse.score < 0).any() and kept["density"].all() and kept["value"].all(), "they fill the budget"
    assert torch.equal(kept["exact"], worse.score > 0)
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


@pytest.mark.parametrize("score, at", [("gain", 5), ("gain_along", 25), ("allocation", 7),
                                       ("gain_after", 11), ("gain_after", 30), ("gain_after", 33)])
def test_a_probe_that_was_killed_goes_on_to_the_same_scores(asked, tmp_path, score, at):
    saved = lambda label: Checkpoint(tmp_path / f"{label}.pt", 2)
    whole = ask(asked, score)
    with pytest.raises(Killed):
        ask(asked, score, callbacks=[Kill(at)], checkpoint=saved)
    again = ask(asked, score, checkpoint=saved)
    assert torch.equal(again.entries, whole.entries) and again.passes == whole.passes


def test_the_log_has_the_space_and_the_scores(asked):
    log = Records()
    found = ask(asked, "gain_after", log=log)
    events = [record["event"] for record in log]
    assert events[0] == "space" and events.count("space") == 1 and events[-1] == "scores"
    assert log[-1]["score"] == found.score.tolist() and log[-1]["name"] == "gain_after"
    assert {record["phase"] for record in log if record["event"] == "step"} == {"probe-train", "probe"}


def test_the_log_has_scores_on_the_way(asked):
    log = Records()
    ask(asked, "gain_along", log=log)
    scored = [record for record in log if record["event"] == "scores"]
    assert [record["step"] for record in scored] == [21, 24, 27, 30], "every tenth, once there is a score"
    first = ask(asked, "gain_along", callbacks=[Stop(24)])
    assert scored[1]["score"] == first.score.tolist()


@pytest.mark.parametrize("score", SCORES)
def test_what_was_found_is_saved_and_read_with_its_scores(asked, tmp_path, score):
    found = ask(asked, score)
    for by in SELECTIONS:
        structure = found.structure(by=by)
        structure.save(tmp_path / "structure.json")
        again = Structure.load(tmp_path / "structure.json")
        assert again.mask(asked[1]).equal(structure.mask(asked[1])) and again.n_params == structure.n_params
        scores = dict(zip((c.name for c in asked[1].candidates), found.score.tolist()))
        assert all(kept.score == pytest.approx(scores[kept.name]) and kept.p is None for kept in again.modules)


def test_the_loader_is_found_where_it_was(asked):
    model, space, _ = asked
    rows = [{name: value[0] for name, value in example_batch(model, size=1, seed=seed).items()} for seed in range(24)]
    loader = DataLoader(rows, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    one, other = (probe(model, space, loader, budget=0.01, score="gain", batches=3, config=CONFIG, callbacks=())
                  for _ in range(2))
    assert torch.equal(one.entries, other.entries)


def test_a_probe_that_was_stopped_says_so_or_is_refused(asked):
    found = ask(asked, "gain", callbacks=[Stop(4)])
    assert found.stopped and found.passes == 4 and "stopped by hand" in repr(found)
    assert not ask(asked, "gain", batches=4).stopped
    with pytest.raises(ValueError, match="stopped after 9 of its moments, and 'gain_along' needs at least 21"):
        ask(asked, "gain_along", callbacks=[Stop(9)])


@pytest.mark.parametrize("family, space", [("t5", "mix"), ("gpt2", "mix"), ("llama", "lora"), ("bert", "mam")])
@pytest.mark.parametrize("score", ["gain", "gain_along"])
def test_low_rank_modules_of_other_families_are_scored(family, space, score):
    model = tiny(family)
    space = make_space(model, space)
    config = replace(CONFIG, steps=22, dropout=True, clip=1.0, compute=Compute(gradient_checkpointing=True))
    found = probe(model, space, [example_batch(model, seed=seed) for seed in range(3)], budget=space.n_params // 4,
                  score=score, batches=3, config=config, callbacks=())
    lora = torch.tensor([c.module == "lora" for c in space.candidates])
    assert (found.score[lora] > 0).any() and 0 < found.structure().n_params <= space.n_params // 4


def test_looks_make_no_optimiser(asked, monkeypatch):
    made = []
    monkeypatch.setattr("s3pet_nb.learn.train.stepper_for", lambda *args: made.append(args))
    ask(asked, "gain", batches=2)
    assert not made
    with pytest.raises(AttributeError):
        ask(asked, "gain_after", batches=2)
    assert len(made) == 1, "the training before them has one"


def test_a_score_is_called_a_score_and_a_criterion_a_criterion(asked):
    space, config = asked[1], replace(CONFIG, steps=1)
    for make, words in (SCORES["gain"].make, "score 'gain'"), (lambda: Mean(CRITERIA["fisher"]), "criterion 'fisher'"):
        with pytest.raises(FloatingPointError, match=f"{words} is not a number at w"):
            check_scores(torch.tensor([math.nan]), make(), {"w": torch.zeros(1)})
        with attach(asked[0], space) as gated:
            assert words.split()[0] in ScoredStep(gated, config, make()).about()


def test_a_scorer_that_cannot_score_is_refused():
    class Half(Scorer):
        def see(self, at):
            return at.grad

    with pytest.raises(TypeError, match="abstract.* scores"):
        Half()


def test_moments_that_there_are_not_are_refused():
    with pytest.raises(UnknownName, match="moments of a score 'during'"):
        Look(Along, "during")


@pytest.mark.parametrize("given, refused", [
    ({"score": "gains"}, "did you mean 'gain'"),
    ({"score": "gain", "batches": 1}, "score 'gain' needs at least 2 batches, and is given 1; give more"),
    ({"score": "gain_along", "config": replace(CONFIG, steps=20)}, "'gain_along' needs at least 21 steps, and is given 20"),
    ({"score": "allocation", "config": replace(CONFIG, steps=1)}, "'allocation' needs at least 2 steps, and is given 1"),
    ({"score": "gain", "budget": 5}, "budget"),
])
def test_what_cannot_be_probed_is_refused_before_a_pass(asked, given, refused):
    model, space, data = asked
    with pytest.raises((LookupError, ValueError), match=refused):
        probe(model, space, data, **{"budget": 0.01, "callbacks": ()} | given)
