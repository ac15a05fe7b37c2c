"Prune-search against stored steps, in every family, and what is left of a model, a file and an optimiser."
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from accidents import Stop, Watch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.utils.data import DataLoader

from s3pet_nb.learn.compute import Compute, negative_loss
from s3pet_nb.learn.learner import Checkpoint, Records, load_state
from s3pet_nb.learn.prune import (CRITERIA, GRANULARITIES, Moment, PruneConfig, ScoredStep, Units, drop, flat,
                                  geometric_budgets, prune_search, random_units, same_kinds_units, upper_units, within)
from s3pet_nb.learn.train import TrainConfig, TrainStep, retrain
from s3pet_nb.model.backbone import FAMILIES, example_batch, head_parameters, tiny
from s3pet_nb.model.space import SPACES, Rule, lora_at, make_space
from s3pet_nb.model.structure import Structure

ROOT = Path(__file__).parents[2]
SMALL = lora_at(SPACES["mam"], 3)  # biases, and rank-3 LoRA
TRAIN = TrainConfig(steps=10, lr=1e-2, warmup=0.2, clip=0.05, take="last", dropout=False)


def rows(model, count: int = 6, size: int = 8) -> list[dict[str, torch.Tensor]]:
    return [example_batch(model, size=size, seed=seed) for seed in range(count)]


FORMULAS = {
    "first-order": lambda theta, grad, start: -theta * grad,
    "absolute": lambda theta, grad, start: (theta * grad).abs(),
    "magnitude": lambda theta, grad, start: theta.abs(),
    "fisher": lambda theta, grad, start: grad ** 2,
    "movement": lambda theta, grad, start: (theta - start).abs(),
}


def test_every_criterion_has_a_formula_to_be_held_against():
    assert set(FORMULAS) | {"random"} <= set(CRITERIA)


@pytest.mark.parametrize("average_over", [0, 4, 1])
@pytest.mark.parametrize("criterion", FORMULAS)
def test_the_criterion_is_the_formula_on_stored_steps(criterion, average_over, monkeypatch):
    model, watch = tiny("bert"), Watch(monkeypatch, ScoredStep)
    result = prune_search(model, make_space(model, SMALL), rows(model), budget=300, criterion=criterion,
                          config=PruneConfig(TRAIN, average_over=average_over), callbacks=())
    steps = [FORMULAS[criterion](theta, grad, watch.thetas[0])
             for theta, grad in zip(watch.thetas, watch.grads)][-average_over:]
    expected = torch.stack(steps).mean(0)
    assert len(steps) == (average_over or 10)
    assert (result.scores - expected).norm() <= 1e-6 * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("compute", [Compute(accumulate=2), Compute("bf16"), Compute(gradient_checkpointing=True)],
                         ids=["accumulated", "bf16", "checkpointed"])
def test_scores_are_right_however_the_gradient_is_computed(compute, monkeypatch):
    model, watch = tiny("bert"), Watch(monkeypatch, ScoredStep)
    config = PruneConfig(replace(TRAIN, compute=compute))
    result = prune_search(model, make_space(model, SMALL), rows(model), budget=300, config=config, callbacks=())
    expected = -torch.stack([theta * grad for theta, grad in zip(watch.thetas, watch.grads)]).mean(0)
    assert (result.scores - expected).norm() <= 1e-6 * expected.norm()


