"""Where the time of a step goes, by kind of work, and the least that it could take.

The kinds come from the profiler's records of single operations. A product with a side of at most `NARROW` is
one of the modules' (LoRA and low-rank adapters have rank 1), every other one is the backbone's. What no
operation accounts for is Python's, with the profiler's own cost in it: shares are of the profiled time.
"""
from collections import Counter

from s3pet_nb.core import n_params
from torch.profiler import ProfilerActivity, profile

from .measure import product_rate, seconds
from .steps import Bench, at_work

NARROW = 8
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
KINDS = ("backbone products", "attention", "element-wise", "module products", "optimiser", "python")
SUBJECTS = ("retrain", "open_pass_simple", "open_pass", "first")


def kind(event) -> str:
    "The kind of one operation, from its name, its shapes and what it is part of."
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimiser"
        above = above.cpu_parent
    if event.name in PRODUCTS:
        sides = [side for shape in event.input_shapes if len(shape) > 1 for side in shape[-2:]]
        return "module products" if min(sides, default=0) <= NARROW else "backbone products"
    return "attention" if "scaled_dot_product" in event.name else "element-wise"


def shares(work, rounds: int) -> dict[str, float]:
    "The share of each kind in the time of some rounds."
    for k in range(2):
        work(k)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        wall = seconds(lambda: [work(k) for k in range(rounds)])
    found = Counter()
    for event in profiler.events():
        found[kind(event)] += event.self_cpu_time_total / 1e6
    found["python"] = wall - sum(found.values())
    return {name: found[name] / wall for name in KINDS}


def floor(bench: Bench) -> dict[str, float]:
    "The least that a training step can cost: 4 x encoder parameters x tokens, at the products' speed."
    config = bench.model.config
    parameters = n_params(bench.model.base_model.encoder)
    tokens = sorted(batch["input_ids"].numel() for batch in bench.batches)[len(bench.batches) // 2]
    rate = product_rate(tokens, config.hidden_size, config.intermediate_size, bench.model.device)
    return {"encoder_parameters": parameters, "tokens": tokens, "flops": 4 * parameters * tokens,
            "flops_per_second": rate, "seconds": 4 * parameters * tokens / rate}


def where(bench: Bench, rounds: int) -> dict | str:
    "Shares by subject, and the floor; of an encoder on the CPU."
    if bench.model.device.type != "cpu":
        return "not measured"
    found = {}
    for name in SUBJECTS:
        with at_work(name, bench) as work:
            found[name] = shares(work, rounds)
    return {"shares": found, "floor": floor(bench)}
