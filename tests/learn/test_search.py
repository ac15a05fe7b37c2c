"What a search may be asked, beyond what its notebook shows."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.learner import Callback, Checkpoint, Evaluate, Learner, Records, load_state
from s3pet_nb.learn.search import (ALPHAS, SEARCH_ORDERS, EarlyStop, SearchConfig, SearchResult, SearchStep,
                                   run_search, search)
from s3pet_nb.learn.train import TrainConfig, retrain
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.gate import Annealed, HardConcrete, ShiftedSigmoid, StraightThrough, gate_record, geometric
from s3pet_nb.model.space import Rule, attach, make_space
from s3pet_nb.model.structure import Structure, jaccard, select

class HaltAt(Callback):
    "Ends a search after one of its steps, the hard way."

    def __init__(self, at):
        self.at = at

    def after_step(self, learner):
        if learner.step == self.at:
            raise KeyboardInterrupt


HEAD = {"t5": "seq2seq"}
ROOT = Path(__file__).parents[2]


def batches(model, n=6, size=4):
    return [example_batch(model, size=size, seed=seed) for seed in range(n)]


def searched(model, budget=200, callbacks=(), log=None, gate=ShiftedSigmoid(), order="first", space="mix",
             **numbers) -> SearchResult:
    numbers = {"steps": 6, "lr": 1e-2, "evaluate_every": 3, "measure_every": 0, "dropout": False} | numbers
    data = batches(model)
    return search(model, make_space(model, space), data[::2], data[1::2], data[:1], budget, gate, order,
                  config=SearchConfig(**numbers), callbacks=callbacks, log=log)


def searched_shuffled(log=None, **numbers) -> SearchResult:
    """A search with dropout on loaders that shuffle with torch's own random numbers, over several epochs.

    The last batch of an epoch is smaller, so that dropout draws less for it.
    """
    model = tiny("bert")
    rows = [{name: column[0] for name, column in example_batch(model, size=1, seed=seed).items()}
            for seed in range(10)]
    loaders = [DataLoader(rows[:size], batch_size=4, shuffle=True) for size in (10, 6)]
    config = SearchConfig(**{"steps": 6, "lr": 1e-2, "evaluate_every": 3, "measure_every": 0} | numbers)
    return search(model, make_space(model), *loaders, batches(model, 1), 200, order="first", config=config,
                  callbacks=(), log=log)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_searched(family):
    result = searched(tiny(family, HEAD.get(family, "classify")), steps=2, order="second")
    assert result.passes == 6 and result.alpha.abs().min() > 0
    assert 0 < result.structure().n_params <= 200


@pytest.mark.parametrize("order, passes", {"first": 12, "second": 18, "central": 24, "exact": 18}.items())
def test_passes_of_every_order(order, passes):
    assert searched(tiny("bert", attn_implementation="eager"), order=order).passes == passes


def test_measuring_costs_passes_and_changes_nothing():
    records = Records()
    plain, measured = searched_shuffled(), searched_shuffled(records, measure_every=2)
    assert all(torch.equal(plain.history[step], measured.history[step]) for step in plain.history)
    shares = {record["step"]: record["mixed"] for record in records if "mixed" in record}
    assert list(shares) == [1, 3, 5] and all(0 < share < 1 for share in shares.values())
    assert measured.passes == plain.passes + 3


def test_the_term_is_measured_on_both_sides_in_half_the_bits():
    for order in ("first", "auto"):
        records = Records()
        searched(tiny("bert"), order=order, measure_every=3, lr=1e-6, compute=Compute(precision="bf16"),
                 steps=4, log=records)
        passes = [record["passes"] for record in records if record["event"] == "step"]
        assert set(passes) == {2, 4} and passes[0] == passes[3] == 4


def test_auto_is_first_order_once_the_modules_have_left_zero_and_the_term_is_small():
    records = Records()
    result = searched(tiny("bert"), order="auto", measure_every=3, lr=1e-6, log=records)
    steps = [record for record in records if record["event"] == "step"]
    assert [record["passes"] for record in steps] == [3, 3, 2, 3, 2, 2] and result.passes == 15
    assert steps[0]["mixed"] > 0.9 and all(record.get("mixed", 0) < 0.01 for record in steps[1:])


