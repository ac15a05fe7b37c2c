"""What a study costs beyond its runs, and what a second slot brings: `python -m tests.bench.pool`.

The overhead of a run is the time from handing it to a slot to its answer, less the time of its
cells: the kernel's start and end, the notebook's account, the lock and the page. The gain of a second slot is the
time of one and the same study with one slot over that with two, where a slot has one thread each.
"""
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import nbformat
import torch
import typer

from s3pet_nb.lab.pool import Local, Rules, plan, run_study
from s3pet_nb.lab.store import Run, environment
from s3pet_nb.lab.study import Study

from .bench import code

SMOKE = {"search_steps": 40, "retrain_steps": 60, "evaluate_every": 30, "n_train": 640, "n_eval": 64}


def in_cells(run: Path) -> float:
    "Seconds of a run's cells, as its notebook says."
    cells = nbformat.read(run / "run.ipynb", as_version=4).cells
    return sum(cell.metadata.get("papermill", {}).get("duration") or 0.0 for cell in cells)


def overheads(study: Study, root: Path) -> list[float]:
    "Seconds that each run took beyond its cells; the first, for which files are read for the first time, is left out."
    found = []
    with Local(1) as backend:
        for job in plan(study, root):
            task = {"id": job.id, "template": job.question.template, "params": job.question.params, "root": str(root),
                    "study": study.name, "time_limit": None, "again": False}
            start = time.perf_counter()
            assert backend.submit(task).result().get("done")
            found.append(time.perf_counter() - start - in_cells(job.folder))
    return found[1:]


def seconds(study: Study, slots: int) -> float:
    "How long a study takes with so many slots of one thread."
    os.environ["OMP_NUM_THREADS"] = str(slots)
    start = time.perf_counter()
    ended = run_study(study, tempfile.mkdtemp(), Local(slots), Rules(retries=0))
    assert len(ended.of("done")) == len(study)
    return time.perf_counter() - start


def main(
    rounds: Annotated[int, typer.Option(help="Pairs of studies, one slot and two in turn.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of all reports.")] = Path("reports"),
) -> None:
    "Measure, and write the numbers into OUT/pool."
    runs = Study("overhead", "search", SMOKE, seeds=[0, 1, 2, 3, 4, 5])
    beyond = overheads(runs, Path(tempfile.mkdtemp()))
    work = Study("slots", "search", SMOKE | {"search_steps": 80, "retrain_steps": 160}, seeds=[0, 1, 2, 3])
    pairs = [{"one": seconds(work, 1), "two": seconds(work, 2)} for _ in range(rounds)]
    asked = {"rounds": rounds, "runs": len(work), "at": datetime.now(UTC).isoformat(timespec="minutes")}
    run = Run.create(out, "pool", asked, code())
    run.save_result({"overhead_seconds": beyond, "overhead": median(beyond), "overhead_most": max(beyond),
                     "pairs": pairs, "speedup": median(pair["one"] / pair["two"] for pair in pairs),
                     **environment(torch.device("cpu"))})
    print(f"overhead {median(beyond):.2f} s, at most {max(beyond):.2f} s; two slots "
          f"{run.result['speedup']:.2f} times one; written to {run.folder}")


if __name__ == "__main__":
    typer.run(main)
