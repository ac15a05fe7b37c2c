"How a pass is run: precision, shares of a step, noise, what it costs, and the numbers of a loop."
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.learn import compute
from s3pet_nb.learn.compute import (Compute, Groups, LoopConfig, average, evaluated, loss_parts, my_share,
                                    negative_loss, own_noise, pick_device, training)
from s3pet_nb.learn.search import SearchConfig
from s3pet_nb.learn.train import TrainConfig
from s3pet_nb.model.backbone import NarrowProducts, example_batch, tiny

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_peak_is_of_the_whole_process_and_stays():
    "Asked in a process that a small shell has started: the peak of whoever starts a process is handed on."
    code = ("import torch\nfrom s3pet_nb.learn.compute import peak_memory_mb\ncpu = torch.device('cpu')\n"
            "before = peak_memory_mb(cpu)\nblock = torch.ones(400_000_000, dtype=torch.uint8)\n"
            "while_held = peak_memory_mb(cpu)\ndel block\n"
            "print(before, while_held, peak_memory_mb(cpu))")
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, held, after = map(float, shown.stdout.split())
    assert before > 50 and 380 < held - before < 500 and after >= held


@pytest.mark.skipif(sys.platform != "linux", reason="a peak can be forgotten on Linux alone")
def test_each_phase_has_a_peak_of_its_own():
    code = ("import torch\nfrom s3pet_nb.learn.compute import forget_peak, peak_memory_mb, phase_memory_mb\n"
            "cpu = torch.device('cpu')\nforget_peak(cpu)\nbefore = phase_memory_mb(cpu)\n"
            "blocks = [torch.ones(1_000_000, dtype=torch.uint8) for _ in range(400)]\n"
            "first = phase_memory_mb(cpu)\ndel blocks\nforget_peak(cpu)\n"
            "blocks = [torch.ones(1_000_000, dtype=torch.uint8) for _ in range(100)]\n"
            "print(before, first, phase_memory_mb(cpu), peak_memory_mb(cpu))")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, first, second, peak = map(float, shown.stdout.split())
    assert 380 < first - before < 500 and 80 < second - before < 200 and peak > 0.99 * first


def test_on_cuda_torch_counts_anew(monkeypatch):
    held, cuda = [7e9], torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.__setitem__(0, 2e9))
    assert compute.peak_memory_mb(cuda) == compute.phase_memory_mb(cuda) == 7_000
    compute.forget_peak(cuda)
    assert compute.phase_memory_mb(cuda) == 2_000 and compute.peak_memory_mb(cuda) == 7_000


def test_where_no_peak_can_be_forgotten_a_step_has_none_of_its_phase(monkeypatch, tmp_path):
    assert set(compute.cost(2, CPU)) == {"passes", "memory_mb", *["phase_memory_mb"] * compute.counts_anew(CPU)}
    monkeypatch.setattr(compute, "CLEAR", tmp_path / "no such file")
    compute.forget_peak(CPU)
    assert set(compute.cost(2, CPU)) == {"passes", "memory_mb"}


def test_a_search_and_a_training_begin_with_a_peak_of_their_own(monkeypatch):
    forgotten = []
    monkeypatch.setattr(compute, "forget_peak", forgotten.append)
    model = tiny("bert")
    with training(model, model, LoopConfig(steps=1)):
        assert forgotten == [model.device]


@pytest.mark.parametrize("config", [LoopConfig, SearchConfig, TrainConfig])
@pytest.mark.parametrize("name", ["steps", "evaluate_every"])
def test_a_loop_of_no_steps_or_no_evaluation_is_refused(config, name):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        config(**{name: 0})


def test_another_precision_and_no_batch_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        Compute("bf6")
    with pytest.raises(ValueError, match="accumulate is 0; give at least 1"):
        Compute(accumulate=0)


