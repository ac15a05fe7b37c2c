"How long and at which rates a training goes, by name."
import math

import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.data.task import TASKS
from s3pet_nb.learn.protocol import (LAWTON, PROTOCOLS, QUICK, RECIPES, S3PET, STANDARD, Epochs, Recipe,
                                     epochs_table)
from s3pet_nb.learn.train import TrainConfig
from s3pet_nb.model.pet import PACES


def test_the_protocol_by_name():
    lawton = PROTOCOLS["lawton"]
    steps = lawton.steps("glue/mrpc", "retrain", 3668 // 16, batch=16)
    config = lawton.config(steps, share=1.0)
    assert (steps, config.lr, config.take, config.clip) == (20 * 229, 1e-5, "last", math.inf)
    assert round(config.warmup * steps) == 275 and (lawton.batch_size, lawton.max_length) == (16, 128)
    assert lawton.metrics == {"glue/mrpc": "accuracy", "glue/qqp": "accuracy"}
    assert lawton.seeds == 5 and {row.epochs for row in lawton.retrain.values()} == {20, 5, 2}


def test_a_table_has_two_phases_and_equal_rows_for_the_tasks_of_a_line():
    table = epochs_table("a b | 3 10 | 4\n  c | 1 | 2 5")
    assert table == {"search": {"a": Epochs(3, 10), "b": Epochs(3, 10), "c": Epochs(1)},
                     "retrain": {"a": Epochs(4), "b": Epochs(4), "c": Epochs(2, 5)}}
    with pytest.raises(ValueError, match="shorter"):
        epochs_table("a | 3 10")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_every_protocol_is_of_tasks_that_there_are_and_can_be_trained_by(protocol):
    assert set(protocol.search) | set(protocol.retrain) | set(protocol.metrics) <= set(TASKS)
    for share in (1e-9, 1e-4, 0.5, 1.0):
        config = protocol.config(10, share, seed=3)
        assert isinstance(config, TrainConfig) and min(protocol.lrs) <= config.lr <= max(protocol.lrs)
        assert (config.take, config.seed) == (protocol.take, 3)
        if protocol.recipe:
            assert config.rates == RECIPES[protocol.recipe].rates and config.clip == math.inf
        else:
            assert (config.clip, config.warmup, config.rates) == (protocol.clip, protocol.warmup, {})


@pytest.mark.parametrize("name", ["s3pet", "lawton"])
def test_the_papers_have_one_rate_and_a_new_head(name):
    assert not PROTOCOLS[name].recipe and PROTOCOLS[name].head == "new" and not PROTOCOLS[name].examples


def test_a_number_that_is_given_wins_over_the_recipe_and_a_recipe_over_the_papers_rate():
    assert QUICK.numbers(1e-4, lr=0.5) == {"lr": 0.5, "warmup": 0.0, "clip": 2.0}
    assert S3PET.numbers(1e-4, recipe=RECIPES["even"])["rates"]["B"] == RECIPES["even"].rates["B"]


def test_ours_are_as_long_on_every_task_and_say_so_in_rows():
    for task in (*TASKS, "own"):
        assert QUICK.steps(task, "search", 7, batch=16) == QUICK.examples // 16 and QUICK.covers(task, "search")
        assert STANDARD.steps(task, "retrain", 7, batch=64) == STANDARD.examples // 64
    assert QUICK.steps("own", "retrain", 7, batch=10 ** 6) == 1 and not S3PET.covers("own", "search")


def test_a_recipe_has_a_rate_for_every_kind_and_no_other():
    rates = RECIPES["default"].rates
    assert list(rates) == list(PACES)
    with pytest.raises(UnknownName, match="unknown kind of rate 'vectors'; did you mean 'vector'"):
        Recipe(rates | {"vectors": 1.0})
    with pytest.raises(ValueError, match="no rate for head; give one for each of A, B"):
        Recipe({kind: rate for kind, rate in rates.items() if kind != "head"})
    doubled = RECIPES["default"].times(2.0, ["A", "norm"])
    assert {kind: doubled.rates[kind] / rate for kind, rate in rates.items()} == {
        kind: 2.0 if kind in ("A", "norm") else 1.0 for kind in PACES}


def test_rates_between_two_sizes_are_of_equal_ratios():
    smallest = LAWTON.smallest
    rates = [LAWTON.lr(smallest ** (k / 4)) for k in range(5)]
    assert rates[0] == 1e-5 and rates[4] == pytest.approx(3e-4)
    assert [b / a for a, b in zip(rates, rates[1:])] == pytest.approx([30 ** 0.25] * 4)
    assert LAWTON.lr(smallest / 10) == LAWTON.lr(smallest) and S3PET.lr(1.0) == 3e-5


def test_a_task_without_a_row_has_no_steps_and_is_scored_at_the_end():
    with pytest.raises(UnknownName, match="unknown task of the protocol 'glue/wnly'; did you mean"):
        S3PET.steps("glue/wnly", "search", 10, batch=8)
    assert S3PET.evaluate_every("agreement", "search", 70) == 70 == LAWTON.evaluate_every("glue/rte", "retrain", 70)
    assert S3PET.evaluate_every("glue/rte", "search", 70) == 50
    assert S3PET.steps("glue/rte", "search", 0, 8) == 20, "a task of less rows than a batch has one step an epoch"
    assert LAWTON.split_rule("glue/rte") == "official" and LAWTON.split_rule("superglue/cb") is None
