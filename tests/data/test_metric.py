"Metrics: those of scikit-learn and scipy, the cases where they have no answer, groups, texts."
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from s3pet_nb.core import UnknownName
from s3pet_nb.data.metric import METRICS, Metric, normalised, same, token_f1

RANDOM = np.random.default_rng(0)
CLASSES = [(RANDOM.integers(0, k, 200), RANDOM.integers(0, k, 200)) for k in (2, 2, 3, 5)]
NUMBERS = [(RANDOM.normal(size=200), RANDOM.normal(size=200)), (RANDOM.integers(0, 6, 50), RANDOM.random(50))]


@pytest.mark.parametrize(("labels", "predictions"), CLASSES)
def test_class_metrics_are_those_of_scikit_learn(labels, predictions):
    for name, expected in {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "matthews": sklearn.metrics.matthews_corrcoef(labels, predictions),
        "f1-macro": sklearn.metrics.f1_score(labels, predictions, average="macro"),
        "f1": sklearn.metrics.f1_score(labels, predictions, labels=[1], average="macro"),
    }.items():
        assert METRICS[name](labels, predictions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("labels", "predictions"), NUMBERS)
def test_correlations_are_those_of_scipy(labels, predictions):
    for name, measure in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        expected = measure(labels, predictions).statistic
        assert METRICS[name](labels, predictions) == pytest.approx(expected, abs=1e-12)


def test_one_predicted_class():
    labels = np.array([0, 1, 1, 0, 1])
    never, always = np.zeros(5, int), np.ones(5, int)
    assert METRICS["matthews"](labels, never) == METRICS["matthews"](labels, always) == 0
    assert METRICS["f1"](labels, never) == 0 and METRICS["f1"](labels, always) == pytest.approx(3 / 4)
    assert METRICS["f1-macro"](labels, always) == pytest.approx(3 / 8)


@pytest.mark.filterwarnings("error")
def test_no_label_at_all_is_wrong_and_no_error():
    labels, predictions, none = np.array([0, 1, 1, 0]), np.array([0, 1, -1, -1]), np.full(4, -1)
    assert METRICS["accuracy"](labels, predictions) == 0.5
    assert METRICS["f1"](labels, predictions) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert METRICS["f1-macro"](labels, predictions) == pytest.approx(2 / 3)
    assert METRICS["em"](labels, predictions, [0, 0, 1, 1]) == 0.5
    assert 0 < METRICS["matthews"](labels, predictions) < 1
    for name in ("accuracy", "f1", "f1-macro", "matthews"):
        assert METRICS[name](labels, none) == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_has_no_correlation_and_says_so(name):
    for pair in ((np.arange(4.0), np.full(4, 2.5)), (np.full(4, 2.5), np.arange(4.0))):
        with pytest.warns(UserWarning, match="taken as 0"):
            assert METRICS[name](*pair) == 0


def test_groups_count_where_every_row_is_right():
    labels, predictions = [1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0]
    assert METRICS["em"](labels, predictions, [7, 7, 3, 3, 5, 5]) == pytest.approx(2 / 3)
    assert METRICS["em"](labels, predictions, [7, 3, 7, 3, 7, 3]) == 0.5
    with pytest.raises(ValueError, match="give the group of every row"):
        METRICS["em"](labels, predictions)


def test_record_compares_with_the_nearest_answer():
    answers = [["The New York Times", "NYT"], ["Barack Obama"], ["Paris"], ["A"]]
    predictions = ["new york times!", "Obama", "London", "a"]
    # equal once normalised; 2 * 1 / (2 + 1); nothing shared; only an article, so no word at all
    assert METRICS["record-f1"](answers, predictions) == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert METRICS["record-em"](answers, predictions) == pytest.approx((1 + 0 + 0 + 1) / 4)
    with pytest.raises(ValueError):
        METRICS["record-f1"](answers, predictions[:2])


def test_texts_are_compared_without_case_punctuation_and_articles():
    assert normalised("  The \"Times\",\tan A-team ") == "times ateam"
    assert normalised("theatre another") == "theatre another", "only whole words are articles"
    assert same("The Beatles!", "beatles") and not same("Beatles", "Beatle")
    assert token_f1("a b b", "b b c") == pytest.approx(2 * 2 / (2 + 3))  # the article of the first is gone


def test_a_metric_calls_its_function_with_groups_only_if_it_has_them():
    seen = []

    def compare(*given):
        seen.append(given)
        return np.float64(0.5)

    for grouped in (False, True):
        score = Metric(compare, grouped=grouped)([1], [0], [7])
        assert score == 0.5 and type(score) is float
    assert seen == [([1], [0]), ([1], [0], [7])]


def test_every_metric_is_for_a_known_kind_and_a_misspelt_one_is_named():
    assert {metric.kind for metric in METRICS.values()} == {"class", "number", "text"}
    assert [name for name, metric in METRICS.items() if metric.grouped] == ["em"]
    with pytest.raises(UnknownName, match="unknown metric 'spaerman'; did you mean 'spearman'"):
        METRICS["spaerman"]
