"The loop, what it remembers, and who watches it, on steps that need no model."
import json
import math

import pytest
import torch
from accidents import Kill, Killed, Stop
from torch.utils.data import DataLoader, RandomSampler

from s3pet_nb.core import UnknownName
from s3pet_nb.learn.learner import (Callback, Callbacks, Checkpoint, Evaluate, Learner, Progress, Records,
                                    Stateful, Stream, check_finite, check_same, generators, load_state,
                                    save_state)


@pytest.mark.parametrize("there, here, words", [
    ({"a": 1}, {"a": 2}, "x.a is 1 in the checkpoint and 2 here"),
    ({"a": [1, 2]}, {"a": [1, 3]}, r"x.a\[1\] is 2 in the checkpoint and 3 here"),
    ([1], [1, 2], r"x is \[1\] in the checkpoint and \[1, 2\] here"),
    ({"a": 1}, {"b": 1}, "x is {'a': 1} in the checkpoint and {'b': 1} here")])
def test_the_first_difference_is_named(there, here, words):
    check_same("x", there, json.loads(json.dumps(there)))
    with pytest.raises(ValueError, match=words):
        check_same("x", there, here)


class Part(Stateful):
    "All that can be remembered: a number, a tensor, a generator, another part, and nothing."

    remembered = "count", "values", "draw", "inner", "none"

    def __init__(self, inner=None):
        self.count, self.values, self.none, self.forgotten = 0, torch.zeros(2), None, 0
        self.draw, self.inner = torch.Generator().manual_seed(len(inner.remembered) if inner else 0), inner

    def go(self):
        self.count += 1
        self.values = torch.rand(2, generator=self.draw)
        self.forgotten += 1
        if self.inner:
            self.inner.go()


def test_what_is_remembered_goes_through_a_file_and_back(tmp_path):
    part, other = Part(Part()), Part(Part())
    part.go()
    save_state(tmp_path / "part.safetensors", part.state_dict())
    other.load_state_dict(load_state(tmp_path / "part.safetensors"))
    assert (other.count, other.inner.count, other.forgotten, other.none) == (1, 1, 0, None)
    assert torch.equal(other.values, part.values)
    for each in part, other:
        each.go()
    assert torch.equal(other.values, part.values) and torch.equal(other.inner.values, part.inner.values)


def test_a_part_of_another_question_is_refused_before_anything_is_taken_over():
    class Asked(Part):
        question = 1

        def about(self):
            return {"question": self.question}

    part, other = Asked(), Asked()
    part.go()
    other.question = 2
    with pytest.raises(ValueError, match="question is 1 in the checkpoint and 2 here"):
        other.load_state_dict(part.state_dict())
    assert other.count == 0
    assert "about" not in Part().state_dict()