def test_auto_has_the_term_while_it_is_large():
    records = Records()
    result = searched(tiny("bert"), order="auto", measure_every=3, lr=3.0, log=records)
    first = next(record for record in records if record["event"] == "step")
    assert first["mixed"] > 0.01 and result.passes == 18


def moments(folder, **compute) -> dict[str, torch.Tensor]:
    "First moments of both optimisers after three steps: averaged gradients, before AdamW divides them."
    model = tiny("bert")
    data = batches(model, 8)
    if compute.pop("whole", False):
        data = [{name: torch.cat([a[name], b[name]]) for name in a}
                for one, two, three, four in zip(data[::4], data[1::4], data[2::4], data[3::4])
                for a, b in ((one, three), (two, four))]
    path = folder / "three.safetensors"
    path.unlink(missing_ok=True)
    search(model, make_space(model), data[::2], data[1::2], data[:1], 200, order="first", callbacks=(),
           config=SearchConfig(3, lr=1e-2, measure_every=0, dropout=False, compute=Compute(**compute)),
           checkpoint=Checkpoint(path))
    state = load_state(path)["learner"]["take_step"]
    kept = {name: state[name]["optimizer"]["state"].values() for name in ("step_delta", "step_alpha")}
    return {name: torch.cat([each["exp_avg"].flatten() for each in states]) for name, states in kept.items()}


def assert_near(one: dict, other: dict, share: float) -> None:
    "Each vector differs by no more than a share of its largest entry."
    for name, moment in one.items():
        assert (other[name] - moment).abs().max() <= share * moment.abs().max() > 0


def test_two_batches_a_step_are_one_batch_of_both(tmp_path):
    assert_near(moments(tmp_path, whole=True), moments(tmp_path, accumulate=2), 1e-3)


def test_gradient_checkpointing_changes_nothing_but_rounding(tmp_path):
    assert_near(moments(tmp_path), moments(tmp_path, gradient_checkpointing=True), 1e-5)


def test_half_the_bits_give_nearly_the_same_gradient(tmp_path):
    from variants import rounded  # not above: this file is also a script, which finds no neighbours

    plain, half = moments(tmp_path), moments(tmp_path, precision="bf16")
    for name in plain:
        assert plain[name].dtype == half[name].dtype and torch.equal(plain[name], half[name]) != rounded()
        assert torch.cosine_similarity(plain[name], half[name], dim=0) > 0.98


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_the_same_but_for_rounding(tmp_path):
    "Three steps of a search in two lengths of rows, three of a training: moments to 1e-4 of the largest."
    model = tiny("bert", num_hidden_layers=1)
    space = make_space(model)
    data = [example_batch(model, 4, length, length) for length in (6, 9)]
    everything = Structure.of(space, torch.ones(len(space), dtype=torch.bool))

    def first_moments(compile):
        numbers, found = {"lr": 1e-2, "dropout": False, "compute": Compute(compile=compile)}, {}
        paths = [tmp_path / f"{phase}-{compile}.safetensors" for phase in ("search", "train")]
        search(model, space, data, data[::-1], data, 100, order="second", callbacks=(),
               config=SearchConfig(3, **numbers), checkpoint=Checkpoint(paths[0]))
        retrain(model, everything, data[:1], data, callbacks=(), config=TrainConfig(3, **numbers),
                checkpoint=Checkpoint(paths[1]))
        for path in paths:
            step = load_state(path)["learner"]["take_step"]
            for name in step.keys() & {"stepper", "step_delta", "step_alpha"}:
                found[name] = torch.cat([each["exp_avg"].flatten()
                                         for each in step[name]["optimizer"]["state"].values()])
        return found

    plain, compiled = first_moments(False), first_moments(True)
    assert len(plain) == 3
    assert_near(plain, compiled, 1e-4)
    assert not all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_an_exact_order_is_not_compiled():
    with pytest.raises(ValueError, match="order 'exact' differentiates twice"):
        searched(tiny("bert"), order="exact", compute=Compute(compile=True))


