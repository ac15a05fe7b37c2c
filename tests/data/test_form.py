"Forms: what a model is given, what is read from it, for every family, tokenizer and kind of task."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from s3pet_nb.core import UnknownName
from s3pet_nb.data.form import FORMS, Head, Text, Words, form_of, number_in, sources, targets
from s3pet_nb.data.task import TASKS, Task
from s3pet_nb.model.backbone import FAMILIES, load_backbone, tiny
from s3pet_nb.model.space import attach, make_space

WORDS = ("<pad> </s> <s> <unk> the a king queen boy girl sleeps sings near saw . yes no calm loud "
         "tone line: answer: 0.0 0.5 1.0 3.8 0 1 2").split()


def word_tokenizer(start=False, end=True, lower=False):
    "A tokenizer of words between spaces that may begin and end every text with a special token."
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        core.normalizer = normalizers.Lowercase()
    before, after = "<s> " * start, " </s>" * end
    core.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", pair=f"{before}$A{after} $B{after}",
        special_tokens=[("<s>", 2), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>",
                                   bos_token="<s>", unk_token="<unk>")


LINES = ["the king sleeps .", "a queen", "the boy near the girl sings .", "a boy saw ."]
CLASSES = Task("tone", ("line",), ("calm", "loud"))
NUMBER = Task("tone", ("line",), metric="pearson", bounds=(0, 1), step=0.5)
CHOICES = Task("pick", ("line", "a", "b"), ("a", "b"),
               choices=lambda row: [(row["line"], row["a"]), (row["line"], row["b"])])
OWN = Task("who", ("line",), metric="record-f1", label="right", entities="names",
           choices=lambda row: [(row["line"], name) for name in row["names"]])
ROWS = {"line": LINES, "a": ["yes"] * 4, "b": ["no"] * 4,
        "names": [["king", "queen"], ["girl"], ["boy", "girl", "king"], ["queen", "boy"]],
        "right": [["queen", "king"], ["girl"], ["girl", "king"], ["boy"]]}
LABELS = {"tone": [0, 1, 1, 0], "pick": [1, 0, 0, 1], "who": [0, 0, 0, 0]}
TASKS_BY_KIND = {"classes": CLASSES, "number": NUMBER, "choices": CHOICES, "candidates": OWN}


def rows_of(task):
    label = [0.0, 0.5, 1.0, 0.5] if task is NUMBER else LABELS[task.name]
    return ROWS | {"label": label}


def batch_of(form, rows, tokenizer, training=True, max_length=32):
    entries = form.encode(rows, tokenizer, max_length, training)
    owners = np.array(entries.pop("row"))
    batch = form.collate(tokenizer)([dict(zip(entries, each)) for each in zip(*entries.values())])
    return batch, owners


PAIRS = [(family, form) for family, row in FAMILIES.items()
         for form in ("head", {("encoder",): "head", ("decoder",): "words"}.get(tuple(row.stacks), "text"))]


def model_for(family, form, vocab_size):
    width = {"num_labels": form.n_labels, "pad_token_id": 0} if form.name == "head" else {}
    return tiny(family, form.head, vocab_size=vocab_size, **width)


@pytest.mark.parametrize("kind", TASKS_BY_KIND)
@pytest.mark.parametrize("family, name", sorted(set(PAIRS)))
def test_every_family_is_trained_and_asked_in_its_forms(family, name, kind):
    task, tokenizer = TASKS_BY_KIND[kind], word_tokenizer()
    form, rows = FORMS[name](task), rows_of(task)
    model = model_for(family, form, len(tokenizer))
    batch, _ = batch_of(form, rows, tokenizer)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in model.parameters())
    batch, owners = batch_of(form, rows, tokenizer, training=False)
    with torch.no_grad():
        found = form.predictions(form.answer(model, batch, tokenizer, 4), owners, rows)
    assert len(found) == 4
    if kind in ("classes", "choices"):
        assert set(found.tolist()) <= {-1, 0, 1}
    elif kind == "number":
        assert np.issubdtype(found.dtype, np.floating)
        assert name == "head" or set(found.tolist()) <= {-1.0, 0.0, 0.5, 1.0}
    elif name == "text":
        assert all(isinstance(each, str) for each in found)
    else:
        assert all(each in names for each, names in zip(found, rows["names"]))


# ---- the source and the target

