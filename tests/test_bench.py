"The bench: the published step is what it claims to be, and the harness measures, tells and goes on."
import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from bench import bench as whole
from bench import runs, scaling, where
from bench.__main__ import NAMES, tell
from bench.bench import MISSING, TARGETS, Plan
from bench.cases import CASES, TaskRun, share, sibling, sparse_structure
from bench.measure import flops, interleaved, ratio, resident, summary
from bench.memory import peak_apart
from bench.published import FivePasses, FourPasses, five_passes, hidden_gates, published_search
from bench.steps import SUBJECTS, Bench, bench_of, measure
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.learner import Records
from s3pet_nb.learn.search import SearchConfig, SearchStep
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.space import attach, make_space

CPU = torch.device("cpu")
CONFIG = SearchConfig(steps=50, lr=0.05, measure_every=0, dropout=False)


def shake(gated) -> None:
    "Weights in double precision that are not where a search starts, the same for the same modules."
    gated.pets.double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in gated.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=draw, dtype=weight.dtype), alpha=0.1)
        gated.alpha.add_(torch.randn(gated.alpha.shape, generator=draw, dtype=torch.float64), alpha=0.5)


def noted(step: SearchStep) -> list[torch.Tensor]:
    "The gradients of alpha that the step will use."
    seen, take = [], step.step_alpha.step

    def note(grads):
        seen.extend(grad.clone() for grad in grads)
        take(grads)

    step.step_alpha.step = note
    return seen


def one_step(family: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, dict]:
    "The gradient of alpha in the first step, alpha and delta after it."
    model = tiny(family, "seq2seq" if family == "t5" else "classify").double()
    space, pair = make_space(model, "mix"), ([example_batch(model, seed=1)], [example_batch(model, seed=2)])
    B = space.n_params // 4
    wired = hidden_gates if kind in ("four", "five") else attach
    second = copy.deepcopy(model)
    with wired(model, space) as gated, wired(second, space) as twin:
        shake(gated)
        twin.pets.double()
        make = {"four": partial(FourPasses, gated), "five": partial(FivePasses, gated, twin)}
        step = make[kind](B, CONFIG) if kind in make else SearchStep(gated, B, kind, CONFIG)
        gradients = noted(step)
        numbers = step(pair)
        assert numbers["passes"] == {"four": 4, "five": 5, "central": 4, "first": 2}[kind]
        return gradients[0], gated.alpha.detach().clone(), gated.tensors()


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_four_passes_are_our_central_order(family):
    "Gates on hidden states or on the modules' smallest factors: one gradient, one step of both variables."
    ours, theirs = one_step(family, "central"), one_step(family, "four")
    size = ours[0].norm()
    assert (ours[0] - theirs[0]).norm() < 1e-5 * size
    assert (ours[0] - one_step(family, "first")[0]).norm() > 1e-3 * size  # the mixed term is not lost in that
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4)
    for name, weight in ours[2].items():
        torch.testing.assert_close(weight, theirs[2][name], rtol=0, atol=1e-3)


