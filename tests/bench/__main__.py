"Measure what a search costs: `python -m tests.bench --help`."
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from s3pet_nb.lab.run import kernel_environment
from s3pet_nb.learn.compute import pick_device

from .bench import MISSING, QUICK, Plan, bench

NAMES = {
    "step_first": "search step, first order / re-train step",
    "step_second": "search step, second order / re-train step",
    "open_over_sparse": "open supernet pass / sparse pass",
    "run_early_stop": "whole search / whole re-train",
    "run_full": "the same without early stop",
    "memory": "peak memory of search / re-train",
    "published_over_ours": "published step / our first-order step",
    "overhead_share": "gates, zeta, selection, log / a step",
}


def columns(*names: str) -> Table:
    "An empty table; numbers stand to the right."
    shown = Table(*names, box=None, header_style="bold")
    for column in shown.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return shown


def figures(result: dict) -> Table:
    "Figure, measured, target, met or not."
    shown = columns("figure", "measured", "target", "met")
    for name, target in result["targets"].items():
        value = result["ratios"][name]
        form = ".1%" if name == "overhead_share" else ".2f"
        yes = {True: "yes", False: "no"}.get(target["met"], "")
        shown.add_row(NAMES[name], value if value == MISSING else f"{value:{form}}",
                      f"{target['bound']} {target['value']:{form}}", yes)
    return shown


def costs(case: str, found: dict) -> Table:
    "Passes, operations and time of every subject of a case."
    shown = columns(case, "passes", "GFLOP", "ms", "quartiles", "/ re-train")
    middle = found["seconds"]["retrain"]["median"]
    for name, seconds in found["seconds"].items():
        shown.add_row(name, str(found["passes"][name]), f"{found['flops'][name] / 1e9:,.1f}",
                      f"{1000 * seconds['median']:,.0f}",
                      f"{1000 * seconds['low']:,.0f} - {1000 * seconds['high']:,.0f}",
                      f"{seconds['median'] / middle:.2f}")
    return shown


def runs(result: dict) -> Table:
    "The ratios of the whole runs, one task a column."
    tasks = result["by_task"]
    shown = columns("whole runs", *(name.removeprefix("glue/") for name in tasks))
    for name in next(iter(tasks.values()))["ratios"]:
        shown.add_row(name, *(f"{found['ratios'][name]:.2f}" for found in tasks.values()))
    return shown


def shares(result: dict) -> Table:
    "Where the time of a step goes."
    found = result["where"]["shares"]
    shown = columns("share of the time", *found)
    for kind in next(iter(found.values())):
        shown.add_row(kind, *(f"{each[kind]:.0%}" for each in found.values()))
    return shown


def memory(result: dict) -> Table:
    "Peak memory of each in its own process."
    found = result["memory"]
    shown = columns("peak memory", "MB in use", "/ re-train", "MB resident", "/ re-train")
    for name in found["bytes"]:
        cells = ((found[f"bytes{kind}"][name], found[f"ratios{kind}"][name]) for kind in ("", " resident"))
        shown.add_row(name, *(text for size, times in cells for text in (f"{size / 1e6:,.0f}", f"{times:.2f}")))
    return shown


def quality(result: dict) -> list[str]:
    "One line a task on what the cheap search's structures score beside the published search's."
    lines = []
    for task, found in result["quality"].items():
        interval = found["interval"]
        within = f" (95 % from {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
        lines.append(f"{task}: {100 * found['mean']:+.1f} points{within}, "
                     f"{found['verdict']}: {found['reason']}")
    return lines


def notes(result: dict) -> list[str]:
    "What no table says: the floor, how costs grow with N, quality."
    lines, narrow = [], [found["candidates"] for found in result["scaling"]["narrow"].values()]
    if result["where"] != MISSING:
        floor = result["where"]["floor"]
        lines.append(f"A training step on {floor['tokens']:,} tokens has {floor['flops'] / 1e9:.1f} GFLOP in "
                     f"products: {1000 * floor['seconds']:.0f} ms at their speed.")
    grown = ", ".join(f"{name} {factor:.2f}" for name, factor in result["scaling"]["growth"].items())
    lines.append(f"Cost per candidate from N = {narrow[0]:,} to N = {narrow[-1]:,}, times: {grown}.")
    return lines + quality(result)


def tell(result: dict, console: Console) -> None:
    "All tables, the figures last."
    measured = {case: found for case, found in result["by_case"].items() if found != MISSING}
    tables = [costs(case, found) for case, found in measured.items()]
    tables += [shares(result)] if result["where"] != MISSING else []
    for shown in [*tables, memory(result), runs(result), figures(result)]:
        console.print(shown, "")
    for line in notes(result):
        console.print(line)


def main(
    quick: Annotated[bool, typer.Option(help="The steps and one task, in under ten minutes.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    data: Annotated[str | None, typer.Option(
        envvar="S3PET_DATA", help="Folder with the files of GLUE; the hub without it.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all reports.")] = Path("reports"),
) -> None:
    "Time searches beside trainings; prints a table and ends with the path of result.json."
    console = Console(width=80)
    run = bench(QUICK if quick else Plan(), out, pick_device(device), data, console.print)
    tell(run.result, console)
    console.print(str(run.folder / "result.json"), soft_wrap=True)


if __name__ == "__main__":
    if missing := kernel_environment():  # read by the allocator and by OpenMP when a process starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)
    typer.run(main)
