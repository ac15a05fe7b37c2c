"Metrics: those of scikit-learn and scipy, the cases where they have no answer, groups, texts."
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from s3pet_nb.core import UnknownName
from s3pet_nb.data.metric import METRICS, Metric, learned_nothing, normalised, one_answer, same, token_f1

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


def classes(n, positive, right, seed=0):
    "Labels with a share of class 1, and predictions with a share that is right whatever the class."
    draw = np.random.default_rng(seed)
    labels = (np.arange(n) < positive * n).astype(int)
    return labels, np.where(draw.random(n) < right, labels, 1 - labels)


@pytest.mark.parametrize(("name", "one"), [("accuracy", 0.7), ("f1", 2 * 0.7 / 1.7), ("matthews", 0.0)])
def test_what_one_class_for_every_row_scores(name, one):
    labels, _ = classes(200, 0.7, 1)
    assert one_answer(METRICS[name], labels) == pytest.approx(one)


@pytest.mark.parametrize("name", ["accuracy", "f1", "f1-macro", "matthews"])
def test_one_class_and_a_guess_say_nothing_and_what_is_mostly_right_does(name):
    labels, good = classes(300, 0.6, 0.92)
    guess = np.random.default_rng(1).permutation(labels)
    metric = METRICS[name]
    assert learned_nothing(metric, labels, np.ones(300, int)) == "one class"
    assert learned_nothing(metric, labels, np.full(300, -1)) == "one class", "no class at all"
    chance = "no better than chance" if name == "f1-macro" else "no better than one class"
    assert learned_nothing(metric, labels, guess) == chance
    assert learned_nothing(metric, labels, good) is None


def test_worse_than_one_class_is_no_better():
    labels, _ = classes(300, 0.6, 1)
    assert learned_nothing(METRICS["accuracy"], labels, 1 - labels) == "no better than one class"


@pytest.mark.parametrize("right", [0.5, 0.52, 0.54, 0.56, 0.58, 0.6])
def test_accuracy_says_something_where_the_binomial_interval_lies_above_the_majority(right):
    "400 rows, half of each class: the interval of scipy's binomial test, give or take a row."
    labels = np.arange(400) % 2
    predictions = np.where(np.arange(400) < round(400 * right), labels, 1 - labels)
    low = scipy.stats.binomtest(round(400 * right), 400).proportion_ci().low
    assert (learned_nothing(METRICS["accuracy"], labels, predictions) is None) == (low > 0.5)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_says_something_beyond_the_noise_of_its_rows(name):
    draw = np.random.default_rng(0)
    labels = draw.normal(size=150)
    assert learned_nothing(METRICS[name], labels, np.full(150, labels.mean())) == "one number"
    assert learned_nothing(METRICS[name], labels, draw.normal(size=150)) == "no better than one number"
    assert learned_nothing(METRICS[name], labels, -labels) == "no better than one number"
    assert learned_nothing(METRICS[name], labels, labels + draw.normal(size=150)) is None


@pytest.mark.parametrize("name", ["record-f1", "record-em"])
def test_texts_are_held_against_the_commonest_right_answer(name):
    answers = [["Paris", "the city"] if i % 4 == 0 else [f"name {i}"] for i in range(80)]
    right = [row[0] for row in answers]
    wrong = [f"other{i}" for i in range(80)]
    assert one_answer(METRICS[name], answers) >= 0.25
    assert learned_nothing(METRICS[name], answers, ["Paris"] * 80) == "one text"
    assert learned_nothing(METRICS[name], answers, wrong) == "no better than one text"
    assert learned_nothing(METRICS[name], answers, right) is None


def test_a_name_out_of_each_text_at_random_is_chance():
    "Ten names that are all common: any of them is right in a tenth of the rows, and so is a guess."
    draw = np.random.default_rng(0)
    answers = [[f"name{i % 10}"] for i in range(400)]
    guess = [f"name{k}" for k in draw.integers(0, 10, 400)]
    skewed = [row[0] if hit else "name0" for row, hit in zip(answers, draw.random(400) < 0.3)]
    verdict = learned_nothing(METRICS["record-em"], answers, guess)
    assert verdict.startswith("no better than") and learned_nothing(METRICS["record-em"], answers, skewed) is None


def test_groups_of_rows_are_drawn_whole():
    labels, groups = np.tile([0, 1], 120), np.repeat(np.arange(60), 4)
    half = np.where(np.isin(groups, np.arange(30)), labels, 1 - labels)
    assert learned_nothing(METRICS["em"], labels, half, groups) is None
    assert learned_nothing(METRICS["em"], labels, 1 - labels, groups) == "no better than one class"


def test_the_verdict_is_the_same_every_time_and_leaves_numpys_random_numbers_alone():
    labels, predictions = classes(120, 0.5, 0.62)
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    verdicts = {learned_nothing(METRICS["f1"], labels, predictions) for _ in range(2)}
    assert len(verdicts) == 1 and np.random.get_state()[1].tolist() == before


def test_one_row_and_labels_of_one_class_say_nothing():
    assert learned_nothing(METRICS["accuracy"], [1], [1]) == "one class"
    assert learned_nothing(METRICS["accuracy"], [1] * 9, [1] * 9) == "one class"
