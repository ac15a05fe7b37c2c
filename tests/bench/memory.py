"""Peak memory of one subject in a process of its own.

    python -m tests.bench.memory CASE SUBJECT ROUNDS DEVICE [DATA]

prints the bytes that it took beyond the interpreter and the imports. The process itself says so: what a
parent is told of a child also counts the parent, as it was when the child was started.

What is in use is told by an allocator that gives every freed block back at once. glibc's own habit is to keep
blocks, so as to be quick; how many it keeps depends on the order in which they came and went.
"""
import os
import subprocess
import sys
from pathlib import Path

import torch

from .measure import resident
from .steps import at_work, bench_of


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2 ** 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def peak(case: str, subject: str, rounds: int, device: torch.device, data: str | None) -> int:
    "Bytes that some rounds of a subject take in this process, its model included."
    before = resident()
    with at_work(subject, bench_of(case, data, device)) as work:
        for k in range(rounds):
            work(k)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident(peak=True) - before


def peak_apart(case: str, subject: str, rounds: int, device: torch.device, data: str | None,
               resident: bool = False) -> int:
    "The same in a new process: what is in use, or all that is resident in a run of this environment."
    command = [sys.executable, "-m", f"{__package__}.memory", case, subject, str(rounds), str(device)]
    folder = Path(__file__).parents[__package__.count(".") + 1]
    done = subprocess.run([*command, *([data] if data else [])], cwd=folder, check=True,
                          env=os.environ | ({} if resident else GIVES_BACK), capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    case, subject, rounds, device, *data = sys.argv[1:]
    print(peak(case, subject, int(rounds), torch.device(device), *data or [None]))