def test_five_passes_move_alpha_alike_and_delta_by_a_gradient_of_their_own():
    four, five = one_step("bert", "four"), one_step("bert", "five")
    torch.testing.assert_close(four[0], five[0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(four[1], five[1], rtol=0, atol=1e-6)
    moved = [(four[2][name] - five[2][name]).abs().max().item() for name in four[2]]
    assert max(moved) > 1e-3


def test_the_fifth_pass_sees_the_new_alpha_and_new_noise(monkeypatch):
    model = tiny("bert")
    space, pair = make_space(model, "mix"), ([example_batch(model)], [example_batch(model, seed=2)])
    seen = []
    with five_passes(model, space, space.n_params // 4, CONFIG) as step:
        sample = type(step.gated).sample

        def note(gated, u):
            seen.append((gated is step.twin.gated, u.clone(), gated.alpha.detach().clone(), gated.zeta))
            sample(gated, u)

        monkeypatch.setattr(type(step.gated), "sample", note)
        step(pair)
    assert [twin for twin, *_ in seen] == [False, True, False, False, False]
    assert all(torch.equal(u, seen[0][1]) and torch.equal(alpha, seen[0][2]) for _, u, alpha, _ in seen[:4])
    assert not torch.equal(seen[4][1], seen[0][1])
    assert not torch.equal(seen[4][2], seen[0][2])


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "llama"])
def test_gates_on_hidden_states_give_the_same_loss(family):
    head = {"bert": "classify", "t5": "seq2seq"}.get(family, "causal")
    model = tiny(family, head).double()
    space, batch = make_space(model, "mix"), example_batch(model)
    z = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, losses = model(**batch).logits, []
    for opened in attach(model, space), hidden_gates(model, space):
        with opened as gated:
            shake(gated)
            gated.z = z
            losses.append(gated(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    assert losses[0] != pytest.approx(model(**batch).loss.item(), rel=1e-3)
    assert torch.equal(model(**batch).logits, before)


def test_a_closed_gate_leaves_its_module_out():
    model = tiny("t5", "seq2seq").double()
    space, batch = make_space(model, "mix"), example_batch(model)
    with hidden_gates(model, space) as gated:
        shake(gated)
        gated.z = torch.zeros(len(space))
        closed = gated(**batch).logits
        assert not closed.requires_grad
        gated.z = torch.ones(len(space))
        assert not torch.allclose(gated(**batch).logits, closed)
    torch.testing.assert_close(model(**batch).logits, closed)


def test_a_published_search_runs_whole_and_leaves_the_model():
    model = tiny("bert")
    batches, log = [example_batch(model, seed=i) for i in range(3)], Records()
    space, before = make_space(model, "mix"), copy.deepcopy(model.state_dict())
    config = SearchConfig(steps=3, lr=0.05, evaluate_every=2, dropout=False)
    result = published_search(model, space, batches, batches[::-1], batches, space.n_params // 4,
                              config=config, log=log)
    assert (result.steps, result.passes, list(result.scores)) == (3, 15, [2, 3])
    assert 0 < result.structure().n_params <= space.n_params // 4
    assert [record["event"] for record in log].count("step") == 3
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_subjects_take_turns_and_warm_ups_do_not_count():
    calls = []
    samples = interleaved({name: lambda k, name=name: calls.append((k, name)) for name in "abc"}, 4, 2)
    assert [name for _, name in calls] == list("abc" "bca" "cab" "abc" "bca" "cab")
    assert [k for k, _ in calls] == [k for k in range(6) for _ in "abc"]
    assert {name: len(each) for name, each in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_figures_are_medians():
    samples = {"a": [1.0, 2.0, 30.0], "b": [4.0, 1.0, 1.0]}
    assert ratio(samples, "a", "b") == 2
    assert summary(samples["a"]) == {"median": 2.0, "low": 1.5, "high": 16.0}


def test_operations_of_products_and_attention_are_counted():
    x, w = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    assert flops(lambda: (x @ w).sum().backward()) == (3 * 2 * 3 * 5 * 7, None)
    assert flops(lambda: torch.ones(3, 7).addmm_(x.detach(), w.detach()))[0] == 2 * 3 * 5 * 7
    q = torch.ones(1, 2, 4, 8, requires_grad=True)
    forward, _ = flops(lambda: scaled_dot_product_attention(q, q, q))
    assert forward == 2 * 2 * (2 * 4 * 4 * 8)  # two products, two heads
    assert flops(lambda: scaled_dot_product_attention(q, q, q).sum().backward())[0] > 3 * forward


def test_a_structure_of_five_percent_begins_in_layer_0():
    space = make_space(tiny("bert", num_hidden_layers=6, hidden_size=32, intermediate_size=128), "mix")
    structure = sparse_structure(space)
    assert structure == sparse_structure(space)
    assert 0.8 * share(space) < structure.n_params <= share(space) == space.n_params // 20
    assert any(kept.layer == 0 and kept.role == "q" for kept in structure.modules)


def test_every_subject_runs_in_bf16():
    model = tiny("t5", "seq2seq")
    space, batches = make_space(model, "mix"), [example_batch(model)]
    bench = Bench(model, space, batches, Compute("bf16"), sparse_structure(space))
    names = [name for name in SUBJECTS if name != "second"]
    found = measure(bench, names, 1, 1)
    assert set(found["samples"]) == set(found["flops"]) == set(names)
    with hidden_gates(model, space) as gated, bench.compute.autocast(CPU):
        assert gated(**batches[0]).logits.dtype == model(**batches[0]).logits.dtype


def test_a_sibling_shares_frozen_weights_and_has_its_own_head():
    model = tiny("bert")
    other = sibling(model)
    assert other.bert.encoder.layer[0].output.dense.weight is model.bert.encoder.layer[0].output.dense.weight
    assert other.classifier.weight is not model.classifier.weight
    with attach(model, make_space(model, "bias")), attach(other, make_space(other, "mix")):
        assert torch.equal(model(**example_batch(model)).logits, other(**example_batch(model)).logits)


def test_memory_is_that_of_a_process_of_its_own():
    "What this process holds is not in it, though it is much."
    held = torch.ones(400_000_000, dtype=torch.uint8)
    assert resident() > held.numel()
    assert 1e6 < peak_apart("narrow-6", "retrain", 1, CPU, None) < 2e8


@pytest.mark.parametrize("cheap, published, constant, told", [
    ([0.80, 0.802, 0.804], [0.80, 0.80, 0.80], [[0.5]] * 3, ("no worse", "above")),
    ([0.80, 0.85, 0.70], [0.80, 0.80, 0.80], [[0.5]] * 3, ("not shown", "below")),
    ([0.70, 0.71, 0.70], [0.80, 0.80, 0.80], [[0.5]] * 3, ("not shown", "below")),
    ([0.60, 0.40, 0.50], [0.60, 0.40, 0.50], [[0.6, 0.4], [0.4, 0.6], [0.5]], ("not shown", "same class")),
    ([0.60, 0.40, 0.503], [0.60, 0.40, 0.50], [[0.6, 0.4], [0.4, 0.6], [0.5]], ("no worse", "above")),
    ([0.9], [0.8], [[0.5]], ("not shown", "one seed")),
])
def test_no_worse_is_said_only_where_it_is_shown(cheap, published, constant, told):
    found = runs.verdict(cheap, published, constant)
    assert found["verdict"] == told[0] and told[1] in found["reason"]
    assert found["mean"] == pytest.approx(sum(cheap) / len(cheap) - sum(published) / len(published))


def test_the_interval_is_students():
    found = runs.verdict([0.1, 0.2, 0.3], [0.0, 0.0, 0.0], [[1.0]] * 3)
    half = 4.302653 * 0.1 / 3 ** 0.5
    assert found["interval"] == pytest.approx([0.2 - half, 0.2 + half])


PLAN = Plan(tasks=(("agreement", 4),), seeds=(0, 1), cases=("narrow-6", "t5-large"), rounds=2,
            scaling_rounds=1, searched=2, profiled=1, memory_rounds=1, memory_repeats=2,
            overhead_case="narrow-6", overhead_rounds=1, sizes=(50, 200), layers=(6, 18),
            shapes=("narrow-6",), n_eval=16)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A bench on tiny models; memory is not measured apart, but stands in for it."
    out, said = tmp_path_factory.mktemp("reports"), []
    with pytest.MonkeyPatch.context() as patch:
        for module in whole, scaling:
            patch.setattr(module, "peak_apart", lambda case, subject, *rest: 1_000 + len(subject))
        return whole.bench(PLAN, out, CPU, None, said.append), said


def test_the_result_has_every_figure_with_its_samples(done):
    run, said = done
    result = run.result
    assert list(result["ratios"]) == list(result["targets"]) == list(TARGETS) == list(NAMES)
    assert all(isinstance(value, float) and value > 0 for value in result["ratios"].values())
    assert result["by_case"]["t5-large"] == MISSING
    narrow = result["by_case"]["narrow-6"]
    assert set(narrow["seconds"]) == set(narrow["passes"]) == set(narrow["flops"]) == set(SUBJECTS)
    assert [narrow["passes"][name] for name in ("retrain", "first", "second", "central", "four", "five")] == [
        1, 2, 3, 4, 4, 5]
    assert result["ratios"]["step_first"] == narrow["ratios"]["step_first"]
    assert all(len(each) == 2 for each in result["samples"]["steps narrow-6"].values())
    assert result["samples"]["memory"]["first"] == [1_005, 1_005]
    assert result["ratios"]["memory"] == 1_006 / 1_007
    assert set(result["where"]["shares"]) == set(where.SUBJECTS)
    for shares in result["where"]["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["backbone products"] > 0 and shares["module products"] > 0
    assert result["scaling"]["overhead"]["candidates"] == narrow["candidates"] == 110
    assert {"device", "threads", "versions"} <= set(result)
    assert json.loads((run.folder / "params.json").read_text())["rounds"] == 2
    assert run.folder.parent.name == "bench" and any("narrow-6" in line for line in said)


def test_whole_runs_are_of_equal_epochs(done):
    found = done[0].result["by_task"]["agreement"]
    assert found["steps"]["retrain"] == [4, 4]
    assert found["steps"]["full"] == found["steps"]["published"] == [2, 2]
    samples = done[0].result["samples"]["runs agreement"]
    assert set(samples) == {*runs.ARMS, "retrain-early", "retrain-published"}
    quality = done[0].result["quality"]["agreement"]
    assert quality["verdict"] in ("no worse", "not shown") and len(quality["differences"]) == 2


def test_a_bench_goes_on_where_it_was_stopped(done, monkeypatch, tmp_path):
    "What is in the log is not measured again; what is not there is."
    run, _ = done
    folder = tmp_path / "bench" / run.id
    folder.mkdir(parents=True)
    kept = [record for record in run.records() if record.get("part") not in ("vectors", "runs agreement")
            and (record.get("arm"), record.get("seed")) != ("retrain-published", 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    computed, once = [], runs.Cells.run
    monkeypatch.setattr(runs.Cells, "run", lambda cells, arm, done: computed.append(
        (cells.seed, arm)) or once(cells, arm, done))
    for name in "steps", "where", "memory", "overhead", "narrow", "shapes":
        monkeypatch.setattr(whole, name, None)
    again = whole.bench(PLAN, tmp_path, CPU, None, lambda line: None)
    assert computed == [(1, "retrain-published")]
    assert again.id == run.id and again.done
    assert again.result["by_case"] == run.result["by_case"]
    monkeypatch.setattr(whole, "parts", None)
    assert whole.bench(PLAN, tmp_path, CPU, None).folder == again.folder


def test_the_table_fits_and_says_met_or_not(done):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    tell(done[0].result | {"ratios": done[0].result["ratios"] | {"memory": 1.0}}, console)
    text = console.export_text()
    assert all(name in text for name in NAMES.values())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "at most 1.15" in text and "agreement: " in text


def test_a_figure_that_is_missing_is_said_to_be(done):
    by_case = {"t5-large": MISSING}
    assert whole.worst(by_case, "step_first") == whole.met("step_first", MISSING) == MISSING
    assert whole.worst(by_case | {"a": {"ratios": {"step_first": 2.0}}, "b": {"ratios": {"step_first": 2.5}}},
                       "step_first") == 2.5
    assert whole.worst({"a": {"ratios": {"published_over_ours": 2.9}},
                        "b": {"ratios": {"published_over_ours": 2.5}}}, "published_over_ours") == 2.5
    assert whole.met("step_first", 2.3) is True and whole.met("published_over_ours", 2.5) is False


def test_every_case_that_a_plan_names_is_there():
    for plan in Plan(), whole.QUICK:
        narrow = {f"narrow-{layers}" for layers in plan.layers}
        assert {*plan.cases, *plan.shapes, plan.overhead_case} | narrow <= set(CASES)
        assert plan.rounds >= 7 and set(plan.subjects) <= set(SUBJECTS)


def test_bench_of_real_rows(data_dir):
    bench = bench_of("minilm", str(data_dir), CPU)
    assert len(bench.batches) == 8 and all(len(batch["labels"]) == 32 for batch in bench.batches)
    assert max(batch["input_ids"].shape[1] for batch in bench.batches) <= 64
    assert len(TaskRun("glue/rte", 100, str(data_dir)).splits(0).train) == 1_600


def test_the_bench_is_outside_the_library():
    assert not list(Path(whole.s3pet_nb.__file__).parent.glob("*bench*"))
