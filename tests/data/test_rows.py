"Rows: files of every kind, what cannot be read, the same content, groups that stay together, split rules."
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset
from tables import FRAME, ROWS, save, text

from s3pet_nb.core import UnknownName
from s3pet_nb.data.rows import (FILES, SPLIT_RULES, Splits, check_columns, check_texts, columns_of, content, fill,
                                find_file, halves, quiet, read_file, read_own, splits_of, text_columns, with_column)


# ---- files

@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_holds_the_same_table(kind, tmp_path):
    assert read_file(save(FRAME, tmp_path / f"tone.{kind}")).to_list() == FRAME.to_dict("records")


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_may_hold_lists_and_rows_that_lack_a_column(kind, tmp_path):
    lines = ['{"words": ["a", "b"], "n": 1}', '{"words": []}']
    (tmp_path / f"rows.{kind}").write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    assert read_file(tmp_path / f"rows.{kind}").to_list() == [{"words": ["a", "b"], "n": 1},
                                                              {"words": [], "n": None}]


def test_a_column_of_numbers_is_one_only_if_all_of_it_is(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,c,d\n1,0.5,1,x\n2,1e3,,y\n3,7,z,1\n")
    assert read_file(tmp_path / "rows.csv").to_dict() == {
        "a": [1, 2, 3], "b": [0.5, 1000.0, 7.0], "c": ["1", None, "z"], "d": ["x", "y", "1"]}


def test_a_file_of_another_kind_or_of_none_is_named(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(UnknownName, match="kind of file 'xlsx'; choose one of csv, json, jsonl, parquet, tsv"):
        read_file(tmp_path / "rows.xlsx")
    with pytest.raises(FileNotFoundError, match="no file .*absent.csv"):
        read_file(tmp_path / "absent.csv")


def test_a_split_is_one_file(tmp_path):
    assert find_file(tmp_path, "train") is None
    for name in ("train.txt", "train.csv"):
        (tmp_path / name).write_text("a\n1\n")
    assert find_file(tmp_path, "train") == tmp_path / "train.csv"
    (tmp_path / "train.TSV").write_text("a\n1\n")
    with pytest.raises(ValueError, match="holds train.TSV and train.csv; keep one file of a split"):
        find_file(tmp_path, "train")


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_leaves_progress_bars_as_they_were(shown):
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        with pytest.raises(KeyError), quiet():
            assert are_progress_bars_disabled()
            raise KeyError
        assert are_progress_bars_disabled() is not shown
    finally:
        enable_progress_bars()


def test_text_of_the_training_rows_is_text_in_every_table(tmp_path):
    (tmp_path / "validation.csv").write_text("line,n\n1999,1\n")
    (tmp_path / "train.csv").write_text("line,n\na king,1\n")
    for source in (tmp_path, str(tmp_path), {"validation": tmp_path / "validation.csv",
                                             "train": str(tmp_path / "train.csv")}):
        tables = read_own(source, "", ())
        assert tables["train"].to_list() == [{"line": "a king", "n": 1}]
        assert tables["validation"].to_list() == [{"line": "1999", "n": 1}]
    assert list(read_own(ROWS, "", ())) == ["train"]
    frame = pd.DataFrame({"line": pd.Categorical(["b", "a", None]), "n": [1, 2, 3]})
    assert read_own(frame, "", ())["train"].to_list() == [
        {"line": "b", "n": 1}, {"line": "a", "n": 2}, {"line": None, "n": 3}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(kind, tmp_path):
    file = save(FRAME, tmp_path / f"tone.{kind}")
    file.write_bytes("\ufeff".encode() + file.read_bytes())
    assert read_file(file).column_names == ["line", "label"]


def test_a_table_of_numbers_keeps_its_texts(tmp_path):
    "A CSV has no types: what is a text of the task stays text, though every value is a number."
    (tmp_path / "own.csv").write_text("year,next,label\n1984,1985,0\n007,1,1\n3,4,1\n5,6,0\n7,8,1\n")
    rows = read_file(tmp_path / "own.csv", texts=["year"])
    assert rows["year"][:] == ["1984", "007", "3", "5", "7"] and rows["next"][:] == [1985, 1, 4, 6, 8]


def test_an_index_of_pandas_is_no_text(tmp_path):
    frame = ROWS.to_pandas()
    frame.index = [f"id {i}" for i in frame.index]
    frame.to_parquet(tmp_path / "rows.parquet")
    assert text_columns(read_file(tmp_path / "rows.parquet")) == text_columns(ROWS) == ["line", "other"]


def test_an_empty_text_in_quotes_is_a_text(tmp_path):
    (tmp_path / "rows.csv").write_text('line,label\n"",0\na,1\nb,0\n')
    assert read_file(tmp_path / "rows.csv")["line"][:] == ["", "a", "b"]


@pytest.mark.parametrize("kind", FILES)
def test_a_very_long_sentence_is_read_whole(kind, tmp_path):
    line = "long " * 20_000
    frame = pd.DataFrame({"line": [line, *text("a", 9)], "label": [0, 1] * 5})
    assert read_file(save(frame, tmp_path / f"long.{kind}"))["line"][0] == line


@pytest.mark.parametrize(("name", "written"), [
    ("head.csv", b"line,label\n"), ("none.jsonl", b"\n\n"), ("none.json", b"[]")])
def test_a_file_without_rows(name, written, tmp_path):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match=f"{name}' is empty; it needs at least one row"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(("name", "written", "said"), [
    ("a.parquet", b"line,label\n", "cannot be read as parquet"),
    ("many.csv", b"line,label\na,0\nb,c,1\n", "read as csv .*Row #3: Expected 2 columns, got 3: b,c,1"),
    ("few.csv", b"line,label\na,0\nb\n", "cannot be read as csv .*Row #3: Expected 2 columns, got 1"),
    ("twice.csv", b"line,line\na,0\n", "two columns have the same name"),
    ("void.csv", b"", "cannot be read as csv .*Empty"),
    ("latin.csv", b"line,label\nok,0\n\nna\xefve,1\n", "line 4 of .* is not UTF-8; save the file as UTF-8"),
    ("head.tsv", b"l\xefne\tlabel\nok\t0\n", "line 1 of .* is not UTF-8"),
    ("utf16.csv", "line,label\na,0\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
    ("latin.jsonl", b'{"line": "ok", "label": 0}\n{"line": "na\xefve", "label": 1}\n', "line 2 .* not UTF-8"),
    ("torn.jsonl", b'{"line": "a", "label": 0}\n{"line": "b", \n', "cannot be read as jsonl .line 2, column"),
    ("list.jsonl", b'{"line": "a", "label": 0}\n3\n', "line 2 is not a JSON object"),
    ("mixed.jsonl", b'{"line": "a", "label": 0}\n{"line": "b", "label": "x"}\n', "cannot be read as jsonl"),
    ("torn.json", b'[{"line": "a", "label": 0}', "cannot be read as json"),
])
def test_a_file_that_cannot_be_read_says_where(name, written, said, tmp_path):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match=said) as error:
        read_file(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


# ---- checks

def test_checks_name_the_column_and_the_row():
    with pytest.raises(ValueError, match="^train of t has no column 'lime', but 'line'; its columns are line, other"):
        check_columns("train of t", ROWS, ["line", "lime"])
    with pytest.raises(ValueError, match="^train of t is empty; it needs at least one row"):
        check_columns("train of t", ROWS.take(0), ["line"])
    parts = [pa.array([b"ok"]).view(pa.string()), pa.array([b"ok", b"na\xefve"]).view(pa.string())]
    with pytest.raises(ValueError, match="^line in row 2 of train of t is not UTF-8; save the text as UTF-8"):
        check_texts("train of t", pa.table({"line": pa.chunked_array(parts)}))
    with pytest.raises(ValueError, match="^line is missing in row 1 of train of t; fill it in"):
        check_texts("train of t", pa.table({"line": ["a", None]}))
    check_texts("train of t", columns_of(ROWS, ["line", "label"]))


def test_a_column_is_replaced_in_the_order_of_the_rows():
    shuffled = ROWS.shuffle(seed=0)
    column = pa.chunked_array([[f"{line}!" for line in shuffled["line"]]])
    changed = with_column(shuffled, "line", column)
    assert changed["line"][:] == [f"{line}!" for line in shuffled["line"]]
    assert changed["other"][:] == shuffled["other"][:] and changed._fingerprint != shuffled._fingerprint


# ---- the same content, groups and rules

@pytest.mark.parametrize("seed", [0, 1, 42])
def test_rows_that_all_differ_are_drawn_by_one_permutation(seed):
    "Published numbers hang on these draws: numpy's permutation, cut in its order."
    rows = {"train": Dataset.from_dict({"row": range(2_500)}),
            "validation": Dataset.from_dict({"row": range(101)})}
    order = np.random.default_rng(seed).permutation(2_500).tolist()
    halved, carved = SPLIT_RULES["halve"](rows, seed, ["row"]), SPLIT_RULES["carve"](rows, seed, ["row"])
    held_out = np.random.default_rng(seed).permutation(101).tolist()
    assert [part["row"][:] for part in halved] == [order, held_out[:50], held_out[50:]]
    assert [part["row"][:] for part in carved] == [order[2_000:], order[:2_000], list(range(101))]
    for key in ((), ["row"]):
        assert [half["row"][:] for half in halves(rows["train"], seed, key)] == [order[:1_250], order[1_250:]]


def drawn(n, n_texts, seed):
    "Rows with texts that some share, as question and answers of MultiRC do."
    random = np.random.default_rng(seed)
    return Dataset.from_dict({"paragraph": [f"p{i}" for i in random.integers(0, n_texts, n) // 3],
                              "question": [f"q{i}" for i in random.integers(0, 3, n)], "row": list(range(n))})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SPLIT_RULES)
def test_rows_of_a_group_never_part(name, seed):
    rule, key = SPLIT_RULES[name], ("paragraph", "question")
    rows = {"train": drawn(2_600, 900, seed), "validation": drawn(301, 90, 10), "test": drawn(50, 20, 20)}
    parts = rule({split: rows[split] for split in rule.needs}, seed, key)
    official = {split: set(map(tuple, rows[split].to_pandas()[list(key)].values)) for split in rows}
    groups = [set(map(tuple, part.to_pandas()[list(key)].values)) for part in parts]
    pairs = {"halve": [(1, 2)], "carve": [(0, 1)], "tenths": [(0, 1), (0, 2), (1, 2)]}.get(name, [])
    assert all(not groups[i] & groups[j] for i, j in pairs)
    if name == "halve":
        assert groups[1] | groups[2] == official["validation"] and len(parts[1]) == 150
    if name == "carve":
        assert groups[0] | groups[1] == official["train"] and len(parts[1]) == 2_000
    if name == "tenths":
        assert [len(part) for part in parts] == [2_080, 260, 260]
    if name in ("official", "given"):
        whole = [rows[split]["row"][:] for split in ("train", "validation")]
        assert [sorted(part["row"]) for part in parts[:2]] == whole
    d_delta, d_alpha = halves(parts[0], seed, key)
    both = [set(map(tuple, half.to_pandas()[list(key)].values)) for half in (d_delta, d_alpha)]
    assert not both[0] & both[1] and len(d_delta) == len(parts[0]) // 2 >= len(d_alpha) > 0


def test_groups_that_do_not_fit_are_passed_over():
    assert fill(np.array([3, 3, 1, 2]), 4).tolist() == [True, False, True, False]
    assert fill(np.array([5, 5]), 4).tolist() == [False, False]
    assert fill(np.array([2, 9, 1, 9, 1, 1]), 4).tolist() == [True, False, True, False, True, False]
    sizes = np.random.default_rng(0).integers(1, 30, 500)
    one_by_one, left = [], 1_000
    for size in sizes:
        one_by_one.append(size <= left)
        left -= size * one_by_one[-1]
    assert fill(sizes, 1_000).tolist() == one_by_one


def test_halves_are_equal_and_disjoint():
    train = Dataset.from_dict({"row": range(101)})
    d_delta, d_alpha = (set(half["row"]) for half in halves(train, seed=0))
    assert len(d_delta) == len(d_alpha) == 50 and not d_delta & d_alpha
    assert set(halves(train, seed=1)[0]["row"]) != d_delta


def test_a_rule_says_which_splits_it_misses():
    with pytest.raises(ValueError, match="needs train and validation and test rows; there are no test rows"):
        SPLIT_RULES["given"]({"train": ROWS, "validation": ROWS}, 0)


def test_content_is_equal_for_equal_rows_only():
    rows = Dataset.from_dict({"text": ["a", "b", "a", "ab"], "more": ["b", "b", "b", ""],
                              "words": [["x", "y"], ["x"], ["x", "y"], ["xy"]], "row": [0, 1, 2, 3]})
    for columns in (["text", "more"], ["words"], ["text", "words"]):
        hashes = content(rows, columns)
        assert hashes.dtype == np.uint64 and hashes[0] == hashes[2] and len(set(hashes)) == 3
    order = [3, 1, 0, 2]
    assert content(rows.select(order), ["text"]).tolist() == content(rows, ["text"])[order].tolist()
    first = content(rows.select(order).take(2), ["words"])
    assert first.tolist() == content(rows, ["words"])[[3, 1]].tolist()
    assert content(rows.select([]), ["text"]).tolist() == []


def test_shared_rows_of_a_pair_need_both_texts():
    train = Dataset.from_dict({"a": ["x", "y"], "b": ["1", "2"]})
    other = Dataset.from_dict({"a": ["x", "x", "y"], "b": ["1", "2", "2"]})
    assert Splits(train, other, other.take(2), {"far": other}, ("a", "b")).shared == {
        "validation": 2, "test": 1, "far": 2}
    assert Splits(train, other, other, key=("a",)).shared == {"validation": 3, "test": 3}


def test_lists_of_large_strings_are_the_same_content():
    words = [["a", "b"], ["a b"]]
    large = Dataset(pa.table({"words": pa.array(words, pa.large_list(pa.large_string()))}))
    assert content(large, ["words"]).tolist() == content(Dataset.from_dict({"words": words}), ["words"]).tolist()


def test_further_tables_are_further_test_splits():
    splits = splits_of({"test": ROWS.take(2), "far": ROWS.take(1), "train": ROWS, "validation": ROWS.take(3)}, ["line"])
    assert list(splits.sizes.items()) == [("train", 20), ("validation", 3), ("test", 2), ("far", 1)]
    assert splits.key == ("line",) and repr(splits) == "Splits(train: 20, validation: 3, test: 2, far: 1)"
    assert splits.head(n_train=5, n_eval=2).sizes == {"train": 5, "validation": 2, "test": 2, "far": 1}
    assert splits.head().sizes == splits.sizes


def test_a_name_of_a_rule_is_taken_once():
    with pytest.raises(ValueError, match="split rule 'halve' is registered already"):
        SPLIT_RULES.register("halve")
    assert {name: rule.needs for name, rule in SPLIT_RULES.items() if len(rule.needs) != 2} == {
        "tenths": ("train",), "given": ("train", "validation", "test")}