class Processes:
    "Stands for the state of one of several processes."
    device = CPU

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def test_processes_share_the_batches_of_a_step_and_none_is_left_out(monkeypatch):
    shares = []
    for index in range(3):
        monkeypatch.setattr(compute, "PartialState", lambda: Processes(index, 3))
        assert Compute(accumulate=2).batches == 6
        shares.append(list(my_share("abcdef")))
    assert shares[1] == [(1, "b"), (4, "e")] and sorted(sum(shares, [])) == list(enumerate("abcdef"))


def test_what_processes_computed_is_averaged_in_its_own_shape_and_dtype(monkeypatch):
    monkeypatch.setattr(compute, "PartialState", lambda: Processes(0, 2))
    monkeypatch.setattr(compute, "reduce", lambda flat, how: {"mean": (flat + 3) / 2}[how])
    tensors = [torch.ones(2, 2), torch.tensor(5.0, dtype=torch.float64)]
    one, other = average(tensors)
    assert torch.equal(one, torch.full((2, 2), 2.0)) and one.dtype == torch.float32
    assert other.item() == 4 and other.dtype == torch.float64 and other.shape == ()


def test_alone_nothing_is_averaged():
    tensor = torch.ones(2)
    assert average([tensor])[0] is tensor


def test_groups_go_on_from_their_place_over_the_end_of_an_epoch():
    groups, again = Groups("abc", 2), Groups("abc", 2)
    assert next(groups) == ["a", "b"]
    again.load_state_dict(groups.state_dict())
    assert next(groups) == next(again) == ["c", "a"]


def test_the_parts_of_a_loss_have_dropout_of_their_own_and_sum_to_its_mean():
    model = tiny("bert", hidden_dropout_prob=0.5).train()
    batch, prepared = example_batch(model), []

    def parts(noise, **compute):
        with own_noise(CPU):
            return [part.item() for part in loss_parts(model, [batch] * 2, noise, Compute(**compute), CPU,
                                                       lambda: prepared.append(torch.rand(()).item()))]

    once = parts(7, accumulate=2)
    assert once == parts(7, accumulate=2) and once[0] != once[1] and parts(8, accumulate=2)[0] == once[1]
    assert prepared[:2] == prepared[2:4] and len(prepared) == 6
    assert sum(parts(7)) == pytest.approx(2 * sum(once), rel=1e-6)


def test_noise_of_its_own_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with own_noise(CPU):
        torch.manual_seed(99)
        torch.rand(5)
    with training(model := tiny("bert"), model, LoopConfig(seed=5, dropout=False)):
        drawn, mode = torch.rand(2), model.training
    assert torch.equal(torch.rand(4), expected) and mode is False
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(2))


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_checkpointed_if_asked_for_and_as_before_on_exit(asked):
    model = tiny("bert")

    def checkpointed():
        return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())

    with training(model, model, LoopConfig(compute=Compute(gradient_checkpointing=asked))):
        assert checkpointed() == asked
    assert not checkpointed()


def test_a_score_is_taken_in_evaluation_mode_and_in_the_precision_of_the_run():
    model = tiny("bert").train()
    batches = [example_batch(model)]

    def score(model, loader):
        assert not model.training and loader is batches
        return NarrowProducts.entered > 0

    assert [evaluated(model, batches, score, Compute(name)) for name in ("float32", "bf16")] == [False, True]
    assert model.training


def test_minus_the_loss_is_the_mean_over_batches():
    model = tiny("bert").eval()
    batches = [example_batch(model, seed=seed) for seed in range(3)]
    losses = [model(**batch).loss.item() for batch in batches]
    assert negative_loss(model, batches) == -sum(losses) / 3


def test_a_device_is_picked_by_its_name():
    assert pick_device("cpu") == CPU and pick_device("meta").type == "meta"


@pytest.mark.parametrize("config", [LoopConfig, SearchConfig, TrainConfig])
def test_numbers_beyond_steps_and_rate_are_given_by_name(config):
    assert config(7, 0.5).lr == 0.5
    with pytest.raises(TypeError, match="positional"):
        config(7, 0.5, 0.1)
