"A task, a backbone and the loaders between them."
import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.data.batch import loader
from s3pet_nb.data.form import Head
from s3pet_nb.data.rows import halves
from s3pet_nb.data.setup import Setup
from s3pet_nb.data.task import TASKS
from s3pet_nb.model.backbone import load_backbone


def same(one, other):
    "Whether two loaders give the same batches in the same order."
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in pairs)


@pytest.fixture(scope="module")
def setup():
    return Setup.of("agreement", seed=3, n_train=60, n_eval=10, batch_size=8)


def test_it_is_what_its_parts_give_one_by_one(setup):
    task = TASKS["agreement"]
    rows = task.load(seed=3).head(60, 10)
    model, tokenizer = load_backbone("minilm", seed=3)
    half_delta, half_alpha = halves(rows.train, 3, rows.key)

    def batches(part, seed=None):
        return loader(part, Head(task), tokenizer, 8, seed)

    assert same(setup.delta, batches(half_delta, 3))
    assert same(setup.alpha, batches(half_alpha, 4))
    assert same(setup.train, batches(rows.train, 3))
    assert same(setup.validation, batches(rows.validation))
    assert list(setup.tests) == ["test", "test_unseen"]
    assert same(setup.tests["test"], batches(rows.test))
    weights = setup.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_loader_begins_anew_when_it_is_asked_for_again(setup):
    assert same(setup.train, setup.train)
    assert not same(setup.train, setup.batches(setup.splits.train, seed=4))


def test_all_rows_are_there_beside_those_that_are_used(setup):
    assert setup.splits.sizes == {"train": 60, "validation": 10, "test": 10, "test_unseen": 10}
    assert all(setup.whole.sizes[name] > n for name, n in setup.splits.sizes.items())


def test_a_task_of_ones_own_and_a_form_by_name(setup):
    task = setup.task
    mine = Setup.of(task, form="head", n_train=20, n_eval=5, max_length=6)
    assert mine.task is task and mine.form.name == "head"
    assert max(batch["input_ids"].shape[1] for batch in mine.train) <= 6


@pytest.mark.parametrize("given", [{"task": "agreemant"}, {"task": "agreement", "form": "haed"}])
def test_an_unknown_name_is_refused_before_the_backbone_is_loaded(given):
    with pytest.raises(UnknownName):
        Setup.of(backbone="/no/such/folder", **given)


def first(batches):
    return next(iter(batches))["input_ids"]


def test_each_part_has_a_seed_of_its_own_and_the_others_stay():
    few = {"n_train": 64, "n_eval": 8}
    plain = Setup.of("agreement", seed=1, **few)
    weights = {name: weight for name, weight in plain.model.named_parameters() if "classifier" in name}
    for name in ("init_seed", "search_seed", "order_seed"):
        own = Setup.of("agreement", seed=1, **few, **{name: 5})
        assert own.splits.train["sentence"] == plain.splits.train["sentence"]
        assert own.halves[0]["sentence"] == plain.halves[0]["sentence"]
        same_head = all(weight.equal(dict(own.model.named_parameters())[key]) for key, weight in weights.items())
        assert same_head == (name != "init_seed")
        assert first(own.train).equal(first(plain.train)) == (name != "order_seed")
        assert first(own.delta).equal(first(plain.delta)) == (name != "search_seed")
        assert first(own.alpha).equal(first(plain.alpha)) == (name != "search_seed")


def test_seeds_that_are_the_same_change_nothing():
    plain = Setup.of("agreement", seed=2, n_train=64, n_eval=8)
    own = Setup.of("agreement", seed=2, init_seed=2, search_seed=2, order_seed=2, n_train=64, n_eval=8)
    assert first(own.train).equal(first(plain.train)) and first(own.delta).equal(first(plain.delta))
    assert all(one.equal(other) for one, other in zip(own.model.parameters(), plain.model.parameters()))