def test_a_state_keeps_keys_and_values_of_every_kind(tmp_path):
    state = {"scores": {20: 0.5}, 3: [None, True, "text", math.inf], "tensors": [torch.arange(3), torch.ones(())],
             "half": torch.ones(2, dtype=torch.bfloat16), "transposed": torch.arange(6).view(2, 3).T}
    save_state(tmp_path / "state.safetensors", state)
    found = load_state(tmp_path / "state.safetensors")
    assert list(found) == list(state) and found["scores"] == {20: 0.5} and found[3] == state[3]
    for name in "half", "transposed":
        assert torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype
    assert torch.equal(found["tensors"][0], state["tensors"][0]) and found["tensors"][1].shape == ()
    with pytest.raises(TypeError):
        save_state(tmp_path / "other.safetensors", {"set": {1}})
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("content", [b"", b"something else", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint; remove it to start over"):
        load_state(path)


def shuffled(**how) -> DataLoader:
    return DataLoader(range(7), batch_size=2, **how)


def with_sampler() -> DataLoader:
    return shuffled(sampler=RandomSampler(range(7), generator=torch.Generator().manual_seed(2)))


LOADERS = {"list": lambda: list("abcd"), "global": lambda: shuffled(shuffle=True), "sampler": with_sampler,
           "own": lambda: shuffled(shuffle=True, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("taken", [0, 1, 4, 6, 11])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_stream_finds_its_place_again(loader, taken):
    torch.manual_seed(0)
    stream, other = Stream(loader()), Stream(loader())
    for _ in range(taken):
        next(stream)
    place, state = stream.state_dict(), torch.get_rng_state()
    rest = [str(next(stream)) for _ in range(9)]
    torch.set_rng_state(state)
    other.load_state_dict(place)
    assert torch.equal(torch.get_rng_state(), state), "torch's own numbers are the learner's to put back"
    assert [str(next(other)) for _ in range(9)] == rest


def test_every_generator_that_shuffles_is_known_and_torchs_own_is_last():
    draw = torch.Generator()
    assert generators([]) == [torch.default_generator]
    assert generators(shuffled(shuffle=True, generator=draw)) == [draw, torch.default_generator]
    assert len(generators(with_sampler())) == 2
    with pytest.raises(ValueError, match="the number of random generators is 1 in the checkpoint and 2 here"):
        Stream(with_sampler()).load_state_dict(Stream([1]).state_dict())


def test_a_loader_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="the loader has no batch; give it more rows or a smaller batch size"):
        next(Stream([]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named(value):
    assert check_finite(one=1.0) == {"one": 1.0}
    with pytest.raises(FloatingPointError, match=f"other is {value}"):
        check_finite(one=1.0, other=value, third=math.nan)


class Counted(Stateful):
    "A step that counts, over numbers that torch draws."

    remembered = ("total",)
    total = 0.0

    def __call__(self, batch):
        self.total += batch + torch.rand(()).item()
        return {"loss": self.total}


class Moments(Callback):
    "Remembers what it was told."

    remembered = ("seen",)

    def __init__(self):
        self.seen = []

    def before_fit(self, learner):
        self.seen = [*self.seen, ["before", learner.step]]

    def after_step(self, learner):
        self.seen = [*self.seen, ["step", learner.step, learner.record["loss"]]]

    def after_fit(self, learner):
        self.seen = [*self.seen, ["after", learner.step]]


def test_callbacks_are_told_of_every_moment_in_order():
    moments = Moments()
    Learner(lambda batch: {"loss": batch}, [0.5, 0.25], 3, "count", callbacks=[Callback(), moments]).fit()
    assert moments.seen == [["before", 0], ["step", 1, 0.5], ["step", 2, 0.25], ["step", 3, 0.5], ["after", 3]]


def test_a_record_says_where_it_is_from_and_seconds_leave_out_a_wait():
    class Waits(Callback):
        def after_step(self, learner):
            learner.waited += 1000

    records = Records()
    Learner(lambda batch: {"loss": 0.0}, [1], 2, "count", records, [Waits()]).fit()
    assert [(r["event"], r["phase"], r["step"], r["steps"]) for r in records] == [
        ("step", "count", 1, 2), ("step", "count", 2, 2)]
    assert 0 <= records[0]["seconds"] < 100 and records[1]["seconds"] < -900


def test_a_stop_ends_the_run_after_its_step():
    learner = Learner(lambda batch: {"loss": 0.0}, [1], 9, "count", callbacks=[Stop(2)])
    learner.fit()
    assert learner.step == 2 and learner.over


def test_a_broken_loss_is_logged_and_told_and_callbacks_see_the_end():
    moments, records, losses = Moments(), Records(), iter([0.5, math.nan])
    learner = Learner(lambda batch: check_finite(loss=next(losses)), [1], 5, "count", records, [moments])
    with pytest.raises(FloatingPointError, match="count stopped at step 2: loss is nan; lower the learning rate"):
        learner.fit()
    assert records[-1] == {"event": "stopped", "phase": "count", "step": 2, "reason": "loss is nan"}
    assert moments.seen[-1] == ["after", 2]


def run(path, records, *more, n_steps=10, every=3):
    torch.manual_seed(4)
    step, moments = Counted(), Moments()
    batches = shuffled(shuffle=True, generator=torch.Generator().manual_seed(1))
    Learner(step, Numbers(batches), n_steps, "count", records, [*more, moments],
            Checkpoint(path, every)).fit()
    return step.total, [each for each in moments.seen if each[0] == "step"]




class Numbers(Stream):
    "Sums of the batches of a loader."

    def __next__(self):
        return super().__next__().sum().item()


@pytest.mark.parametrize("at", [1, 3, 4, 8, 10])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(at, tmp_path):
    whole, parts = Records(), Records()
    expected = run(tmp_path / "whole.safetensors", whole)
    with pytest.raises(Killed):
        run(tmp_path / "part.safetensors", parts, Kill(at))
    assert run(tmp_path / "part.safetensors", parts) == expected
    assert [{**record, "seconds": 0} for record in parts] == [{**record, "seconds": 0} for record in whole]


def test_a_checkpoint_of_other_steps_or_callbacks_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path, Records())
    with pytest.raises(ValueError, match="is of another run: n_steps is 10 in the checkpoint and 11 here; remove it"):
        run(path, Records(), n_steps=11)
    with pytest.raises(ValueError, match="is of another run: callbacks is .*'Moments'.* here; remove it"):
        run(path, Records(), Moments())


def test_a_finished_run_is_not_run_again_and_its_log_stays(tmp_path):
    records = Records()
    expected = run(tmp_path / "run.safetensors", records)
    before = list(records)
    assert run(tmp_path / "run.safetensors", records) == expected and records == before


def test_a_checkpoint_is_saved_when_it_is_due(tmp_path):
    path, steps = tmp_path / "run.safetensors", []

    class Watch(Callback):
        def after_step(self, learner):
            steps.append(load_state(path)["learner"]["step"])
            learner.checkpoint.due = learner.step == 2

    Learner(Counted(), [1.0], 8, "count", callbacks=[Watch()], checkpoint=Checkpoint(path, every=5)).fit()
    assert steps == [0, 0, 2, 2, 2, 5, 5, 5] and load_state(path)["learner"]["step"] == 8
    with pytest.raises(ValueError, match="every is 0; give at least 1"):
        Checkpoint(path, every=0)


def evaluated(scores, every, steps, take="best"):
    given, taken = iter(scores), []
    evaluate = Evaluate(lambda: next(given), lambda: taken.append(0) or len(taken), every, take)
    Learner(lambda batch: {"loss": 0.0}, [1], steps, "count", callbacks=[evaluate]).fit()
    return evaluate


def test_the_best_score_is_kept_a_tie_goes_to_the_later_and_the_end_is_scored():
    evaluate = evaluated([0.5, 0.9, 0.9, 0.1], every=3, steps=10)
    assert evaluate.scores == {3: 0.5, 6: 0.9, 9: 0.9, 10: 0.1} and evaluate.kept_step == 9
    last = evaluated([0.5, 0.9, 0.1], every=4, steps=9, take="last")
    assert (last.kept_step, last.kept) == (9, 1), "one snapshot, at the end"
    with pytest.raises(FloatingPointError, match="score is nan"):
        evaluated([math.nan], every=1, steps=1)
    with pytest.raises(UnknownName, match="did you mean 'best'"):
        evaluated([], every=1, steps=1, take="bets")


def test_states_go_to_the_callbacks_that_had_them():
    one, other = Callbacks([Moments(), Callback(), Moments()]), Callbacks([Callback(), Moments(), Moments()])
    one[0].seen, one[2].seen = [["a"]], [["b"]]
    other.load_state_dict(one.state_dict())
    assert [other[1].seen, other[2].seen] == [[["a"]], [["b"]]]


def test_a_bar_counts_steps_and_shows_the_loss(capsys):
    Learner(lambda batch: {"loss": 0.5}, [1], 4, "count", callbacks=[Progress()]).fit()
    shown = capsys.readouterr().err
    assert "count" in shown and "4/4" in shown and "loss 0.500" in shown