def source(name, **row):
    return sources(TASKS[name], {column: [value] for column, value in row.items()})[0]


def test_sources_are_written_as_t5_was_taught():
    assert source("glue/cola", sentence="He sleeps.") == "cola sentence: He sleeps."
    assert source("glue/stsb", sentence1="A man.", sentence2="A boy.") == (
        "stsb sentence1: A man. sentence2: A boy.")
    assert source("superglue/multirc", question="Who?", answer="He.", paragraph="Long.") == (
        "multirc question: Who? answer: He. paragraph: Long.")
    assert source("superglue/record", query="@placeholder won", entities=["A", "B"], passage="Then.") == (
        "record query: @placeholder won entities: A, B passage: Then.")


@pytest.mark.parametrize("label, word", [(0.0, "0.0"), (3.8, "3.8"), (3.799999952, "3.8"), (3.75, "3.8"),
                                         (2.89, "2.8"), (2.5, "2.4"), (4.91, "5.0"), (5.0, "5.0")])
def test_the_labels_of_stsb_are_on_a_grid(label, word):
    "As T5: round(label * 5) / 5 with one digit."
    assert targets(TASKS["glue/stsb"], {"label": [label]}) == [[word]] == [[f"{round(label * 5) / 5:.1f}"]]


def test_digits_are_written_for_classes_and_read_as_classes():
    tokenizer, form = word_tokenizer(), FORMS["digits"](CLASSES)
    labels = form.encode(rows_of(CLASSES), tokenizer, 32)["labels"]
    assert [[WORDS[i] for i in ids] for ids in labels] == [[digit, "</s>"] for digit in "0110"]
    assert (form.task.name, form.task.labels, form.task.kind) == ("tone", ("calm", "loud"), "class")
    batch, _ = batch_of(form, rows_of(CLASSES), tokenizer, training=False)
    assert form.answer(Writer(tokenizer, ["1", "0", "calm", "2"]), batch, tokenizer, 4).tolist() == [1, 0, -1, -1]
    for task in NUMBER, OWN:
        whole, plain = (FORMS[name](task).encode(rows_of(task), tokenizer, 32) for name in ("digits", "text"))
        assert whole == plain
    assert "digits" in form.note and not FORMS["text"](CLASSES).note


@pytest.mark.parametrize("name", ["text", "words"])
def test_every_right_answer_is_a_training_row(name):
    rows = ROWS | {"right": [["queen", "king"], ["girl"], ["girl", "king", "girl"], ["boy"]]}
    assert targets(OWN, rows) == [["queen", "king"], ["girl"], ["girl", "king"], ["boy"]]
    tokenizer, form = word_tokenizer(), FORMS[name](OWN)
    entries = form.encode(rows, tokenizer, 32)
    assert entries["row"] == [0, 0, 1, 2, 2, 3]
    written = [[WORDS[i] for i in labels if i != -100][0] for labels in entries["labels"]]
    assert written == ["queen", "king", "girl", "girl", "king", "boy"]
    assert entries["input_ids"][0][:2] == entries["input_ids"][1][:2]
    answered = form.encode(rows, tokenizer, 32, training=False)["row"]
    assert answered == ([0, 1, 2, 3] if name == "text" else [0, 0, 1, 2, 2, 2, 3, 3])


@pytest.mark.parametrize("start, end", [(False, True), (True, False), (True, True), (False, False)])
def test_a_target_ends_once_whatever_the_tokenizer_adds(start, end):
    tokenizer = word_tokenizer(start, end)
    entries = Text(CLASSES).encode(rows_of(CLASSES), tokenizer, 32)
    assert entries["labels"] == [[WORDS.index(word), 1] for word in ("calm", "loud", "loud", "calm")]
    assert entries["input_ids"][1] == tokenizer("tone line: a queen").input_ids


def test_a_long_source_is_cut_and_keeps_its_end_token():
    rows = {"line": ["the king " * 50], "label": [0]}
    (ids,) = Text(CLASSES).encode(rows, word_tokenizer(), 10)["input_ids"]
    assert len(ids) == 10 and ids[-1] == 1 and ids[:3] == word_tokenizer()("tone line: the").input_ids[:3]


# ---- what is written is read

class Writer:
    "A model that writes what it was told to, and notes how it was asked."

    def __init__(self, tokenizer, texts):
        ids = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        self.ids = torch.cat([torch.full((len(texts), 1), tokenizer.pad_token_id), ids], 1)

    def generate(self, **asked):
        self.asked = asked
        return self.ids


