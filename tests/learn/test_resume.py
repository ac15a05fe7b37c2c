"A search or a training that is killed goes on from its checkpoint, and ends with the same bits."
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from s3pet_nb.lab.store import Run
from s3pet_nb.learn.learner import Checkpoint, Records
from s3pet_nb.learn.prune import PruneConfig, prune_search
from s3pet_nb.learn.search import EarlyStop, SearchConfig, search
from s3pet_nb.learn.train import TrainConfig, finetune, retrain
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.gate import Annealed, ShiftedSigmoid, geometric
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import Structure

STOPS = 28  # where the early stop comes, of 60 steps
RATES = {"A": 0.3, "B": 0.2, "norm": 3e-2, "backbone": 1e-3}  # those of other kinds are lr
CLOCK = "seconds", "memory_mb", "phase_memory_mb"  # what two runs of one question do not share


def rows(size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    batch = example_batch(tiny("bert"), size=size, seed=seed)
    batch["labels"] = (batch["input_ids"][:, 0] > 32).long()
    return [{name: column[i] for name, column in batch.items()} for i in range(size)]


def shuffled(size: int, seed: int, draw: torch.Generator | None = None) -> DataLoader:
    return DataLoader(rows(size, seed), batch_size=4, shuffle=True, generator=draw)


def whole_search(folder: Path) -> None:
    """A search with all that has a state.

    Several epochs of unequal loaders that share one generator, dropout, annealing, an early stop.
    """
    model, run, draw = tiny("bert"), Run(folder), torch.Generator().manual_seed(5)
    result = search(model, make_space(model), shuffled(20, 1, draw), shuffled(36, 2, draw),
                    DataLoader(rows(8, 3), 4), budget=200, order="auto", log=run,
                    gate=Annealed(ShiftedSigmoid(), beta=geometric(1.0, 0.2)),
                    config=SearchConfig(60, lr=1e-2, rates=RATES, warmup=0.1, evaluate_every=4, measure_every=7),
                    callbacks=[EarlyStop(rounds=3, similar=0.6, checks=15, floor=0), EarlyStop(rounds=50)],
                    checkpoint=Checkpoint(run.checkpoint("search"), every=5))
    result.structure().save(folder / "structure.json")
    save_file({"alpha": result.alpha.clone(), **{str(s): alpha for s, alpha in result.history.items()}},
              folder / "alphas.safetensors")


def whole_pruning(folder: Path) -> None:
    "Two rounds and a re-training, with dropout, a shuffling loader and a criterion that draws."
    model, run = tiny("bert"), Run(folder)
    config = TrainConfig(12, lr=1e-2, rates=RATES, warmup=0.2, take="last", evaluate_every=5)
    result = prune_search(model, make_space(model, "mam"), shuffled(20, 1), DataLoader(rows(8, 3), 4),
                          budget=[900, 200], criterion="random", config=PruneConfig(config, average_over=7),
                          callbacks=(), log=run,
                          checkpoint=lambda label: Checkpoint(run.checkpoint(label), every=4))
    result.structure().save(folder / "structure.json")
    save_file({"scores": result.scores, **result.trained.tensors}, folder / "alphas.safetensors")


def die_in_pass(k: int, folder: Path, job=whole_search) -> None:
    "The search, killed from inside its k-th pass through the model."
    passes, forward = iter(range(1, k + 1)), torch.nn.Module.__call__

    def counted(module, *args, **kwargs):
        if type(module).__name__ == "BertForSequenceClassification" and next(passes, k) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(module, *args, **kwargs)

    torch.nn.Module.__call__ = counted
    job(folder)


def die_while_saving(k: int, folder: Path) -> None:
    "The search, killed when its k-th checkpoint is written but not yet in place."
    saves, replace = iter(range(1, k + 1)), os.replace

    def counted(source, target):
        if str(target).endswith("search.safetensors") and next(saves, k) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counted
    whole_search(folder)


def in_process(function, *args) -> int:
    "Exit code of `function`, run in a process of its own, with one thread as every test has."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s3pet_nb.learn.search", "s3pet_nb.lab.store"])
    process = context.Process(target=_alone, args=(function, *args))
    process.start()
    process.join()
    return process.exitcode


def _alone(function, *args) -> None:
    torch.set_num_threads(1)
    function(*args)


def outcome(folder: Path) -> tuple:
    "All that a search leaves, but for time and memory."
    log = [{name: value for name, value in json.loads(line).items() if name not in CLOCK}
           for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, (folder / "structure.json").read_text(), load_file(folder / "alphas.safetensors")


def assert_same(one: tuple, other: tuple) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("whole")
    assert in_process(whole_search, folder) == 0
    return outcome(folder)


def test_the_search_is_one_worth_killing(uninterrupted):
    log = uninterrupted[0]
    steps = [record for record in log if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STOPS + 1))
    assert {record["passes"] for record in steps} == {2, 3}
    assert len({record["zeta"] for record in steps}) == STOPS
    assert [record["step"] for record in log if record["event"] == "early_stop"] == [STOPS]


PASSES = random.Random(0).sample(range(2, 80), 20)


@pytest.mark.parametrize("k", PASSES)
def test_killed_in_any_pass_it_ends_with_the_same_bits(k, tmp_path, uninterrupted):
    assert in_process(die_in_pass, k, tmp_path) == -signal.SIGKILL
    assert not (tmp_path / "structure.json").exists()
    assert in_process(whole_search, tmp_path) == 0
    assert_same(outcome(tmp_path), uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted_pruning(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("pruned")
    assert in_process(whole_pruning, folder) == 0
    return outcome(folder)


@pytest.mark.parametrize("k", [3, 14, 21, 27, 33, 44])
def test_a_pruning_killed_in_any_phase_ends_with_the_same_bits(k, tmp_path, uninterrupted_pruning):
    assert in_process(die_in_pass, k, tmp_path, whole_pruning) == -signal.SIGKILL
    assert in_process(whole_pruning, tmp_path) == 0
    assert_same(outcome(tmp_path), uninterrupted_pruning)


def test_killed_again_and_again_it_still_arrives(tmp_path, uninterrupted):
    kills = 0
    while in_process(die_in_pass, 23, tmp_path):
        kills += 1
        assert kills < 20
    assert kills > 1
    assert_same(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_killed_while_saving_it_has_the_checkpoint_before_and_no_rubbish(k, tmp_path, uninterrupted):
    assert in_process(die_while_saving, k, tmp_path) == -signal.SIGKILL
    assert in_process(whole_search, tmp_path) == 0
    assert_same(outcome(tmp_path), uninterrupted)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["search.safetensors"]


def test_a_finished_search_is_not_searched_again(tmp_path, uninterrupted):
    for _ in range(2):
        assert in_process(whole_search, tmp_path) == 0
    assert_same(outcome(tmp_path), uninterrupted)


def test_another_question_is_refused_and_says_what_differs(tmp_path):
    model = tiny("bert")
    space, batches = make_space(model), [example_batch(model)]
    path = tmp_path / "search.safetensors"
    config = SearchConfig(steps=2, evaluate_every=2)

    def ask(budget):
        search(model, space, batches, batches, batches, budget, config=config, callbacks=(),
               checkpoint=Checkpoint(path))

    ask(200)
    with pytest.raises(ValueError, match="budget is 200 in the checkpoint and 100 here; remove it to start"):
        ask(100)


class Breaks(Exception):
    pass


class BreakingScore:
    "Scores that are best at the first evaluation; the one number `at` raises."

    def __init__(self, scores, at=None):
        self.scores, self.at, self.calls = iter(scores), at, 0

    def __call__(self, model, loader):
        self.calls += 1
        if self.calls == self.at:
            raise Breaks
        return next(self.scores)


@pytest.mark.parametrize("train", ["retrain", "finetune"])
def test_a_training_goes_on_with_the_same_bits(train, tmp_path):
    model = tiny("bert")
    space = make_space(model, "lora")
    structure = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    path = tmp_path / "training.safetensors"

    def run(log, score, checkpoint=None):
        config = TrainConfig(12, lr=1e-2, rates=RATES, evaluate_every=3)
        more = {"callbacks": (), "log": log, "checkpoint": checkpoint}
        if train == "finetune":
            return finetune(model, shuffled(28, 1), None, score, config, **more)
        return retrain(model, structure, shuffled(28, 1), None, score, config, **more)

    whole, parts = Records(), Records()
    expected = run(whole, BreakingScore([0.9, 0.5, 0.6, 0.7]))
    assert expected.step == 3
    with pytest.raises(Breaks):
        run(parts, BreakingScore([0.9, 0.5], at=3), Checkpoint(path, every=4))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    found = run(parts, BreakingScore([0.6, 0.7]), Checkpoint(path, every=4))
    assert found.scores == expected.scores and found.step == 3
    assert all(torch.equal(found.tensors[name], weight) for name, weight in expected.tensors.items())
    clockless = [[{**record, **dict.fromkeys(CLOCK)} for record in log] for log in (whole, parts)]
    assert clockless[0] == clockless[1]


def test_a_log_that_a_checkpoint_does_not_know_is_left_alone(tmp_path):
    model = tiny("bert")
    space, batches = make_space(model), [example_batch(model)]
    told = {"config": SearchConfig(steps=4, evaluate_every=2), "callbacks": ()}
    records = Records([{"event": "mine"}])
    for log in (None, records):
        search(model, space, batches, batches, batches, 200, log=log,
               checkpoint=Checkpoint(tmp_path / "search.safetensors"), **told)
    assert records == [{"event": "mine"}]


@pytest.mark.parametrize("shorter, words", [(4, "batches of an epoch before this place is 5"), (20, None)])
def test_a_loader_that_has_shrunk_is_refused(shorter, words, tmp_path):
    model = tiny("bert")
    path = tmp_path / "search.safetensors"

    def ask(size, breaks_at=None):
        return search(model, make_space(model), shuffled(size, 1), shuffled(20, 1), [None], 200, callbacks=(),
                      score=BreakingScore([0.5] * 9, breaks_at), checkpoint=Checkpoint(path, every=5),
                      config=SearchConfig(steps=8, evaluate_every=6))

    with pytest.raises(Breaks):
        ask(20, breaks_at=1)
    if words:
        with pytest.raises(ValueError, match=words):
            ask(shorter)
    else:
        assert ask(shorter).steps == 8
