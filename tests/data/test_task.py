"Tasks: rows in the columns of the hub, labels, folders, rows of one's own, broken input."
import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tables import FRAME, ROWS, save, text

from s3pet_nb.core import UnknownName
from s3pet_nb.data.metric import METRICS
from s3pet_nb.data.rows import FILES, Splits
from s3pet_nb.data.task import TASKS, Task, copa_pairs, find_task, marked_spans
from s3pet_nb.learn.protocol import PROTOCOLS


def write(folder, name, split, **columns):
    (folder / name).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / name / f"{split}.parquet")


def write_cola(folder, n_train=6, n_validation=7):
    for split, n in (("train", n_train), ("validation", n_validation)):
        write(folder, "glue/cola", split,
              sentence=[f"{split} {i}" for i in range(n)], label=[i % 2 for i in range(n)])


# ---- splits

def test_head_and_sizes():
    splits = TASKS["agreement"].load()
    assert splits.head(n_train=400, n_eval=100).sizes == {
        "train": 400, "validation": 100, "test": 100, "test_unseen": 100}
    assert splits.head(n_eval=5_000).sizes == splits.sizes
    assert splits.head(n_train=8).train["sentence"][:] == splits.train["sentence"][:8]
    assert splits.head(n_train=8).key == splits.key == ("square",)


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


# ---- every row of TASKS, in the hub's columns