def written(task, texts, tokenizer=None, longest=0):
    tokenizer = tokenizer or word_tokenizer()
    model = Writer(tokenizer, texts)
    batch = {"input_ids": torch.zeros(len(texts), 3), "attention_mask": torch.ones(len(texts), 3)}
    return Text(task).answer(model, batch, tokenizer, longest).tolist(), model.asked


def test_a_written_word_is_a_class_or_none():
    texts = ["calm </s>", "loud </s> loud", "</s>", "calm", "the king", "calm calm", "loud </s> <pad>"]
    assert written(CLASSES, texts)[0] == [0, -1, -1, 0, -1, -1, 1]


def test_white_space_around_a_written_word_is_stripped(data_dir):
    texts = ["calm", " calm", "loud\n", "  loud ", "ca lm"]
    assert written(CLASSES, texts, tokenizers(data_dir)["gpt2"])[0] == [0, 0, 1, 1, -1]


def test_a_tokenizer_that_lowers_case_is_read_in_its_own_way():
    task = Task("tone", ("line",), ("Calm", "LOUD"))
    assert written(task, ["calm </s>", "loud </s>"], word_tokenizer(lower=True))[0] == [0, 1]


def test_a_written_number_is_read_and_anything_else_is_minus_one():
    tokenizer = word_tokenizer()
    texts = ["3.8", "38", " 0.5 ", "3 . 8", "nan", "inf", "-inf", "1e400", "", "calm", "4,2"]
    numbers = [number_in(text) for text in texts]
    assert numbers == [3.8, 38.0, 0.5, 3.8, -1, -1, -1, -1, -1, -1, -1]
    assert written(NUMBER, ["3.8 </s>", "yes </s>", "0.5"], tokenizer)[0] == [3.8, -1.0, 0.5]


def test_a_candidate_is_read_as_it_was_written():
    assert written(OWN, ["queen </s>", "the king </s>"])[0] == ["queen", "the king"]


def test_writing_is_greedy_and_no_longer_than_the_longest_label():
    tokenizer = word_tokenizer()
    _, asked = written(CLASSES, ["calm"], tokenizer, longest=2)
    assert (asked["do_sample"], asked["num_beams"], asked["max_new_tokens"]) == (False, 1, 2)
    assert asked["eos_token_id"] == tokenizer.eos_token_id
    assert Text(CLASSES).longest({"label": [0]}, tokenizer) == 2
    assert Text(OWN).longest({"names": [["king"], ["a king near the queen"]], "right": [["king"]] * 2},
                             tokenizer) == 6


def test_a_checkpoints_own_habits_of_writing_are_left_out(tmp_path):
    tokenizer = word_tokenizer()
    model = tiny("t5", "seq2seq", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                 eos_token_id=tokenizer.eos_token_id)
    model.generation_config.update(min_new_tokens=9, no_repeat_ngram_size=1, num_beams=3, length_penalty=9.0,
                                   forced_bos_token_id=tokenizer.eos_token_id, max_length=40)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_backbone(tmp_path, "seq2seq")
    form = Text(CLASSES)
    batch, _ = batch_of(form, rows_of(CLASSES), tokenizer, training=False)
    plain = tiny("t5", "seq2seq", vocab_size=len(tokenizer))
    plain.load_state_dict(loaded.state_dict())
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")} | {
        "do_sample": False, "num_beams": 1, "max_new_tokens": 4, "eos_token_id": tokenizer.eos_token_id}
    assert torch.equal(loaded.generate(**asked), plain.generate(**asked))


def test_a_gated_model_writes_what_its_backbone_would():
    form, tokenizer = Text(CLASSES), word_tokenizer()
    model = tiny("t5", "seq2seq", vocab_size=len(tokenizer))
    batch, _ = batch_of(form, rows_of(CLASSES), tokenizer, training=False)
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    plain = model.generate(**ids, max_new_tokens=3, do_sample=False)
    with attach(model, make_space(model, "lora")) as gated:
        assert torch.equal(gated.generate(**ids, max_new_tokens=3, do_sample=False), plain)
        said = form.answer(gated, batch, tokenizer, 2)
    assert said.tolist() == form.answer(model, batch, tokenizer, 2).tolist()


