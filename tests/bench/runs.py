"""Whole runs at equal epochs: searches over re-trainings, and what their structures are worth.

A search takes half the steps of a re-training, since it halves the rows; both score the validation rows three
times. A cell is one arm on one task with one seed; it is logged when it is done, and not computed again.
"""
import math
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from s3pet_nb.data.batch import Batches, score
from s3pet_nb.data.metric import METRICS
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.search import EarlyStop, SearchConfig, search
from s3pet_nb.learn.train import TrainConfig, retrain
from s3pet_nb.model.backbone import load_backbone
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import Structure
from scipy import stats

from .cases import TaskRun, share, sparse_structure
from .measure import ratio
from .published import published_search

WARMUP = 3  # steps
SCORINGS = 3  # of validation rows, in a search and in a training
SEARCHES = ("early", "full", "published")
JUDGED = ("early", "published")  # whose structures are trained and tested
ARMS = ("retrain", *SEARCHES)
NO_WORSE = -0.01  # of the metric: what the lower end of the interval has to be above


def evaluate_every(steps: int) -> int:
    "Distance of the scorings."
    return math.ceil(steps / SCORINGS)


def constants(batches: Batches) -> list[float]:
    "Scores of answering always the same class."
    task = batches.form.task
    labels = np.asarray(batches.rows[task.label][:])
    return [METRICS[task.metric](labels, np.full_like(labels, k), None) for k in range(len(task.labels))]


class Cells:
    "The arms of one task and one seed, on one model."

    def __init__(self, task: TaskRun, seed: int, device: torch.device):
        form = task.form()
        self.task, self.seed, self.steps = task, seed, task.retrain_steps
        self.model, self.tokenizer = load_backbone("minilm", form.head, form.n_labels, seed=seed)
        self.model.to(device)
        self.space = make_space(self.model, "mix")
        with tempfile.TemporaryDirectory() as folder:  # what only the first steps of a process cost
            self.retrain(sparse_structure(self.space), Run(folder), steps=WARMUP)

    def structure(self, kept: Iterable[int]) -> Structure:
        "The candidates of these indices."
        mask = torch.zeros(len(self.space), dtype=torch.bool)
        mask[list(kept)] = True
        return Structure.of(self.space, mask)

    def search(self, arm: str, log: Run) -> dict:
        "A whole search."
        loaders, steps = self.task.loaders(self.seed, self.tokenizer), self.steps // 2
        config = SearchConfig(steps, lr=2e-3, evaluate_every=evaluate_every(steps), measure_every=40,
                              dropout=False, seed=self.seed)
        given = (self.model, self.space, loaders["delta"], loaders["alpha"], loaders["validation"],
                 share(self.space))
        start = time.perf_counter()
        if arm == "published":
            result = published_search(*given, score=score, config=config, log=log)
        else:
            result = search(*given, order="auto", score=score, config=config, log=log,
                            callbacks=[EarlyStop()] if arm == "early" else [])
        spent = time.perf_counter() - start
        names = {module.name for module in result.structure().modules}
        kept = [i for i, candidate in enumerate(self.space.candidates) if candidate.name in names]
        return {"seconds": spent, "steps": result.steps, "planned": steps, "passes": result.passes,
                "kept": kept}

    def retrain(self, structure: Structure, log: Run, steps: int = 0) -> dict:
        "A whole re-training, or one of some `steps`, and the score of what it kept on test rows."
        loaders, steps = self.task.loaders(self.seed, self.tokenizer), steps or self.steps
        config = TrainConfig(steps, lr=1e-3, evaluate_every=evaluate_every(steps), dropout=False,
                             seed=self.seed)
        start = time.perf_counter()
        trained = retrain(self.model, structure, loaders["train"], loaders["validation"], score, config,
                          callbacks=(), log=log)
        spent = time.perf_counter() - start
        with trained.on(self.model) as carrier:
            test = score(carrier, loaders["test"])
        return {"seconds": spent, "steps": trained.steps, "planned": steps, "test": test,
                "validation": trained.score, "constants": constants(loaders["test"])}

    def run(self, arm: str, done: dict[str, dict]) -> dict:
        "One arm; those that train a found structure take it from `done`."
        with tempfile.TemporaryDirectory() as folder:
            if arm in SEARCHES:
                return self.search(arm, Run(folder))
            of = arm.removeprefix("retrain-")
            structure = self.structure(done[of]["kept"]) if of in SEARCHES else sparse_structure(self.space)
            return self.retrain(structure, Run(folder))


def run_cells(task: TaskRun, seeds: Iterable[int], run: Run, device: torch.device,
              say: Callable[[str], None]) -> dict[int, dict[str, dict]]:
    "All cells of a task, by seed and arm; those in the log of `run` are taken from there."
    found = {}
    for turn, seed in enumerate(seeds):
        done = found[seed] = {record["arm"]: record for record in run.records() if record["event"] == "cell"
                              and (record["task"], record["seed"]) == (task.name, seed)}
        arms = [*ARMS[turn % len(ARMS):], *ARMS[:turn % len(ARMS)], *(f"retrain-{arm}" for arm in JUDGED)]
        cells = None
        for arm in arms:
            if arm not in done:
                cells = cells or Cells(task, seed, device)
                done[arm] = {"event": "cell", "task": task.name, "seed": seed, "arm": arm,
                             **cells.run(arm, done)}
                run.log(done[arm])
                say(f"{task.name}, seed {seed}, {arm}: {done[arm]['seconds']:.0f} s")
    return found


def verdict(cheap: list[float], published: list[float], constant: list[list[float]]) -> dict:
    "What paired test scores say of the difference cheap - published."
    differences = np.subtract(cheap, published)
    told = {"differences": differences.tolist(), "mean": float(differences.mean()), "interval": None,
            "verdict": "not shown"}
    if len(differences) < 2:
        return told | {"reason": "one seed gives no interval"}
    low, high = differences.mean() + stats.sem(differences) * np.array(
        stats.t.interval(0.95, len(differences) - 1))
    told["interval"] = [float(low), float(high)]
    if all(any(np.allclose(pair, level) for level in levels)
           for pair, levels in zip(zip(cheap, published), constant, strict=True)):
        return told | {"reason": "both always answer the same class"}
    if low > NO_WORSE:
        return told | {"verdict": "no worse", "reason": "the interval lies above -1 point"}
    return told | {"reason": "the interval reaches below -1 point"}


def whole_runs(task: TaskRun, seeds: list[int], run: Run, device: torch.device,
               say: Callable[[str], None]) -> dict:
    "Times, ratios and quality of one task."
    cells = run_cells(task, seeds, run, device, say)
    arms = [*ARMS, *(f"retrain-{arm}" for arm in JUDGED)]
    samples = {arm: [cells[seed][arm]["seconds"] for seed in seeds] for arm in arms}
    tests = {arm: [cells[seed][f"retrain-{arm}"]["test"] for seed in seeds] for arm in JUDGED}
    levels = [cells[seed]["retrain"]["constants"] for seed in seeds]
    return {"samples": samples, "test": tests, "steps": {arm: [cells[seed][arm]["steps"] for seed in seeds]
                                                         for arm in arms},
            "ratios": {"run_early_stop": ratio(samples, "early", "retrain"),
                       "run_full": ratio(samples, "full", "retrain"),
                       "run_published": ratio(samples, "published", "retrain"),
                       "run_early_stop_found": ratio(samples, "early", "retrain-early"),
                       "run_published_over_ours": ratio(samples, "published", "early")},
            "quality": {"early": tests["early"], "published": tests["published"], "constants": levels,
                        **verdict(tests["early"], tests["published"], levels)}}