IDX = np.arange(8, dtype="int32")
ENTITIES = [["Anna", f"Bob {i}"] for i in range(8)]
HUB_ROWS = {
    "glue/cola": {"sentence": text("s")}, "glue/sst2": {"sentence": text("s")},
    "glue/mrpc": {"sentence1": text("a"), "sentence2": text("b")},
    "glue/qqp": {"question1": text("a"), "question2": text("b")},
    "glue/stsb": {"sentence1": text("a"), "sentence2": text("b"),
                  "label": np.array([0, 5, 2.5, 3.8, 1, 1, 4.75, 2], "float32")},
    "glue/mnli": {"premise": text("a"), "hypothesis": text("b")},
    "glue/qnli": {"question": text("a"), "sentence": text("b")},
    "glue/rte": {"sentence1": text("a"), "sentence2": text("b")},
    "glue/wnli": {"sentence1": text("a"), "sentence2": text("b")},
    "superglue/boolq": {"question": text("a"), "passage": text("b")},
    "superglue/cb": {"premise": text("a"), "hypothesis": text("b")},
    "superglue/copa": {"premise": text("a"), "choice1": text("b"), "choice2": text("c"),
                       "question": ["cause", "effect"] * 4},
    "superglue/multirc": {"paragraph": [f"p {i // 4}" for i in range(8)],
                          "question": [f"q {i // 2}" for i in range(8)], "answer": text("a"),
                          "idx": [{"paragraph": i // 4, "question": i // 2, "answer": i} for i in range(8)]},
    "superglue/record": {"passage": [f"It rained {i}.\n@highlight\nIt stopped" for i in range(8)],
                         "query": [f"@placeholder slept {i}" for i in range(8)], "entities": ENTITIES,
                         "answers": [words[1:] for words in ENTITIES],
                         "idx": [{"passage": i, "query": i} for i in range(8)], "label": None},
    "superglue/rte": {"premise": text("a"), "hypothesis": text("b")},
    "superglue/wic": {"word": text("w"), "sentence1": text("a"), "sentence2": text("b"),
                      "start1": IDX, "start2": IDX, "end1": IDX + 1, "end2": IDX + 1},
    "superglue/wsc": {"text": [f"Anna told Bob {i} that she left ." for i in range(8)],
                      "span1_index": IDX * 0, "span2_index": IDX * 0 + 5,
                      "span1_text": ["Anna"] * 8, "span2_text": ["she"] * 8},
}


def write_hub_rows(folder, task, split, n):
    "`n` rows in the hub's columns; no text is twice or in another split."
    columns = {"idx": np.arange(8), "label": [i % max(len(task.labels), 1) for i in range(8)]}
    frame = pd.DataFrame({name: values for name, values in (columns | HUB_ROWS[task.name]).items()
                          if values is not None})
    frame = pd.concat([frame] * -(-n // 8), ignore_index=True).head(n)
    first = (task.group or task.texts)[0]
    frame[first] = [f"{value} in {split} {i // 8}" for i, value in enumerate(frame[first])]
    write(folder, task.name, split, **frame.to_dict("series"))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_the_hubs_columns(name, tmp_path):
    task = TASKS[name]
    if not task.make:
        write_hub_rows(tmp_path, task, "train", 2_016 if task.rule == "carve" else 24)
        write_hub_rows(tmp_path, task, task.held_out, 16)
    splits = task.load(tmp_path, seed=0)
    if not task.make:
        assert splits.sizes == ({"train": 16, "validation": 2_000, "test": 16} if task.rule == "carve" else
                                {"train": 24, "validation": 8, "test": 8})
    assert splits.key == (task.group or task.texts)
    assert set(splits.shared.values()) == {0}
    for _, rows in splits.items():
        for row in rows.take(8).to_list():
            assert all(isinstance(row[column], list if column == task.entities else str)
                       for column in task.texts)
            if task.kind == "class":
                assert row[task.label] in range(len(task.labels))
            elif task.kind == "number":
                assert task.bounds[0] <= row[task.label] <= task.bounds[1]
            else:
                assert row[task.label] and set(row[task.label]) <= set(row[task.entities])
            if task.choices:
                pairs = task.choices(row)
                assert len(pairs) == len(row[task.entities] if task.entities else task.label_words)
                assert all(isinstance(part, str) for pair in pairs for part in pair)
    assert {METRICS[metric].kind for metric in (task.metric, *task.beside)} == {task.kind}
    assert task.short == name.split("/")[-1]
    words = {"text": 0, "class": len(task.labels), "number": 26}[task.kind]
    assert len(set(task.label_words)) == len(task.label_words) == words


def test_the_metrics_are_those_of_table_4():
    named = {"CoLA": "matthews", "SST2": "accuracy", "MRPC": "f1", "QQP": "f1", "STSB": "pearson",
             "MNLI": "accuracy", "QNLI": "accuracy", "BoolQ": "accuracy", "CB": "accuracy",
             "COPA": "accuracy", "MultiRC": "f1", "ReCoRD": "record-f1", "RTE": "accuracy", "WiC": "accuracy"}
    rows = {task.short: task for task in TASKS.values()}
    assert {name: rows[name.lower()].metric for name in named} == named
    lengths = {name: (task.max_length, task.batch_size) for name, task in TASKS.items()}
    assert {lengths[name] for name in lengths if name.startswith("glue/")} == {(128, 32)}
    assert lengths.pop("superglue/record") == (512, 8)
    assert {lengths[name] for name in lengths if name.startswith("superglue/")} == {(256, 16)}
    assert {name for name, task in TASKS.items() if task.rule == "carve"} == {
        "glue/qqp", "glue/qnli", "superglue/record", "glue/sst2", "glue/mnli"}


HUB = {  # configuration, and the labels in their order, as nyu-mll/glue and aps/super_glue have them
    "glue/cola": ("cola", "unacceptable acceptable"), "glue/sst2": ("sst2", "negative positive"),
    "glue/mrpc": ("mrpc", "not_equivalent equivalent"), "glue/qqp": ("qqp", "not_duplicate duplicate"),
    "glue/stsb": ("stsb", ""), "glue/mnli": ("mnli", "entailment neutral contradiction"),
    "glue/qnli": ("qnli", "entailment not_entailment"), "glue/rte": ("rte", "entailment not_entailment"),
    "glue/wnli": ("wnli", "not_entailment entailment"), "superglue/boolq": ("boolq", "False True"),
    "superglue/cb": ("cb", "entailment contradiction neutral"), "superglue/copa": ("copa", "choice1 choice2"),
    "superglue/multirc": ("multirc", "False True"), "superglue/record": ("record", ""),
    "superglue/rte": ("rte", "entailment not_entailment"), "superglue/wic": ("wic", "False True"),
    "superglue/wsc": ("wsc.fixed", "False True")}
BESIDE = {"glue/mrpc": "accuracy", "glue/qqp": "accuracy", "glue/stsb": "spearman", "superglue/cb": "f1-macro",
          "superglue/multirc": "em", "superglue/record": "record-em"}


def test_configurations_and_labels_are_the_hubs():
    tasks = {name: task for name, task in TASKS.items() if not task.make}
    assert {name: (task.config, " ".join(task.labels)) for name, task in tasks.items()} == HUB
    assert {name: task.hub for name, task in tasks.items()} == {
        name: "nyu-mll/glue" if name.startswith("glue/") else "aps/super_glue" for name in HUB}
    assert {name: task.beside for name, task in tasks.items() if task.beside} == {
        name: (metric,) for name, metric in BESIDE.items()}


TABLE_3 = """cola 32 15 100 15 100 | mnli 32 1 200 3 500 | mrpc 32 20 50 20 50 | qnli 32 4 200 4 200
qqp 32 1 200 3 500 | sst2 32 5 150 5 150 | stsb 32 40 100 40 100 | boolq 16 15 200 15 200 | cb 16 60 20 60 20
copa 16 40 20 40 20 | multirc 16 5 200 10 200 | record 8 1 200 1 200 | rte 16 20 50 40 50
wic 16 20 100 20 100""".replace("\n", " | ")


def test_the_protocol_is_table_3():
    protocol, rows = PROTOCOLS["s3pet"], (row.split() for row in TABLE_3.split(" | "))
    table = {f"{'glue' if int(batch) == 32 else 'superglue'}/{name}": (int(batch), *map(int, numbers))
             for name, batch, *numbers in rows}
    assert len(table) == 14
    for name, row in table.items():
        search, retrain = protocol.search[name], protocol.retrain[name]
        assert (TASKS[name].batch_size, search.epochs, search.every, retrain.epochs, retrain.every) == row
    for name, like in {"glue/rte": "rte", "glue/wnli": "rte", "superglue/wsc": "wic"}.items():
        assert protocol.retrain[name] == protocol.retrain[f"superglue/{like}"]


def test_a_papers_rule_is_for_its_own_tasks():
    rules = [PROTOCOLS[name].split_rule(task) for name in ("s3pet", "lawton")
             for task in ("glue/rte", "superglue/cb", "reviews")]
    assert rules == [None, None, None, "official", None, None]


def test_label_words():
    grid = TASKS["glue/stsb"].label_words
    assert grid[:2] == ("0.0", "0.2") and grid[-1] == "5.0"
    assert TASKS["superglue/copa"].label_words == ("choice1", "choice2")
    assert replace(TASKS["glue/cola"], words=("no", "yes")).label_words == ("no", "yes")
    fine = Task("t", ("a",), metric="pearson", bounds=(-0.00002, 0.00001), step=0.00001)
    assert fine.label_words == ("-0.00002", "-0.00001", "0.00000", "0.00001")
    assert Task("t", ("a",), metric="pearson").label_words == ()


def test_wsc_marks_its_spans(tmp_path):
    for split in ("train", "validation"):
        write_hub_rows(tmp_path, TASKS["superglue/wsc"], split, 8)
    texts = TASKS["superglue/wsc"].load(tmp_path).train["text"][:]
    assert "* Anna * told Bob 3 that # she # left . in train 0" in texts
    row = {"text": "He (really) saw the man. He left.", "span1_text": "the man", "span1_index": 3,
           "span2_text": "He", "span2_index": 5}
    assert marked_spans(row)["text"] == "He (really) saw * the man *. # He # left."
    swapped = row | {"span1_text": "He left", "span1_index": 5, "span2_text": "(really)", "span2_index": 1}
    assert marked_spans(swapped)["text"] == "He # (really) # saw the man. * He left *."
    astray = row | {"span1_index": 9, "span2_index": 0}
    assert marked_spans(astray)["text"] == "# He # (really) saw the man. He left."


def test_record_rows(tmp_path):
    task = TASKS["superglue/record"]
    row = {"passage": "It rained.\n@highlight\nIt stopped\n@highlight\nAll slept",
           "query": "@placeholder slept", "entities": ["Anna", "Bob"], "answers": ["Bob"]}
    plain = task.prepare(row)
    assert plain["passage"] == "It rained. It stopped. All slept"
    assert task.choices(plain) == [("Anna slept", plain["passage"]), ("Bob slept", plain["passage"])]
    for asked, sentence in (("effect", "What happened as a result?"), ("cause", "What was the cause?")):
        assert copa_pairs({"premise": "It fell.", "question": asked, "choice1": "x", "choice2": "y"}) == [
            (f"It fell. {sentence}", "x"), (f"It fell. {sentence}", "y")]
    for end in ".?!\"'":
        assert task.prepare(row | {"passage": f"Why{end}\n@highlight\nSo"})["passage"] == f"Why{end} So"


def test_multirc_keeps_the_answers_of_a_question_together(tmp_path):
    task = TASKS["superglue/multirc"]
    for split in ("train", "validation"):
        write_hub_rows(tmp_path, task, split, 80)
    for seed in range(3):
        splits = task.load(tmp_path, seed=seed)
        questions = [set(zip(rows["paragraph"], rows["question"])) for _, rows in splits.items()]
        assert not questions[1] & questions[2] and len(splits.validation) == 40


# ---- rows that are twice

def test_duplicates_stay_in_one_split_and_shared_rows_are_counted(tmp_path):
    held_out = [f"v {i // 2}" for i in range(40)]
    write(tmp_path, "glue/cola", "train", sentence=["v 0", "v 1", *text("t", 20)], label=[0] * 22)
    write(tmp_path, "glue/cola", "validation", sentence=held_out, label=[1] * 40)
    for seed in range(5):
        splits = TASKS["glue/cola"].load(tmp_path, seed=seed)
        validation, test = splits.validation["sentence"][:], splits.test["sentence"][:]
        assert not set(validation) & set(test) and sorted(validation + test) == sorted(held_out)
        assert splits.shared == {"validation": sum(line in ("v 0", "v 1") for line in validation),
                                 "test": sum(line in ("v 0", "v 1") for line in test)}
        assert sum(splits.shared.values()) == 4
    whole = TASKS["glue/cola"].load(tmp_path, rule="official")
    assert whole.shared == {"validation": 4, "test": 4}


# ---- kinds of file

@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    task = Task.of(save(FRAME, tmp_path / f"tone.{kind}"))
    assert (task.name, task.texts, task.labels) == ("tone", ("line",), ("None", "calm", "loud"))
    assert (task.metric, task.rule, task.kind) == ("accuracy", "tenths", "class")
    splits, expected = task.load(seed=3), Task.of(FRAME).load(seed=3)
    assert splits.sizes == {"train": 16, "validation": 2, "test": 2}
    for (_, rows), (_, same) in zip(splits.items(), expected.items()):
        assert rows.to_list() == same.to_list()
        assert {row["label"] for row in rows} <= {0, 1, 2}
    assert sorted(line for _, rows in splits.items() for line in rows["line"]) == sorted(FRAME.line)


@pytest.mark.parametrize("kind", FILES)
def test_a_data_folder_may_hold_every_kind_of_file(kind, tmp_path):
    (tmp_path / "glue/cola").mkdir(parents=True)
    for split in ("train", "validation"):
        frame = pd.DataFrame({"sentence": ["1984", *text(split, 11)], "label": [0, 1] * 6, "idx": range(12)})
        save(frame, tmp_path / f"glue/cola/{split}.{kind}")
    splits = TASKS["glue/cola"].load(tmp_path)
    assert splits.sizes == {"train": 12, "validation": 6, "test": 6} and sum(splits.shared.values()) == 1
    assert splits.train.features["label"].dtype == "int64" and "1984" in splits.train["sentence"]
    with open(tmp_path / "glue/cola/train.txt", "w"):
        assert TASKS["glue/cola"].load(tmp_path).sizes == splits.sizes
    other = "csv" if kind != "csv" else "tsv"
    save(pd.DataFrame({"sentence": ["a"], "label": [0]}), tmp_path / f"glue/cola/train.{other}")
    with pytest.raises(ValueError, match=r"holds train\.\w+ and train\.\w+; keep one file"):
        TASKS["glue/cola"].load(tmp_path)


# ---- tasks of one's own

def test_one_line_takes_every_kind_of_source(tmp_path):
    frame = ROWS.to_pandas()
    for split in ("train", "dev"):
        save(frame, tmp_path / f"{split}.jsonl")
    file = save(frame, tmp_path / "rows.csv")
    sources = {"dataset": ROWS, "shuffled": ROWS.shuffle(seed=1), "frame": frame, "file": file,
               "path": str(file), "mapping": {"train": frame, "test": ROWS, "valid": file},
               "dictionary": datasets.DatasetDict(train=ROWS, validation=ROWS), "folder": tmp_path}
    tasks = {name: Task.of(source) for name, source in sources.items()}
    for name, task in tasks.items():
        assert (task.texts, task.labels, task.metric) == (("line", "other"), ("0", "1"), "accuracy"), name
        lines = {(row["line"], row["label"]) for _, rows in task.load().items() for row in rows}
        assert lines == {(f"line {i}", i % 2) for i in range(20)}, name
    assert {name: task.rule for name, task in tasks.items() if task.rule != "tenths"} == {
        "mapping": "given", "dictionary": "halve", "folder": "halve"}
    assert tasks["mapping"].load().shared == {"validation": 20, "test": 20}
    assert {name: task.name for name, task in tasks.items()} == {
        "dataset": "own", "shuffled": "own", "frame": "own", "mapping": "own", "dictionary": "own",
        "file": "rows", "path": "rows", "folder": tmp_path.name}


@pytest.mark.parametrize(("labels", "names", "index"), [
    (["no", "yes", "no", "yes"], ("no", "yes"), [0, 1, 0, 1]),
    ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    ([5, 1, 10, 1], ("1", "5", "10"), [1, 0, 2, 0]),
    ([-1, 1, 1, -1], ("-1", "1"), [0, 1, 1, 0]),
    (pd.Categorical(["b", "a", "b", "b"]), ("a", "b"), [1, 0, 1, 1]),
])
def test_classes_are_inferred(labels, names, index):
    task = Task.of({split: pd.DataFrame({"line": text(split, 4), "label": labels})
                    for split in ("train", "validation", "test")})
    assert task.labels == names and task.rule == "given"
    assert task.load().test["label"][:] == index
    assert task.load().train.features["label"].names == list(names)


def test_class_names_of_a_dataset_are_kept():
    named = ROWS.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    assert Task.of(named).labels == ("bad", "good")
    assert Task.of(ROWS, labels=["bad", "good"]).labels == ("bad", "good")
    words = ROWS.to_pandas().assign(label=["loud", "calm"] * 10)
    task = Task.of({"train": words, "dev": words, "test": words}, labels=["loud", "calm"])
    assert task.load().test["label"][:] == [0, 1] * 10


@pytest.mark.parametrize(("labels", "bounds", "step"), [
    ([0.0, 5.0, 2.5, 3.8], (0.0, 5.0), 0.1), ([0.37, 0.93, 0.5, 0.6], (0.37, 0.93), 0.01),
    ([-120.0, 1_000.5, 3.0, 4.0], (-200.0, 1_100.0), 100.0)])
def test_numbers_are_a_regression_with_the_bounds_of_the_data(labels, bounds, step):
    task = Task.of(pd.DataFrame({"line": text("a", 4), "label": labels}))
    assert (task.kind, task.metric, task.labels) == ("number", "pearson", ())
    assert task.bounds == pytest.approx(bounds) and task.step == step
    assert 10 <= len(task.label_words) <= 102 and float(task.label_words[0]) == pytest.approx(bounds[0])
    assert float(task.label_words[-1]) == pytest.approx(bounds[1])
    assert sorted(value for _, rows in task.load().items() for value in rows["label"]) == sorted(labels)


def test_integers_are_numbers_where_the_metric_says_so():
    frame = pd.DataFrame({"line": text("a", 300), "label": range(300)})
    task = Task.of(frame, metric="spearman")
    assert task.kind == "number" and task.load().sizes == {"train": 240, "validation": 30, "test": 30}
    with pytest.raises(ValueError, match="label has 300 different values; .*metric='pearson'"):
        Task.of(frame)


def classes(names, labels):
    features = Features({"line": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"line": [f"{names} {i}" for i in range(len(labels))], "label": labels}, features)


def test_named_labels_count_by_their_names():
    task = Task.of({"train": classes(["no", "yes"], [0, 1, 1, 0]), "dev": classes(["yes", "no"], [0, 1, 0]),
                    "test": classes(["no", "yes"], [1, 1])})
    splits = task.load()
    assert sorted(splits.train["label"]) == [0, 0, 1, 1] and splits.validation["label"][:] == [1, 0, 1]
    assert splits.validation.features["label"].names == ["no", "yes"]
    plain = Dataset.from_dict({"line": ["a", "b"], "label": [1, 0]})
    assert Task.of({"train": classes(["no", "yes"], [0, 1]), "dev": plain}).load().sizes["validation"] == 1
    with pytest.raises(ValueError, match="'perhaps' is a label of validation .*; allowed is 0 … 1 or no, yes"):
        Task.of({"train": classes(["no", "yes"], [0, 1]), "dev": classes(["no", "perhaps"], [0, 1])}).load()
    with pytest.raises(ValueError, match="label -1 in row 1 of validation"):
        Task.of({"train": classes(["no", "yes"], [0, 1]), "dev": classes(["yes", "no"], [0, -1])}).load()
    with pytest.raises(ValueError, match="names in some splits and not in the training rows"):
        Task.of({"train": plain, "dev": classes(["no", "yes"], [0, 1])})


def test_a_file_with_the_labels_in_another_order_is_read_by_name(tmp_path):
    turned = classes(["not_entailment", "entailment"], [0, 1]).rename_column("line", "sentence1")
    for split in ("train", "validation"):
        (tmp_path / "glue" / "rte").mkdir(parents=True, exist_ok=True)
        turned.add_column("sentence2", [split, "b"]).to_parquet(tmp_path / "glue" / "rte" / f"{split}.parquet")
    assert sorted(TASKS["glue/rte"].load(tmp_path).train.to_pandas()[["sentence2", "label"]].values.tolist()) == [
        ["b", 0], ["train", 1]]


def test_what_is_text_in_training_is_text_in_every_split(tmp_path):
    for split, label, line in (("train", "3+", "a"), ("test", "1", "1999"), ("dev", "2", "2000")):
        (tmp_path / f"{split}.csv").write_text(
            f"line,label\n{line} b,{label}\n{line},1\n{line}c,2\n" if split == "train"
            else f"line,label\n{line},{label}\n")
    task = Task.of(tmp_path)
    assert task.labels == ("1", "2", "3+") and task.load().test.to_list() == [{"line": "1999", "label": 0}]


def test_rows_that_all_stay_together_cannot_be_split():
    with pytest.raises(ValueError, match="is empty; rows with the same line stay together: give more"):
        Task.of(pd.DataFrame({"line": ["a"] * 20, "label": [0, 1] * 10})).load()


def test_what_makes_no_task_says_why(tmp_path):
    frame = ROWS.to_pandas()
    for source, options, said in [
        (frame.assign(label="x"), {}, "every row has the label 'x'"),
        (frame.assign(label=2.5), {}, "every row has the label 2.5"),
        (frame.assign(label=None), {}, "no training row has a label"),
        (frame.assign(label=float("nan")), {}, "no training row has a label"),
        ({"train": frame, "dev": frame.assign(label="x")}, {}, "label holds integers and text"),
        (frame.rename(columns={"label": "labels"}), {}, "has no column 'label', but 'labels'"),
        (frame, {"texts": ["lime"]}, "has no column 'lime', but 'line'"),
        (frame, {"texts": "lime"}, "has no column 'lime', but 'line'"),
        (frame.assign(label=[0.5, float("inf")] * 10), {}, "a label is not a finite number"),
        (frame, {"words": ["no"]}, "give every class one of its own"),
        (frame, {"labels": ["no", "no"]}, "give every class one of its own"),
        (frame, {"metric": "pearson", "labels": ["a", "b"]}, "for labels of kind 'number'"),
        (frame.assign(label=[["a"]] * 20), {}, "label holds list"),
        ({"eval": frame, "test": frame}, {}, "no split 'train'"),
        ({"train": frame, "dev": frame, "val": frame}, {}, "second validation split"),
    ]:
        with pytest.warns(UserWarning, match="'eval' is left out") if "eval" in source else nullcontext():
            with pytest.raises(ValueError, match=said):
                Task.of(source, **options)
    with pytest.raises(TypeError, match="a list holds no rows"):
        Task.of([1, 2])
    with pytest.raises(FileNotFoundError, match="no file .*absent.csv"):
        Task.of(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="no file .*absent'"):
        Task.of(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no training rows in .* train.parquet or train.csv"):
        Task.of(tmp_path)
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(UnknownName, match="kind of file 'xlsx'; choose one of csv"):
        Task.of(tmp_path / "table.xlsx")


def test_a_test_without_labels_is_left_out():
    unknown = ROWS.take(4).map(lambda row: {"label": -1})
    for source in (unknown, unknown.remove_columns("label"), ROWS.to_pandas().assign(label=None),
                   ROWS.to_pandas().assign(label=-1.0)):
        with pytest.warns(UserWarning, match="test split is left out; it has no labels"):
            task = Task.of({"train": ROWS, "dev": ROWS, "test": source})
        assert task.rule == "halve" and task.labels == ("0", "1")


def test_a_task_of_your_own_takes_further_fields(tmp_path):
    task = Task.of(ROWS, "mine/tone", texts=["line"], max_length=32, batch_size=4, words=("no", "yes"),
                   beside=("f1",), group=("other",))
    assert (task.short, task.max_length, task.label_words) == ("tone", 32, ("no", "yes"))
    assert task.load().key == ("other",)
    listed = {"query": text("q"), "names": ENTITIES, "right": [words[:1] for words in ENTITIES]}
    listed = Dataset.from_dict(listed)
    gaps = Task.of({"train": listed, "test": listed}, texts=["query", "names"], label="right",
                   entities="names")
    assert (gaps.kind, gaps.metric) == ("text", "record-f1") and gaps.load().train["right"][0] == ["Anna"]


def test_find_task_knows_rows_paths_and_the_hub(tmp_path, monkeypatch):
    assert find_task("glue/rte") is TASKS["glue/rte"]
    save(ROWS.to_pandas(), tmp_path / "rows.csv")
    assert find_task(str(tmp_path / "rows.csv")).name == "rows"
    save(ROWS.to_pandas(), tmp_path / "train.csv")
    monkeypatch.chdir(tmp_path)
    assert find_task(str(tmp_path)).name == find_task(".").name == tmp_path.name
    with pytest.raises(UnknownName, match="did you mean 'glue/rte'.*; or give the path of a file or folder") as error:
        find_task("glue/rtee")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing'.*give a file, a folder"):
        find_task("hub:nobody/nothing")
    for name in ("", "hub:"):
        with pytest.raises(UnknownName):
            find_task(name)


def test_a_table_without_text_makes_no_task(tmp_path):
    (tmp_path / "own.csv").write_text("year,label\n1984,0\n007,1\n")
    with pytest.raises(ValueError, match="no column of own but 'label' holds text"):
        Task.of(tmp_path / "own.csv")


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
    with pytest.warns(UserWarning, match="test split is left out"):
        own = Task.of("hub:nyu-mll/glue", config="cola")
    assert (own.name, own.rule, own.texts) == ("glue", "halve", ("sentence",))
    assert own.load(seed=2).test.to_list() == TASKS["glue/cola"].load(seed=2).test.to_list()


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
                 "superglue/cb/validation.parquet", ".csv"):
        assert part in str(error.value)


def answer(server, asked):
    "404 for a name with super_glue in it; for any other the silence of a network that swallows packets."
    held = []
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        asked.append(connection.recv(4096).decode().splitlines()[0])
        if "super_glue" in asked[-1]:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\n"
                               b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()
        held.append(connection)


def test_a_hub_that_says_no_or_nothing_is_asked_once(tmp_path):
    write_cola(tmp_path)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server, asked), daemon=True).start()
        code = """
import sys
from s3pet_nb.data.task import TASKS
print(TASKS["glue/cola"].load(sys.argv[1]))
for name in ("superglue/cb", "glue/mnli"):
    try:
        TASKS[name].load()
    except FileNotFoundError as reason:
        print(reason)
"""
        env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"),
                            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
                            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)
    folder, absent, silent = done.stdout.splitlines()
    assert folder == "Splits(train: 6, validation: 3, test: 4)"
    assert "'aps/super_glue', 'cb' (RepositoryNotFoundError: " in absent and "--data-dir" in absent
    assert "'nyu-mll/glue', 'mnli' (ReadTimeout: " in silent and "validation_matched.parquet" in silent
    asked = [line.split()[1] for line in asked if "/datasets/" in line]  # reading the folder asks for none
    assert asked == ["/api/datasets/aps/super_glue", "/api/datasets/nyu-mll/glue"]
    assert "Retrying" not in done.stderr


def test_unreachable_hub_is_asked_once(tmp_path):
    "Nothing listens on port 9; the loader alone would retry five times and print each."
    code = "from s3pet_nb.data.task import TASKS\nTASKS['glue/mnli'].load()"
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


@pytest.mark.parametrize("wrong", [{"metric": "acuracy"}, {"rule": "half"}, {"beside": ("spaerman",)}])
def test_unknown_metric_and_rule_are_refused_when_the_task_is_written(wrong):
    with pytest.raises(UnknownName, match="did you mean"):
        replace(TASKS["glue/cola"], **wrong)


def test_a_metric_for_other_labels_is_refused_when_the_task_is_written():
    with pytest.raises(ValueError, match="'pearson' is for labels of kind 'number'.* of kind 'class'"):
        replace(TASKS["glue/cola"], beside=("pearson",))


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder .*absent.*glue/cola/train.parquet"):
        TASKS["glue/cola"].load(tmp_path / "absent")
    write(tmp_path, "glue/cola", "train", sentence=["a"], label=[0])
    with pytest.raises(FileNotFoundError, match="no validation file in .*glue/cola"):
        TASKS["glue/cola"].load(tmp_path)


def test_missing_column_names_the_nearest_and_those_that_are_there(tmp_path):
    write_cola(tmp_path)
    write(tmp_path, "glue/cola", "validation", sentense=["a", "b"], label=[0, 1])
    with pytest.raises(ValueError, match="validation of glue/cola has no column 'sentence', but 'sentense'; "
                                         "its columns are sentense, label"):
        TASKS["glue/cola"].load(tmp_path)
    write(tmp_path, "superglue/wsc", "train", text=["a"], label=[0])
    write(tmp_path, "superglue/wsc", "validation", text=["a"], label=[0])
    with pytest.raises(ValueError, match="no column 'span1_index'; its columns are text, label"):
        TASKS["superglue/wsc"].load(tmp_path)


@pytest.mark.parametrize(("label", "said"), [
    (2, "label 2"), (-1, "label -1"), ("yes", "label 'yes'"), (0.5, "label 0.5"), (None, "label missing"),
    (2 ** 60, "label 1152921504606846976")])
def test_label_out_of_range_names_value_and_row(tmp_path, label, said):
    write_cola(tmp_path)
    labels = ["acceptable", "unacceptable", label] if isinstance(label, str) else [0, 1, label]
    write(tmp_path, "glue/cola", "train", sentence=["a", "b", "c"], label=labels)
    with pytest.raises(ValueError, match=f"^{said} in row 2 of train of glue/cola is out of range; "
                                         "allowed is 0 … 1 or unacceptable, acceptable$"):
        TASKS["glue/cola"].load(tmp_path)


def test_labels_by_name_become_indices(tmp_path):
    write_cola(tmp_path)
    write(tmp_path, "glue/cola", "train", sentence=["a", "b"], label=["acceptable", "unacceptable"])
    train = TASKS["glue/cola"].load(tmp_path).train
    assert dict(zip(train["sentence"], train["label"])) == {"a": 1, "b": 0}


@pytest.mark.parametrize(("label", "said"), [
    (5.5, "label 5.5"), (-0.1, "label -0.1"), (float("nan"), "label missing"), (float("inf"), "label inf")])
def test_regression_label_out_of_range(tmp_path, label, said):
    for split in ("train", "validation"):
        write(tmp_path, "glue/stsb", split, sentence1=["a", "b"], sentence2=["c", "d"], label=[5.0, label])
    with pytest.raises(ValueError, match=f"^{said} in row 1 of train of .* out of range; allowed is 0 … 5"):
        TASKS["glue/stsb"].load(tmp_path)


@pytest.mark.parametrize(("task", "column"), [("glue/stsb", ["a", "b"]), ("glue/cola", [[1], [0]])])
def test_labels_of_another_type(task, column, tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, task, split, **{name: ["a", "b"] for name in TASKS[task].texts}, label=column)
    with pytest.raises(ValueError, match="the labels of train of .* are of type"):
        TASKS[task].load(tmp_path)


def test_missing_text_names_its_row(tmp_path):
    write_cola(tmp_path)
    write(tmp_path, "glue/cola", "train", sentence=["a", "b", None], label=[0, 1, 1])
    with pytest.raises(ValueError, match="^sentence is missing in row 2 of train of glue/cola"):
        TASKS["glue/cola"].load(tmp_path)
    write(tmp_path, "glue/cola", "train", sentence=[1, 2, 3], label=[0, 1, 1])
    with pytest.raises(ValueError, match="sentence of train of glue/cola holds int64; it should hold text"):
        TASKS["glue/cola"].load(tmp_path)


@pytest.mark.parametrize(("column", "said"), [
    ("answers", "row 1 .* allowed is a list with at least one string"),
    ("entities", "entities is an empty list in row 1 of train")])
def test_record_needs_entities_and_answers(column, said, tmp_path):
    task = TASKS["superglue/record"]
    write_hub_rows(tmp_path, task, "validation", 4)
    lists = {"entities": [["a"], ["b"]], "answers": [["a"], ["b"]]}
    lists[column][1] = []
    write(tmp_path, task.name, "train", query=["q"] * 2, passage=["p"] * 2, **lists)
    with pytest.raises(ValueError, match=said):
        task.load(tmp_path)


def test_empty_file_and_empty_half(tmp_path):
    write_cola(tmp_path, n_validation=1)
    with pytest.raises(ValueError, match="validation of glue/cola is empty"):
        TASKS["glue/cola"].load(tmp_path)
    write(tmp_path, "glue/cola", "train", sentence=[], label=[])
    with pytest.raises(ValueError, match="train.parquet' is empty"):
        TASKS["glue/cola"].load(tmp_path)


def test_bytes_in_parquet_that_are_no_text(tmp_path):
    texts = pa.array([b"ok", b"na\xefve", b"ok"]).view(pa.string())
    write_cola(tmp_path)
    file = tmp_path / "glue/cola/train.parquet"
    pyarrow.parquet.write_table(pa.table({"sentence": texts, "label": [0, 1, 1]}), file)
    with pytest.raises(ValueError, match="^sentence in row 1 of train of glue/cola is not UTF-8"):
        TASKS["glue/cola"].load(tmp_path)


def test_checks_leave_progress_bars_as_they_were(tmp_path, capfd):
    datasets.enable_progress_bars()
    for split in ("train", "validation"):
        write_hub_rows(tmp_path, TASKS["superglue/wsc"], split, 8)
    TASKS["superglue/wsc"].load(tmp_path)
    assert not datasets.are_progress_bars_disabled() and "Map" not in capfd.readouterr().err


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
    "superglue/copa": (400, 50, 50), "superglue/rte": (2_490, 138, 139),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_tasks_have_their_rows_and_share_none(name, data_dir: Path):
    task = TASKS[name]
    splits = task.load(data_dir, seed=0)
    assert tuple(splits.sizes.values()) == SIZES[name]
    parts = [set(zip(*(part[column] for column in task.texts))) for _, part in splits.items()]
    assert not parts[1] & parts[0 if task.rule == "carve" else 2]
    ids = [part["idx"][:] for _, part in splits.items()]
    assert [len(set(part)) for part in ids] == list(SIZES[name])
    assert set(task.load(data_dir, seed=1).validation["idx"]) != set(ids[1])


@pytest.mark.parametrize("name", SIZES)
def test_real_shared_rows_are_those_that_pandas_finds(name, data_dir: Path):
    task = TASKS[name]
    key = list(task.texts)
    official = {split: pd.read_parquet(data_dir / name / f"{split}.parquet")[key]
                for split in ("train", task.held_out)}
    among = official[task.held_out].merge(official["train"].drop_duplicates(), on=key)
    splits = task.load(data_dir, seed=0)
    if task.rule == "halve":
        assert sum(splits.shared.values()) == len(among)
    for split, rows in splits.items():
        if split != "train":
            twice = rows.to_pandas()[key].merge(splits.train.to_pandas()[key].drop_duplicates(), on=key)
            assert splits.shared[split] == len(twice)


@pytest.mark.parametrize("name", SIZES)
def test_real_label_names_are_those_of_the_files(name, data_dir: Path):
    task = TASKS[name]
    label = task.load(data_dir).train.features["label"]
    assert tuple(getattr(label, "names", ())) == task.labels
