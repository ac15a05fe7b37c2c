"Batches and scores: the file of entries, buckets, workers, what resumes, metrics by hand."
import multiprocessing
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
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

import s3pet_nb.data.batch
from s3pet_nb.data.batch import (Buckets, Chunks, cache_folder, entries_key, loader, predict, read_entries,
                                 score, scores)
from s3pet_nb.data.form import FORMS, Head, Text, Words
from s3pet_nb.data.task import TASKS, Task
from s3pet_nb.learn.learner import Stream


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "Every test keeps its entries in a folder of its own."
    monkeypatch.setenv("S3PET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


VOCABULARY = ["<pad>", "<unk>", "</s>", ".", *"the a king queen boy girl sleeps sings near saw 0 1 2".split()]


def word_tokenizer(lower=False):
    "A tokenizer of whole words that ends every text with </s>, as T5's does."
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", model_input_names=["input_ids", "attention_mask"])


SIZE = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "pad_token_id": 0}
MODELS = {
    "bert": lambda n: BertForSequenceClassification(BertConfig(**SIZE, num_labels=n)),
    "roberta": lambda n: RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=n)),
    "t5": lambda n: T5ForSequenceClassification(T5Config(
        vocab_size=17, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=n, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0)),
    "gpt2": lambda n: GPT2ForSequenceClassification(GPT2Config(
        vocab_size=17, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=n, pad_token_id=0)),
    "llama": lambda n: LlamaForSequenceClassification(LlamaConfig(**SIZE, num_labels=n)),
}
SENTENCES = ["the king sleeps .", "a queen", "the boy near the girl sings .", "a boy saw ."]
ROWS = Dataset.from_dict({"sentence": SENTENCES * 5,
                          "other": ["the girl .", "a king saw the queen ."] * 10,
                          "word": ["king", "saw"] * 10,
                          "label": [0, 1, 2, 1] * 5})
SINGLE = Head(Task("single", ("sentence",), ("x", "y", "z")))
TRIPLE = Head(Task("triple", ("word", "sentence", "other"), ("x", "y", "z")))
REGRESSION = Head(Task("regression", ("sentence", "other"), metric="pearson"))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("form", [SINGLE, TRIPLE, REGRESSION], ids=lambda form: form.task.name)
def test_batches_and_score_for_every_family(family, form):
    torch.manual_seed(0)
    model = MODELS[family](form.n_labels).train()
    batches = loader(ROWS, form, word_tokenizer(), batch_size=8)
    for batch in batches:
        loss = model(**batch).loss
        assert loss.ndim == 0 and torch.isfinite(loss)
    assert -1 <= score(model, batches) <= 1
    assert model.training


def test_batches_are_padded_to_their_own_longest_row_and_cut():
    def widths(**options):
        batches = loader(ROWS.take(4), SINGLE, word_tokenizer(), batch_size=2, **options)
        return [batch["input_ids"].shape[1] for batch in batches]

    assert widths() == [8, 5]
    assert widths(max_length=4) == [4, 4]


def test_the_task_gives_batch_size_and_length():
    form = Head(replace(SINGLE.task, batch_size=3, max_length=5))
    batches = loader(ROWS.take(4), form, word_tokenizer())
    assert [batch["input_ids"].shape for batch in batches] == [(3, 5), (1, 3)]


def test_a_loader_knows_what_it_is_made_of():
    tokenizer = word_tokenizer()
    batches = loader(ROWS, SINGLE, tokenizer)
    assert (batches.rows, batches.form, batches.tokenizer) == (ROWS, SINGLE, tokenizer)


@pytest.mark.parametrize("wrong", [{"rows": ROWS.take(0)}, {"batch_size": -1}])
def test_no_rows_and_no_batch_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; give at least 1"):
        loader(**{"rows": ROWS, "form": SINGLE, "tokenizer": word_tokenizer()} | wrong)


def test_a_tokenizer_without_padding_is_refused_before_the_work(cache):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        loader(ROWS, SINGLE, tokenizer)
    assert not cache.exists()


def test_progress_bars_stay_as_they_were(capfd):
    datasets.enable_progress_bars()
    loader(ROWS, SINGLE, word_tokenizer())
    assert not datasets.are_progress_bars_disabled() and "Map" not in capfd.readouterr().err