def test_two_batches_a_step_score_as_one_of_twice_the_rows():
    model = tiny("bert")
    space, single = make_space(model, SMALL), rows(model)
    double = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(single[::2], single[1::2])]
    whole = prune_search(model, space, double, budget=300, config=PruneConfig(TRAIN), callbacks=())
    halves = prune_search(model, space, single, budget=300, callbacks=(),
                          config=PruneConfig(replace(TRAIN, compute=Compute(accumulate=2))))
    assert (whole.scores - halves.scores).norm() < 1e-3 * whole.scores.norm()


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_whole_training_and_its_scores_follow_from_plain_torch(in_float64):
    "A loop of its own: loss, gradient, score, clip, Adam with a warm-up; nothing of the library but the model."
    model = tiny("bert")
    space, batches = make_space(model, SMALL), rows(model)
    everything = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    with everything.apply(model, seed=3) as gated:
        gated.train(False)
        weights = gated.trainable()
        pets = [weight for name, weight in weights.items() if not name.startswith("head.")]
        adam, total = AdamW(weights.values(), lr=0.0, weight_decay=0.0), 0
        for k in range(10):
            loss = gated(**batches[k % 6]).loss
            grads = torch.autograd.grad(loss, list(weights.values()))
            total = total - flat(pets) * flat(grads[:len(pets)])
            norm = flat(grads).norm()
            for weight, grad in zip(weights.values(), grads):
                weight.grad = grad * min(1.0, 0.05 / (norm + 1e-6))  # as clip_grad_norm_ does
            adam.param_groups[0]["lr"] = 1e-2 * (k / 2 if k < 2 else (10 - k) / 8)
            adam.step()
    result = prune_search(model, space, batches, budget=300, callbacks=(),
                          config=PruneConfig(replace(TRAIN, seed=3)))
    torch.testing.assert_close(result.scores, total / 10, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_structured_scores_are_sums_of_unstructured_ones(criterion):
    model = tiny("bert")
    space = make_space(model, SMALL)
    results = {granularity: prune_search(model, space, rows(model), budget=300, criterion=criterion,
                                         granularity=granularity, config=PruneConfig(TRAIN), callbacks=())
               for granularity in GRANULARITIES}
    assert torch.equal(results["structured"].scores, results["unstructured"].scores)
    scores, units = results["structured"].scores, results["structured"].units
    summed = []
    parts = dict(zip(units.shapes, scores.split([shape.numel() for shape in units.shapes.values()])))
    for candidate in space.candidates:
        if candidate.module == "lora":
            summed += parts[f"{candidate.name}.B"].view(units.shapes[f"{candidate.name}.B"]).sum(0).tolist()
        else:
            summed.append(parts[f"{candidate.name}.b"].sum().item())
    assert len(summed) == len(units.sizes)
    torch.testing.assert_close(units.scores(scores), torch.tensor(summed, dtype=torch.float64))


@pytest.mark.parametrize("module, counted", [("adapter", ("up.weight", "up.bias")), ("lora", ("B",)),
                                             ("lowrank_adapter", ("up_out", "up_bias")), ("bitfit", ("b",))])
def test_a_unit_counts_the_scores_of_its_last_factor(module, counted):
    model = tiny("bert")
    role = {"lora": "q", "bitfit": "q"}.get(module, "ffn")
    units = Units.of(make_space(model, [Rule(module, (role,))]), "structured")
    sizes = [shape.numel() for shape in units.shapes.values()]
    for name, counts in zip(units.shapes, units.counts.split(sizes)):
        assert bool(counts.all()) == bool(counts.any()) == name.endswith(counted)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_lowest_go_first_and_the_rest_is_at_most_one_unit_below_the_budget(granularity):
    model = tiny("bert")
    space = make_space(model, SMALL)
    for B in 64, 200, 777:
        result = prune_search(model, space, rows(model), budget=B, granularity=granularity,
                              config=PruneConfig(TRAIN), callbacks=())
        units, keep = result.units, result.kept()
        kept = torch.bincount(units.unit[keep], minlength=len(units.sizes)) > 0
        scores = units.scores(result.scores)
        before = torch.stack([units.sizes[kept & (scores >= score)].sum() for score in scores[~kept]])
        assert (before + units.sizes[~kept] > B).all(), "what is gone does not fit behind what scores higher"
        last = units.sizes[~kept][scores[~kept].argmax()]
        assert B - int(last) < int(keep.sum()) <= B
        assert result.structure().n_params == int(keep.sum()) == result.trained.n_trained


def test_ties_are_broken_by_position():
    model = tiny("bert")
    units = Units.of(make_space(model, "bias"), "unstructured")
    keep = drop(units, torch.zeros(len(units.unit)), torch.ones(len(units.unit), dtype=torch.bool), 100)
    assert keep[-100:].all() and not keep[:-100].any()
    scores = torch.tensor([0.5, 0.2, 0.2, 0.9]).repeat(len(units.unit) // 4)
    kept = []
    for threads in 2, 1:
        torch.set_num_threads(threads)
        kept.append(drop(units, scores, torch.ones(len(scores), dtype=torch.bool), len(scores) - 10))
    assert torch.equal(*kept) and (~kept[0]).nonzero().flatten().tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18]


SCRIPT = """
import sys, torch
from s3pet_nb.learn.prune import PruneConfig, prune_search
from s3pet_nb.learn.train import TrainConfig
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.space import make_space
torch.set_num_threads(2)
model = tiny("bert")
batches = [example_batch(model, size=8, seed=seed) for seed in range(3)]
config = PruneConfig(TrainConfig(steps=5, lr=1e-2, take="last"))
prune_search(model, make_space(model, "mam"), batches, budget=500, config=config,
             callbacks=()).structure().save(sys.argv[1])
"""


def test_the_structure_depends_neither_on_hashes_nor_on_the_order_of_threads(tmp_path):
    files = []
    for hash_seed in "1", "2":
        path = tmp_path / f"{hash_seed}.json"
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, cwd=ROOT,
                       env=os.environ | {"PYTHONHASHSEED": hash_seed})
        files.append((path.read_bytes(), path.with_suffix(".safetensors").read_bytes()))
    assert files[0] == files[1]


