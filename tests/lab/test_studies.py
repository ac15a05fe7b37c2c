"The studies that are shipped, and a search whose structure is trained on other tasks."
import pandas as pd
import pytest
import torch

from s3pet_nb.data.form import FORMS
from s3pet_nb.data.task import TASKS
from s3pet_nb.lab.page import form_notes
from s3pet_nb.lab.run import execute
from s3pet_nb.lab.study import shipped, study
from s3pet_nb.learn.protocol import PROTOCOLS
from s3pet_nb.learn.prune import GRANULARITIES
from s3pet_nb.learn.train import BASELINES
from s3pet_nb.model.gate import GATES
from s3pet_nb.model.select import select
from s3pet_nb.model.space import SPACES

SWEEP = [6343, 12835, 25670, 51229, 102458, 204916, 409832]
SEARCHED = ["S3PET-M", "S3PET-L", "S3PET-M quarter"]
PRUNED = ["U-BitFit", "S-BitFit"]
MAM = ["U-MaM", "S-MaM", *PRUNED]
GATES_OF = {"figure-4": ["shifted global sigmoid", "L0 penalty"], "figure-7": ["global", "local"]}
EQUAL = ["S3PET", "prune-search", "prune-search of modules"]
ALL = {  # name: runs, tasks, seeds, methods, budgets
    "agreement": (5, 1, 5, [""], [2e-4]),
    "demo": (1, 1, 1, [""], [0.0]),
    "search": (1, 1, 1, [""], [0.0]),
    "search-quick": (1, 1, 1, [""], [0.0]),
    "search-paper": (1, 1, 1, [""], [1.389e-4]),
    "prune": (1, 1, 1, [""], [0.0]),
    "prune-quick": (1, 1, 1, [""], [0.0]),
    "prune-paper": (1, 1, 1, [""], [7e-5]),
    "probe": (1, 1, 1, [""], [0.0]),
    "probe-quick": (1, 1, 1, [""], [0.0]),
    "calibrate": (135, 3, 3, ["modules", "head", "A"], [0.0]),
    "admit": (95, 9, 5, ["habits", "5 %", "20 %"], [0.0]),
    "reference": (15, 5, 3, [""], [0.0]),
    "table": (168, 3, 2, ["uniform", "stratified", "uniform, 20 %", "stratified, 20 %"], [0.0]),
    "s3pet-table-2": (168, 14, 4, SEARCHED, [25670, 102458]),
    "s3pet-figure-2": (336, 3, 8, SEARCHED[:2], SWEEP),
    "s3pet-table-3": (28, 7, 4, ["transfer", "no transfer"], [102458]),
    "s3pet-mean": (32, 7, 4, ["transfer", "no transfer", "mean of three"], [102458]),
    "s3pet-figures-3-5-8": (112, 14, 4, SEARCHED[:2], [102458]),
    "s3pet-figure-4": (336, 3, 8, GATES_OF["figure-4"], SWEEP),
    "s3pet-figure-7": (96, 3, 8, GATES_OF["figure-7"], [25670, 102458]),
    "s3pet-table-5": (12, 3, 4, SEARCHED[:1], [102458]),
    "prune-table-1": (160, 8, 5, MAM, [25000, 3400000]),
    "prune-table-2": (400, 8, 5, PRUNED, [10000, 25000, 50000, 100000, 200000]),
    "prune-figure-1": (80, 8, 5, PRUNED, [50000]),
    "equal-budgets": (336, 14, 4, EQUAL, [25670, 102458]),
    "small-table-2": (40, 4, 5, ["S3PET-M", "S3PET-M quarter"], [1189, 4747]),
    "small-figure-2": (30, 2, 5, SEARCHED[:1], [1189, 4747, 18991]),
    "small-table-3": (12, 4, 3, ["transfer"], [4747]),
    "small-mean": (15, 4, 3, ["transfer", "mean of three"], [4747]),
    "small-figures-3-5-8": (20, 4, 5, SEARCHED[:1], [4747]),
    "small-figure-4": (36, 2, 3, GATES_OF["figure-4"], [594, 2373, 18991]),
    "small-figure-7": (36, 3, 3, GATES_OF["figure-7"], [1189, 4747]),
    "small-table-5": (15, 3, 5, SEARCHED[:1], [4747]),
    "small-prune-table-1": (36, 3, 3, MAM, [2361, 318863]),
    "small-prune-table-2": (36, 2, 3, PRUNED, [2361, 4722, 9445]),
    "small-prune-figure-1": (12, 2, 3, PRUNED, [4722]),
    "small-equal-budgets": (30, 2, 5, EQUAL, [4747]),
}
LOOKS_AT = {  # a study without runs of its own: whose runs it looks at
    "s3pet-figures-3-5-8": "s3pet-table-2",
    "s3pet-table-5": "s3pet-table-2",
    "prune-figure-1": "prune-table-2",
    "small-figures-3-5-8": "small-table-2",
    "small-table-5": "small-table-2",
    "small-prune-figure-1": "small-prune-table-2",
}
# studies that keep their runs with those of another one, as some are the same
COMMANDS = {f"{command}-{length}": command for command in ("search", "prune") for length in ("quick", "paper")}
COMMANDS["probe-quick"] = "probe"
SHARED = {"small-table-2": "small-figure-2", "small-equal-budgets": "small-figure-2",
          "s3pet-mean": "s3pet-table-3", "small-mean": "small-table-3"}