# ---- the order of batches

def passes(n=2, **options):
    batches = loader(ROWS, SINGLE, word_tokenizer(), batch_size=8, **options)
    return [[batch["input_ids"].tolist() for batch in batches] for _ in range(n)]


def test_order_follows_the_seed():
    assert passes(seed=1) == passes(seed=1) != passes(seed=2)
    first, second = passes(seed=1)
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


def buckets(lengths, batch_size=16, seed=0):
    return Buckets(np.asarray(lengths), batch_size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, batch_size, batches", [
    (1, 8, 1), (7, 8, 1), (8, 8, 1), (9, 8, 1), (16, 8, 2), (999, 8, 124), (5_000, 1, 5_000)])
def test_a_pass_has_whole_batches_without_repeats(n, batch_size, batches):
    sampler = buckets(np.arange(n) % 50, batch_size)
    for _ in range(2):
        found = list(sampler)
        assert len(found) == len(sampler) == batches
        assert {len(batch) for batch in found} == {min(n, batch_size)}
        assert len(set(sum(found, []))) == len(sum(found, []))


def test_a_batch_holds_rows_of_like_length_and_batches_come_in_any_order():
    lengths = np.random.default_rng(0).lognormal(3, 0.7, 20_000).astype(int) + 1
    found = list(buckets(lengths))
    longest = np.array([lengths[batch].max() for batch in found])
    in_order = lengths.reshape(-1, 16).max(1)
    assert 16 * longest.sum() < 1.1 * lengths.sum() < 0.6 * 16 * in_order.sum()
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.1  # sorted stretches give more than 0.9


def test_every_row_waits_equally_often():
    "21 rows in batches of 4: one waits in each pass, the longest as often as the shortest."
    sampler = buckets(np.arange(21), 4)
    waited = Counter(next(iter(set(range(21)) - set(sum(sampler, [])))) for _ in range(2_100))
    assert len(waited) == 21 and max(waited.values()) < 160 and min(waited.values()) > 50


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_a_stream_finds_its_place_again(taken, workers):
    def stream():
        return Stream(loader(ROWS, SINGLE, word_tokenizer(), batch_size=8, seed=3, workers=workers))

    first = stream()
    for _ in range(taken):
        next(first)
    place = first.state_dict()
    expected = [next(first)["input_ids"].tolist() for _ in range(5)]
    resumed = stream()
    resumed.load_state_dict(place)
    assert [next(resumed)["input_ids"].tolist() for _ in range(5)] == expected


# ---- workers

def test_workers_change_nothing():
    for seed in (None, 1):
        assert passes(seed=seed, workers=2) == passes(seed=seed)


@pytest.mark.parametrize("name", FORMS)
def test_workers_tokenise_the_same_entries(name, cache, monkeypatch):
    monkeypatch.setattr(s3pet_nb.data.batch, "CHUNK", 3)
    monkeypatch.setattr(s3pet_nb.data.batch, "MANY", 2)
    form = FORMS[name](Task("t", ("sentence",), ("king", "queen", "a boy")))
    files = []
    for workers in (0, 2):
        loader(ROWS, form, word_tokenizer(), workers=workers)
        (file,) = cache.iterdir()
        files.append((file.name, file.read_bytes()))
        file.unlink()
    assert files[0] == files[1]


def test_chunks_are_put_together(monkeypatch):
    def entries():
        task = Task("t", ("sentence",), ("king", "queen", "a boy"))
        batches = loader(ROWS, Words(task), word_tokenizer(), batch_size=1)
        return batches.owners.tolist(), [batch["input_ids"].tolist() for batch in batches]

    whole = entries()
    monkeypatch.setattr(s3pet_nb.data.batch, "CHUNK", 3)
    assert entries() == whole and whole[0] == np.repeat(np.arange(20), 3).tolist()


# ---- the file of entries

@pytest.fixture
def encoded(monkeypatch):
    "Number of rows that were encoded to be kept."
    seen, encode = [], Chunks.__getitem__
    monkeypatch.setattr(Chunks, "__getitem__", lambda self, i: seen.append(i) or encode(self, i))
    return seen