def test_two_processes_compute_what_one_does_with_two_batches(tmp_path):
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    command = [sys.executable, *launch, __file__, str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = searched_shuffled(compute=Compute(accumulate=2))
    assert torch.equal(one["alpha"], two["alpha"])
    assert one["records"] > 0 and two["records"] == 0
    torch.testing.assert_close(one["alpha"], alone.alpha, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one["alpha"], searched_shuffled().alpha, rtol=1e-2, atol=1e-3)


def one_of_two(folder: str) -> None:
    "What each of the two processes does."
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    records = Records()
    result = searched_shuffled(records)
    save_file({"alpha": result.alpha.clone(), "records": torch.tensor(len(records))},
              Path(folder) / f"{state.process_index}.safetensors")


def test_the_one_sided_difference_is_refused_in_half_the_bits():
    with pytest.raises(ValueError, match="drowns in the rounding of bf16; choose 'first'"):
        searched(tiny("bert"), order="second", compute=Compute(precision="bf16"))


def test_an_early_stop_that_was_used_before_begins_anew():
    stop = EarlyStop(rounds=2, similar=0.5, floor=0)
    searched(tiny("bert"), callbacks=[stop], steps=2)
    assert len(stop.sets) == 1
    again = searched(tiny("bert"), callbacks=[stop], space="lora", steps=3)
    assert again.steps == 3 and len(stop.sets) == 2


@pytest.mark.parametrize("alphas", ALPHAS)
def test_alphas_are_chosen_after_the_search(alphas):
    result = searched(tiny("bert"), steps=9)
    steps = list(result.scores)
    best = max(steps, key=lambda step: (result.scores[step], step))
    expected = {"best": best, "last": 9, "mean": 9}[alphas]
    taken = result.taken(alphas, k=2)
    assert taken.step == expected
    mean = (result.history[6] + result.history[9]) / 2
    assert torch.equal(taken.alpha, mean if alphas == "mean" else result.history[expected])
    assert result.taken("best").step == result.step and torch.equal(result.taken("best").alpha, result.alpha)


def test_an_unknown_choice_of_alphas_names_the_near_one():
    with pytest.raises(UnknownName, match="did you mean 'last'"):
        searched(tiny("bert")).taken("lats")


def test_an_annealed_gate_is_as_it_was_at_the_step_that_was_taken():
    gate = Annealed(ShiftedSigmoid(), tau=geometric(1.0, 0.25), beta=geometric(1.0, 0.1))
    records = Records()
    result = searched(tiny("bert"), steps=8, evaluate_every=4, gate=gate, log=records)
    assert result.taken("last").gate == ShiftedSigmoid(tau=0.25, beta=0.1)
    assert result.gate == gate.at(result.step / 8)
    looks = [record for record in records if record["event"] == "gates"]
    assert looks and all(look["gate"] == gate_record(gate.at(look["step"] / 8)) for look in looks)


@pytest.mark.parametrize("gate", [ShiftedSigmoid(), ShiftedSigmoid(scope="local"), StraightThrough()],
                         ids=["global", "local", "straight-through"])
def test_the_expected_size_stays_within_the_budget_at_every_step(gate):
    records = Records()
    searched(tiny("bert"), gate=gate, log=records)
    sizes = [record["expected_size"] for record in records if record["event"] == "step"]
    assert all(199.999 < size <= 200 for size in sizes)


def test_a_heavier_penalty_leaves_a_smaller_expected_size():
    model = tiny("bert")
    sizes = []
    for weight in (0.0, 1e-4, 1.0):
        result = searched(model, gate=HardConcrete(weight=weight), steps=40).taken("last")
        sizes.append(float(result.p @ result.space.n.double()))
        assert result.structure().n_params <= 200
    assert sizes[0] > sizes[1] > sizes[2]


def taught() -> tuple:
    "A regression model, its space, batches whose labels one module's change makes, and the module's place."
    model = tiny("bert", head="regress", num_labels=1)
    space, data = make_space(model), [example_batch(model, size=16, seed=seed) for seed in range(24)]
    teacher = torch.tensor([candidate.name == "encoder.1.ffn_norm.lnfit" for candidate in space.candidates])
    with attach(model, space.subset(teacher)) as gated, torch.no_grad():
        gated.pets[0].s.copy_(2 * torch.randn(16, generator=torch.Generator().manual_seed(0)))
        answers = [gated(batch["input_ids"], batch["attention_mask"]).logits[:, 0] for batch in data]
    scale = torch.cat(answers).std()
    return model, space, [batch | {"labels": each / scale} for batch, each in zip(data, answers)], teacher


@pytest.mark.parametrize("budget, steps, alpha_lr", [(64, 120, 0.3), (300, 120, 0.1), (900, 80, 0.1)])
def test_the_weight_of_a_penalty_is_found_for_the_budget(budget, steps, alpha_lr):
    model, space, data, teacher = taught()
    records = Records()
    result = search(model, space, data[:10], data[10:20], data[20:], budget, HardConcrete(weight=None),
                    "first", config=SearchConfig(steps=steps, lr=2e-2, alpha_lr=alpha_lr, measure_every=0,
                                                 evaluate_every=steps), callbacks=(), log=records).taken("last")
    sizes = [record["expected_size"] for record in records if record["event"] == "step"]
    assert sizes[0] > 1000 and sizes[-1] == pytest.approx(budget, rel=0.04)
    assert float(result.p @ space.n.double()) == pytest.approx(sizes[-1])
    assert result.p[teacher].item() > 0.7 and int((result.p > result.p[teacher]).sum()) <= 2
    assert any(module.module == "lnfit" and module.role == "ffn_norm" and module.layer == 1
               for module in result.structure().modules)


def test_a_search_that_finds_the_weight_of_its_penalty_goes_on_from_a_checkpoint(tmp_path):
    def run(at=None):
        halts = [HaltAt(at)] if at else []
        return search(model, make_space(model), data[::2], data[1::2], data[:1], 200, gate, "first",
                      config=config, callbacks=halts, checkpoint=Checkpoint(path, every=4))

    model, path, gate = tiny("bert"), tmp_path / "search.safetensors", HardConcrete(weight=None)
    data = batches(model)
    config = SearchConfig(steps=12, lr=1e-2, evaluate_every=6, measure_every=0, dropout=False)
    whole = searched(model, gate=gate, steps=12, evaluate_every=6).taken("last")
    with pytest.raises(KeyboardInterrupt):
        run(at=7)
    assert torch.equal(run().taken("last").alpha, whole.alpha)


def test_early_stop_needs_as_many_equal_sets_as_it_is_told():
    records = Records()
    result = searched(tiny("bert"), steps=400, evaluate_every=5, callbacks=[EarlyStop(rounds=4, checks=80, floor=0)],
                      log=records)
    note = next(record for record in records if record["event"] == "early_stop")
    assert result.steps == note["step"] < 400 and note["saved"] == 1 - result.steps / 400
    sets = [select(torch.tensor(record["p"], dtype=torch.float64), result.space.n, 200)
            for record in records if record["event"] == "gates" and record["step"]]
    likeness = [[jaccard(now, before) for before in sets[max(0, i - 4):i]] for i, now in enumerate(sets)]
    assert min(likeness[-1]) >= 0.95 and len(likeness[-1]) == 4
    assert not any(len(each) == 4 and min(each) >= 0.95 for each in likeness[:-1])
    assert records[-1]["event"] == "score" and records[-1]["step"] == result.steps


class Looks:
    "A step whose chosen sets are given, in the order of the looks."

    def __init__(self, sets):
        self.sets, self.seen = iter(sets), 0

    def __call__(self, batch):
        return {"loss": 0.0}

    def chosen(self):
        self.seen += 1
        return torch.tensor(next(self.sets), dtype=torch.bool)


@pytest.mark.parametrize("checks, steps, every", [(20, 100, 5), (20, 47, 2), (20, 7, 1), (3, 100, 33)])
def test_a_search_is_looked_at_as_often_as_it_is_told_and_scored_where_it_stops(checks, steps, every):
    always, never = Looks([[1, 0]] * 200), Looks([[1, 0], [0, 1]] * 100)
    for step, stops in ((always, 3 * every), (never, steps)):
        evaluate, records = Evaluate(lambda: 0.5, lambda: None, every=1000), Records()
        learner = Learner(step, [None], steps, "search", records,
                          [EarlyStop(rounds=2, checks=checks, floor=0), evaluate])
        learner.fit()
        assert learner.step == stops and list(evaluate.scores) == [stops]
        assert [record["event"] for record in records[-2:]][-1] == "score"
    assert always.seen == 3 and never.seen == (steps - 1) // every


def test_one_other_set_among_the_looks_begins_the_count_anew():
    step = Looks([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]])
    learner = Learner(step, [None], 20, "search", callbacks=[EarlyStop(rounds=2, floor=0)])
    learner.fit()
    assert learner.step == 6


