"A task, a backbone and the loaders between them."
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from s3pet_nb.core import UnknownName
from s3pet_nb.data.batch import loader, score
from s3pet_nb.data.form import Head
from s3pet_nb.data.rows import halves
from s3pet_nb.data.setup import Setup, fitted, last_layer
from s3pet_nb.data.task import TASKS, Task
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
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()
               if name != "classifier.bias")


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


def test_a_new_head_is_that_of_the_seed_alone():
    new = Setup.of("agreement", seed=3, n_train=60, n_eval=10, head="new")
    model, _ = load_backbone("minilm", seed=3)
    assert all(torch.equal(value, new.model.state_dict()[name]) for name, value in model.state_dict().items())


def own(labels, **more):
    "A setup of texts of our own with these labels."
    texts = [f"{word} house {i}" for i, word in enumerate(itertools.islice(itertools.cycle("red old big".split()),
                                                                          len(labels)))]
    frame = pd.DataFrame({"text": texts, "label": labels})
    return Setup.of(Task.of({"train": frame, "validation": frame, "test": frame}, "own", **more.pop("task", {})), **more)


def test_the_prior_of_classes_is_the_log_of_their_shares():
    layer = last_layer(own(["a"] * 90 + ["b"] * 9 + ["c"]).model)
    shares = torch.softmax(layer.bias, 0)
    assert shares.tolist() == pytest.approx([91 / 103, 10 / 103, 2 / 103], abs=1e-6)
    assert layer.bias.mean().item() == pytest.approx(0, abs=1e-6)
    assert not last_layer(own(["a", "b"] * 10).model).bias.any()


def test_a_regression_starts_at_the_mean_and_in_the_spread_of_its_labels():
    labels = [1.0, 2.0, 6.0, 3.5] * 5
    prior, new = (own(labels, head=head, task={"metric": "pearson"}) for head in ("prior", "new"))
    assert last_layer(prior.model).bias.item() == pytest.approx(np.mean(labels))
    ratio = last_layer(prior.model).weight / last_layer(new.model).weight
    assert ratio.detach().numpy() == pytest.approx(np.std(labels), rel=1e-5)


@pytest.mark.parametrize("n_labels", [1, 2, 3])
def test_what_is_fitted_says_what_scikit_learn_says(n_labels):
    draw = np.random.default_rng(0)
    X = draw.normal(3.0, [0.1, 2.0, 5.0], (300, 3))
    target = X @ [4.0, 0.3, -0.1] - 12
    labels = target if n_labels == 1 else np.digitize(target, [0.0] if n_labels == 2 else [-0.5, 0.5])
    weight, bias = fitted(X, labels, n_labels)
    assert weight.shape == (n_labels, 3) and bias.shape == (n_labels,)
    outputs = X @ weight.T + bias
    if n_labels == 1:
        assert np.corrcoef(outputs[:, 0], labels)[0, 1] > 0.99 and abs(outputs.mean() - labels.mean()) < 1e-9
    else:
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1_000)).fit(X, labels)
        chances = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        assert chances == pytest.approx(plain.predict_proba(X), abs=1e-9)


def test_a_probe_reads_the_frozen_backbone_and_touches_the_head_alone():
    plain, probed = (Setup.of("agreement", n_train=1_000, n_eval=200, head=head) for head in ("new", "probe"))
    differ = {name for name, value in probed.model.state_dict().items()
              if not torch.equal(value, plain.model.state_dict()[name])}
    assert differ == {"classifier.weight", "classifier.bias"}
    assert score(probed.model, probed.validation) > 0.58 > score(plain.model, plain.validation)


def test_a_head_that_starts_in_another_way_is_refused():
    with pytest.raises(UnknownName, match="unknown start of a head 'probed'; did you mean 'probe'"):
        Setup.of("agreement", head="probed")
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


def test_a_probe_without_rows_of_a_class_is_refused():
    with pytest.raises(ValueError, match="needs rows of all 3 classes, and the first 4 have 2; give more"):
        fitted(np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 2, 0, 2]), 3)
