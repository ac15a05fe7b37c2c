"The agreement sentences: sizes, balance, what the words tell, what agrees, the squares they are made of."
import random
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer

from s3pet_nb.data.agreement import PHENOMENA, SEEN, UNSEEN, Square, agreement_rows, table
from s3pet_nb.data.rows import halves
from s3pet_nb.data.task import TASKS


@pytest.fixture(scope="module")
def rows():
    return agreement_rows(seed=0)


def words(sentence):
    return sentence.lower().rstrip(".").split()


def forms(lexicon):
    "Every form of every noun and verb."
    return {form for part in (lexicon.persons, lexicon.things, lexicon.verbs, lexicon.acts)
            for lemma in part for form in lemma}


def test_agreement_sizes_balance_and_seed(rows):
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 12_000, "validation": 1_000, "test": 1_000, "test_unseen": 1_000}
    for part in rows.values():
        assert sum(row["label"] for row in part) * 2 == len(part)
    assert agreement_rows(seed=0) == rows
    assert agreement_rows(seed=1)["test"] != rows["test"]


def test_agreement_shares_no_sentence(rows):
    sentences = [row["sentence"] for part in rows.values() for row in part]
    assert len(set(sentences)) == len(sentences)


def test_the_rows_of_a_square_stay_in_one_half():
    splits = TASKS["agreement"].load(seed=3).head(330)
    parts = halves(splits.train, 3, splits.key)
    squares = [set(part["square"]) for part in parts]
    assert squares[0].isdisjoint(squares[1])
    assert [len(part) for part in parts] == [164, 164]
    assert all(count == 4 for part in parts for count in Counter(part["square"]).values())


def test_a_square_has_a_number_of_its_own(rows):
    squares = {row["square"]: [] for part in rows.values() for row in part}
    for part in rows.values():
        for row in part:
            squares[row["square"]].append((row["label"], row["phenomenon"]))
    assert len(squares) == 15_000 // 4
    assert all(sorted(label for label, _ in four) == [0, 0, 1, 1] and len({name for _, name in four}) == 1
               for four in squares.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_words_are_as_frequent_in_both_labels(seed):
    for part in agreement_rows(seed).values():
        counts = [Counter(word for row in part if row["label"] == label for word in words(row["sentence"]))
                  for label in (0, 1)]
        assert counts[0] == counts[1]


def test_agreement_first_rows_hold_every_kind(rows):
    shares = Counter((row["phenomenon"], row["distractors"]) for row in rows["train"][:1600])
    assert shares == {(phenomenon, distractors): weight * n
                      for phenomenon, weight in (("reflexive", 2), ("subject-verb", 1),
                                                 ("determiner-noun", 1))
                      for distractors, n in ((0, 280), (1, 80), (2, 40))}


def test_agreement_unseen_words(rows):
    vocabulary = {split: {word for row in part for word in words(row["sentence"])}
                  for split, part in rows.items()}
    assert vocabulary["test_unseen"] & forms(UNSEEN) and not vocabulary["test_unseen"] & forms(SEEN)
    assert vocabulary["train"] & forms(SEEN) and not vocabulary["train"] & forms(UNSEEN)
    assert vocabulary["test"] <= vocabulary["train"]


def test_agreement_acceptable_sentences_agree(rows):
    "The rule is checked on the sentences themselves, from the word tables, apart from how they were made."
    singular = {lemma[0] for lemma in SEEN.persons}
    verbs = {lemma[1]: True for lemma in SEEN.verbs} | {lemma[0]: False for lemma in SEEN.verbs}
    seen = 0
    for row in rows["train"]:
        if row["phenomenon"] == "subject-verb":
            text = words(row["sentence"])
            verb = next(word for word in reversed(text) if word in verbs)
            assert (verbs[verb] == (text[1] in singular)) == bool(row["label"])
            seen += 1
    assert seen == 3_000


def test_counting_words_teaches_nothing(rows):
    def accuracy(longest, part):
        model = make_pipeline(CountVectorizer(ngram_range=(1, longest), token_pattern=r"\w+"),
                              LogisticRegression(max_iter=1000))
        model.fit([row["sentence"] for row in rows["train"]], [row["label"] for row in rows["train"]])
        return model.score([row["sentence"] for row in part], [row["label"] for row in part])

    assert accuracy(1, rows["test"]) < 0.6
    assert accuracy(3, [row for row in rows["test"] if row["distractors"]]) < 0.6
    assert accuracy(3, [row for row in rows["test"] if not row["distractors"]]) > 0.8  # it does learn


def test_agreement_words_are_single_tokens(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    for lexicon in (SEEN, UNSEEN):
        split = sorted(word for word in forms(lexicon) if len(tokenizer.tokenize(word)) > 1)
        assert len(split) <= 3, split


def test_agreement_sentences_are_short(rows, data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    lengths = [len(ids) for ids in tokenizer([row["sentence"] for row in rows["train"]])["input_ids"]]
    assert 6 <= min(lengths) and max(lengths) <= 16


def test_a_table_is_read_lemma_by_lemma():
    assert table("man men, see sees\n  saw") == (("man", "men"), ("see", "sees", "saw"))


def test_two_of_four_fillings_of_a_square_agree():
    square = Square("the {a} {b} today", ("king", "kings"), ("laughs", "laugh"))
    assert list(square.rows()) == [("The king laughs today.", 1), ("The king laugh today.", 0),
                                   ("The kings laughs today.", 0), ("The kings laugh today.", 1)]


@pytest.mark.parametrize("name", PHENOMENA)
@pytest.mark.parametrize("distractors", [0, 1, 2])
def test_every_phenomenon_fills_both_places_apart(name, distractors):
    "Between the places stand only words of the frame: none for no phrase, more for more phrases."
    for seed in range(20):
        square = PHENOMENA[name](SEEN, distractors, random.Random(seed))
        assert square == PHENOMENA[name](SEEN, distractors, random.Random(seed))
        between = square.frame.partition("{a}")[2].partition("{b}")[0].split()
        verb = name == "reflexive"
        assert len(between) == verb if not distractors else len(between) >= 2 * distractors
        assert len({text for text, _ in square.rows()}) == 4