# ---- words after a prompt

def tokenizers(data_dir):
    gpt2 = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "gpt2")
    gpt2.eos_token = gpt2.pad_token = "<|endoftext|>"
    llama = AutoTokenizer.from_pretrained(data_dir / "backbones" / "stories260k-llama")
    return {"gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_real_tokenizers(name, data_dir):
    tokenizer = tokenizers(data_dir)[name]
    task = Task("glue/rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"))
    rows = {"sentence1": ["He sleeps."], "sentence2": ["A man sleeps."], "label": [1]}
    entries = Words(task).encode(rows, tokenizer, 128)
    (ids,), (labels,) = entries["input_ids"], entries["labels"]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" \n", "\n") == (
        "rte sentence1: He sleeps. sentence2: A man sleeps.\nanswer: not_entailment")
    said = [label for label in labels if label >= 0]
    assert tokenizer.decode(said[:-1]).strip() == "not_entailment"
    assert said[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert ids[-len(said):] == said and labels[:-len(said)] == [-100] * (len(ids) - len(said))
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id]
    assert starts == ([0] if name == "llama" else [])


@pytest.mark.parametrize("start, end", [(False, True), (True, False), (True, True), (False, False)])
def test_a_prompt_begins_as_the_tokenizer_does_and_never_ends_early(start, end):
    tokenizer = word_tokenizer(start, end)
    entries = Words(CLASSES).encode(rows_of(CLASSES), tokenizer, 32)
    expected = "tone line: a queen answer: loud".split()
    assert entries["input_ids"][1] == [2] * start + [WORDS.index(word) for word in expected] + [1]
    assert entries["labels"][1] == [-100] * (start + 5) + [WORDS.index("loud"), 1]


def test_training_and_answering_share_the_prompt_and_only_the_source_is_cut():
    rows = {"line": ["a queen " + "the king " * 50], "label": [1]}
    form, tokenizer = Words(CLASSES), word_tokenizer(start=True)
    (trained,) = form.encode(rows, tokenizer, 12)["input_ids"]
    asked = form.encode(rows, tokenizer, 12, training=False)["input_ids"]
    assert len(trained) == 12 and trained == asked[1] and trained[:-2] == asked[0][:-2]
    assert tokenizer.decode(trained).split() == (
        "<s> tone line: a queen the king the king answer: loud </s>".split())


@pytest.mark.parametrize("family", [family for family, name in PAIRS if name == "words"])
def test_a_score_is_the_log_probability_of_word_and_end(family):
    "Entry by entry, unpadded, from all logits in float64."
    form, tokenizer, rows = Words(OWN), word_tokenizer(start=True), rows_of(OWN)
    model = tiny(family, "causal", vocab_size=len(tokenizer), initializer_range=0.2)
    entries = form.encode(rows, tokenizer, 32, training=False)
    expected = []
    with torch.no_grad():
        for ids, labels in zip(entries["input_ids"], entries["labels"]):
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(logs[i - 1, label].item() for i, label in enumerate(labels) if label >= 0))
        batch, owners = batch_of(form, rows, tokenizer, training=False)
        found = form.answer(model, batch, tokenizer, 0)
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found.tolist())) == len(found) == 8
    best = [max(range(8), key=lambda i: (owners[i] == row, expected[i])) for row in range(4)]
    names = sum(rows["names"], [])
    assert form.predictions(found, owners, rows).tolist() == [names[i] for i in best]


def test_only_the_places_of_words_reach_the_vocabulary():
    form, tokenizer = Words(CLASSES), word_tokenizer()
    model, seen = tiny("llama", "causal", vocab_size=len(tokenizer)), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    rows = {"line": ["the king sleeps ."] * 3, "label": [0, 1, 1]}
    batch, _ = batch_of(form, rows, tokenizer, training=False)
    with torch.no_grad():
        form.answer(model, batch, tokenizer, 0)
    assert seen == [2] and batch["input_ids"].shape == (6, 9)


def test_the_loss_is_on_the_word_and_its_end():
    form, tokenizer = Words(CLASSES), word_tokenizer()
    model = tiny("gpt2", "causal", vocab_size=len(tokenizer))
    batch, _ = batch_of(form, rows_of(CLASSES), tokenizer)
    with torch.no_grad():
        loss = model(**batch).loss.item()
        said = form.answer(model, batch, tokenizer, 0)
    assert loss == pytest.approx(-said.sum() / 8, rel=1e-5)  # four words of one token, four ends


