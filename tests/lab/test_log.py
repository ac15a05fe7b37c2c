"A log that grows: what was read is read once, whatever is done to the file."
import json

import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import log
from s3pet_nb.lab.log import Tail, Thinned, duration, find_run
from s3pet_nb.lab.store import Run


def lines(steps, **more):
    return "".join(json.dumps({"step": step} | more) + "\n" for step in steps)


def test_a_line_is_given_once_and_whole_whenever_it_was_cut(tmp_path):
    whole, seen = lines(range(3)).encode(), []
    tail = Tail(tmp_path / "log.jsonl")
    assert tail.read() == ([], False) and not tail.more
    for byte in range(len(whole)):
        with open(tail.path, "ab") as file:
            file.write(whole[byte:byte + 1])
        records, again = tail.read()
        assert not again and tail.cut == (whole[byte:byte + 1] != b"\n") and tail.more == bool(records)
        seen += records
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}] and tail.place == len(whole)


def test_a_long_log_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CHUNK", 1000)
    (tmp_path / "log.jsonl").write_text(lines(range(500)))
    tail, pieces = Tail(tmp_path / "log.jsonl"), []
    while not pieces or tail.more:
        pieces.append(tail.read()[0])
    assert [record["step"] for piece in pieces for record in piece] == list(range(500))
    assert max(map(len, pieces)) < 100 < sum(map(bool, pieces)) * 100 and tail.read() == ([], False)


def test_what_is_no_record_is_counted_and_passed_over(tmp_path):
    tail = Tail(tmp_path / "log.jsonl")
    tail.path.write_bytes(b'{"step": 1}\nno JSON\n[2]\n\xff\n\n{"step": 3}\n')
    assert tail.read() == ([{"step": 1}, {"step": 3}], False) and tail.faults == 4
    tail.path.write_text(lines(range(100, 120)))
    assert tail.read()[1] and tail.faults == 0, "another file has its own faults"


def test_a_thinned_row_keeps_its_ends_an_even_pace_and_every_count(tmp_path):
    thinned = Thinned(most=10)
    assert thinned.frame(["step"]).empty
    for step in range(1, 96):
        thinned.add({"step": step, "loss": 1 / step})
        frame = thinned.frame(["step", "loss", "score"])
        assert frame.step.iloc[0] == 1 and frame.step.iloc[-1] == step and len(frame) <= 11
        assert frame.step.diff()[1:-1].nunique() <= 1 and frame.score.isna().all()
    assert thinned.count == 95 and thinned.every == 16


def test_a_run_is_found_by_itself_its_folder_and_its_name(tmp_path):
    run = Run.create(tmp_path, "one", {"seed": 0}, "")
    assert find_run(run) is run
    assert find_run(run.folder).folder == find_run(str(run.folder)).folder == find_run(run.id, tmp_path).folder
    with pytest.raises(UnknownName, match=f"unknown run under .* did you mean '{run.id}'"):
        find_run(run.id[:-1] + "x", tmp_path)
    other = Run.create(tmp_path, "two", {"seed": 0}, "")
    with pytest.raises(ValueError, match=f"is in 2 studies, {run.folder} and {other.folder}; give one of"):
        find_run(run.id, tmp_path)


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.4, "59 min 59 s"), (3600, "1 h 0 min"),
    (90_000, "25 h 0 min")])
def test_a_duration_is_said_in_two_parts(seconds, text):
    assert duration(seconds) == text