SMALL = [name for name in ALL if name.startswith("small-")]
PAPERS = [name for name in ALL if name.startswith(("s3pet-", "prune-")) and name not in COMMANDS]
PAPERS.append("equal-budgets")


@pytest.fixture(scope="module")
def asked():
    "The questions of a study, read once."
    known = {}

    def of(name):
        if name not in known:
            known[name] = study(name).questions()
        return known[name]
    return of


def test_every_shipped_study_is_in_the_table():
    assert set(shipped("studies")) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_study_asks_what_the_table_says(asked, name):
    n_runs, n_tasks, n_seeds, methods, budgets = ALL[name]
    found = [question.params for question in asked(name)]
    assert len(study(name)) == len(found) == len({question.id for question in asked(name)}) == n_runs
    assert len({params["task"] for params in found}) == n_tasks
    assert {params["seed"] for params in found} == set(range(n_seeds))
    assert list(dict.fromkeys(question.method for question in asked(name))) == methods
    assert sorted({params["budget"] for params in found}) == budgets


@pytest.mark.parametrize("name", PAPERS + SMALL)
def test_all_that_a_study_names_is_there(asked, name):
    known = {"task": TASKS, "space": SPACES, "gate": GATES, "protocol": PROTOCOLS,
             "granularity": GRANULARITIES}
    assert study(name).title
    for question in asked(name):
        for parameter, registry in known.items():
            if parameter in question.params:
                assert question.params[parameter] in registry
        assert all(base in BASELINES or base == "finetune" for base in question.params["baselines"])
        if question.template == "search":
            assert all(task in TASKS for part in ("sources", "targets") for task in question.params[part])


@pytest.mark.parametrize("name", SMALL)
def test_a_small_study_is_small(asked, name):
    assert len(asked(name)) <= 40
    for question in asked(name):
        params = question.params
        steps = [value for parameter, value in params.items() if parameter.endswith("_steps")]
        assert len(steps) == 2 and all(0 < value <= 400 for value in steps)
        assert 0 < params["max_length"] <= 64 and params["backbone"] == "minilm" and params["form"] == ""
        assert params["checkpoint_every"] and 0 < params["n_eval"] <= 1000
        tasks = {params["task"], *(params["targets"] if question.template == "search" else [])}
        assert tasks <= {f"glue/{name}" for name in ("cola", "mnli", "mrpc", "qqp", "rte", "sst2", "stsb")}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_study_leaves_the_protocol_to_the_protocol(asked, name):
    for question in asked(name):
        params = question.params
        left = [params[each] for each in params if each.endswith("_steps") or each in (
            "batch_size", "max_length", "lr", "search_lr", "prune_lr", "evaluate_every", "n_train", "n_eval")]
        assert not any(left) and params["dropout"]
        assert params["backbone"] == {"lawton": "FacebookAI/roberta-large",
                                      "s3pet": "google-t5/t5-large"}[params["protocol"]]
        assert params["form"] == {"lawton": "", "s3pet": "digits"}[params["protocol"]]
        assert params["task"] in PROTOCOLS[params["protocol"]].search
        if question.template == "search":
            assert all(task in PROTOCOLS[params["protocol"]].retrain for task in params["targets"])


def test_the_page_of_a_study_with_digits_says_so():
    assert form_notes(study("s3pet-table-5")) == [FORMS["digits"].note]
    assert "words of its own" in FORMS["digits"].note
    assert form_notes(study("small-table-5")) == form_notes(study("prune-table-1")) == []


def test_runs_are_looked_for_where_they_are():
    folders = {name: study(name).folder for name in ALL if study(name).folder}
    assert folders == COMMANDS | SHARED | {name: SHARED.get(theirs, theirs) for name, theirs in LOOKS_AT.items()}


@pytest.mark.parametrize("name", SHARED)
def test_studies_of_one_folder_share_runs(asked, name):
    assert {question.id for question in asked(name)} & {question.id for question in asked(SHARED[name])}