@pytest.mark.parametrize("floor, stops", [(0, 3), (0.15, 3), (0.2, 4), (0.5, 10), (0.51, 11), (0.99, 20)])
def test_a_set_that_stays_the_same_from_the_start_ends_no_search_before_the_floor(floor, stops):
    learner = Learner(Looks([[1, 0]] * 20), [None], 20, "search", callbacks=[EarlyStop(rounds=2, floor=floor)])
    learner.fit()
    assert learner.step == stops


def test_after_the_floor_the_looks_before_it_count():
    step = Looks([[0, 1]] * 7 + [[1, 0]] * 12)
    learner = Learner(step, [None], 20, "search", callbacks=[EarlyStop(rounds=4)])
    learner.fit()
    assert learner.step == 12


def test_no_search_stops_before_half_of_its_steps_by_default():
    learner = Learner(Looks([[1, 0]] * 100), [None], 100, "search", callbacks=[EarlyStop()])
    learner.fit()
    assert learner.step == 50


@pytest.mark.parametrize("settings, words", [
    ({"rounds": 0}, "rounds is 0; give at least 1"), ({"checks": 0}, "checks is 0; give at least 1"),
    ({"similar": 0.0}, "similar is 0.0; give a share"), ({"similar": 1.5}, "similar is 1.5; give a share"),
    ({"floor": -0.1}, "floor is -0.1; give a share"), ({"floor": 1}, "floor is 1; give a share")])
