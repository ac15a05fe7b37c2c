"Trainings of structures and of whole models, what they return, and what they are compared with."
from collections import Counter

import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.compute import Compute, negative_loss
from s3pet_nb.learn.learner import Records
from s3pet_nb.learn.train import (BASELINES, TrainConfig, TrainResult, TrainStep, draw_like, finetune, heights, kept,
                                  kinds_of, lighter, random_structure, retrain, same_kinds, upper_layers)
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.space import Rule, make_space

SHORT = TrainConfig(steps=6, lr=1e-2, evaluate_every=2, dropout=False)


def rows(model, count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [example_batch(model, size=8, seed=seed) for seed in range(count)]


@pytest.fixture
def model():
    return tiny("bert")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_as_before(model, before) -> None:
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("how", ["retrain", "finetune"])
def test_a_training_leaves_the_model_and_its_result_goes_back_on(how, model):
    before, data = weights_of(model), rows(model)
    structure = random_structure(make_space(model), 400, 0)
    result = (retrain(model, structure, data, data, config=SHORT, callbacks=()) if how == "retrain"
              else finetune(model, data, data, config=SHORT, callbacks=()))
    assert_as_before(model, before)
    with result.on(model) as trained:
        trained.eval()
        assert negative_loss(trained, data) == result.score == result.scores[result.step]
    assert_as_before(model, before)
    assert list(result.scores) == [2, 4, 6] and result.steps == 6
    assert result.n_trained == (structure.n_params if how == "retrain" else
                                sum(weight.numel() for weight in model.parameters()))


def test_weights_come_back_after_an_error(model):
    before = weights_of(model)
    with pytest.raises(ZeroDivisionError), kept(model):
        for weight in model.parameters():
            weight.data.zero_()
        1 / 0
    assert_as_before(model, before)


def test_best_is_the_highest_score_and_last_is_the_end(model):
    structure, scores = random_structure(make_space(model), 400, 0), [0.9, 0.5, 0.7]

    def trained(take):
        given = iter(scores)
        config = TrainConfig(steps=6, evaluate_every=2, take=take)
        return retrain(model, structure, rows(model), None, lambda model, loader: next(given), config, callbacks=())

    best, last = trained("best"), trained("last")
    assert (best.step, best.score, last.step, last.score) == (2, 0.9, 6, 0.7)
    assert not all(torch.equal(weight, last.tensors[name]) for name, weight in best.tensors.items())


def test_the_first_step_of_a_warm_up_moves_nothing(model):
    structure, moved = random_structure(make_space(model), 400, 0), []
    for warmup in (0.0, 0.4):
        with structure.apply(model) as gated:
            config = TrainConfig(steps=5, lr=1e-2, warmup=warmup)
            step = TrainStep(gated, gated.trainable(), gated.paces(), config)
            before = step.snapshot()
            step(rows(model)[:1])
            moved.append(not all(torch.equal(weight, before[name]) for name, weight in step.snapshot().items()))
    assert moved == [True, False]
    with pytest.raises(ValueError, match="warmup is 1.0; give a share of the steps, from 0 to below 1"):
        TrainConfig(warmup=1.0)


def test_accumulated_batches_have_the_gradient_of_one_of_all_rows(model):
    one, other = rows(model)[:2]
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    with random_structure(make_space(model), 400, 0).apply(model) as gated:
        gated.train(False)
        plain = TrainStep(gated, gated.trainable(), gated.paces(), TrainConfig())
        halves = TrainStep(gated, gated.trainable(), gated.paces(), TrainConfig(compute=Compute(accumulate=2)))
        grads, loss = plain.gradients([both])
        parts, mean = halves.gradients([one, other])
    assert mean == pytest.approx(loss, rel=1e-5)
    for grad, part in zip(grads, parts):
        torch.testing.assert_close(part, grad, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_a_number_ends_a_training_and_leaves_the_model():
    data = [batch | {"labels": torch.full((8,), float("nan"))} for batch in rows(tiny("bert", "regress", num_labels=1))]
    broken = tiny("bert", "regress", num_labels=1)
    before, records = weights_of(broken), Records()
    with pytest.raises(FloatingPointError, match="retrain stopped at step 1: loss is nan"):
        retrain(broken, random_structure(make_space(broken), 400, 0), data, data, config=SHORT, callbacks=(), log=records)
    assert [record["event"] for record in records] == ["stopped"]
    assert_as_before(broken, before)


def test_a_row_has_the_tasks_metric_first_and_the_others_by_their_names():
    result = TrainResult({}, 10, 2, 20, 10, {10: 0.5, 20: 0.4}, 1.5, 0)
    row = result.row("x", {"test": {"f1": 0.75, "accuracy": 0.5}, "hard": {"f1": 0.25}})
    assert list(row) == ["label", "structure", "modules", "n_params", "head_params", "validation", "test",
                         "accuracy/test", "test/hard", "steps", "seconds"]
    assert (row["test"], row["accuracy/test"], row["test/hard"], row["validation"]) == (0.75, 0.5, 0.25, 0.5)
    assert row["modules"] is None and row["n_params"] == 10


def test_the_head_alone_has_no_module_on_any_family_and_can_be_trained(model):
    for family in FAMILIES:
        alone = BASELINES["head-alone"](tiny(family, "seq2seq" if family == "t5" else "classify"))
        assert len(alone) == alone.n_params == 0
    result = retrain(model, BASELINES["head-alone"](model), rows(model), rows(model), config=TrainConfig(2, 1e-2))
    assert (result.n_trained, result.row("x", {})["modules"]) == (0, 0) and result.n_head > 0


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "head-alone"])
def test_every_baseline_fits_every_family_and_can_be_cut(name):
    sizes = {}
    for family in FAMILIES:
        model = tiny(family, "seq2seq" if family == "t5" else "classify")
        try:
            whole = BASELINES[name](model)
        except ValueError:
            continue  # a baseline whose modules have no place on this family
        part = BASELINES[name].cut(model, whole.n_params // 2, seed=1)
        assert 0 < part.n_params <= whole.n_params // 2 and (whole.method, part.method) == (name, f"{name}-cut")
        assert {module.key for module in part.modules} <= {module.key for module in whole.modules}
        sizes[family] = whole.n_params
    assert "bert" in sizes and min(sizes.values()) > 0


def test_an_unknown_baseline_names_the_near_ones():
    with pytest.raises(UnknownName, match="did you mean 'lora-r8'"):
        BASELINES["lora_r8"]


def test_random_structures_are_within_the_budget_and_follow_from_the_seed(model):
    space = make_space(model)
    drawn = [random_structure(space, 200, seed) for seed in range(4)]
    assert all(0 < structure.n_params <= 200 for structure in drawn)
    assert drawn[2] == random_structure(space, 200, 2) and len({str(each.frame()) for each in drawn}) == 4
    assert random_structure(space, 0.05, 0).n_params <= 0.05 * space.n_backbone
    with pytest.raises(ValueError, match="choose"):
        random_structure(space, 10_000_000, 0)


def kinds_in(structure) -> Counter:
    return Counter(structure.frame().module)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_kinds_are_as_many_of_each_and_fill_the_budget(family):
    model = tiny(family, "seq2seq" if family == "t5" else "classify")
    space = make_space(model)
    B = space.n_params // 5
    for seed in range(6):
        searched = random_structure(space, B, seed)
        alike = same_kinds(space, searched, B, seed + 100)
        assert alike.n_params <= B and set(kinds_in(alike)) == set(kinds_in(searched))
        assert all(kinds_in(alike)[kind] >= count for kind, count in kinds_in(searched).items())
        assert alike == same_kinds(space, searched, B, seed + 100) != same_kinds(space, searched, B, seed + 101)


def test_what_is_drawn_alike_leaves_no_room_for_what_still_fits():
    draw = torch.Generator().manual_seed(0)
    for seed in range(50):
        kinds, n = torch.randint(3, (40,), generator=draw), torch.randint(1, 60, (40,), generator=draw)
        some = torch.rand(40, generator=draw) < 0.2
        B = int(n[some].sum()) + seed
        if not some.any():
            continue
        counts = torch.bincount(kinds[some], minlength=3)
        taken = draw_like(kinds, counts, n, B, seed)
        assert int(n[taken].sum()) <= B and (torch.bincount(kinds[taken], minlength=3) >= counts).all()
        fits = ~taken & (counts[kinds] > 0)
        assert not fits.any() or int(n[fits].min()) > B - int(n[taken].sum())
        assert not (taken & (counts[kinds] == 0)).any()


def test_a_set_that_is_too_large_exchanges_modules_within_their_kinds():
    kinds, n = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([9, 2, 5, 7, 1])
    taken = torch.tensor([True, False, True, True, False])
    lighter_set = lighter(taken, kinds, n, 8, torch.arange(5))
    assert int(n[lighter_set].sum()) <= 8 and torch.bincount(kinds[lighter_set]).tolist() == [2, 1]
    with pytest.raises(ValueError, match="need more than 7 parameters; choose a larger budget"):
        lighter(taken, kinds, n, 7, torch.arange(5))


def test_settings_are_a_part_of_the_kind(model):
    space = make_space(model, (Rule("lora", ("q",), {"r": 1}), Rule("lora", ("q",), {"r": 4}), Rule("bitfit", ("q",))))
    assert len(kinds_of(space).unique()) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_upper_layers_are_taken_from_the_top(family):
    model = tiny(family, "seq2seq" if family == "t5" else "classify")
    space = make_space(model)
    upper = upper_layers(space, space.n_params // 3)
    assert upper.n_params <= space.n_params // 3
    kept = {(m.stack, m.layer, m.role, m.module) for m in upper.modules}
    taken = torch.tensor([(c.position.stack, c.position.layer, c.position.role, c.module) in kept
                          for c in space.candidates])
    height, room = heights(space), space.n_params // 3 - upper.n_params
    lowest = height[taken].min()
    assert space.n[(height > lowest) & ~taken].gt(room).all(), "what is passed over above does not fit"
    first = [c.position for c in space.candidates][int(height.argmax())]
    assert first.layer is None or first.layer == max(c.position.layer or 0 for c in space.candidates)
    assert upper_layers(space, space.n_params // 3) == upper, "nothing is drawn"