@pytest.mark.parametrize("name", LOOKS_AT)
def test_the_runs_of_another_study_are_runs_of_that_study(asked, name):
    theirs = {question.id: question for question in asked(LOOKS_AT[name])}
    for question in asked(name):
        there = theirs[question.id]
        assert (question.template, question.params) == (there.template, there.params)


def test_a_search_without_targets_trains_on_its_own_task(tmp_path):
    run = execute("search", {}, tmp_path, "search")
    assert run.result["task"] == "agreement" and "targets" not in run.result
    assert [row["label"] for row in run.result["rows"]] == ["searched", "random-1", "lora-everywhere"]
    assert not any({"task", "metric"} & row.keys() for row in run.result["rows"])
    phases = {record["phase"] for record in run.records() if record.get("event") == "step"}
    assert phases == {"search", "searched", "random-1", "lora-everywhere"}
    gates = pd.read_csv(run.folder / "gates.csv")
    assert len(gates) == run.result["space"]["candidates"]
    assert gates.selected.sum() == run.result["rows"][0]["modules"] == len(run.structure["modules"])


def test_the_structure_of_several_sources_is_that_of_their_mean(tmp_path):
    texts = [f"{a} {b} day" for a in ("good", "bad", "fair", "poor", "fine", "late") for b in "abcdefghij"]
    for name in "one", "two":
        labels = ["xyz"[(i // 7 if name == "two" else i) % 3] for i in range(60)]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / f"{name}.csv", index=False)
    given = {"n_random": 0, "baselines": [], "search_steps": 3, "retrain_steps": 2, "evaluate_every": 3,
             "alphas": "last", "budget": 4000.0}
    one, two = (str(tmp_path / f"{name}.csv") for name in ("one", "two"))
    alone = [pd.read_csv(execute("search", given | {"task": task}, tmp_path, "alone").folder / "gates.csv")
             for task in ("agreement", one, two)]
    run = execute("search", given | {"task": "agreement", "sources": [one, two]}, tmp_path, "mean")
    gates = pd.read_csv(run.folder / "gates.csv")
    assert gates.p.to_numpy() == pytest.approx(sum(frame.p for frame in alone).to_numpy() / 3, rel=1e-6)
    assert run.structure["method"] == "s3pet-mean" and run.result["sources"] == ["one", "two"]
    mask = torch.tensor(gates.selected.tolist())
    p, n = torch.tensor(gates.p.tolist(), dtype=torch.float64), torch.tensor(gates.n.tolist())
    assert torch.equal(mask, select(p, n, 4000))
    assert run.result["rows"][0]["modules"] == int(mask.sum())
    phases = {record["phase"] for record in run.records() if record.get("event") == "step"}
    assert phases == {"search", "searched"}


def test_a_search_gives_each_target_the_head_that_it_needs(tmp_path):
    words = ["good", "bad", "fair", "poor", "fine", "late", "kind", "soft"]
    texts = [f"{a} {b} day {i}" for i, (a, b) in enumerate((a, b) for a in words for b in words)]
    three, number = tmp_path / "three.csv", tmp_path / "number.csv"
    pd.DataFrame({"text": texts, "label": ["abc"[i % 3] for i in range(64)]}).to_csv(three, index=False)
    pd.DataFrame({"text": texts, "label": [i % 7 / 2 for i in range(64)]}).to_csv(number, index=False)
    given = {"targets": [str(three), str(number)], "n_random": 0, "baselines": [], "search_steps": 2,
             "retrain_steps": 2}
    run = execute("search", given, tmp_path, "search")
    rows = run.result["rows"]
    assert run.result["metric"] == "accuracy" and [row["label"] for row in rows] == ["searched"] * 2
    assert [row["task"] for row in rows] == run.result["targets"] == ["three", "number"]
    phases = dict.fromkeys(record["phase"] for record in run.records() if record.get("event") == "step")
    assert list(phases) == ["search", "searched on three", "searched on number"]
    assert [row["metric"] for row in rows] == ["accuracy", "pearson"]
    assert rows[0]["n_params"] == rows[1]["n_params"]
    assert rows[0]["head_params"] - rows[1]["head_params"] == 2 * 385


@pytest.mark.parametrize("name", ["s3pet-figure-4", "small-figure-4"])
def test_figure_4_leaves_the_weight_of_the_penalty_to_the_search(asked, name):
    penalised = [question.params for question in asked(name) if question.params["gate"] == "hard-concrete"]
    assert penalised and all((params["l0"], params["alphas"]) == (0, "last") for params in penalised)
