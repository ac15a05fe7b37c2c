"""Time, arithmetic and memory of a piece of work.

Subjects that are compared run in turn, round after round, each round in another order, so that whatever else
the machine does falls on all of them. Every sample is kept; figures are medians.
"""
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Work = Callable[[int], object]  # of the round, from 0

ATEN = torch.ops.aten
LEFT_OUT = {  # of torch's own table; of each, the shapes of its tensors
    ATEN.addmm_: lambda out, a, b, *rest, out_shape=None, **more: 2 * a[0] * a[1] * b[1],
    ATEN._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, out_shape=None, **more: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, out_shape=None, **more: sdpa_backward_flop_count(grad, q, k, v),
}


def seconds(
    work: Callable[[], object],
    device: torch.device = torch.device("cpu"),
) -> float:
    "How long `work` takes, with all that it started on the device."
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


@contextmanager
def swept() -> Iterator[None]:
    "Within it the garbage collector looks at new objects alone, so that it costs next to nothing."
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleaved(
    subjects: Mapping[str, Work],
    rounds: int,  # that count
    warmups: int,  # that come before
    device: torch.device = torch.device("cpu"),
) -> dict[str, list[float]]:
    "Seconds of every subject in every round."
    names, samples = list(subjects), {name: [] for name in subjects}
    with swept():
        for k in range(warmups + rounds):
            gc.collect()
            for i in range(len(names)):
                name = names[(i + k) % len(names)]
                spent = seconds(lambda: subjects[name](k), device)
                if k >= warmups:
                    samples[name].append(spent)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    "Median and quartiles."
    if len(samples) < 2:
        return {"median": samples[0]}
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio(samples: Mapping[str, list[float]], over: str, under: str) -> float:
    "Median of one subject over the median of another."
    return statistics.median(samples[over]) / statistics.median(samples[under])


def flops(work: Callable[[], object]) -> tuple[int, object]:
    "Floating-point operations of all matrix products and attention in `work`, and what it returned."
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counter:
        returned = work()
    return counter.get_total_flops(), returned


def product_rate(
    tokens: int,
    d_in: int,
    d_out: int,
    device: torch.device = torch.device("cpu"),
    repeats: int = 20,
) -> float:
    "Floating-point operations a second in a matrix product of this shape, in the fastest repeat."
    x, w = torch.randn(tokens, d_in, device=device), torch.randn(d_in, d_out, device=device)
    times = interleaved({"product": lambda k: x @ w}, repeats, 3, device)["product"]
    return 2 * tokens * d_in * d_out / min(times)


def resident(peak: bool = False) -> int:
    "Bytes that this process has in memory now, or had at most since it began."
    status = Path("/proc/self/status")
    if not status.exists():  # macOS tells the peak alone, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])
