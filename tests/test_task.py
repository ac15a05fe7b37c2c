"Tasks: the agreement sentences, split rules, the folder and the hub, batches for every family, scores."
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from s3pet_nb.agreement import SEEN, UNSEEN, agreement_rows
from s3pet_nb.core import UnknownName
from s3pet_nb.task import TASKS, Splits, Task, halves, loader, pearson, score


@pytest.fixture(scope="module")
def rows():
    return agreement_rows(seed=0)


def words(sentence):
    return sentence.lower().rstrip(".").split()


def write(folder, name, split, **columns):
    (folder / name).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / name / f"{split}.parquet")


def write_cola(folder, n_train=6, n_validation=7):
    for split, n in (("train", n_train), ("validation", n_validation)):
        write(folder, "glue/cola", split,
              sentence=[f"{split} {i}" for i in range(n)], label=[i % 2 for i in range(n)])


# ---- agreement

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
    assert vocabulary["test_unseen"] & UNSEEN.forms and not vocabulary["test_unseen"] & SEEN.forms
    assert vocabulary["train"] & SEEN.forms and not vocabulary["train"] & UNSEEN.forms
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
        split = sorted(word for word in lexicon.forms if len(tokenizer.tokenize(word)) > 1)
        assert len(split) <= 3, split


def test_agreement_sentences_are_short(rows, data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    lengths = [len(ids) for ids in tokenizer([row["sentence"] for row in rows["train"]])["input_ids"]]
    assert 6 <= min(lengths) and max(lengths) <= 16


# ---- splits

def test_head_and_sizes():
    splits = TASKS["agreement"].load()
    assert splits.head(n_train=400, n_eval=100).sizes == {
        "train": 400, "validation": 100, "test": 100, "test_unseen": 100}
    assert splits.head(n_eval=5_000).sizes == splits.sizes
    assert splits.head(n_train=8).train["sentence"][:] == splits.train["sentence"][:8]


def test_halve_rule(tmp_path):
    write_cola(tmp_path)
    splits = TASKS["glue/cola"].load(tmp_path, seed=0)
    assert splits.sizes == {"train": 6, "validation": 3, "test": 4}
    parts = [set(part["sentence"]) for _, part in splits.items()]
    assert parts[0] == {f"train {i}" for i in range(6)}
    assert parts[1] | parts[2] == {f"validation {i}" for i in range(7)}
    tests = {frozenset(TASKS["glue/cola"].load(tmp_path, seed=seed).test["sentence"]) for seed in range(5)}
    assert frozenset(parts[2]) in tests and len(tests) > 1


def test_carve_rule(tmp_path):
    for split, n in (("train", 2_100), ("validation", 50)):
        write(tmp_path, "glue/sst2", split, sentence=[f"{split} {i}" for i in range(n)], label=[0] * n)
    first, second = (TASKS["glue/sst2"].load(tmp_path, seed=seed) for seed in (0, 1))
    assert first.sizes == {"train": 100, "validation": 2_000, "test": 50}
    carved = set(first.train["sentence"]), set(first.validation["sentence"])
    assert carved[0] | carved[1] == {f"train {i}" for i in range(2_100)} and not carved[0] & carved[1]
    assert set(first.train["sentence"]) != set(second.train["sentence"])
    assert first.test["sentence"][:] == [f"validation {i}" for i in range(50)]


def test_carving_needs_more_rows_than_it_takes(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, "glue/sst2", split, sentence=["a"] * 100, label=[0] * 100)
    with pytest.raises(ValueError, match="2,000 training rows are to validate; there are only 100"):
        TASKS["glue/sst2"].load(tmp_path)


def test_halves_are_equal_and_disjoint():
    train = Dataset.from_dict({"row": range(101)})
    d_delta, d_alpha = (set(half["row"]) for half in halves(train, seed=0))
    assert len(d_delta) == len(d_alpha) == 50 and not d_delta & d_alpha
    assert set(halves(train, seed=1)[0]["row"]) != d_delta


# ---- the hub

def write_hub(folder):
    "A dataset repository as the hub has it: configurations named in the front matter of its README."
    parts = {("cola", "train"): 6, ("cola", "validation"): 7, ("cola", "test"): 3,
             ("mnli", "train"): 2_010, ("mnli", "validation_matched"): 5,
             ("mnli", "validation_mismatched"): 4}
    front = ["---", "configs:"]
    for config in ("cola", "mnli"):
        front += [f"- config_name: {config}", "  data_files:"]
        for (name, split), n in parts.items():
            if name == config:
                front += [f"  - split: {split}", f"    path: {config}/{split}-*"]
                texts = ("sentence",) if config == "cola" else ("premise", "hypothesis")
                columns = {text: [f"{text} {split} {i}" for i in range(n)] for text in texts}
                (folder / config).mkdir(parents=True, exist_ok=True)
                label = [-1] * n if split == "test" else [i % 2 for i in range(n)]
                frame = pd.DataFrame({**columns, "label": label})
                frame.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*front, "---", ""]))