def test_an_impossible_early_stop_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EarlyStop(**settings)


def test_every_step_of_a_search_tells_its_cost():
    records = Records()
    searched(tiny("bert"), log=records)
    steps = [record for record in records if record["event"] == "step"]
    memory = [record["memory_mb"] for record in steps]
    assert len(steps) == 6 and memory[0] > 100 and memory == sorted(memory)
    assert all(record["passes"] == 2 for record in steps)
    assert [record["seconds"] for record in steps] == sorted(record["seconds"] for record in steps)


def test_budgets_of_one_search_and_where_they_are_not_nested():
    result = searched(tiny("bert"), steps=20)
    table = result.budgets([2 * 16, 48, 64, 96, 200, 0.05])
    assert table.budget.is_monotonic_increasing and len(table) == 6
    names = [candidate.name for candidate in result.space.candidates]
    for before, row in zip(table.budget, table.iloc[1:].itertuples()):
        small, large = (result.structure(int(B)) for B in (before, row.budget))
        lost = {(k.layer, k.role, k.module) for k in small.modules} - {(k.layer, k.role, k.module)
                                                                       for k in large.modules}
        assert len(row.dropped) == len(lost) and set(row.dropped) <= set(names)
        assert row.n_params == large.n_params and row.modules == len(large)
        assert row.sum_p <= row.sum_p_exact + 1e-9 and row.gap == pytest.approx(result.gap(int(row.budget)))
    assert any(table.dropped.str.len())


def test_several_ranks_at_one_position_are_candidates_of_their_own():
    rules = tuple(Rule("lora", ("q", "v"), {"r": r}) for r in (1, 2, 4))
    result = searched(tiny("bert"), space=rules, budget=128, steps=10)
    assert len(result.space) == 2 * 2 * 3 and len({c.name for c in result.space.candidates}) == 12
    assert result.structure().n_params <= 128


def test_alpha_is_stepped_in_move_and_nowhere_else():
    class Held(SearchStep):
        "A step that trains the modules and leaves alpha."

        def move(self, result):
            self.step_delta.step(result.delta_grads)

    model = tiny("bert")
    data, space = batches(model), make_space(model)
    config = SearchConfig(steps=3, lr=1e-2, evaluate_every=2, dropout=False)
    with attach(model, space) as gated:
        before = gated.tensors()
        result = run_search(Held(gated, 200, "first", config), (data[:2], data[2:4], data[4:]))
        moved = [name for name, weight in gated.tensors().items() if not torch.equal(weight, before[name])]
    assert not any(alpha.any() for alpha in result.history.values()) and list(result.history) == [0, 1, 2, 3]
    assert moved and result.steps == 3