def test_a_number_is_the_best_of_its_grid():
    form, rows = Words(NUMBER), rows_of(NUMBER)
    assert len(form.encode(rows, word_tokenizer(), 32, training=False)["row"]) == 12
    outcomes = np.array([-1.0, -3, -2, -5, -4, -6, -9, -8, -7, -1, -1, -2])
    assert form.predictions(outcomes, np.repeat(np.arange(4), 3), rows).tolist() == [0.0, 0.5, 1.0, 0.0]


# ---- heads

def test_the_last_text_is_the_second_and_the_others_are_joined():
    task = Task("three", ("a", "line", "b"), ("x", "y"))
    (ids, *_) = Head(task).encode(rows_of(CLASSES), word_tokenizer(), 32)["input_ids"]
    unknown = WORDS.index("<unk>")  # "yes:"
    assert ids == [unknown, *(WORDS.index(word) for word in "the king sleeps . </s> no </s>".split())]


def test_labels_of_a_regression_are_floats_even_when_read_as_integers():
    rows = {"line": LINES, "label": [0, 1, 1, 0]}
    batch, _ = batch_of(Head(NUMBER), rows, word_tokenizer())
    assert batch["labels"].dtype == torch.float32 and Head(NUMBER).n_labels == 1
    assert batch_of(Head(CLASSES), rows, word_tokenizer())[0]["labels"].dtype == torch.int64


@pytest.mark.parametrize("task, expected", [
    (CHOICES, [0, 1, 1, 0, 1, 0, 0, 1]), (OWN, [1, 1, 1, 0, 1, 1, 0, 1])], ids=["choices", "candidates"])
def test_a_choice_is_labelled_by_whether_it_is_right(task, expected):
    entries = Head(task).encode(rows_of(task), word_tokenizer(), 32)
    assert entries["labels"] == expected
    assert entries["row"] == ([0, 0, 1, 1, 2, 2, 3, 3] if task is CHOICES else [0, 0, 1, 2, 2, 2, 3, 3])


def test_the_surest_choice_is_the_answer():
    "Logits of wrong and right: the difference counts, not the height."
    logits = torch.tensor([[5.0, 6.0], [0.0, 2.0], [1.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 1.0], [4.0, 4.0],
                           [9.0, 9.5]])
    form = Head(OWN)
    said = form.answer(lambda **batch: SimpleNamespace(logits=logits), {"labels": None}, None, 0)
    assert said.tolist() == [1.0, 2.0, -1.0, 3.0, -3.0, 1.0, 0.0, 0.5]
    owners = np.array([0, 0, 1, 2, 2, 2, 3, 3])
    assert form.predictions(said, owners, ROWS).tolist() == ["queen", "girl", "boy", "boy"]


def test_a_row_without_candidates_has_no_answer():
    rows = {"line": LINES[:3], "names": [["king"], [], ["boy"]], "right": [["king"], ["a"], ["boy"]]}
    for make in (Head, Words):
        owners = np.array(make(OWN).encode(rows, word_tokenizer(), 32, training=False)["row"])
        assert owners.tolist() == [0, 2]
        assert make(OWN).predictions(np.array([0.1, 0.2]), owners, rows).tolist() == ["king", "", "boy"]


# ---- batches of entries

def test_padding_is_on_the_right_and_hidden():
    form, tokenizer = Words(CLASSES), word_tokenizer()
    tokenizer.padding_side = "left"
    batch, _ = batch_of(form, rows_of(CLASSES), tokenizer)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
        assert ids[n:].tolist() == [0] * (len(ids) - n) and labels[n:].tolist() == [-100] * (len(ids) - n)
        assert (labels[:n] >= 0).sum() == 2


