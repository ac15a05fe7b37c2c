"Single steps side by side: of a re-training, a search in each order, the published ones, a pruning; passes."
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from s3pet_nb.learn.compute import Compute
from s3pet_nb.learn.prune import CRITERIA, Mean, ScoredStep
from s3pet_nb.learn.search import SearchConfig, SearchStep, search
from s3pet_nb.learn.train import TrainConfig, TrainStep
from s3pet_nb.model.space import GatedModel, SearchSpace, attach, make_space
from s3pet_nb.model.structure import Structure

from .cases import CASES, share, sibling, sparse_structure
from .measure import Work, flops, interleaved, ratio, summary
from .published import FourPasses, five_passes, hidden_gates

PLENTY = 10_000  # steps of a schedule that no measurement comes to the end of
ORDERS = ("first", "second", "central", "auto")
SUBJECTS = ("retrain", "retrain_found", *ORDERS, "four", "five", "train_all", "prune", "sparse_pass",
            "open_pass", "open_pass_simple", "open_pass_gates")
RATIOS = {  # what is divided by what
    "step_first": ("first", "retrain"), "step_second": ("second", "retrain"),
    "step_central": ("central", "retrain"), "step_auto": ("auto", "retrain"),
    "step_four": ("four", "retrain"), "step_five": ("five", "retrain"),
    "published_over_ours": ("five", "first"), "paper_over_ours": ("four", "first"),
    "open_over_sparse": ("open_pass", "sparse_pass"),
    "open_simple_over_sparse": ("open_pass_simple", "sparse_pass"),
    "open_gates_over_sparse": ("open_pass_gates", "sparse_pass"),
    "prune_over_train": ("prune", "train_all"), "found_over_retrain": ("retrain_found", "retrain"),
}


@dataclass(frozen=True)
class Bench:
    "A model at hand, with all that a subject needs."

    model: transformers.PreTrainedModel
    space: SearchSpace
    batches: list[dict]
    compute: Compute
    found: Structure | None = None  # of a search, where that is measured

    @property
    def search_config(self) -> SearchConfig:
        "Numbers of a search step."
        return SearchConfig(PLENTY, lr=2e-3, dropout=False, compute=self.compute)

    @property
    def train_config(self) -> TrainConfig:
        "Numbers of a training step."
        return TrainConfig(PLENTY, lr=1e-3, dropout=False, compute=self.compute)

    def batch(self, k: int) -> dict:
        "The batch of round k, the same for every subject."
        return self.batches[k % len(self.batches)]


def bench_of(case: str, data: str | None, device: torch.device) -> Bench:
    "The bench of a case, without a found structure."
    model, batches = CASES[case].load(data, device)
    return Bench(model, make_space(model, "mix"), batches, Compute(CASES[case].precision))


def find(bench: Bench, steps: int) -> Structure:
    "The structure of a short search on the batches."
    config = SearchConfig(steps, lr=2e-3, evaluate_every=steps, dropout=False, compute=bench.compute)
    return search(bench.model, bench.space, bench.batches[::2], bench.batches[1::2], bench.batches[:1],
                  share(bench.space), order="first", config=config, callbacks=()).structure()


def one_pass(gated: GatedModel, bench: Bench, k: int, gates: bool = False) -> None:
    "Forwards and backwards to every weight that is trained, and to alpha through sampled gates if `gates`."
    weights = list(gated.trainable().values())
    if gates:
        gated.sample(torch.full((len(bench.space),), 0.5, dtype=torch.float64))
        weights.append(gated.alpha)
    with bench.compute.autocast(gated.device):
        loss = gated(**bench.batch(k)).loss
    torch.autograd.grad(loss, weights, materialize_grads=True)


def search_work(bench: Bench, step: SearchStep) -> Work:
    "A search step, both losses on the batch of the round."
    return lambda k: step(([bench.batch(k)], [bench.batch(k)]))


@contextmanager
def at_work(name: str, bench: Bench) -> Iterator[Work]:
    "The work of one of `SUBJECTS`, on a model of its own that shares the frozen weights."
    model, space, B = sibling(bench.model), bench.space, share(bench.space)
    with ExitStack() as stack:
        if name in ORDERS:
            gated = stack.enter_context(attach(model, space))
            yield search_work(bench, SearchStep(gated, B, name, bench.search_config))
        elif name == "four":
            gated = stack.enter_context(hidden_gates(model, space))
            yield search_work(bench, FourPasses(gated, B, bench.search_config))
        elif name == "five":
            yield search_work(bench, stack.enter_context(five_passes(model, space, B, bench.search_config)))
        elif name.startswith("open_pass"):
            gated = stack.enter_context(attach(model, space, fused=name != "open_pass_simple"))
            gated.meet(B)
            yield partial(one_pass, gated, bench, gates=name == "open_pass_gates")
        else:
            everything = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
            structure = {"retrain_found": bench.found, "train_all": everything, "prune": everything}.get(
                name) or sparse_structure(space)
            gated = stack.enter_context(structure.apply(model))
            if name == "sparse_pass":
                yield partial(one_pass, gated, bench)
            elif name == "prune":
                step = ScoredStep(gated, bench.train_config, Mean(CRITERIA["first-order"]))
                yield lambda k: step([bench.batch(k)])
            else:
                step = TrainStep(gated, gated.trainable(), gated.paces(), bench.train_config)
                yield lambda k: step([bench.batch(k)])


def measure(bench: Bench, names: list[str], rounds: int, warmups: int = 2, count: bool = True) -> dict:
    "Samples, medians, passes, operations and ratios of some of `SUBJECTS`."
    device = bench.model.device
    with ExitStack() as stack:
        works = {name: stack.enter_context(at_work(name, bench)) for name in names}
        samples = interleaved(works, rounds, warmups, device)
        counted = {name: flops(lambda: work(0)) for name, work in works.items()} if count else {}
    return {"samples": samples, "seconds": {name: summary(each) for name, each in samples.items()},
            "passes": {name: (numbers or {"passes": 1})["passes"] for name, (_, numbers) in counted.items()},
            "flops": {name: operations for name, (operations, _) in counted.items()},
            "ratios": {name: ratio(samples, over, under) for name, (over, under) in RATIOS.items()
                       if over in samples and under in samples}}


def steps(
    case: str,
    data: str | None,  # folder with the files of GLUE; the hub if None
    device: torch.device,
    rounds: int,
    searched: int,  # steps of the search for a found structure
    subjects: tuple[str, ...] = SUBJECTS,
) -> dict | str:
    "Subjects side by side on one case; a sentence where the device is missing."
    if CASES[case].needs_cuda and device.type != "cuda":
        return "not measured"
    bench = bench_of(case, data, device)
    bench = Bench(bench.model, bench.space, bench.batches, bench.compute, find(bench, searched))
    names = [name for name in subjects if name != "second" or bench.compute.precision == "float32"]
    return {"candidates": len(bench.space), "space": bench.space.n_params,
            "precision": bench.compute.precision, "sparse": len(sparse_structure(bench.space)),
            "found": len(bench.found), "tokens": [batch["input_ids"].numel() for batch in bench.batches],
            **measure(bench, names, rounds)}