def test_a_search_step_of_another_question_is_refused():
    model = tiny("bert")
    with attach(model, make_space(model)) as gated:
        step = SearchStep(gated, 200, "auto", SearchConfig(measure_every=3))
        step((batches(model)[:1], batches(model)[1:2]))
        again = SearchStep(gated, 200, "auto", SearchConfig(measure_every=3))
        with pytest.raises(ValueError, match="config.seed is 0 in the checkpoint and 1 here"):
            SearchStep(gated, 200, "auto", SearchConfig(measure_every=3, seed=1)).load_state_dict(step.state_dict())
        with pytest.raises(ValueError, match=r"start\[0\] is 0.0 in the checkpoint and"):
            SearchStep(gated, 200, "auto", SearchConfig(measure_every=3)).load_state_dict(step.state_dict())
        again.start = step.start
        again.load_state_dict(step.state_dict())
        assert (again.done, again.passes, again.auto.share) == (1, 3, step.auto.share)
        assert torch.equal(again.noise()[0], step.noise()[0])


def test_orders_are_checked_before_any_pass():
    with pytest.raises(UnknownName, match="did you mean 'central'"):
        searched(tiny("bert"), order="centrl")
    assert SEARCH_ORDERS == ("first", "second", "central", "exact", "auto")


if __name__ == "__main__":
    one_of_two(sys.argv[1])


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.pop("about"), "it has no 'about', so another version wrote it"),
    (lambda state: state.pop("generator"), "it has no 'generator', so another version wrote it"),
    (lambda state: state["about"]["weights"].update({"head.classifier.bias": [99]}), "weights.head.classifier.bias[0] is 99")])
def test_a_checkpoint_of_another_version_or_shape_is_refused_in_a_sentence(spoil, says):
    model = tiny("bert")
    with attach(model, make_space(model)) as gated:
        step = SearchStep(gated, 200, "first", SearchConfig())
        state = step.state_dict()
        assert "head.classifier.bias" in state["about"]["weights"]
        spoil(state)
        with pytest.raises(ValueError, match=re.escape(says)):
            step.load_state_dict(state)


def alpha_gradient(lora_alpha, rates):
    "The hypergradient of alpha at the first step, of LoRA and biases on a model in float64."
    model = tiny("bert").double()
    space = make_space(model, (Rule("lora", ("q", "wi"), {"lora_alpha": lora_alpha}), Rule("bitfit", ("q",))))
    batches = [example_batch(model, seed=seed) for seed in (1, 2)]
    with attach(model, space) as gated:
        for k, pet in enumerate(gated.pets.double()):
            for weight in pet.parameters():
                draw = torch.Generator().manual_seed(k)
                if weight.any():
                    weight.data = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        step = SearchStep(gated, space.n_params // 2, "first", SearchConfig(10, 1e-2, rates=rates, dropout=False))
        seen = []
        step.move = lambda result: seen.append(result.direct)
        step(([batches[0]], [batches[1]]))
    return seen[0]


def test_loras_scale_does_not_matter_in_a_search_under_a_recipe_and_does_at_one_rate():
    rates = {"A": 0.02, "B": 0.01, "vector": 0.002, "head": 0.01}
    one, sixteen = (alpha_gradient(scale, rates) for scale in (1.0, 16.0))
    assert one.norm() > 0 and torch.allclose(one, sixteen, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(alpha_gradient(1.0, {}), alpha_gradient(16.0, {}), rtol=0.1)


def test_auto_measures_only_once_the_rate_is_above_zero():
    model, records = tiny("bert"), Records()
    loader = DataLoader([{name: column[i] for name, column in example_batch(model, size=8).items()}
                         for i in range(8)], 4)
    search(model, make_space(model, "bias"), loader, loader, loader, budget=100, order="auto", log=records,
           config=SearchConfig(20, rates={"vector": 0.1}, warmup=0.1, measure_every=50, evaluate_every=20),
           callbacks=())
    measured = {record["step"]: record["mixed"] for record in records if "mixed" in record}
    assert min(measured) == 2 and measured[2] > 0