def test_rows_are_tokenised_once(encoded, cache):
    first = passes(seed=0)
    assert encoded == [0] and passes(seed=0) == first and encoded == [0]
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]


def key(rows=ROWS, form=SINGLE, tokenizer=None, max_length=8, training=True):
    return entries_key(Chunks(rows, form, tokenizer or word_tokenizer(), max_length, training))


def test_the_key_is_the_same_for_the_same_content():
    shuffled = ROWS.select([3, 2, 1, 0])
    written = Dataset.from_dict({name: shuffled[name][:] for name in ROWS.column_names})
    used = word_tokenizer()
    used(["a king"] * 2, truncation=True, max_length=1, padding=True)
    bare = written.remove_columns(["other", "word"])
    form = Head(replace(SINGLE.task, batch_size=1, metric="f1-macro"))
    classes = written.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    same = [key(shuffled), key(written), key(bare), key(classes), key(written, tokenizer=used),
            key(written, form), key(datasets.concatenate_datasets([written.take(1), written.skip(1)]))]
    assert len(set(same)) == 1


class Shouting(Head):
    "A form whose module is the one of `Head`'s children, not of `Head`."


def test_the_key_depends_on_all_that_matters():
    more, left = word_tokenizer(), word_tokenizer()
    more.add_tokens("laughs")
    left.truncation_side = "left"
    task = SINGLE.task
    named = replace(task, words=("king", "queen", "a boy"))
    relabelled = ROWS.remove_columns("label").add_column("label", [0, 1, 2, 1] * 4 + [0, 1, 2, 2])
    others = [
        key(ROWS.select(range(19, -1, -1))), key(ROWS.take(19)), key(relabelled), key(max_length=9),
        key(tokenizer=word_tokenizer(lower=True)), key(tokenizer=more), key(tokenizer=left),
        key(training=False), key(form=Shouting(task)), key(form=TRIPLE), key(form=Text(named)),
        key(form=Head(named)), key(form=Head(replace(task, name="other")))]
    assert len({key(), *others}) == 1 + len(others)


def choosing(word):
    return lambda row: [(row["sentence"], word), (row["sentence"], "a")]


def choose(row, word):
    return [(row["sentence"], word), (row["sentence"], "a")]


@pytest.mark.parametrize("make", [choosing, lambda word: partial(choose, word=word)], ids=["closure", "partial"])
def test_what_a_choice_has_captured_is_part_of_the_key(make, monkeypatch):
    monkeypatch.setattr(Chunks, "encode", lambda self, rows: {})  # as if no row of the sample told them apart
    tasks = [Task("pick", ("sentence",), ("x", "y"), choices=make(word)) for word in ("king", "king", "queen")]
    first, again, other = (key(form=Head(task)) for task in tasks)
    assert first == again != other


def test_the_code_of_a_form_and_how_a_tokenizer_splits_are_part_of_the_key(monkeypatch):
    whole, split = word_tokenizer(), word_tokenizer()
    split.split_special_tokens = True
    assert key(tokenizer=whole) != key(tokenizer=split)
    before = key()
    monkeypatch.setattr(s3pet_nb.data.batch, "code", lambda form: [b"edited"])
    assert key() != before


def test_a_form_of_a_notebook_is_known_by_what_it_does(monkeypatch):
    "Its module has no file; a changed cue must not be answered from the old file."
    module = type(sys)("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    task = Task("t", ("sentence",), ("king", "queen", "a boy"))
    first, second = (type("Mine", (Words,), {"cue": cue, "__module__": "notebook"})(task)
                     for cue in ("a", "near"))
    assert key(form=first) != key(form=second)


def test_a_choice_reads_any_column():
    task = Task("pick", ("sentence",), ("x", "y"),
                choices=lambda row: [(row["word"], "a"), (row["other"], "a")])
    rows = ROWS.remove_columns("label").add_column("label", [0, 1] * 10)
    batches = loader(rows, Head(task), word_tokenizer(), batch_size=1)
    assert len(batches) == 40 and key(rows, Head(task)) != key(
        rows.remove_columns("word").add_column("word", ["king"] * 20), Head(task))


def spoil(file, content):
    "Another file in its place: one that is mapped must not shrink."
    other = file.with_suffix(".other")
    other.write_bytes(content)
    other.replace(file)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:len(whole) // 2], lambda whole: whole[:-8], lambda whole: b"",
    lambda whole: b"not arrow", lambda whole: b"\0" * 64 + whole[-8:],
], ids=["half", "no end", "empty", "text", "zeros"])
def test_a_torn_file_is_made_again(damage, cache, encoded):
    expected = passes()
    (file,) = cache.iterdir()
    spoil(file, damage(file.read_bytes()))
    assert read_entries(file, file.stem) is None
    assert passes() == expected and encoded == [0, 0]


