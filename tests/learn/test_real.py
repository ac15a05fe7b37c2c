"The whole path on real rows and real weights: template, run folder, report; skipped where the data are not."
import json
import math
from functools import partial

import pytest
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from s3pet_nb.data.batch import loader, score
from s3pet_nb.data.form import Head
from s3pet_nb.data.rows import halves
from s3pet_nb.data.task import TASKS
from s3pet_nb.lab.page import report
from s3pet_nb.lab.run import execute
from s3pet_nb.learn.search import SearchConfig, search
from s3pet_nb.learn.train import TrainConfig, retrain
from s3pet_nb.model.backbone import load_backbone
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import Structure

SHORT = {"search_steps": 3, "retrain_steps": 3, "evaluate_every": 2, "order": "first", "measure_every": 0,
         "n_random": 1, "n_train": 64, "n_eval": 32, "batch_size": 8, "max_length": 32}


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
    ({"gate": "hard-concrete", "l0": 1e-3}, 6), ({"gate": "hard-concrete", "alphas": "last"}, 6),
    ({"order": "central", "alphas": "mean", "method": "exact"}, 12)],
    ids=["local", "straight-through", "l0", "l0 for the budget", "central"])
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
    batches = partial(loader, form=Head(task), tokenizer=tokenizer, batch_size=8, max_length=32)
    half_delta, half_alpha = halves(rows.train, seed=0)
    space = make_space(model, "mix")
    result = search(model, space, batches(half_delta, seed=0), batches(half_alpha, seed=1),
                    batches(rows.validation), budget=500, score=score, order="second",
                    callbacks=(), config=SearchConfig(steps=4, evaluate_every=2))
    structure = result.structure(method="exact")
    assert 0 < structure.n_params <= 500 and result.passes == 12
    trained = retrain(model, structure, batches(rows.train, seed=0), batches(rows.validation),
                      score, TrainConfig(steps=4, evaluate_every=2), callbacks=())
    assert trained.n_trained == structure.n_params and trained.n_head == 2 * model.config.hidden_size


def save_t5(folder, tokenizers):
    "A small encoder-decoder with random weights, and a tokenizer that has its words."
    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "bert-base-uncased", eos_token="[SEP]")
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                      decoder_start_token_id=tokenizer.pad_token_id)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template, backbone, task", [
    ("search", "t5", "superglue/copa"), ("search", "llama", "glue/stsb"),
    ("prune", "t5", "glue/stsb"), ("prune", "llama", "superglue/copa")])
def test_a_model_that_writes_is_asked_in_text(template, backbone, task, data_dir, tmp_path):
    folder = (save_t5(tmp_path / "t5", data_dir / "tokenizers") if backbone == "t5"
              else data_dir / "backbones" / "stories260k-llama")
    asked = {"backbone": str(folder), "task": task, "data_dir": str(data_dir), "space": "lora", "budget": 600.0,
             "n_random": 0, "baselines": [], "max_length": 64, "n_train": 32, "n_eval": 8}
    run = execute(template, asked, tmp_path, template)
    (row,), form = run.result["rows"], {"t5": "text", "llama": "words"}[backbone]
    assert run.result["form"] == form and row["head_params"] == 0 < row["n_params"] <= 600
    assert math.isfinite(row["test"]) and ("spearman/test" in row) == (task == "glue/stsb")
    assert f"<dd>{form}</dd>" in report(run).read_text(encoding="utf-8")
