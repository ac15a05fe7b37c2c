"""The run folder: ids, logs that survive a crash, whole files, and the frame of all runs."""

import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic import make_run

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.store import Run, faults, flatten, home, plain, run_folders, run_id, unreadable, write_json

PARAMS = {"task": "agreement", "budget": 2e-4, "seed": 0}


def test_run_id_is_short_stable_and_depends_on_each_of_its_three_parts():
    one = run_id(PARAMS, "code", "0.1.0")
    canonical = '[{"budget":0.0002,"seed":0,"task":"agreement"},"code","0.1.0"]'
    assert one == hashlib.sha256(canonical.encode()).hexdigest()[:10]
    assert one == run_id(dict(reversed(PARAMS.items())), "code", "0.1.0")
    assert (
        len(
            {
                one,
                run_id(PARAMS | {"seed": 1}, "code", "0.1.0"),
                run_id(PARAMS, "code ", "0.1.0"),
                run_id(PARAMS, "code", "0.1.1"),
            }
        )
        == 4
    )


def test_plain_values_are_json_and_keep_every_digit():
    value = {
        "a": torch.tensor([1.5, math.nan]),
        "b": np.float32(0.5),
        "c": (1, None, True),
        "d": -math.inf,
        3: torch.tensor(7),
        "e": 0.1 + 0.2,
    }
    made = plain(value)
    assert made == {"a": [1.5, None], "b": 0.5, "c": [1, None, True], "d": None, "3": 7, "e": 0.1 + 0.2}
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    with pytest.raises(TypeError, match="a set cannot be written"):
        plain({"a": {1}})