def assert_as_before(model, before) -> None:
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("space", ["bias", "mam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned(family, space, granularity):
    model = tiny(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch = example_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    candidates = make_space(model, space)
    B = candidates.n_params // 4
    result = prune_search(model, candidates, [batch], budget=B, granularity=granularity, callbacks=(),
                          config=PruneConfig(replace(TRAIN, steps=2)))
    structure = result.structure()
    assert 0 < structure.n_params <= B and math.isfinite(result.trained.score)
    assert_as_before(model, before)
    with structure.apply(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_left_begins_where_it_began_in_the_whole(granularity, monkeypatch):
    model, starts = tiny("bert"), {}
    made = TrainStep.__init__

    def noted(step, *args):
        made(step, *args)
        starts[len(starts)] = step.snapshot()

    monkeypatch.setattr(TrainStep, "__init__", noted)
    space = make_space(model, SMALL)
    result = prune_search(model, space, rows(model), budget=[900, 400], granularity=granularity, callbacks=(),
                          config=PruneConfig(replace(TRAIN, seed=5)))
    whole, first, last = starts.values()
    final = result.units.masks(result.kept())
    assert {name for name in last if not name.startswith("head.")} <= set(final)
    for part, masks in (first, None), (last, final):
        for name, tensor in part.items():
            if name.startswith("head."):
                assert torch.equal(tensor, whole[name])
            elif masks is not None:
                assert torch.equal(tensor.flatten(), whole[name][masks[name]])
    assert sum(t.numel() for n, t in last.items() if not n.startswith("head.")) == result.structure().n_params
    assert sum(t.numel() for n, t in first.items() if not n.startswith("head.")) > 400


def test_another_seed_draws_what_is_left_anew():
    model = tiny("bert")
    space, batches = make_space(model, SMALL), rows(model)
    one, other = (prune_search(model, space, batches, budget=400, callbacks=(),
                               config=PruneConfig(TRAIN, replace(TRAIN, steps=1, seed=seed))) for seed in (0, 1))
    assert one.structure() == other.structure()
    assert not all(torch.equal(one.trained.tensors[name], other.trained.tensors[name])
                   for name in one.trained.tensors if ".lora" in name)


def test_only_what_is_kept_is_trained_stored_and_remembered(tmp_path):
    model = tiny("bert")
    space = make_space(model, SMALL)
    result = prune_search(model, space, rows(model), budget=100, config=PruneConfig(TRAIN), callbacks=(),
                          checkpoint=lambda label: Checkpoint(tmp_path / f"{label}.safetensors", every=3))
    n_head = sum(weight.numel() for weight in head_parameters(model).values())
    state = load_state(tmp_path / "searched.safetensors")["learner"]["take_step"]
    assert sum(weight.numel() for weight in state["stepper"]["values"].values()) == 100 + n_head
    moments = state["stepper"]["optimizer"]["state"].values()
    assert sum(each["exp_avg"].numel() for each in moments) == 100 + n_head
    assert result.trained.n_trained == 100 and result.trained.n_head == n_head
    result.structure().save(tmp_path / "structure.json")
    again = Structure.load(tmp_path / "structure.json")
    with pytest.raises(ValueError, match="give the seed of the training that these tensors are from"):
        with again.apply(model, tensors=result.trained.tensors):
            pass
    with again.apply(model, result.trained.tensors, seed=TRAIN.seed) as gated:
        assert gated.space.n_params == 100
        assert negative_loss(gated, rows(model)) == result.trained.score


def test_scoring_takes_no_pass_of_its_own(monkeypatch):
    model = tiny("bert")
    space, calls, forward = make_space(model, "mam"), [], type(model).forward

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    prune_search(model, space, rows(model), budget=500, config=PruneConfig(TRAIN), callbacks=())
    assert sum(calls) == 10 + 10


def test_round_after_round_from_the_same_initial_values():
    model, log = tiny("bert"), Records()
    space = make_space(model, "bias")
    budgets = geometric_budgets(space.n_params, 30, 3)
    result = prune_search(model, space, rows(model), budget=budgets, config=PruneConfig(TRAIN), callbacks=(),
                          log=log)
    assert [record["event"] for record in log[:1]] == ["space"]
    scored = [record for record in log if record["event"] == "scores"]
    assert [record["phase"] for record in scored] == ["prune-1", "prune-2", "prune-3"]
    assert [record["budget"] for record in scored] == [sum(record["kept"]) for record in scored] == budgets
    kept = torch.tensor([record["kept"] for record in scored])
    assert (kept[1:] <= kept[:-1]).all() and (kept[0] <= space.n).all()
    assert [kept_.n for kept_ in result.structure().modules] == [n for n in scored[-1]["kept"] if n]
    phases = [record["phase"] for record in log if record["event"] == "step"]
    assert list(dict.fromkeys(phases)) == ["prune-1", "prune-2", "prune-3", "searched"] and len(phases) == 40
    assert result.steps == 30 and result.alive.sum() == budgets[1]


def test_other_budgets_are_answered_within_what_was_trained():
    model = tiny("bert")
    result = prune_search(model, make_space(model, "bias"), rows(model), budget=[200, 100], callbacks=(),
                          config=PruneConfig(TRAIN))
    assert result.structure(200).n_params == 200 and result.structure(30).n_params == 30
    with pytest.raises(ValueError, match="201 parameters, the whole space has 200"):
        result.structure(201)


def test_a_round_that_has_nothing_to_do_is_left_out():
    "A large unit that goes last may leave less than the next budget already."
    model, log, skipped = tiny("bert"), Records(), 0
    space = make_space(model, "bias")
    for seed in range(3):
        del log[:]
        config = PruneConfig(replace(TRAIN, steps=1, seed=seed), replace(TRAIN, seed=seed))
        result = prune_search(model, space, rows(model), budget=geometric_budgets(space.n_params, 64, 10),
                              granularity="structured", criterion="random", config=config, callbacks=(), log=log)
        phases = {record["phase"] for record in log if record["event"] == "scores"}
        skipped += 10 - len(phases)
        assert 0 < result.structure().n_params <= 64
        assert result.structure().n_params == result.trained.n_trained
    assert skipped > 0


def test_every_phase_sees_the_same_batches(monkeypatch):
    model, seen = tiny("bert"), []
    gradients = TrainStep.gradients

    def noted(step, batches):
        seen.append(int(batches[0]["input_ids"].sum()))
        return gradients(step, batches)

    monkeypatch.setattr(TrainStep, "gradients", noted)
    items = [{name: column[i] for name, column in batch.items()} for batch in rows(model) for i in range(8)]

    def shuffled():
        return DataLoader(items, 8, shuffle=True, generator=torch.Generator().manual_seed(7))

    space = make_space(model, "bias")
    result = prune_search(model, space, shuffled(), rows(model), budget=[200, 100], config=PruneConfig(TRAIN),
                          callbacks=())
    retrain(model, random_units(space, 100, "unstructured", 0), shuffled(), rows(model), config=TRAIN,
            callbacks=())
    assert result.steps == 20 and len(seen) == 40
    assert seen[:10] == seen[10:20] == seen[20:30] == seen[30:] and len(set(seen[:6])) == 6


def test_a_checkpoint_of_other_entries_is_refused(tmp_path):
    model = tiny("bert")
    space, told = make_space(model, "bias"), {"config": TRAIN, "callbacks": ()}
    units = Units.of(space, "unstructured")

    def train(entry):
        structure = Structure.pruned(space, units.masks(torch.arange(len(units.unit)) == entry))
        return retrain(model, structure, rows(model), rows(model), **told,
                       checkpoint=Checkpoint(tmp_path / "one.safetensors"))

    first = train(0)
    with pytest.raises(ValueError, match="the digest of the structure is .* in the checkpoint and"):
        train(5)
    with pytest.raises(ValueError, match="belong to another structure: 1 names or shapes differ"):
        three = Structure.pruned(space, units.masks(torch.arange(len(units.unit)) < 3))
        with three.apply(model, first.tensors):
            pass


@pytest.mark.parametrize("asked, words", [
    ({"budget": 300}, "budget is 400 in the checkpoint and 300 here"),
    ({"granularity": "structured"}, "granularity is 'unstructured' in the checkpoint and 'structured' here"),
    ({"criterion": "absolute"}, "criterion is 'first-order' in the checkpoint and 'absolute' here"),
    ({"config": PruneConfig(TRAIN, average_over=2)}, "average_over is 0 in the checkpoint and 2 here")])
def test_another_question_is_refused_in_its_first_phase(asked, words, tmp_path):
    model = tiny("bert")

    def ask(**other):
        prune_search(model, make_space(model, SMALL), rows(model), callbacks=(), checkpoint=lambda label: Checkpoint(
            tmp_path / f"{label}.safetensors"), **{"budget": 400, "config": PruneConfig(TRAIN)} | other)

    ask()
    ask()
    with pytest.raises(ValueError, match=f"prune-1.safetensors is of another run: .*{words}; remove it"):
        ask(**asked)


def test_a_training_that_is_stopped_before_it_is_scored_is_refused():
    refused(ValueError, "stopped after step 5, and only the last 3 of 10 are scored; score all of them",
            config=PruneConfig(TRAIN, average_over=3), callbacks=[Stop(5)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_pruning_is_of_the_same_units_and_reproducible(granularity):
    space = make_space(tiny("bert"), SMALL)
    found = [random_units(space, 400, granularity, seed) for seed in range(5)]
    assert found[0] == random_units(space, 400, granularity, 0)
    assert len({tuple(structure.frame().n) for structure in found}) == 5
    largest = int(Units.of(space, granularity).sizes.max())
    assert all(400 - largest < structure.n_params <= 400 for structure in found)


def test_the_papers_sizes_on_roberta_large():
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(
            vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
            num_attention_heads=16, max_position_embeddings=514, type_vocab_size=1))
    biases = sum(w.numel() for name, w in head_parameters(model).items() if name.endswith("bias"))
    space = make_space(model, "mam")
    assert make_space(model, "bias").n_params + biases == 272_386
    assert space.n_params + biases == 5_777_410
    assert len(Units.of(space, "structured").sizes) == 193 + 96 * 16
    other = make_space(model, lora_at(SPACES["mam"], 4, ("q", "v")))
    assert other.n_params == 272_386 - biases + 48 * 4 * 2048


def refused(error, words, **asked):
    model = asked.pop("model", None) or tiny("bert")
    space = asked.pop("space", None) or make_space(model, SMALL)
    with pytest.raises(error, match=words):
        prune_search(model, space, rows(model),
                     **{"budget": 300, "config": PruneConfig(TRAIN), "callbacks": ()} | asked)


def test_budgets_that_keep_nothing_or_prune_nothing_are_refused_before_a_step(monkeypatch):
    monkeypatch.setattr(TrainStep, "__call__", None)
    refused(ValueError, "31 parameters may keep nothing, since structured pruning removes up to 48 at once; give at "
                        "least 48, or prune unstructured", budget=31, granularity="structured")
    refused(ValueError, "a budget of 100,000 prunes nothing", budget=100_000)
    refused(ValueError, "a budget of 300 prunes nothing, there are 300 parameters", budget=[300, 300])
    refused(ValueError, "budget 0 is not a positive number", budget=0)
    refused(ValueError, "the schedule of budgets is empty; give at least one", budget=[])
    refused(LookupError, "unknown granularity 'structurd'; did you mean 'structured'", granularity="structurd")
    refused(LookupError, "unknown pruning criterion 'firstorder'; did you mean 'first-order'",
            criterion="firstorder")
    refused(ValueError, "average_over is 11; give 0 for all steps, or 1 to 10",
            config=PruneConfig(TRAIN, average_over=11))
    with pytest.raises(ValueError, match="6 rounds from 10 to 8 would repeat a budget"):
        geometric_budgets(10, 8, 6)
    with pytest.raises(ValueError, match="B is 0.2; give at least 1 of each, B as a count"):
        geometric_budgets(10, 0.2, 2)


def test_a_criterion_that_is_not_a_number_is_named_with_its_weight():
    def broken(at: Moment) -> torch.Tensor:
        return at.theta.sqrt()

    refused(FloatingPointError, "prune-1 stopped at step 1: criterion 'broken' is not a number at encoder.0.q.lora",
            criterion=broken)


def test_a_criterion_gives_one_score_for_each_entry():
    def short(at: Moment) -> torch.Tensor:
        return at.theta[:1]

    refused(ValueError, r"criterion 'short' gave a tensor of shape \(1,\); it should give one score for each of",
            criterion=short)


def test_a_part_of_a_module_is_not_pruned_again():
    from s3pet_nb.model.structure import kept_space
    model = tiny("bert")
    part = kept_space(model, random_units(make_space(model, "bias"), 50, "unstructured", 0))
    refused(ValueError, "is a part of a module; take a space of whole ones", model=model, space=part, budget=20)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_biases_are_added_where_a_backbone_has_none(family):
    model = tiny(family)
    assert not any(name.endswith("bias") for name, _ in model.base_model.named_parameters())
    space = make_space(model, "bias")
    result = prune_search(model, space, [example_batch(model)], budget=40, callbacks=(),
                          config=PruneConfig(TRAIN))
    with result.trained.on(model) as gated:
        assert sum(tensor.abs().sum() for name, tensor in gated.tensors().items() if ".bitfit" in name) > 0


def scores_of(**compute) -> torch.Tensor:
    model = tiny("bert")
    config = PruneConfig(replace(TRAIN, compute=Compute(**compute)))
    return prune_search(model, make_space(model, SMALL), rows(model), budget=300, config=config,
                        callbacks=()).scores


def one_of_two(folder: str) -> None:
    "What each of the two processes does."
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    save_file({"scores": scores_of()}, Path(folder) / f"{state.process_index}.safetensors")


def test_two_processes_score_what_one_does_with_two_batches(tmp_path):
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    shown = subprocess.run([sys.executable, *launch, __file__, str(tmp_path)], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    assert shown.returncode == 0, shown.stderr
    one, two = (load_file(tmp_path / f"{rank}.safetensors")["scores"] for rank in range(2))
    alone = scores_of(accumulate=2)
    assert torch.equal(one, two)
    assert (one - alone).norm() < 1e-3 * alone.norm() < 0.1 * (scores_of() - alone).norm()


if __name__ == "__main__":
    one_of_two(sys.argv[1])


# --- what a pruning is compared with

def test_structured_pruning_fills_what_the_last_unit_leaves():
    sizes, scores = torch.tensor([50, 40, 9, 30, 4]), torch.tensor([5.0, 4.0, 1.0, 3.0, 2.0])
    assert within(scores, sizes, 100).tolist() == [True, True, False, False, True], "4 comes back, 30 and 9 do not fit"
    model = tiny("bert")
    units = Units.of(make_space(model, SMALL), "structured")
    alive = torch.ones(len(units.unit), dtype=torch.bool)
    for seed in range(8):
        scores = torch.rand(len(units.unit), generator=torch.Generator().manual_seed(seed))
        B = 300 + 7 * seed
        keep = drop(units, scores, alive, B)
        gone = ~(torch.bincount(units.unit[keep], minlength=len(units.sizes)) > 0)
        assert units.sizes[gone].min() > B - int(keep.sum()), "nothing that is gone still fits"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_controls_of_a_pruning_are_as_full_as_it_is(granularity):
    model = tiny("bert")
    space = make_space(model, SMALL)
    units = Units.of(space, granularity)
    scores = torch.rand(len(units.unit), generator=torch.Generator().manual_seed(5))
    keep = drop(units, scores, torch.ones(len(scores), dtype=torch.bool), 400)
    alike, upper = same_kinds_units(units, keep, 400, 1), upper_units(units, 400)
    smallest = int(units.sizes.min())
    assert all(400 - smallest < structure.n_params <= 400 for structure in (alike, upper))
    owner = [candidate.module for candidate in space.candidates]
    kinds = {kind: sum(int(n) for n, each in zip(units.by_candidate(keep), owner) if each == kind) for kind in set(owner)}
    if granularity == "unstructured":
        assert alike.frame().groupby("module").n.sum().to_dict() == kinds
    assert upper.frame().layer.max() == space.shape["encoder"][0] - 1
    assert alike == same_kinds_units(units, keep, 400, 1) != same_kinds_units(units, keep, 400, 2)