def test_segments_of_a_pair_are_kept(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    batch, _ = batch_of(Head(Task("t", ("a", "b"), ("x", "y"))), rows_of(CLASSES), tokenizer)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 4


# ---- which form

def test_the_backbone_decides(tmp_path, data_dir):
    tiny("t5", "seq2seq").save_pretrained(tmp_path)
    assert isinstance(form_of(CLASSES, tmp_path), Text) and isinstance(form_of(CLASSES, "minilm"), Head)
    assert isinstance(form_of(CLASSES, data_dir / "backbones" / "stories260k-llama"), Words)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_asked_in_every_form(name):
    for form in FORMS.values():
        assert form(TASKS[name]).n_labels >= 1


# ---- what can go wrong

@pytest.mark.parametrize("make", [Text, Words])
def test_a_regression_without_a_grid_has_no_words(make):
    with pytest.raises(ValueError, match="score is a regression; .* needs a grid: give the task a `step`"):
        make(Task("score", ("line",), metric="pearson"))


def test_candidates_need_choices_for_a_head():
    with pytest.raises(ValueError, match="who is answered with texts; a head needs its `choices`"):
        Head(Task("who", ("line",), metric="record-f1", label="right", entities="names"))


@pytest.mark.parametrize("make", [Text, Words])
def test_words_that_the_tokenizer_writes_alike_are_refused(make):
    task = Task("tone", ("line",), ("good", "bad"))  # both unknown
    with pytest.raises(ValueError, match="cannot tell the label words 'good' and 'bad' apart"):
        make(task).encode(rows_of(CLASSES), word_tokenizer(), 32)


@pytest.mark.parametrize("make", [Text, Words])
def test_a_tokenizer_without_an_end_is_refused(make):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token; set its eos_token"):
        make(CLASSES).encode(rows_of(CLASSES), tokenizer, 32)


def test_a_limit_without_room_says_how_much_is_needed():
    form, tokenizer = Words(CLASSES), word_tokenizer(start=True)
    with pytest.raises(ValueError, match="4 tokens leave no room .* give a max_length of more than 4"):
        form.encode(rows_of(CLASSES), tokenizer, 4)
    assert len(form.encode(rows_of(CLASSES), tokenizer, 5)["input_ids"][0]) == 5


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Head(CLASSES).collate(tokenizer)


def test_an_unknown_form_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'words'"):
        FORMS["word"]


def test_two_very_long_texts_are_cut(data_dir):
    "All ways to cut a pair are made before one is taken; 100,000 letters on both sides would fill the memory."
    task = Task("pair", ("one", "other"), ("no", "yes"))
    rows = {"one": ["word " * 20_000, "a"], "other": ["other " * 20_000, "word " * 20_000], "label": [0, 1]}
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    entries = Head(task).encode(rows, tokenizer, 32)
    assert [len(ids) for ids in entries["input_ids"]] == [32, 32]
    assert [sum(marks) for marks in entries["token_type_ids"]] == [15, 29]


@pytest.mark.parametrize("name", FORMS)
def test_a_very_long_text_is_cut(name):
    rows = {"line": ["the king " * 11_112], "label": [0]}
    assert len(rows["line"][0]) >= 100_000
    (ids,) = FORMS[name](CLASSES).encode(rows, word_tokenizer(), 128)["input_ids"]
    assert len(ids) == 128


# ---- real data

@pytest.mark.parametrize("name", ["glue/cola", "glue/mrpc", "glue/stsb", "superglue/boolq", "superglue/copa"])
def test_real_rows_get_their_own_label(name, data_dir):
    task, tokenizer = TASKS[name], tokenizers(data_dir)["gpt2"]
    rows = task.load(data_dir).train.take(16)[:]
    told = Text(task).encode(rows, tokenizer, task.max_length)["labels"]
    entries = Words(task).encode(rows, tokenizer, task.max_length)
    spoken = [[i for i in labels if i >= 0] for labels in entries["labels"]]
    for found in told, spoken:
        words = [tokenizer.decode(ids[:-1]).strip() for ids in found]
        if task.kind == "class":
            assert words == [task.label_words[label] for label in rows["label"]]
        else:
            assert [float(word) for word in words] == pytest.approx(rows["label"], abs=0.1 + 1e-6)
    assert max(map(len, entries["input_ids"])) <= task.max_length
    asked = Words(task).encode(rows, tokenizer, task.max_length, training=False)
    assert asked["row"] == np.repeat(np.arange(16), len(task.label_words)).tolist()


def test_real_choices_are_right_once(data_dir):
    task = TASKS["superglue/copa"]
    rows = task.load(data_dir).train.take(16)[:]
    labels = Head(task).encode(rows, tokenizers(data_dir)["gpt2"], 64)["labels"]
    assert np.reshape(labels, (16, 2)).argmax(1).tolist() == rows["label"] and sum(labels) == 16