def test_log_is_readable_by_another_process_while_the_run_is_open(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    run.log({"event": "step", "loss": torch.tensor(0.25)})
    text = subprocess.run(
        [sys.executable, "-c", f"print(open({str(run.folder / 'log.jsonl')!r}).read(), end='')"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert text == '{"event": "step", "loss": 0.25}\n'


@pytest.mark.parametrize("cut", range(1, 12))
def test_log_survives_a_write_that_was_cut_anywhere(tmp_path, cut):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    run.log({"step": 1})
    run.log({"step": 2})
    whole = (run.folder / "log.jsonl").read_bytes()
    (run.folder / "log.jsonl").write_bytes(whole[:-cut])
    assert run.records() == [{"step": 1}]
    run.log({"step": 3})
    assert run.records() == [{"step": 1}, {"step": 3}]


def test_log_with_a_broken_line_in_the_middle_names_the_line(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    (run.folder / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        run.records()
    assert "3 records" in repr(run)


def test_write_json_keeps_the_old_file_and_no_rubbish_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"test": 1})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_json(path, {"test": 2})
    assert json.loads(path.read_text()) == {"test": 1}
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("text", ["", "{", '{"rows": [', "[]", "null"])
def test_an_incomplete_result_is_no_result(tmp_path, text):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    assert run.result is None
    (run.folder / "result.json").write_text(text)
    assert run.result is None and not run.done
    assert Run.create(tmp_path, "study", PARAMS, "code").folder == run.folder
    assert not (run.folder / "result.json").exists()


def test_a_folder_in_the_place_of_a_result_is_none(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    (run.folder / "result.json").mkdir()
    assert run.result is None and not run.done


def test_create_starts_an_unfinished_run_over_and_keeps_a_finished_one(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    assert run.folder == tmp_path / "study" / run_id(PARAMS, "code") and run.params == PARAMS
    run.log({"step": 1})
    write_json(run.folder / "structure.json", {"modules": []})
    (run.folder / "structure.safetensors").write_bytes(b"masks")
    again = Run.create(tmp_path, "study", PARAMS, "code")
    assert again.records() == [] and again.structure is None
    assert not (run.folder / "structure.safetensors").exists()
    again.log({"step": 1})
    again.save_result({"test": 0.5})
    kept = Run.create(tmp_path, "study", PARAMS, "code")
    assert kept.done and kept.records() == [{"step": 1}]


def test_create_goes_on_with_an_unfinished_run_that_has_a_checkpoint(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    run.log({"step": 1})
    write_json(run.folder / "structure.json", {"modules": []})
    place = run.checkpoint("search")
    assert place == run.folder / "checkpoints" / "search.safetensors" and place.parent.is_dir()
    place.with_name(".search.safetensors.7.tmp").write_bytes(b"half")
    assert Run.create(tmp_path, "study", PARAMS, "code").records() == [], "half a checkpoint is none"

    run.log({"step": 1})
    place.write_bytes(b"whole")
    write_json(run.folder / "structure.json", {"modules": []})
    again = Run.create(tmp_path, "study", PARAMS, "code")
    assert again.records() == [{"step": 1}] and again.structure is None and again.params == PARAMS
    assert again.checkpoint("search").read_bytes() == b"whole"
    assert Run.create(tmp_path, "study", PARAMS | {"seed": 1}, "code").records() == []


@pytest.mark.parametrize("label", ["", "a/b", "../out", ".hidden", ".."])
def test_a_checkpoint_stays_in_its_run(tmp_path, label):
    with pytest.raises(ValueError, match="label .* is not a plain name"):
        Run.create(tmp_path, "study", PARAMS, "code").checkpoint(label)


def test_a_log_that_was_rewound_and_written_again_is_the_same_to_the_byte(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    assert run.mark() == 0 and not (run.folder / "log.jsonl").exists()
    run.rewind(0)
    records = [{"step": step, "loss": 1 / step, "unit": "\u00b5s"} for step in range(1, 6)]
    marks = [run.log(record) or run.mark() for record in records]
    whole = (run.folder / "log.jsonl").read_bytes()
    assert marks == [k + 1 for k, byte in enumerate(whole) if byte == ord("\n")]
    for done in 5, 4, 2, 0:
        run.rewind([0, *marks][done])
        assert run.records() == records[:done]
        for record in records[done:]:
            run.log(record)
        assert (run.folder / "log.jsonl").read_bytes() == whole


def test_a_mark_leaves_out_a_line_that_was_cut_off(tmp_path):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    run.log({"step": 1})
    with open(run.folder / "log.jsonl", "ab") as file:
        file.write(b'{"st')
    assert run.mark() == len(b'{"step": 1}\n')
    run.rewind(run.mark())
    assert run.records() == [{"step": 1}]


def test_a_mark_is_on_the_disk_before_it_is_given(tmp_path, monkeypatch):
    run, synced = Run.create(tmp_path, "study", PARAMS, "code"), []
    run.log({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    run.mark()
    assert synced == [(run.folder / "log.jsonl").stat().st_ino]


@pytest.mark.parametrize("mark", [-1, 5, 13, 10_000])
def test_a_mark_where_no_record_ends_is_refused_and_nothing_is_cut(tmp_path, mark):
    run = Run.create(tmp_path, "study", PARAMS, "code")
    run.log({"step": 1})
    with pytest.raises(ValueError, match=f"no record ends at byte {mark:,} of .*, which has 12"):
        run.rewind(mark)
    assert run.records() == [{"step": 1}]


@pytest.mark.parametrize("study", ["../out", "a/b", "", ".", "..", ".hidden", "/x"])
def test_a_study_is_a_plain_folder_name(tmp_path, study):
    with pytest.raises(ValueError, match="is not a plain name"):
        Run.create(tmp_path / "reports", study, PARAMS, "code")
    assert os.listdir(tmp_path) == []


def test_a_run_shows_itself_small_and_escaped(tmp_path):
    run = Run.create(tmp_path, "study", {"task": "<script>alert(1)</script>"}, "code")
    shown = run._repr_html_()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and len(shown) < 2000


def test_the_runs_of_one_study_or_of_all_are_found_by_study_and_name(tmp_path):
    finished = make_run(tmp_path, steps=12)
    unfinished = make_run(tmp_path, steps=12, seed=1, finished=False)
    other = make_run(tmp_path, steps=12, study="other")
    found = run_folders(tmp_path)
    assert [(run.study, run.id) for run in found] == [
        *sorted([("demo", finished.id), ("demo", unfinished.id)]), ("other", other.id)]
    assert [run.id for run in run_folders(tmp_path, "other")] == [other.id]
    flat = dict(flatten(finished.result))
    assert flat["space.n_params"] == 87_168 and flat["search.best_step"] == 10 and "rows" not in flat


def test_every_folder_with_a_part_of_a_run_is_found(tmp_path):
    parts = {"a": "params.json", "b": "log.jsonl", "c": "structure.json", "d": "result.json", "e": "notes.txt"}
    for name, file in parts.items():
        (tmp_path / "study" / name).mkdir(parents=True)
        (tmp_path / "study" / name / file).write_text("{}")
    assert [run.id for run in run_folders(tmp_path)] == ["a", "b", "c", "d"]
    assert run_folders(tmp_path / "none") == [] and run_folders(tmp_path / "none", "x") == []
    with pytest.raises(UnknownName, match="did you mean 'study'"):
        run_folders(tmp_path, "stady")


@pytest.mark.parametrize("folder, name", [("", "mine"), ("theirs", "theirs")])
def test_a_studys_runs_are_in_its_folder_or_in_another_studys(tmp_path, folder, name):
    class Asked:
        pass

    asked = Asked()
    asked.name, asked.folder = "mine", folder
    assert home(str(tmp_path), asked) == tmp_path / name


@pytest.mark.parametrize("name, content, fault, lost", [
    ("log.jsonl", None, "no log.jsonl", True),
    ("result.json", None, "no result.json", True),
    ("params.json", b"", "a params.json that is no JSON object", True),
    ("structure.json", b"[]", "a structure.json that is no JSON object", True),
    ("result.json", b"{\"task\": \"agr", "a result.json that is no JSON object", True),
    ("result.json", b"\xff\xfe", "a result.json that is no JSON object", True),
    ("log.jsonl", b"{}\n{", "a log.jsonl whose last line is cut off", False),
    ("log.jsonl", b"", None, False),
    ("log.jsonl", b"{}\n", None, False)])
def test_what_a_folder_lacks_is_said(tmp_path, name, content, fault, lost):
    run = make_run(tmp_path, steps=6)
    assert faults(run) == []
    (run.folder / name).unlink()
    if content is not None:
        (run.folder / name).write_bytes(content)
    assert faults(run) == faults(run, [name]) == ([fault] if fault else [])
    assert unreadable(run.folder / name) == (fault if lost else None)


def test_faults_are_in_the_order_of_the_files_and_only_of_those_asked_for(tmp_path):
    run = make_run(tmp_path, steps=6)
    for name in "result.json", "params.json":
        (run.folder / name).unlink()
    assert faults(run) == ["no params.json", "no result.json"]
    assert faults(run, ["structure.json", "result.json"]) == ["no result.json"]