def test_the_hub_path_reads_configurations(tmp_path, monkeypatch):
    "`load_dataset` takes nyu-mll/glue from the working directory where a repository of that name lies there."
    write_hub(tmp_path / "nyu-mll" / "glue")
    monkeypatch.chdir(tmp_path)
    cola, mnli = TASKS["glue/cola"].load(), TASKS["glue/mnli"].load()
    assert cola.sizes == {"train": 6, "validation": 3, "test": 4}
    assert mnli.sizes == {"train": 10, "validation": 2_000, "test": 5}
    assert mnli.test["premise"][0] == "premise validation_matched 0"


def test_hub_and_folder_give_the_same_splits(tmp_path, monkeypatch):
    repo = tmp_path / "nyu-mll" / "glue"
    write_hub(repo)
    for split in ("train", "validation"):
        frame = pd.read_parquet(repo / "cola" / f"{split}-00000-of-00001.parquet")
        write(tmp_path / "data", "glue/cola", split, **frame.to_dict("list"))
    monkeypatch.chdir(tmp_path)
    hub, folder = TASKS["glue/cola"].load(seed=3), TASKS["glue/cola"].load("data", seed=3)
    for split, part in hub.items():
        assert part["sentence"][:] == getattr(folder, split)["sentence"][:]


def test_offline_hub_names_the_folder_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        TASKS["superglue/cb"].load()
    assert "\n" not in str(error.value)
    for part in ("'aps/super_glue', 'cb'", "--data-dir", "superglue/cb/train.parquet",
                 "superglue/cb/validation.parquet"):
        assert part in str(error.value)


def test_unreachable_hub_is_asked_once(tmp_path):
    "Nothing listens on port 9; the loader alone would retry five times and print each."
    code = "from s3pet_nb.task import TASKS\nTASKS['glue/mnli'].load()"
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path),
                        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Retrying" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError")
    assert "--data-dir" in last and "validation_matched.parquet" in last


# ---- bad input

def test_unknown_task_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'glue/mrpc'"):
        TASKS["glue/mprc"]


@pytest.mark.parametrize("wrong", [{"metric": "acuracy"}, {"rule": "half"}])
def test_unknown_metric_and_rule_are_refused_when_the_task_is_written(wrong):
    with pytest.raises(UnknownName, match="did you mean"):
        replace(TASKS["glue/cola"], **wrong)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder .*absent.*glue/cola/train.parquet"):
        TASKS["glue/cola"].load(tmp_path / "absent")
    write(tmp_path, "glue/cola", "train", sentence=["a"], label=[0])
    with pytest.raises(FileNotFoundError, match="no file .*cola/validation.parquet"):
        TASKS["glue/cola"].load(tmp_path)


def test_missing_column_names_those_that_are_there(tmp_path):
    write_cola(tmp_path)
    write(tmp_path, "glue/cola", "validation", text=["a", "b"], target=[0, 1])
    with pytest.raises(ValueError, match="validation of .* no column sentence, label; it has text, target"):
        TASKS["glue/cola"].load(tmp_path)


@pytest.mark.parametrize("label", [2, -1, "yes", None])
def test_label_out_of_range_names_value_and_row(tmp_path, label):
    write_cola(tmp_path)
    labels = [label] * 3 if isinstance(label, str) else [0, 1, label]
    write(tmp_path, "glue/cola", "train", sentence=["a", "b", "c"], label=labels)
    with pytest.raises(ValueError,
                       match=r"label .* in row \d of train of .* out of range; allowed is 0 … 1"):
        TASKS["glue/cola"].load(tmp_path)


@pytest.mark.parametrize("label", [5.5, float("nan")])
def test_regression_label_out_of_range(tmp_path, label):
    for split in ("train", "validation"):
        write(tmp_path, "glue/stsb", split, sentence1=["a", "b"], sentence2=["c", "d"], label=[5.0, label])
    with pytest.raises(ValueError, match="in row 1 of train of .* is out of range; allowed is 0 … 5"):
        TASKS["glue/stsb"].load(tmp_path)


def test_empty_file_and_empty_half(tmp_path):
    write_cola(tmp_path, n_validation=1)
    with pytest.raises(ValueError, match="validation of glue/cola is empty"):
        TASKS["glue/cola"].load(tmp_path)
    write(tmp_path, "glue/cola", "train", sentence=[], label=[])
    with pytest.raises(ValueError, match="train.parquet' is empty"):
        TASKS["glue/cola"].load(tmp_path)