def test_a_foreign_file_is_made_again(cache, encoded):
    "A whole Arrow file under this name that was made from something else."
    expected = passes()
    (file,) = cache.iterdir()
    loader(ROWS.take(3), SINGLE, word_tokenizer())
    (other,) = set(cache.iterdir()) - {file}
    spoil(file, other.read_bytes())
    assert passes() == expected and len(encoded) == 3


def test_a_failure_leaves_no_file(cache):
    "The wrong label is in the second chunk, when the first one is written."
    rows = Dataset.from_dict({"sentence": SENTENCES * 300, "label": [0] * 1_001 + [7] + [0] * 198})
    with pytest.raises(IndexError):
        loader(rows, Text(Task("t", ("sentence",), ("king", "queen"))), word_tokenizer(), seed=0)
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_written_names_the_variable(cache):
    cache.write_text("a file")
    with pytest.raises(OSError, match="cannot be kept in .*cache.*; let S3PET_CACHE name a folder"):
        loader(ROWS, SINGLE, word_tokenizer())


def test_the_folder_is_beside_the_files_of_datasets(monkeypatch):
    monkeypatch.delenv("S3PET_CACHE")
    assert cache_folder().parent == type(cache_folder())(datasets.config.HF_DATASETS_CACHE)
    assert cache_folder().name == "s3pet_nb"


def test_two_processes_at_once_make_one_file(cache):
    rows = Dataset.from_dict({"sentence": SENTENCES * 2_000, "label": [0, 1, 2, 1] * 2_000})
    fork = multiprocessing.get_context("fork")
    start, sums = fork.Barrier(2), fork.Queue()

    def make():
        start.wait()
        sums.put(sum(batch["input_ids"].sum().item() for batch in loader(rows, SINGLE, word_tokenizer())))

    both = [fork.Process(target=make) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and sums.get() == sums.get() > 0
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]


def test_entries_are_mapped_and_not_read(cache):
    rows = Dataset.from_dict({"sentence": SENTENCES * 500, "label": [0, 1, 2, 1] * 500})
    batches = loader(rows, SINGLE, word_tokenizer(), seed=0)
    (file,) = cache.iterdir()
    assert [entry["filename"] for entry in batches.dataset.cache_files] == [str(file)]
    assert str(file) in open("/proc/self/maps").read()


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
        assert "labels" not in batch and not torch.is_grad_enabled()
        n = len(batch["input_ids"])
        here, self.logits = self.logits[:n], self.logits[n:]
        self.modes.append(self.part.training)
        return SimpleNamespace(logits=here)


def of_four(task, labels=(0, 1, 0, 1), **columns):
    rows = Dataset.from_dict({"sentence": ["a"] * 4, "label": list(labels)} | columns)
    return loader(rows, Head(task), word_tokenizer(), batch_size=3)


class Counting(torch.nn.Module):
    "Predicts the number of tokens of an entry."
    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, **batch):
        return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).to(torch.bfloat16))


def test_answers_come_back_in_the_order_of_the_rows():
    lengths = [3, 1, 4, 1, 5, 2, 2]
    rows = Dataset.from_dict({"sentence": ["king " * n for n in lengths], "label": [0.0] * 7})
    task = Task("t", ("sentence",), metric="pearson")
    batches = loader(rows, Head(task), word_tokenizer(), batch_size=3)
    ends = len(word_tokenizer()("").input_ids)
    assert predict(Counting(), batches).tolist() == [n + ends for n in lengths]
    assert [batch["input_ids"].shape[1] for batch in batches] == [5 + ends, 2 + ends, 1 + ends]


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.75), ("f1", 2 / 3), ("matthews", 3 ** -0.5)])
def test_scores_by_hand(metric, expected):
    "Labels 0 1 0 1 and predictions 0 1 0 0: three right, precision 1, recall 1/2."
    batches = of_four(Task("t", ("sentence",), ("x", "y"), metric))
    assert score(Fixed(torch.eye(2)[[0, 1, 0, 0]]), batches) == pytest.approx(expected)


