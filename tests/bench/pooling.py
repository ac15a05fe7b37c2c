"""What the mean of the last hidden states gives a head beside BERT's pooler: `python -m tests.bench.pooling`.

Of each task: a linear model that is fitted on the frozen features of either, and BitFit trained under either by
the protocol `quick` from the same seeds. Results go to `reports/pooling/result.json`.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from s3pet_nb.data.batch import score
from s3pet_nb.data.setup import Setup, start_head
from s3pet_nb.lab.store import environment, read_json, write_json
from s3pet_nb.learn.protocol import QUICK
from s3pet_nb.learn.train import BASELINES, retrain

PROBED = ("agreement", "glue/sst2", "glue/stsb", "glue/qqp", "glue/mrpc", "glue/rte", "glue/cola")
TRAINED = ("agreement", "glue/sst2", "glue/stsb")
SEEDS = (0, 1, 2)


@contextmanager
def mean_pooled(model: transformers.PreTrainedModel) -> Iterator[None]:
    "Within it the head reads the mean of the last hidden states over the tokens that are no padding."
    def pool(module: torch.nn.Module, args: tuple, kwargs: dict, out: object) -> object:
        mask = kwargs["attention_mask"][..., None].to(out.last_hidden_state.dtype)
        out.pooler_output = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
        return out

    hook = model.base_model.register_forward_hook(pool, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def of(task: str, seed: int, data_dir: str | None) -> Setup:
    "The task on MiniLM with a head of its prior."
    return Setup.of(task, seed=seed, n_eval=1_000, batch_size=QUICK.batch_size, max_length=96,
                    data_dir=None if task == "agreement" else data_dir)


def probed(setup: Setup) -> float:
    "Test score of a head that is fitted on the frozen backbone's features."
    start_head(setup, probed=True)
    return score(setup.model, setup.tests["test"])


def trained(setup: Setup) -> float:
    "Test score of BitFit."
    steps = QUICK.steps(setup.task.name, "retrain", 1, QUICK.batch_size)
    config = QUICK.config(steps, 1e-3, dropout=False, seed=setup.seed, evaluate_every=steps // 3)
    result = retrain(setup.model, BASELINES["bitfit"](setup.model), setup.train, setup.validation, score, config)
    with result.on(setup.model) as carrier:
        return score(carrier, setup.tests["test"])


def main(data_dir: Annotated[str, typer.Option(help="Folder with the tasks' files instead of the hub.")] = None,
         out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("reports/pooling")) -> None:
    "Measure both poolings and write result.json; a row that is there is not measured again."
    file = out / "result.json"
    rows = (read_json(file) or {"rows": []})["rows"]
    for how, tasks, seeds, measure in ("probe", PROBED, SEEDS[:1], probed), ("bitfit", TRAINED, SEEDS, trained):
        for task in tasks:
            for seed in seeds:
                about = {"how": how, "task": task, "seed": seed}
                if any(row.items() >= about.items() for row in rows):
                    continue
                setup = of(task, seed, data_dir)
                pooler = measure(setup)
                with mean_pooled(setup.model):
                    mean = measure(setup)
                rows.append(about | {"metric": setup.task.metric, "pooler": pooler, "mean": mean})
                out.mkdir(parents=True, exist_ok=True)
                write_json(file, {"rows": rows, **environment(setup.model.device)})


if __name__ == "__main__":
    typer.run(main)