def test_a_file_that_is_no_parquet(tmp_path):
    write_cola(tmp_path)
    (tmp_path / "glue/cola/train.parquet").write_text("sentence,label\n")
    with pytest.raises(ValueError, match="train.parquet' cannot be read as parquet"):
        TASKS["glue/cola"].load(tmp_path)


# ---- batches

VOCABULARY = ["<pad>", "<unk>", "</s>", ".", *"the a king queen boy girl sleeps sings near saw".split()]


def word_tokenizer(pad=True):
    "A tokenizer of whole words that ends every text with </s>, as T5's does."
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>" if pad else None,
                                   model_input_names=["input_ids", "attention_mask"])


SIZE = {"vocab_size": 14, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "pad_token_id": 0}
MODELS = {
    "bert": lambda n: BertForSequenceClassification(BertConfig(**SIZE, num_labels=n)),
    "roberta": lambda n: RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=n)),
    "t5": lambda n: T5ForSequenceClassification(T5Config(
        vocab_size=14, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=n, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0)),
    "gpt2": lambda n: GPT2ForSequenceClassification(GPT2Config(
        vocab_size=14, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=n, pad_token_id=0)),
    "llama": lambda n: LlamaForSequenceClassification(LlamaConfig(**SIZE, num_labels=n)),
}
SENTENCES = ["the king sleeps .", "a queen", "the boy near the girl sings .", "a boy saw ."]
ROWS = Dataset.from_dict({"sentence": SENTENCES * 5,
                          "other": ["the girl .", "a king saw the queen ."] * 10,
                          "word": ["king", "saw"] * 10,
                          "label": [0, 1, 2, 1] * 5})
SINGLE = Task("single", ("sentence",), ("x", "y", "z"))
TRIPLE = Task("triple", ("word", "sentence", "other"), ("x", "y", "z"))
REGRESSION = Task("regression", ("sentence", "other"), metric="pearson")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("task", [SINGLE, TRIPLE, REGRESSION], ids=lambda task: task.name)
def test_batches_and_score_for_every_family(family, task):
    torch.manual_seed(0)
    model = MODELS[family](task.n_labels).train()
    batches = loader(ROWS, task, word_tokenizer(), batch_size=8)
    for batch in batches:
        loss = model(**batch).loss
        assert loss.ndim == 0 and torch.isfinite(loss)
    assert -1 <= score(model, batches, task) <= 1
    assert model.training


def test_labels_of_a_regression_are_floats_even_when_read_as_integers():
    batch = next(iter(loader(ROWS, REGRESSION, word_tokenizer(), batch_size=4)))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0, 1, 2, 1]
    assert next(iter(loader(ROWS, SINGLE, word_tokenizer())))["labels"].dtype == torch.int64


def test_the_last_text_is_the_second_and_the_others_are_joined():
    tokenizer = word_tokenizer()
    first = next(iter(loader(ROWS, TRIPLE, tokenizer, batch_size=1)))["input_ids"][0]
    expected = [VOCABULARY.index(word) if word in VOCABULARY else 1
                for word in "king : the king sleeps . the girl . </s>".split()]
    assert first.tolist() == expected


def test_batches_are_padded_to_their_own_longest_row_and_cut():
    def widths(**options):
        batches = loader(ROWS.take(4), SINGLE, word_tokenizer(), batch_size=2, **options)
        return [batch["input_ids"].shape[1] for batch in batches]

    assert widths() == [5, 8]
    assert widths(max_length=4) == [4, 4]


def test_order_follows_the_seed():
    def passes(seed):
        batches = loader(ROWS, SINGLE,
                         word_tokenizer(), batch_size=8, seed=seed)
        return [[batch["input_ids"].tolist() for batch in batches] for _ in range(2)]

    assert passes(1) == passes(1) != passes(2)
    first, second = passes(1)
    assert first != second and len(first) == 2  # 20 rows, batches of 8: the last 4 wait
    assert len(loader(ROWS, SINGLE, word_tokenizer(), batch_size=8)) == 3
    assert len(loader(ROWS.take(5), SINGLE, word_tokenizer(), batch_size=8, seed=0)) == 1


def test_iterating_a_loader_leaves_the_global_noise_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for seed in (None, 1):
        list(loader(ROWS, SINGLE, word_tokenizer(), seed=seed))
    assert torch.rand(1) == expected


def test_a_tokenizer_without_padding_is_refused():
    with pytest.raises(ValueError, match="no padding token"):
        loader(ROWS, SINGLE, word_tokenizer(pad=False))


