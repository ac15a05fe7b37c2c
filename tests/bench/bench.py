"""The whole bench, part by part, into one result.

A part that is done is in the log of its run, and not computed again by a second call with the same question.
The question is the parameters and the code, the bench's own and the library's.
"""
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import s3pet_nb
import torch
from s3pet_nb.lab.store import Run, environment, run_id

from .cases import STEP_CASES, TaskRun
from .memory import peak_apart
from .runs import whole_runs
from .scaling import LAYERS, SIZES, by_size, growth, narrow, overhead, shapes
from .steps import SUBJECTS, bench_of, steps
from .where import where

MISSING = "not measured"
TARGETS = {  # the highest value that is good enough, or the lowest
    "step_first": ("at most", 2.3), "step_second": ("at most", 3.5), "open_over_sparse": ("at most", 1.15),
    "run_early_stop": ("at most", 0.75), "run_full": ("at most", 1.2), "memory": ("at most", 1.15),
    "published_over_ours": ("at least", 2.8), "overhead_share": ("at most", 0.02),
}
GROWING = ("retrain", "first", "open_pass", "memory")  # what is told by candidate
ROLES = ("retrain", "first", "second", "five", "prune")  # whose memory is measured


@dataclass(frozen=True)
class Plan:
    "How much is measured; the tasks with the steps of a re-training."

    tasks: tuple[tuple[str, int], ...] = (("agreement", 200), ("glue/cola", 120), ("glue/rte", 60))
    seeds: tuple[int, ...] = (0, 1, 2)
    cases: tuple[str, ...] = STEP_CASES
    subjects: tuple[str, ...] = SUBJECTS
    rounds: int = 16  # of single steps
    scaling_rounds: int = 7  # of single steps, for every size
    searched: int = 24  # steps of the search for a found structure
    profiled: int = 4  # steps of each subject under the profiler
    memory_rounds: int = 8  # steps in each process, one for every batch
    memory_repeats: int = 3
    overhead_case: str = "t5-large-batch-2"
    overhead_rounds: int = 7
    sizes: tuple[int, ...] = SIZES
    layers: tuple[int, ...] = LAYERS
    shapes: tuple[str, ...] = ("depth-3", "depth-6", "depth-12", "depth-24", "width-128", "width-256",
                               "width-384", "width-768")
    n_eval: int = 256  # validation and test rows


QUICK = Plan(tasks=(("glue/cola", 80),), seeds=(0,), cases=("minilm", "t5-large"), rounds=7, searched=8,
             profiled=2, memory_repeats=1,
             subjects=("retrain", "retrain_found", "first", "second", "auto", "four", "five", "sparse_pass",
                       "open_pass"),
             overhead_rounds=2, layers=(6, 56), shapes=())


def code() -> str:
    "The text of the bench and of the library."
    folders = Path(__file__).parent, Path(s3pet_nb.__file__).parent
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def open_run(out: Path, plan: Plan, device: torch.device) -> Run:
    "The run of this question, with what it has of it already."
    params = {**asdict(plan), "device": str(device), "threads": torch.get_num_threads()}
    folder = out / "bench" / run_id(params, code())
    return Run(folder) if folder.is_dir() else Run.create(out, "bench", params, code())


