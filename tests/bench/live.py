"""What it costs to watch a search in JupyterLab with a browser attached: `python -m tests.bench.live`.

One search is watched in every second block of steps and not in the others: there its log is not read, and
nothing is sent or drawn. The figure is the time of all blocks with a monitor over that of all without, less 1.
"""
import json
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from playwright.sync_api import sync_playwright
from s3pet_nb.lab.store import Run, environment
from scipy import stats

from ..conftest import CHROMIUM
from ..lab import DRAWN, MINUTE, Page, jupyterlab, notebook
from .bench import code

SEARCH = """
import json
import time
from tests.bench.cases import TaskRun, share
from s3pet_nb.lab.live import Monitor
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.learner import Callback
from s3pet_nb.learn.search import SearchConfig, search
from s3pet_nb.model.backbone import load_backbone
from s3pet_nb.model.space import make_space

task = TaskRun("agreement", {steps}, None)
model, tokenizer = load_backbone("minilm", "classify", 2)
space, loaders = make_space(model), task.loaders(0, tokenizer)
run = Run.create("reports", "watched", {{"steps": {steps}}}, "")


class Dozing(Monitor):
    looks = True

    def look_on(self):
        if self.looks:
            super().look_on()


monitor, blocks = Dozing(run), []


class InTurn(Callback):
    def before_fit(self, learner):
        self.start = time.perf_counter()

    def after_step(self, learner):
        if learner.step % {block}:
            return
        blocks.append(time.perf_counter() - self.start)
        monitor.looks = len(blocks) % 2 == 0
        self.start = time.perf_counter()


result = await monitor.steer(search, model, space, loaders["delta"], loaders["alpha"], loaders["validation"],
                             budget=share(space), callbacks=[InTurn()],
                             config=SearchConfig({steps}, lr=2e-3, evaluate_every={steps}, dropout=False))
with open("blocks.json", "w") as file:
    json.dump(blocks, file)
print("watched")
"""


def watched(steps: int, block: int) -> list[float]:
    "Seconds of each block of steps; the first is watched, the second is not, and so on."
    folder = Path(tempfile.mkdtemp())
    notebook(folder / "watched.ipynb", SEARCH.format(steps=steps, block=block))
    with sync_playwright() as playwright, jupyterlab(folder) as address:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = Page(chromium, address, "watched.ipynb")
        page.run_all()
        page.page.wait_for_selector(DRAWN, timeout=MINUTE)
        page.page.get_by_text("watched", exact=True).wait_for(timeout=60 * MINUTE)
        chromium.close()
    return json.loads((folder / "blocks.json").read_text())


def compared(blocks: list[float]) -> dict:
    "Share of the time that watching takes, with its 95 % interval; the first pair warms up."
    seen, alone = blocks[2::2], blocks[3::2]

    def share(seen, alone):
        return sum(seen) / sum(alone) - 1

    low, high = stats.bootstrap((seen, alone), share, paired=True, vectorized=False, rng=0).confidence_interval
    return {"share": share(seen, alone), "interval": [low, high], "pairs": list(zip(seen, alone))}


def main(
    steps: Annotated[int, typer.Option(help="Of the search.")] = 1200,
    block: Annotated[int, typer.Option(help="Steps in a row that are watched, or not.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of all reports.")] = Path("reports"),
) -> None:
    "Measure it and write result.json."
    run = Run.create(out, "live", {"steps": steps, "block": block}, code())
    found = compared(watched(steps, block))
    run.save_result({**found, "target": 0.02, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                     **environment(torch.device("cpu"))})
    low, high = found["interval"]
    print(f"watching takes {found['share']:.1%} of the time (95 % from {low:.1%} to {high:.1%})")
    print(run.folder / "result.json")


if __name__ == "__main__":
    typer.run(main)