def test_metrics_beside_and_groups():
    "Questions p and q with two answers each, of which one is wrong: F1 2/3, half of the questions."
    task = Task("t", ("sentence",), ("x", "y"), "f1", beside=("em", "accuracy"), group=("page", "question"))
    batches = of_four(task, page=["A", "B", "A", "B"], question=["p"] * 4)
    assert scores(Fixed(torch.eye(2)[[0, 1, 0, 0]]), batches) == pytest.approx(
        {"f1": 2 / 3, "em": 0.5, "accuracy": 0.75})


def test_candidates_are_scored_row_by_row():
    task = Task("t", ("sentence",), metric="record-f1", beside=("record-em",), label="right",
                entities="names", choices=lambda row: [(row["sentence"], name) for name in row["names"]])
    names = [["a king", "queen"], ["boy"], ["a girl", "girl", "boy"], ["king", "queen"]]
    right = [["queen", "the king"], ["boy"], ["boy girl"], ["queen"]]
    batches = of_four(task, names=names, right=right)
    logits = torch.tensor([[0.0, 1], [0, 0], [0, 0], [0, 0], [0, 2], [0, 1], [0, 1], [0, 0]])
    assert predict(Fixed(logits), batches).tolist() == ["a king", "boy", "girl", "king"]
    assert scores(Fixed(logits), batches) == pytest.approx(
        {"record-f1": (1 + 1 + 2 / 3 + 0) / 4, "record-em": 0.5})


def test_pearson_of_a_regression_and_of_a_constant():
    task = replace(REGRESSION.task, texts=("sentence",))
    batches = of_four(task, labels=[1.0, 2.0, 3.0, 5.0])
    model = Fixed(torch.tensor([[1.0], [2.0], [2.0], [4.0]]))
    assert score(model, batches) == pytest.approx(np.corrcoef([1, 2, 3, 5], [1, 2, 2, 4])[0, 1])
    with pytest.warns(UserWarning, match="taken as 0"):
        assert score(Fixed(torch.zeros(4, 1)), batches) == 0


def test_score_restores_the_mode_of_every_part():
    batches = of_four(Task("t", ("sentence",), ("x", "y")))
    model = Fixed(torch.eye(2)[[0, 1, 0, 0]]).train()
    model.part.eval()
    score(model, batches)
    assert model.training and not model.part.training
    model = Fixed(torch.eye(2)[[0, 1, 0, 0]]).eval()
    model.part.train()
    score(model, batches)
    assert not model.training and model.part.training and model.modes == [False, False]


def test_training_batches_are_not_scored():
    batches = loader(ROWS, SINGLE, word_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="training batches.*make them without a seed"):
        predict(Fixed(torch.zeros(20, 3)), batches)


# ---- real data

def test_real_pairs_become_two_segments(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    task = TASKS["superglue/boolq"]
    batch = next(iter(loader(task.load(data_dir).train.take(32), Head(task), tokenizer, seed=0)))
    assert batch["input_ids"].shape == (16, 256)
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}


def test_a_real_shuffled_task_is_tokenised_once(data_dir, encoded):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    task = TASKS["glue/cola"]
    first, again = (loader(task.load(data_dir).train, Head(task), tokenizer, seed=0) for _ in range(2))
    assert encoded == list(range(9)) and len(first) == 8_551 // 32
    for one, other in islice(zip(first, again), 20):
        assert torch.equal(one["input_ids"], other["input_ids"])
    text = tokenizer.decode(first.dataset[5]["input_ids"], skip_special_tokens=True)
    assert text == tokenizer.decode(tokenizer(first.rows[5]["sentence"]).input_ids, skip_special_tokens=True)