def memory(plan: Plan, device: torch.device, data: str | None) -> dict:
    "Peak bytes of every role, in use and resident, each sample in a process of its own; ratios of medians."
    samples, told = defaultdict(list), {}
    for resident, repeats in (False, plan.memory_repeats), (True, 1):
        for _, role in product(range(repeats), ROLES):
            samples[f"{role} resident" if resident else role].append(
                peak_apart(plan.cases[0], role, plan.memory_rounds, device, data, resident))
    middle = {role: sorted(each)[len(each) // 2] for role, each in samples.items()}
    for kind in "", " resident":
        told[f"bytes{kind}"] = {role: middle[role + kind] for role in ROLES}
        told[f"ratios{kind}"] = {role: middle[role + kind] / middle["retrain" + kind] for role in ROLES}
    return {"samples": samples, **told}


def parts(plan: Plan, run: Run, device: torch.device, data: str | None,
          say: Callable[[str], None]) -> dict[str, Callable[[], dict | str]]:
    "What there is to measure, by name, the cheap parts first."
    tasks = {name: TaskRun(name, n_steps, data, n_eval=plan.n_eval) for name, n_steps in plan.tasks}
    return {
        **{f"steps {case}": lambda case=case: steps(case, data, device, plan.rounds, plan.searched,
                                                       plan.subjects)
           for case in plan.cases},
        "where": lambda: where(bench_of(plan.cases[0], data, device), plan.profiled),
        "memory": lambda: memory(plan, device, data),
        "vectors": lambda: by_size(max(plan.rounds, 7), plan.sizes),
        "overhead": lambda: overhead(plan.overhead_case, data, device, plan.overhead_rounds),
        "narrow": lambda: narrow(plan.layers, device, plan.scaling_rounds),
        "shapes": lambda: shapes(plan.shapes, device, plan.scaling_rounds),
        **{f"runs {name}": lambda task=task: whole_runs(task, list(plan.seeds), run, device, say)
           for name, task in tasks.items()},
    }


def worst(by_case: Mapping[str, dict | str], name: str) -> float | str:
    "The ratio of that name where it is worst."
    found = [entry["ratios"][name] for entry in by_case.values()
             if entry != MISSING and name in entry["ratios"]]
    pick = max if TARGETS[name][0] == "at most" else min
    return pick(found) if found else MISSING


def met(name: str, value: float | str) -> bool | str:
    "Whether a figure is as it should be."
    bound, limit = TARGETS[name]
    return MISSING if value == MISSING else value <= limit if bound == "at most" else value >= limit


def without_samples(part: dict | str) -> dict | str:
    "A part as a reader wants it; its samples are in another place of the result."
    return {key: value for key, value in part.items() if key != "samples"} if isinstance(part, dict) else part


def collect(done: Mapping[str, dict | str]) -> dict:
    "What the parts say together."
    by_case = {name.removeprefix("steps "): part for name, part in done.items() if name.startswith("steps ")}
    by_task = {name.removeprefix("runs "): part for name, part in done.items() if name.startswith("runs ")}
    ratios = {name: worst(by_case | by_task, name) for name in TARGETS}
    ratios["memory"] = max(done["memory"]["ratios"][role] for role in ("first", "second"))
    ratios["overhead_share"] = done["overhead"]["share"]
    by_case, by_task = ({name: without_samples(part) for name, part in parts.items()}
                        for parts in (by_case, by_task))
    return {
        "ratios": {name: ratios[name] for name in TARGETS},
        "targets": {name: {"bound": bound, "value": limit, "met": met(name, ratios[name])}
                    for name, (bound, limit) in TARGETS.items()},
        "by_case": by_case, "by_task": by_task,
        "quality": {name: part["quality"] for name, part in by_task.items()},
        "memory": without_samples(done["memory"]), "where": done["where"],
        "scaling": {"vectors": done["vectors"], "overhead": done["overhead"], "narrow": done["narrow"],
                    "growth": {of: growth(done["narrow"], of) for of in GROWING},
                    "shapes": done["shapes"]},
        "samples": {name: part["samples"] for name, part in done.items()
                    if isinstance(part, dict) and "samples" in part},
    }


def bench(
    plan: Plan,
    out: Path,  # folder of all reports
    device: torch.device,
    data: str | None,  # folder with the files of GLUE; the hub if None
    say: Callable[[str], None] = print,  # is told of every part
) -> Run:
    "Measure all that the plan asks for and is not measured yet; the run, with its result."
    run = open_run(out, plan, device)
    if run.done:
        return run
    done = {record["part"]: record["result"] for record in run.records() if record["event"] == "part"}
    for name, part in parts(plan, run, device, data, say).items():
        if name not in done:
            start = time.perf_counter()
            done[name] = part()
            run.log({"event": "part", "part": name, "result": done[name]})
            say(f"{name}: {time.perf_counter() - start:.0f} s")
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    run.save_result({**collect(done), "finished": finished, **environment(device)})
    return run
