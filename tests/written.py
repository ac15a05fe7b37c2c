"A study whose runs are written down instead of computed: no model, no kernel."
import math
import random

import nbformat
import pandas as pd
from synthetic import candidates, pick, prune, shifted

from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.lab.study import Study

EVIL = "<img src=x onerror=alert(1)>"
N_BACKBONE = 22_713_216
PARAMETERS = """\
run_folder = ""
task = "glue/cola"
budget = 1e-4
gate = "global"
criterion = ""
probe_score = ""
targets = []
data_dir = ""
seed = 0
"""
LEVEL = {"glue/cola": 0.42, "glue/mrpc": 0.86, "glue/rte": 0.61, "glue/stsb": 0.84, EVIL: 0.5}
METRIC = {"glue/cola": "matthews_correlation", "glue/mrpc": "f1", "glue/stsb": "pearson"}
VIEWS = ["table", "differences", "ranks", "sweep", "heatmaps", "cost"]


def write_template(folder):
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "measure.ipynb")
    return str(folder / "measure.ipynb")


def trained(label, n_params, score, **more):
    return {"label": label, "structure": label, "modules": 23, "n_params": n_params, "head_params": 770,
            "validation": score + 0.01, "test": score, "steps": 280, "seconds": 24.0, **more}


def scored(asked, method, budget, rng):
    "Rows as the template search writes them: the larger the budget the less the choice matters."
    doublings = math.log2(asked["budget"] / 5e-5)
    gain = {"first-order": 0.016}.get(method, 0.024) * (1 - doublings / 8)
    level = LEVEL[asked["task"]] + 0.012 * doublings + rng.gauss(0, 0.008)
    sizes = {"searched": budget - rng.randrange(90), "random-1": budget, "random-2": budget, "bitfit": 41_088,
             "finetune": N_BACKBONE}
    more = {"searched": gain, "bitfit": 0.02, "finetune": 0.035}
    return [trained(label, size, level + more.get(label, 0) + rng.gauss(0, 0.006))
            for label, size in sizes.items()]


def moved(asked, budget, rng):
    "Rows as the template transfer writes them: a structure is a little better on its own task."
    found = []
    for label in ("searched", "random-1"):
        for target in asked["targets"]:
            own = 0.02 * (target == asked["task"]) * (label == "searched")
            found.append(trained(label, budget, LEVEL[target] + own + rng.gauss(0, 0.004), task=target,
                                 metric=METRIC.get(target, "accuracy")))
    return found


def write_run(study, question, root, space, gates=True):
    "What a run of this question leaves, made of plain numbers."
    asked = question.params
    rng = random.Random(repr(sorted((item for item in asked.items() if item != ("probe_score", "")), key=str)))
    params = {name: value for name, value in asked.items() if name != "data_dir"}
    run = Run.create(root, study.folder or study.name, params, id=question.id)
    assert run.id == question.id
    budget = round(asked["budget"] * N_BACKBONE)
    result = {"task": asked["task"], "metric": METRIC.get(asked["task"], "accuracy"), "backbone": "minilm",
              "n_backbone": N_BACKBONE, "family": "bert", "budget": budget, "seconds": 180.0,
              "rows": scored(asked, question.method, budget, rng), "peak_memory_mb": 1800.0,
              "space": {"name": "mix", "candidates": len(space), "n_params": sum(e["n"] for e in space)}}
    if asked["targets"]:
        result["rows"] = moved(asked, budget, rng)
    drift = random.Random(0)
    alpha = [drift.gauss(0, 3) + rng.gauss(0, 1) + 2.5 * (e["module"] == "bitfit") + 0.5 * (e["layer"] or 0)
             for e in space]
    if asked["criterion"]:
        kept = prune(space, [math.exp(a / 4) for a in alpha], budget, False)
        result["prune"] = {"seconds": 30.0, "passes": 280, "criterion": "first-order",
                           "granularity": "unstructured", "average_over": 0}
        result["kept"] = [{name: e[name] for name in ("stack", "layer", "role", "module", "name")}
                          | {"n": n, "of": e["n"]} for e, n in zip(space, kept)]
    elif asked["probe_score"]:
        chosen = {module["path"] for module in pick(space, alpha, budget)}
        result["probe"] = {"seconds": 6.0, "passes": 100, "score": asked["probe_score"], "select_by": "density"}
        result["kept"] = [{name: e[name] for name in ("stack", "layer", "role", "module", "name")}
                          | {"n": e["n"] * (e["name"] in chosen), "of": e["n"]} for e in space]
    elif not asked["targets"]:
        result["search"] = {"seconds": 64.0 + rng.gauss(0, 3), "passes": 480, "steps": 160}
    if gates and "search" in result:
        p = shifted(alpha, [e["n"] for e in space], budget)[1]
        chosen = {module["path"] for module in pick(space, p, budget)}
        frame = pd.DataFrame(space).assign(p=p, alpha=alpha, selected=[e["name"] in chosen for e in space])
        frame[["stack", "layer", "role", "kind", "module", "name", "n", "p", "alpha", "selected"]].to_csv(
            run.folder / "gates.csv", index=False)
    run.save_result(result)
    return run


def make_study(folder, **changes):
    tasks = ["glue/cola", "glue/mrpc", "glue/rte", EVIL]
    asked = {"grid": {"task": tasks, "budget": [5e-5, 1e-4, 2e-4]}, "seeds": [0, 1, 2],
             "methods": {"S3PET": {}, EVIL: {"params": {"gate": "local"}}}, "show": VIEWS,
             "title": f"Does a search pay? {EVIL}"}
    return Study("sweep", write_template(folder), **(asked | changes))


def fill(study, root, space=None, gates=True, leave=0):
    space = space or candidates({"encoder": 6})
    questions = study.questions()
    return [write_run(study, question, root, space, gates) for question in questions[:len(questions) - leave]]


def faulty_study(folder):
    "A study of which one run failed, one result is torn, three gates are lost, and four runs were not begun."
    study, root = make_study(folder), folder / "reports"
    runs = fill(study, root, leave=4)
    (runs[0].folder / "result.json").unlink()
    write_json(runs[0].folder / "error.json", {"error": f"ValueError: no column {EVIL}"})
    (runs[1].folder / "result.json").write_text('{"task": "glue/co')
    (runs[3].folder / "gates.csv").unlink()
    text = (runs[4].folder / "gates.csv").read_text()
    (runs[4].folder / "gates.csv").write_text(text[:len(text) // 2])
    (runs[5].folder / "gates.csv").write_text("")
    return study, root, runs
