"Whole files, and what is left of a writer that was killed; tables."
import os
import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from s3pet_nb.core import lives, table, write_text, writing

TORN = """\
import os, signal, sys
from s3pet_nb.core import writing
with writing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.fixture
def left(tmp_path):
    "An unfinished file of a writer that was killed."
    subprocess.run([sys.executable, "-c", TORN, str(tmp_path / "structure.json")])
    (file,) = tmp_path.glob(".*.tmp")
    assert file.read_bytes() == b"half" and not (tmp_path / "structure.json").exists()
    return file


def elsewhere(file):
    "The same file, of a writer on another machine."
    return file.rename(file.with_name(re.sub(r"\.[0-9a-f]{8}-", ".ffffffff-", file.name)))


def test_the_next_writer_in_the_folder_removes_what_a_killed_one_left(tmp_path, left):
    write_text(tmp_path / "result.json", "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_writer_that_ended_and_was_not_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", TORN, str(tmp_path / "structure.json")])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not lives(process.pid) and len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "result.json", "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    process.wait()


def test_a_writer_that_lives_is_left_alone(tmp_path):
    with writing(tmp_path / "slow.json") as file:
        file.write(b"whole")
        write_text(tmp_path / "result.json", "{}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result.json", "slow.json"]
    assert (tmp_path / "slow.json").read_bytes() == b"whole"


@pytest.mark.parametrize("hours, stays", [(23, True), (25, False)])
def test_a_writer_elsewhere_is_dead_after_a_day_alone(tmp_path, left, hours, stays):
    far = elsewhere(left)
    then = time.time() - 3600 * hours
    os.utime(far, (then, then))
    write_text(tmp_path / "result.json", "{}")
    assert far.exists() is stays


@pytest.mark.parametrize("name", [".notes.tmp", ".structure.json.1.tmp", "structure.json.tmp", ".a.00000000-x-00000000.tmp"])
def test_files_of_others_are_not_touched(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "result.json", "{}")
    assert (tmp_path / name).exists()


def test_a_file_that_fails_midway_leaves_nothing_and_the_old_one(tmp_path):
    write_text(tmp_path / "result.json", "old")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "result.json") as file:
        file.write(b"new")
        1 / 0
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_a_table_escapes_and_aligns():
    frame = pd.DataFrame({"label": ["<img src=x>", "lora-r1"], "n_params": [41_472, 48], "ratio": [1.86e-4, 0.5],
                          "test": [0.82, 0.7], "layer": pd.array([3, None], "Int64")})
    shown = table(frame, "a < b")
    assert "<img" not in shown and "&lt;img src=x&gt;" in shown and "<caption>a &lt; b</caption>" in shown
    assert '<td style="text-align:right">41,472</td>' in shown
    assert '<td style="text-align:left">lora-r1</td>' in shown and ">n params</th>" in shown
    assert ">1.86e-04<" in shown and ">0.820<" in shown and ">–<" in shown
    assert shown._repr_html_() == shown and repr(shown) == f"Html of {len(shown):,} characters"


def test_a_table_has_bold_cells_links_and_parts():
    frame = pd.DataFrame({"row": ["a", "b", "c"], "run": ["0123", "x\"y", "<z>"], "part": [1, 1, 2]})
    shown = table(frame, bold={"row": [False, True, False]}, links={"run": ["../a b/r.html", None, "\"><i>"]},
                  parted=["part"], target="_blank")
    lines = shown.splitlines()[1:4]
    assert [line.startswith('<tr class="begins">') for line in lines] == [False, False, True]
    assert "<b>b</b>" in lines[1] and shown.count("<b>") == 1
    assert '<td style="text-align:left"><a href="../a%20b/r.html" target="_blank">0123</a></td>' in lines[0]
    assert "<i>" not in shown and "<z>" not in shown and "href" not in lines[1]


@pytest.mark.parametrize("texts, side", [
    (["1,234", "–"], "right"), (["59.3 ± 4.8", "7"], "right"), (["−0.2 to 3.4", "< 0.001"], "right"),
    (["3 of 5", "2 of 5"], "right"), (["21 bitfit, 2 lnfit", "3"], "left"), (["1,2;3", "4"], "left"), ([], "left")])
def test_numbers_in_words_stand_right_as_well(texts, side):
    shown = table(pd.DataFrame({"column": pd.Series(texts, dtype=object)}))
    assert shown.startswith(f'<table class="numbers"><thead><tr><th style="text-align:{side}">')
