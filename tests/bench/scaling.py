"How time and memory grow: with the number of candidates N, with depth, with width."
import statistics
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.optim import Stepper
from s3pet_nb.model.fuse import fuse
from s3pet_nb.model.gate import ShiftedSigmoid
from s3pet_nb.model.space import attach, make_space
from s3pet_nb.model.structure import select

from .cases import CASES, sibling
from .measure import interleaved, seconds
from .memory import peak_apart
from .steps import Bench, at_work, bench_of, measure

SIZES = (100, 300, 916, 3_000, 10_000)  # N of the vectors alone
LAYERS = (6, 18, 56, 178, 555)  # of narrow encoders, with N from 110 to 9,992
PASSES = 2  # of our first-order step: gates are sampled once in each


def vectors(n: torch.Tensor, rounds: int) -> dict:
    "Seconds of all that a step does with N numbers alone, part by part, and in all if every step did everything."
    gate, B = ShiftedSigmoid(), max(int(n.sum()) // 20, int(n.min()))
    draw = torch.Generator().manual_seed(0)
    alpha = torch.nn.Parameter(torch.randn(len(n), dtype=torch.float64, generator=draw))
    u = torch.rand(len(n), dtype=torch.float64, generator=draw)
    zeta, stepper = gate.solve(alpha, n, B), Stepper([alpha], 1e-6, 2.0, 10_000)
    p = gate.p(alpha, zeta)

    def sample(k: int) -> None:
        z = gate.z(gate.p(alpha, zeta), u)
        opened = z.to(torch.float32)
        torch.autograd.grad(opened.sum(), alpha)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        samples = interleaved({
            "zeta": lambda k: gate.solve(alpha, n, B), "sample": sample,
            "step_alpha": lambda k: stepper.step([u.clone()]), "select": lambda k: select(p, n, B),
            "log_gates": lambda k: run.log({"event": "gates", "alpha": alpha.tolist(), "p": p.tolist()}),
            "log_step": lambda k: run.log({"event": "step", "step": k, "loss": 0.1, "zeta": zeta}),
        }, rounds, 2)
    middle = {name: statistics.median(each) for name, each in samples.items()}
    return {"samples": samples, "seconds": middle,
            "all": sum(middle.values()) + (PASSES - 1) * middle["sample"]}


def by_size(rounds: int, sizes: Iterable[int] = SIZES) -> dict:
    "`vectors` for each N, with sizes of modules as they come."
    draw = torch.Generator().manual_seed(0)
    return {str(N): vectors(torch.randint(100, 5_000, (N,), generator=draw), rounds) for N in sizes}


def gating(bench: Bench, rounds: int) -> list[float]:
    "Seconds in which the gates of one pass meet the modules' weights, there and back."
    with attach(sibling(bench.model), bench.space) as gated:
        places = [candidate.position for candidate in gated.space.candidates]
        fused, weights = fuse(gated.model, gated.pets, places), list(gated.pets.parameters())
        z = torch.rand(len(bench.space), device=bench.model.device, requires_grad=True)

        def prepare(k: int) -> None:
            fused.prepare(z, [False] * len(z))
            shifted = [vars(owner)[name] for group in fused.vectors.values() for owner, name in group.slots]
            ups = [up for product in fused.products.values() for _, up in product.parts]
            torch.autograd.grad([*shifted, *ups], [z, *weights], [torch.ones_like(x) for x in (*shifted, *ups)],
                                allow_unused=True)

        return interleaved({"gating": prepare}, rounds, 2, bench.model.device)["gating"]


def overhead(case: str, data: str | None, device: torch.device, rounds: int) -> dict:
    "The share of a first-order step that goes to gates, zeta, selection and the log."
    bench = bench_of(case, data, device)
    step = measure(bench, ["first"], rounds, warmups=1, count=False)
    found, gated = vectors(bench.space.n, max(rounds, 7)), gating(bench, max(rounds, 7))
    spent = found["all"] + PASSES * statistics.median(gated)
    return {"case": case, "candidates": len(bench.space), "tokens": bench.batches[0]["input_ids"].numel(),
            "step": step["seconds"]["first"], "samples": step["samples"] | {"gating": gated}, "vectors": found,
            "seconds": spent, "share": spent / step["seconds"]["first"]["median"]}


def narrow(layers: Iterable[int], device: torch.device, rounds: int) -> dict:
    "Seconds and bytes per candidate of narrow encoders with ever more layers."
    found = {}
    for count in layers:
        case = f"narrow-{count}"
        model, batches = CASES[case].load(None, device)
        bench = Bench(model, make_space(model, "mix"), batches, Compute())
        N = len(bench.space)
        with ExitStack() as stack:
            attached = seconds(lambda: stack.enter_context(at_work("open_pass", bench)), device)
        told = measure(bench, ["retrain", "first", "open_pass"], rounds, count=False)
        memory = peak_apart(case, "first", 2, device, None)
        found[case] = {"candidates": N, "attach": attached, "memory": memory,
                       "memory_per_candidate": memory / N, **told, "per_candidate": {name: each["median"] / N
                                                 for name, each in told["seconds"].items()}}
    return found


def shapes(cases: Iterable[str], device: torch.device, rounds: int) -> dict:
    "The ratios of a step for encoders of other depths and widths."
    names = ["retrain", "first", "second", "sparse_pass", "open_pass"]
    return {case: {"candidates": len((bench := bench_of(case, None, device)).space),
                   **measure(bench, names, rounds, count=False)} for case in cases}


def growth(found: dict, of: str) -> float:
    "The largest cost per candidate over that of the smallest model; 1 where it does not grow."
    each = [entry["memory_per_candidate"] if of == "memory" else entry["per_candidate"][of]
            for entry in found.values()]
    return max(each) / each[0]
