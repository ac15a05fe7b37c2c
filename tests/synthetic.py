"""Run folders as a search, a pruning and a probe leave them, made of plain numbers: no model, no training."""

import math
import random
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from scipy.optimize import brentq

from s3pet_nb.lab.store import Run, write_json

LINEAR = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "wi": (1, 4), "wo": (4, 1)}  # widths / d
RETRAININGS = ["searched", "random-1", "random-2", "random-3", "lora-r1"]
METRIC = "accuracy"
GATE = {"kind": "ShiftedSigmoid", "tau": 1.0, "beta": 1.0, "scope": "global"}  # that of `shifted`


def candidate(stack: str, layer: int | None, role: str, kind: str, module: str, n: int) -> dict:
    "One entry of the record `space`."
    name = ".".join(str(part) for part in (stack, layer, role, module) if part is not None)
    return {
        "name": name,
        "stack": stack,
        "layer": layer,
        "role": role,
        "kind": kind,
        "module": module,
        "n": n,
    }


def candidates(stacks: dict[str, int], d: int = 384) -> list[dict]:
    "The Mix space; an encoder has a norm after the embedding, a decoder one after its last layer."
    found = []
    for stack, layers in stacks.items():
        outside = "embed_norm" if stack == "encoder" else "final_norm"
        norms = [(layer, role) for layer in range(layers) for role in ("attn_norm", "ffn_norm")] + [
            (None, outside)
        ]
        for layer in range(layers):
            found += [
                candidate(stack, layer, role, "linear", "lora", (a + b) * d)
                for role, (a, b) in LINEAR.items()
            ]
            found += [
                candidate(stack, layer, role, "linear", "bitfit", b * d) for role, (a, b) in LINEAR.items()
            ]
            found += [
                candidate(stack, layer, role, "block", "lowrank_adapter", 3 * d + 96) for role in ("attn", "ffn")
            ]
        for module in "bitfit", "lnfit":
            found += [candidate(stack, layer, role, "norm", module, d) for layer, role in norms]
    return found


def shifted(alpha: list[float], n: list[int], budget: int) -> tuple[float, list[float]]:
    "The shift that makes the expected size equal `budget`, and p at that shift."

    def p(zeta: float) -> list[float]:
        return [1 / (1 + math.exp(zeta - a)) for a in alpha]

    zeta = brentq(lambda z: sum(a * b for a, b in zip(p(z), n)) - budget, min(alpha) - 60, max(alpha) + 60)
    return zeta, p(zeta)


def pick(space: list[dict], p: list[float], budget: int) -> list[dict]:
    "Greedily by p, within the budget."
    modules, spent = [], 0
    for entry, value in sorted(zip(space, p), key=lambda pair: -pair[1]):
        if spent + entry["n"] <= budget:
            spent += entry["n"]
            modules.append(
                {name: entry[name] for name in ("role", "layer", "stack", "module", "n")}
                | {"settings": {}, "of": entry["n"], "p": value, "score": None, "path": entry["name"]}
            )
    return modules