def test_progress_bars_stay_as_they_were(capfd):
    datasets.enable_progress_bars()
    loader(ROWS, SINGLE, word_tokenizer())
    assert not datasets.are_progress_bars_disabled() and "Map" not in capfd.readouterr().err


# ---- score

class Fixed(torch.nn.Module):
    "Gives the logits that it was built with, row after row, and records the mode of its part."
    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.part = torch.nn.Linear(1, 1)
        self.modes = []

    def forward(self, **batch):
        n = len(batch["input_ids"])
        here, self.logits = self.logits[:n], self.logits[n:]
        self.modes.append(self.part.training)
        return SimpleNamespace(logits=here)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.75), ("f1", 2 / 3), ("matthews", 3 ** -0.5)])
def test_scores_by_hand(metric, expected):
    "Labels 0 1 0 1 and predictions 0 1 0 0: three right, precision 1, recall 1/2."
    rows = Dataset.from_dict({"sentence": ["a"] * 4, "label": [0, 1, 0, 1]})
    model = Fixed(torch.eye(2)[[0, 1, 0, 0]])
    task = Task("t", ("sentence",), ("x", "y"), metric)
    assert score(model, loader(rows, task, word_tokenizer(), batch_size=3), task) == pytest.approx(expected)


def test_pearson_of_a_regression_and_of_a_constant():
    rows = Dataset.from_dict({"sentence": ["a"] * 4, "other": ["a"] * 4, "label": [1.0, 2.0, 3.0, 5.0]})
    batches = loader(rows, REGRESSION, word_tokenizer(), batch_size=3)
    model = Fixed(torch.tensor([[1.0], [2.0], [2.0], [4.0]]))
    assert score(model, batches, REGRESSION) == pytest.approx(np.corrcoef([1, 2, 3, 5], [1, 2, 2, 4])[0, 1])
    with pytest.warns(UserWarning, match="taken as 0"):
        assert score(Fixed(torch.zeros(4, 1)), batches, REGRESSION) == 0
    assert pearson(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == pytest.approx(-1)


def test_score_restores_the_mode_of_every_part():
    rows = Dataset.from_dict({"sentence": ["a"] * 4, "label": [0, 1, 0, 1]})
    task = Task("t", ("sentence",), ("x", "y"))
    model = Fixed(torch.eye(2)[[0, 1, 0, 0]]).train()
    model.part.eval()
    score(model, loader(rows, task, word_tokenizer()), task)
    assert model.training and not model.part.training
    model = Fixed(torch.eye(2)[[0, 1, 0, 0]]).eval()
    model.part.train()
    score(model, loader(rows, task, word_tokenizer()), task)
    assert not model.training and model.part.training and model.modes == [False]


def test_a_generated_task_needs_no_folder():
    made = {split: [{"line": f"{split} {i}", "label": i % 2} for i in range(4)]
            for split in ("train", "validation", "test", "test_far")}
    splits = Task("made", ("line",), ("x", "y"), make=lambda seed: made).load()
    assert isinstance(splits, Splits) and list(splits.extra) == ["test_far"] and splits.sizes["test_far"] == 4


# ---- real data

SIZES = {
    "glue/cola": (8_551, 521, 522), "glue/mrpc": (3_668, 204, 204), "glue/rte": (2_490, 138, 139),
    "glue/stsb": (5_749, 750, 750), "glue/mnli": (6_999, 2_000, 9_815), "glue/qqp": (6_999, 2_000, 1_000),
    "superglue/boolq": (1_000, 1_635, 1_635), "superglue/cb": (250, 28, 28),
    "superglue/rte": (2_490, 138, 139),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_tasks_have_their_rows_and_share_none(name, data_dir: Path):
    task = TASKS[name]
    splits = task.load(data_dir, seed=0)
    assert tuple(splits.sizes.values()) == SIZES[name]
    train, validation, test = (set(part["idx"]) for _, part in splits.items())
    assert (len(train), len(validation), len(test)) == SIZES[name]
    assert not validation & (train if task.rule == "carve" else test)
    assert set(task.load(data_dir, seed=1).validation["idx"]) != set(splits.validation["idx"])


@pytest.mark.parametrize("name", SIZES)
def test_real_label_names_are_those_of_the_files(name, data_dir: Path):
    task = TASKS[name]
    label = task.load(data_dir).train.features["label"]
    assert tuple(getattr(label, "names", ())) == task.labels


def test_real_pairs_become_two_segments(data_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    task = TASKS["superglue/boolq"]
    batch = next(iter(loader(task.load(data_dir).train.take(32), task, tokenizer, seed=0)))
    assert batch["input_ids"].shape == (16, 256)
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
