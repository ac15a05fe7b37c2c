"The whole path on real rows and real weights: template, run folder, report; skipped where the data are not."
import json
import math
from functools import partial

import pytest

from s3pet_nb.backbone import load_backbone
from s3pet_nb.report import report
from s3pet_nb.run import execute
from s3pet_nb.search import SearchConfig, search
from s3pet_nb.space import make_space
from s3pet_nb.structure import Structure
from s3pet_nb.task import TASKS, halves, loader, score
from s3pet_nb.train import TrainConfig, retrain

SHORT = {"search_steps": 3, "retrain_steps": 3, "evaluate_every": 2, "measure_every": 0, "n_random": 1,
         "n_train": 64, "n_eval": 32, "batch_size": 8, "max_length": 32}


@pytest.mark.parametrize("task, head", [("glue/cola", 770), ("glue/stsb", 385)])
def test_a_search_on_real_rows_ends_in_its_report(task, head, data_dir, tmp_path):
    run = execute("search", {**SHORT, "task": task, "data_dir": str(data_dir), "budget": 1e-3}, tmp_path,
                  "search")
    result, structure = run.result, Structure.load(run.folder / "structure.json")
    assert result["budget"] == int(1e-3 * result["n_backbone"]) >= structure.n_params
    assert [row["label"] for row in result["rows"]] == ["searched", "random-1", "lora-everywhere"]
    assert (result["rows"][0]["n_params"] == structure.n_params
            and result["rows"][0]["modules"] == len(structure))
    assert all(row["head_params"] == head and math.isfinite(row["test"]) for row in result["rows"])
    assert result["search"]["passes"] == 2 * result["search"]["steps"] == 6
    steps = [record for record in run.records() if record["event"] == "step" and record["phase"] == "search"]
    assert all(record["expected_size"] <= result["budget"] for record in steps)
    page = report(run).read_text(encoding="utf-8")
    assert structure.modules[0].role in page and task in page


@pytest.mark.parametrize("asked, passes", [
    ({"gate": "local"}, 6), ({"gate": "straight-through", "beta_end": 0.1}, 6),
    ({"gate": "hard-concrete", "l0": 1e-3}, 6), ({"order": "central", "alphas": "mean", "method": "exact"}, 12)],
    ids=["local", "straight-through", "l0", "central"])
def test_other_gates_and_orders_on_real_rows(asked, passes, data_dir, tmp_path):
    run = execute("search", {**SHORT, **asked, "task": "glue/cola", "data_dir": str(data_dir), "budget": 1e-3,
                             "n_random": 0, "baselines": []}, tmp_path, "search")
    found = run.result["search"]
    assert found["passes"] == passes and found["gap"] >= 0
    assert [row["label"] for row in run.result["rows"]] == ["searched"]
    assert found["order"] in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("asked, phases", [
    ({"space": "bias", "granularity": "structured", "budget": 4631.0, "baselines": ["bitfit"]}, 1),
    ({"space": "mam", "granularity": "unstructured", "rank": 4, "targets": ["q", "wo"], "rounds": 2,
      "budget": 1e-3, "baselines": ["lawton-lora"], "seed": 2, "criterion": "absolute"}, 2)],
    ids=["s-bitfit", "u-mam"])
def test_a_pruning_on_real_rows_ends_in_its_report(asked, phases, data_dir, tmp_path):
    run = execute("prune", {**asked, "task": "glue/cola", "data_dir": str(data_dir), "n_train": 64, "n_eval": 32},
                  tmp_path, "prune")
    result, structure = run.result, Structure.load(run.folder / "structure.json")
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["searched", "random-1", *asked["baselines"]]
    assert rows["searched"]["n_params"] == structure.n_params <= result["budget"]
    assert [kept["n"] for kept in result["kept"] if kept["n"]] == list(structure.frame().n)
    assert len(result["prune"]["budgets"]) == phases and result["prune"]["steps"] == 4 * phases
    assert all(row["test"] == row["validation"] and row["head_params"] == 770 for row in rows.values())
    model, _ = load_backbone("minilm")
    with structure.apply(model) as gated:
        assert gated.space.n_params == structure.n_params
    page = report(run).read_text(encoding="utf-8")
    assert "Kept share" in page and f"{asked['granularity']}, " in page


def test_a_structure_of_one_task_is_trained_on_another_beside_baselines(data_dir, tmp_path):
    asked = {**SHORT, "data_dir": str(data_dir), "budget": 1e-3, "n_random": 0, "baselines": []}
    cola = execute("search", {**asked, "task": "glue/cola"}, tmp_path, "search")
    rte = execute("search", {**asked, "task": "glue/rte", "structures": [str(cola.folder / "structure.json")],
                             "baselines": ["bitfit", "finetune"], "cut": True}, tmp_path, "search")
    rows = {row["label"]: row for row in rte.result["rows"]}
    assert list(rows) == ["searched", "bitfit", "bitfit-cut", "finetune", "glue-cola-s3pet-1"]
    assert rows["glue-cola-s3pet-1"]["n_params"] == cola.result["rows"][0]["n_params"]
    assert rows["bitfit-cut"]["n_params"] <= rte.result["budget"] < rows["bitfit"]["n_params"]
    assert rows["finetune"]["n_params"] == rte.result["n_backbone"] and rows["finetune"]["modules"] is None
    assert all(math.isfinite(row["test"]) for row in rows.values())
    assert "glue-cola-s3pet-1" in report(rte).read_text(encoding="utf-8")


def test_the_same_question_has_the_same_answer(data_dir, tmp_path):
    asked = {**SHORT, "task": "superglue/cb", "data_dir": str(data_dir), "budget": 1e-3, "n_random": 0}
    once, again = (execute("search", asked, tmp_path / name, "search") for name in ("once", "again"))
    assert once.id == again.id
    assert (once.folder / "structure.json").read_bytes() == (again.folder / "structure.json").read_bytes()
    timeless = [[{**row, "seconds": 0} for row in run.result["rows"]] for run in (once, again)]
    assert json.dumps(timeless[0]) == json.dumps(timeless[1])


def test_a_pretrained_decoder_is_searched_and_trained(data_dir):
    task = TASKS["glue/cola"]
    model, tokenizer = load_backbone(data_dir / "backbones" / "stories260k-llama")
    rows = task.load(data_dir).head(64, 32)
    batches = partial(loader, task=task, tokenizer=tokenizer, batch_size=8, max_length=32)
    half_delta, half_alpha = halves(rows.train, seed=0)
    space = make_space(model, "mix")
    result = search(model, space, batches(half_delta, seed=0), batches(half_alpha, seed=1),
                    batches(rows.validation), budget=500, score=partial(score, task=task), order="second",
                    callbacks=(), config=SearchConfig(steps=4, evaluate_every=2))
    structure = result.structure(method="exact")
    assert 0 < structure.n_params <= 500 and result.passes == 12
    trained = retrain(model, structure, batches(rows.train, seed=0), batches(rows.validation),
                      partial(score, task=task), TrainConfig(steps=4, evaluate_every=2), callbacks=())
    assert trained.n_trained == structure.n_params and trained.n_head == 2 * model.config.hidden_size