def retrain(run: Run, sizes: dict[str, int], steps: int, rng: random.Random) -> list[dict]:
    "Log a re-training of 2 * steps for each label, worse from one to the next, and give their rows."
    rows = []
    for k, (label, size) in enumerate(sizes.items()):
        for step in range(1, 2 * steps + 1):
            loss = 0.2 + (0.4 + 0.02 * k) * math.exp(-2.5 * step / steps) + rng.gauss(0, 0.02)
            run.log({"event": "step", "phase": label, "step": step, "steps": 2 * steps, "seconds": 0.2,
                     "loss": loss})
            if step % (steps // 3) == 0:
                score = 0.82 - 0.02 * k - 0.2 * math.exp(-3 * step / steps)
                run.log({"event": "score", "phase": label, "step": step, "score": score})
        rows.append({"label": label, "structure": "21 bitfit, 2 lnfit" if label != "lora-r1" else "36 lora",
                     "modules": 23, "n_params": size, "head_params": 770, "validation": 0.83 - 0.02 * k,
                     "test": 0.82 - 0.018 * k, "test/unseen_words": 0.78 - 0.02 * k, "steps": 2 * steps,
                     "seconds": 24.0 + k})
    return rows


def make_run(
    root: Path,
    stacks: dict[str, int] | None = None,  # layers of each stack; 110 candidates without
    budget: int = 4542,
    steps: int = 60,
    seed: int = 0,
    study: str = "demo",
    finished: bool = True,
    **params,
) -> Run:
    "A run folder with params, log, structure and result, as the search template writes them."
    space = candidates(stacks or {"encoder": 6})
    n = [entry["n"] for entry in space]
    rng = random.Random(seed)
    drift = [
        rng.gauss(0, 3) + (2.5 if entry["module"] == "bitfit" else 0) + 0.4 * (entry["layer"] or 0)
        for entry in space
    ]
    run = Run.create(
        root,
        study,
        {"task": "agreement", "backbone": "all-MiniLM-L6-v2", "budget": 2e-4, "seed": seed, "search_steps": steps}
        | params,
        code="synthetic",
    )
    if run.done:
        return run

    def gates(step: int) -> list[float]:
        alpha = [step / steps * a for a in drift]
        p = shifted(alpha, n, budget)[1]
        run.log({"event": "gates", "phase": "search", "step": step, "alpha": alpha, "p": p, "gate": GATE})
        return p

    run.log({"event": "space", "space": "mix", "candidates": space, "budget": budget})
    gates(0)
    for step in range(1, steps + 1):
        zeta, p = shifted([step / steps * a for a in drift], n, budget)
        loss = 0.25 + 0.45 * math.exp(-2 * step / steps) + rng.gauss(0, 0.03)
        run.log(
            {
                "event": "step",
                "phase": "search",
                "step": step,
                "steps": steps,
                "loss": loss,
                "loss_alpha": loss + 0.03 + rng.gauss(0, 0.03),
                "zeta": zeta,
                "seconds": 0.4,
                "expected_size": sum(a * b for a, b in zip(p, n)),
                "budget": budget,
            }
        )
        if step % (steps // 6) == 0:
            gates(step)
            run.log(
                {
                    "event": "score",
                    "phase": "search",
                    "step": step,
                    "score": 0.5 + 0.3 * step / steps - (0.02 if step == steps else 0),
                }
            )
    best_step = steps // 6 * 5
    p = next(
        record["p"] for record in run.records() if record["event"] == "gates" and record["step"] == best_step
    )
    modules = pick(space, p, budget)
    write_json(
        run.folder / "structure.json",
        {
            "schema": 4,
            "backbone": "all-MiniLM-L6-v2",
            "n_backbone": 22_713_216,
            "family": "bert",
            "shape": {stack: [layers, 384] for stack, layers in (stacks or {"encoder": 6}).items()},
            "space": "mix",
            "rules": [],
            "masks": None,
            "task": run.params["task"],
            "budget": budget,
            "method": "s3pet",
            "seed": seed,
            "version": "0.1.0",
            "modules": modules,
        },
    )
    own = sum(module["n"] for module in modules)
    rows = retrain(run, dict.fromkeys(RETRAININGS, budget) | {"searched": own, "lora-r1": 41_472}, steps, rng)
    if finished:
        run.save_result(
            {
                "task": run.params["task"],
                "metric": METRIC,
                "backbone": "all-MiniLM-L6-v2",
                "n_backbone": 22_713_216,
                "family": "bert",
                "device": "cpu",
                "threads": 2,
                "budget": budget,
                "space": {"name": "mix", "candidates": len(space), "n_params": sum(n)},
                "search": {
                    "steps": steps,
                    "seconds": 0.4 * steps,
                    "order": "second",
                    "zeta": zeta,
                    "expected_size": float(budget),
                    "passes": 3 * steps,
                    "best_step": best_step,
                },
                "data": {"train": 12_000, "validation": 1_000, "test": 1_000, "note": "a synthetic run"},
                "rows": rows,
                "seconds": 180.0,
                "peak_memory_mb": 1800.0,
                "versions": {"s3pet_nb": "0.1.0"},
            }
        )
    return run


def prune(space: list[dict], scores: list[float], budget: int, structured: bool) -> list[int]:
    "Entries kept of each candidate: whole ones by score, or of each a part, larger in the middle layers."
    if structured:
        kept = [0] * len(space)
        for i in sorted(range(len(space)), key=lambda i: -scores[i]):
            kept[i] = space[i]["n"] if sum(kept) + space[i]["n"] <= budget else 0
        return kept
    whole = sum(score * entry["n"] for score, entry in zip(scores, space))
    return [min(entry["n"], int(budget * score * entry["n"] / whole)) for score, entry in zip(scores, space)]


def make_pruned(
    root: Path,
    stacks: dict[str, int] | None = None,  # layers of each stack; the biases of MiniLM without
    granularity: str = "unstructured",
    rounds: int = 1,
    share: float = 0.18,  # of all biases
    steps: int = 60,
    seed: int = 0,
    study: str = "prune",
    finished: bool = True,
    **params,
) -> Run:
    "A run folder with params, log, structure and result, as the pruning template writes them."
    space = [entry for entry in candidates(stacks or {"encoder": 6}) if entry["module"] == "bitfit"]
    whole = sum(entry["n"] for entry in space)
    budget, rng = round(share * whole), random.Random(seed)
    layers = (stacks or {"encoder": 6}).values()
    middle = (max(layers) - 1) / 2
    scores = [rng.uniform(0.2, 1.8) / (1 + abs((entry["layer"] or 0) - middle) / max(layers))
              * (1.8 if entry["role"] == "wi" else 1) for entry in space]
    run = Run.create(root, study, {
        "task": "glue/cola", "backbone": "minilm", "data_dir": "", "space": "bias", "budget": float(budget),
        "granularity": granularity, "criterion": "first-order", "average_over": 0, "rounds": rounds,
        "protocol": "lawton", "seed": seed} | params, code="synthetic")
    if run.done:
        return run

    run.log({"event": "space", "space": "bias", "candidates": space, "budget": budget})
    budgets = [round(whole * (budget / whole) ** (k / rounds)) for k in range(1, rounds + 1)]
    for k, smaller in enumerate(budgets, start=1):
        for step in range(1, steps + 1):
            loss = 0.2 + (0.4 + 0.03 * k) * math.exp(-2.5 * step / steps) + rng.gauss(0, 0.02)
            run.log({"event": "step", "phase": f"prune-{k}", "step": step, "steps": steps, "loss": loss,
                     "seconds": 0.2})
            if step % (steps // 3) == 0:
                score = 0.84 - 0.01 * k - 0.2 * math.exp(-3 * step / steps)
                run.log({"event": "score", "phase": f"prune-{k}", "step": step, "score": score})
        kept = prune(space, scores, smaller, granularity == "structured")
        run.log({"event": "scores", "phase": f"prune-{k}", "step": steps, "budget": smaller,
                 "criterion": run.params["criterion"], "score": scores, "kept": kept})
    places = [{name: entry[name] for name in ("stack", "layer", "role", "module")}
              | {"n": n, "of": entry["n"], "score": score} for entry, n, score in zip(space, kept, scores)]
    modules = [place | {"settings": {}, "p": None, "path": entry["name"]}
               for entry, place in zip(space, places) if place["n"]]
    write_json(run.folder / "structure.json", {
        "schema": 4, "backbone": "minilm", "n_backbone": 22_713_216, "family": "bert", "space": "bias",
        "shape": {"encoder": [6, 384]}, "rules": [],
        "task": run.params["task"], "budget": budget, "method": f"prune-{granularity}", "seed": seed,
        "version": "0.1.0", "masks": "0" * 64, "modules": modules})
    sizes = {"searched": sum(kept), "random-1": budget, "bitfit": whole, "finetune": 22_713_216}
    rows = retrain(run, sizes, steps, rng)
    rows[-1]["modules"] = None
    if finished:
        run.save_result({
            "task": run.params["task"], "metric": "matthews_correlation", "backbone": "minilm",
            "n_backbone": 22_713_216, "family": "bert", "budget": budget,
            "space": {"name": "bias", "candidates": len(space), "n_params": whole},
            "prune": {"criterion": run.params["criterion"], "granularity": granularity, "average_over": 0,
                      "rounds": rounds, "budgets": budgets, "steps": steps * rounds, "seconds": 0.2 * steps,
                      "protocol": "lawton"},
            "kept": [place | {"name": entry["name"]} for entry, place in zip(space, places)],
            "data": {"rows": {"train": 8_551, "validation": 1_043}}, "rows": rows, "seconds": 180.0,
            "device": "cpu", "threads": 2, "peak_memory_mb": 1800.0, "versions": {"s3pet_nb": "0.1.0"}})
    return run


def make_probed(root: Path, budget: int = 4542, steps: int = 24, seed: int = 0, study: str = "probe",
                finished: bool = True, **params) -> Run:
    "A run folder with params, log, structure and result, as the template of a probe writes them."
    space, rng = candidates({"encoder": 6}), random.Random(seed)
    run = Run.create(root, study, {
        "task": "agreement", "backbone": "minilm", "data_dir": "", "space": "mix", "budget": float(budget),
        "probe_score": "gain_along", "select_by": "density", "protocol": "quick", "seed": seed} | params,
        code="synthetic")
    run.log({"event": "space", "space": "mix", "candidates": space, "budget": budget})
    for step in range(1, steps + 1):
        run.log({"event": "step", "phase": "probe-train", "step": step, "steps": steps, "loss": 0.7,
                 "seconds": 0.2 * step, "passes": 1, "phase_memory_mb": 700.0 + step})
        if step in (steps - 2, steps):
            score = [rng.gauss(0.5, 1) * 1e-6 * entry["n"] for entry in space]
            run.log({"event": "scores", "phase": "probe-train", "step": step, "budget": budget,
                     "name": run.params["probe_score"], "score": score})
    scores = dict(zip((entry["name"] for entry in space), score))
    modules = [module | {"p": None, "score": scores[module["path"]]}
               for module in pick(space, [value / entry["n"] for value, entry in zip(score, space)], budget)]
    chosen = {module["path"] for module in modules}
    write_json(run.folder / "structure.json", {
        "schema": 4, "backbone": "minilm", "n_backbone": 22_713_216, "family": "bert", "space": "mix",
        "shape": {"encoder": [6, 384]}, "rules": [], "task": run.params["task"], "budget": budget,
        "method": "probe-gain_along", "seed": seed, "version": "0.1.0", "masks": None, "modules": modules})
    rows = retrain(run, {"searched": sum(module["n"] for module in modules), "random-1": budget}, steps, rng)
    if finished:
        run.save_result({
            "task": run.params["task"], "metric": METRIC, "backbone": "minilm", "n_backbone": 22_713_216,
            "family": "bert", "budget": budget,
            "space": {"name": "mix", "candidates": len(space), "n_params": sum(entry["n"] for entry in space)},
            "probe": {"score": run.params["probe_score"], "select_by": run.params["select_by"], "protocol": "quick",
                      "steps": steps, "batches": 0, "passes": steps, "rows": 16 * steps, "seconds": 0.2 * steps,
                      "trainings": 1},
            "kept": [{name: entry[name] for name in ("stack", "layer", "role", "module", "name")}
                     | {"of": entry["n"], "n": entry["n"] * (entry["name"] in chosen), "score": scores[entry["name"]]}
                     for entry in space],
            "rows": rows, "seconds": 60.0, "device": "cpu", "threads": 2, "peak_memory_mb": 900.0,
            "versions": {"s3pet_nb": "0.1.0"}})
    return run


TEMPLATE = [
    ("code", "parameters", "folder = ''"),
    ("code", "injected-parameters", "folder = {folder!r}"),
    (
        "code",
        "",
        "import sys\nimport pandas as pd\nimport plotly.io\nfrom s3pet_nb.core import table\nfrom s3pet_nb.lab.store import Run\n"
        "from s3pet_nb.lab.plot import comparison_frame, plot_budget, plot_comparison, plot_loss, plot_p, "
        "plot_score, structure_frame\n"
        "plotly.io.renderers.default = 'plotly_mimetype'\nrun = Run(folder)\n"
        "print('progress' + ' bar', file=sys.stderr)",
    ),
    (
        "md",
        "",
        "## The comparison\n\nThe searched structure, three random ones of the same budget and LoRA of rank "
        "one at every position, each re-trained from new initial values on the same rows in the same order. "
        "A search is worth its cost only if it stands clear of the spread of the random ones.",
    ),
    ("code", "", "plot_comparison(run)"),
    ("code", "", "table(comparison_frame(run))"),
    (
        "md",
        "",
        "## Where the parameters went\n\nThe probability `p` of every candidate at the step from which the "
        "structure was taken.",
    ),
    ("code", "", "plot_p(run).show()"),
    ("code", "", "table(structure_frame(run), 'The searched structure')"),
    ("md", "", "## The search"),
    ("code", "", "plot_budget(run).show()"),
    ("code", "", "plot_loss(run).show()"),
    ("code", "", "plot_score(run).show()"),
    ("md", "", "## Parameters and versions"),
    ("code", "", "table(pd.DataFrame(run.params.items(), columns=['parameter', 'value']))"),
    ("code", "remove-cell", "print('removed' + ' cell')"),
    ("code", "remove-output", "print('removed' + ' output')"),
]
N_FIGURES = 5
PRUNE_TEMPLATE = [
    ("code", "injected-parameters", "folder = {folder!r}"),
    (
        "code",
        "",
        "import plotly.io\nfrom s3pet_nb.core import table\nfrom s3pet_nb.lab import plot\nfrom s3pet_nb.lab.store import Run\n"
        "plotly.io.renderers.default = 'plotly_mimetype'\nrun = Run(folder)",
    ),
    ("md", "", "## What was kept"),
    ("code", "", "plot.plot_share(run).show()"),
    ("code", "", "table(plot.structure_frame(run), 'The pruned structure')"),
    ("md", "", "## The comparison"),
    ("code", "", "plot.plot_comparison(run).show()\nplot.plot_sizes(run).show()"),
    ("code", "", "table(plot.comparison_frame(run))"),
    ("code", "", "plot.plot_loss(run).show()\nplot.plot_score(run).show()"),
]


def execute_notebook(run: Run, template: list = TEMPLATE) -> None:
    "Write run.ipynb as a kernel leaves it: five figures, and three tables or two."
    cells = []
    for kind, tag, source in template:
        make = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        source = source.replace("{folder!r}", repr(str(run.folder)))
        cells.append(make(source, metadata={"tags": [tag]} if tag else {}))
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
    )
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    nbformat.write(notebook, run.folder / "run.ipynb")
