"""A run folder as a search leaves it, made of plain numbers: no model, no training."""

import math
import random
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from scipy.optimize import brentq

from s3pet_nb.store import Run, write_json

LINEAR = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "wi": (1, 4), "wo": (4, 1)}  # widths / d
RETRAININGS = ["searched", "random-1", "random-2", "random-3", "lora-r1"]
METRIC = "accuracy"


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
                | {"settings": {}, "p": value, "path": entry["name"]}
            )
    return modules


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
        {"task": "agreement", "backbone": "all-MiniLM-L6-v2", "budget": 2e-4, "seed": seed, "steps": steps}
        | params,
        code="synthetic",
    )
    if run.done:
        return run

    def gates(step: int) -> list[float]:
        alpha = [step / steps * a for a in drift]
        p = shifted(alpha, n, budget)[1]
        run.log({"event": "gates", "phase": "search", "step": step, "alpha": alpha, "p": p})
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
            "schema": 1,
            "backbone": "all-MiniLM-L6-v2",
            "n_backbone": 22_713_216,
            "family": "bert",
            "space": "mix",
            "task": run.params["task"],
            "budget": budget,
            "method": "s3pet",
            "seed": seed,
            "version": "0.1.0",
            "modules": modules,
        },
    )
    rows = []
    for k, label in enumerate(RETRAININGS):
        for step in range(1, 2 * steps + 1):
            run.log(
                {
                    "event": "step",
                    "phase": label,
                    "step": step,
                    "steps": 2 * steps,
                    "seconds": 0.2,
                    "loss": 0.2 + (0.4 + 0.02 * k) * math.exp(-2.5 * step / steps) + rng.gauss(0, 0.02),
                }
            )
            if step % (steps // 3) == 0:
                run.log(
                    {
                        "event": "score",
                        "phase": label,
                        "step": step,
                        "score": 0.82 - 0.02 * k - 0.2 * math.exp(-3 * step / steps),
                    }
                )
        own = (
            sum(module["n"] for module in modules)
            if label == "searched"
            else (41_472 if label == "lora-r1" else budget - 64 * k)
        )
        rows.append(
            {
                "label": label,
                "structure": "21 bitfit, 2 lnfit" if label != "lora-r1" else "36 lora",
                "modules": len(modules),
                "n_params": own,
                "head_params": 770,
                "validation": 0.83 - 0.02 * k,
                "test": 0.82 - 0.018 * k,
                "test/unseen_words": 0.78 - 0.02 * k,
                "steps": 2 * steps,
                "seconds": 24.0 + k,
            }
        )
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


TEMPLATE = [
    ("code", "parameters", "folder = ''"),
    ("code", "injected-parameters", "folder = {folder!r}"),
    (
        "code",
        "",
        "import sys\nimport pandas as pd\nimport plotly.io\nfrom s3pet_nb.store import Run\n"
        "from s3pet_nb.plot import comparison_frame, plot_budget, plot_comparison, plot_loss, plot_p, "
        "plot_score, structure_frame, table\n"
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


def execute_notebook(run: Run) -> None:
    "Write run.ipynb as a kernel leaves it: five figures and three tables."
    cells = []
    for kind, tag, source in TEMPLATE:
        make = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        source = source.replace("{folder!r}", repr(str(run.folder)))
        cells.append(make(source, metadata={"tags": [tag]} if tag else {}))
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
    )
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    nbformat.write(notebook, run.folder / "run.ipynb")
