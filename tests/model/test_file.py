"A structure file may be anything: it loads, or it is refused in a sentence; no crash, no code run, memory bounded."
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structures import RANKS, in_part, searched

from s3pet_nb.learn.prune import random_units
from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.file import LARGEST, LARGEST_MASKS, SCHEMA
from s3pet_nb.model.space import LINEAR, NORM, SPACES, Rule, make_space
from s3pet_nb.model.structure import Structure, kept_space

RULES = (Rule("lora", LINEAR, {"r": 2}), Rule("bitfit", NORM), Rule("lowrank_adapter", "ffn", {"init": "glorot"}))


def made() -> Structure:
    space = make_space(tiny("bert"), RULES)
    p = torch.linspace(0.1, 0.9, len(space), dtype=torch.float64)
    return Structure.of(space, torch.ones(len(space), dtype=torch.bool), p, task="rte", method="s3pet", seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("file") / "structure.json"


@pytest.fixture(scope="module")
def text(path) -> str:
    made().save(path)
    return path.read_text()


def load(path: Path, content: str | bytes) -> Structure | None:
    "The structure, or None where it is refused as it should be."
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        return Structure.load(path)
    except ValueError as refused:
        said = str(refused)
        assert said.startswith(f"{path} is not a structure file: ") or "does not hold the masks of" in said
        assert len(said) < 3_000 and said.isprintable() or "\n" in said
        return None


def test_every_prefix_is_refused(path, text):
    content = text.rstrip()
    assert all(load(path, content[:end]) is None for end in range(len(content)))
    assert load(path, content) == made()


ODD = [None, True, -1, 0, 10 ** 400, 2 ** 63, -2 ** 70, 1e308, 1.5, "", "x", "../../etc/passwd", "/etc/passwd",
       "a" * 5_000, "lora", "\x00", "__import__('os').system('touch pwned')", [], {}, [[]], {"r": 1}, ["q"]]


def test_every_field_refuses_what_it_is_not(path, text):
    "Each field of the head, of a rule and of a module, with each odd value: what loads is still what it says."
    whole = json.loads(text)
    for part in [(), ("rules", 0), ("modules", 0), ("modules", 0, "settings"), ("shape",)]:
        there = whole
        for key in part:
            there = there[key]
        for name in list(there):
            before = there[name]
            for value in ODD:
                there[name] = value
                found = load(path, json.dumps(whole))
                if found is not None:
                    found.save(path)
                    assert Structure.load(path) == found
                    assert name in ("p", "score", "backbone", "family", "space", "task", "method", "version", "seed",
                                    "n_backbone", "budget", "roles", "lora_alpha", "settings", "layer", "role", "of",
                                    "n", "r", "path", "shape", "module", "rules") or value == before
            there[name] = before


@pytest.mark.parametrize("old, new, says", [
    ('"path": "bert', '"path": "../bert', "path is '../bert"),
    ('"path": "bert', '"path": "/etc/passwd bert', "path is '/etc/passwd bert"),
    ('"role": "q"', '"role": "../q"', "unknown role '../q'"),
    ('"stack": "encoder"', '"stack": "/etc"', "unknown stack '/etc'"),
    ('"n": 64', f'"n": {10 ** 30}', "too small or too large"),
    ('"n": 64', f'"n": {"9" * 5_000}', "Exceeds the limit"),
    ('"n": 64', '"n": -64', "n is '-64', which is too small or too large"),
    ('"n": 64', '"n": 1e400', "wrong type"),
    ('"r": 2', '"r": -2', "r of lora is -2; give a number above 0"),
    ('"r": 2', '"r": 1e999', "r of lora is inf"),
    ('"p": 0.', '"p": Infinity, "q": 0.', "Infinity is no number of JSON"),
    ('"module": "lora"', '"module": "os.system"', "unknown PET module 'os.system'"),
    ('"seed": 3', '"seed": 3, "seed": 4', "a name stands twice"),
    ('"backbone": "bert"', f'"backbone": "{"b" * 2_000}"', "too long or cannot be printed"),
    ('"backbone": "bert"', '"backbone": "b\\u0007rt"', "too long or cannot be printed"),
    ('"layer": 0', '"layer": -1', "layer is '-1'"),
    ('"masks": null', '"masks": "../../secret"', "masks is '../../secret'; it is the SHA-256"),
    ('"shape": {"encoder": [2, 16]}', '"shape": {"encoder": [2, -16]}', "the shape of stack 'encoder'"),
    ('"shape": {"encoder": [2, 16]}', '"shape": {"../": [2, 16]}', "the shape of stack '../'"),
    ('"shape": {"encoder": [2, 16]}', '"shape": {"decoder": [2, 16]}', "encoder.0.q.lora(r=2) is in no layer of"),
    ('"shape": {"encoder": [2, 16]}', '"shape": {"encoder": [1, 16]}', "encoder.1.q.lora(r=2) is in no layer"),
    (f'"schema": {SCHEMA}', '"schema": [4]', "its schema is '[4]', and schema 4 is read")])
def test_what_is_wrong_is_said(path, text, old, new, says):
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as refused:
        Structure.load(path)
    assert says in str(refused.value) and len(str(refused.value)) < 1_000


def test_a_module_that_stands_twice_is_refused(path, text):
    found = json.loads(text)
    found["modules"].append(found["modules"][0])
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="keeps a module twice"):
        Structure.load(path)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
                      | st.sampled_from([name for name in ODD if not isinstance(name, (list, dict))]),
                      lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
relaxed = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(st.binary(max_size=400) | values.map(json.dumps) | st.text(max_size=400))
def test_any_bytes_are_refused(path, content):
    assert load(path, content) is None


@relaxed
@given(st.data())
def test_a_file_with_changed_bytes_loads_as_what_it_says_or_is_refused(path, text, data):
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    found = load(path, bytes(content))
    if found is not None:
        found.save(path)
        assert Structure.load(path) == found


@relaxed
@given(st.data())
def test_a_file_with_a_changed_value_loads_as_what_it_says_or_is_refused(path, text, data):
    found = json.loads(text)
    there = data.draw(st.sampled_from([found, found["rules"][0], found["modules"][0], found["shape"],
                                       found["modules"][0]["settings"]]))
    name = data.draw(st.sampled_from([*sorted(there), "r"]) | st.text(max_size=8))
    if data.draw(st.booleans()):
        there[name] = data.draw(values)
    else:
        there.pop(name, None)
    loaded = load(path, json.dumps(found))
    if loaded is not None:
        loaded.save(path)
        assert Structure.load(path) == loaded
        try:
            with loaded.apply(tiny("bert")) as gated:
                assert gated.space.n_params == loaded.n_params
        except (ValueError, LookupError) as refused:
            assert "place" in str(refused) or "mask" in str(refused)


HUGE = {  # what is written, as pieces and how often
    "lines": ('{"schema": 4, "modules": [\n', '  {"stack": "encoder"},\n', 10_000_000, "]}"),
    "a line": ('{"schema": 4, "backbone": "', "bbbbbbbbbb", 20_000_000, '"}'),
    "nested": ("", "[", 5_000_000, ""), "nested objects": ("", '{"a":', 1_500_000, ""),
    "small objects": ('{"schema": 4, "modules": [', "{},", 2_600_000, "{}]}"),
    "a digit": ('{"schema": 4, "seed": ', "9", 7_000_000, "}"), "blanks": ("", " \n", 60_000_000, "{}")}
CODE = """
import resource, sys
from s3pet_nb.model.structure import Structure
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Structure.load(sys.argv[1])
except ValueError as refused:
    assert len(str(refused)) < 1_000, len(str(refused))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", HUGE)
def test_a_file_of_any_size_is_refused_in_bounded_memory(tmp_path, kind):
    "In a process of its own: at most 600 MB beyond what importing takes, of files of up to 230 MB."
    start, piece, times, end = HUGE[kind]
    path = tmp_path / "structure.json"
    with open(path, "w") as file:
        file.write(start)
        for _ in range(100):
            file.write(piece * (times // 100))
        file.write(end)
    ended = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-800:]
    assert int(ended.stdout) < 600, f"{ended.stdout.strip()} MB for a file of {path.stat().st_size:,} bytes"
    path.unlink()


def test_a_structure_of_every_module_of_a_large_model_is_far_below_the_limit(tmp_path):
    model = tiny("llama", num_hidden_layers=126)
    space = make_space(model, "exportable")
    Structure.of(space, torch.ones(len(space), dtype=torch.bool)).save(tmp_path / "structure.json")
    assert (tmp_path / "structure.json").stat().st_size < LARGEST / 10


def test_a_module_larger_than_its_backbone_is_refused_before_anything_is_built(path, text):
    n = 10 ** 10 * 32
    path.write_text(text.replace('"settings": {"r": 2}, "n": 64, "of": 64',
                                 f'"settings": {{"r": {10 ** 10}}}, "n": {n}, "of": {n}', 1))
    with pytest.raises(ValueError, match="has no place of its size"):
        with Structure.load(path).apply(tiny("bert")):
            pass


def test_masks_larger_than_any_are_not_read(tmp_path):
    space = make_space(tiny("bert"), RULES)
    random_units(space, 300, "unstructured", 0).save(tmp_path / "structure.json")
    with open(tmp_path / "structure.safetensors", "r+b") as file:
        file.truncate(LARGEST_MASKS + 1)
    with pytest.raises(ValueError, match="does not hold the masks of .*: it has more than 100,000,000 bytes"):
        Structure.load(tmp_path / "structure.json")


@pytest.mark.parametrize("space", [*SPACES, RANKS], ids=[*SPACES, "custom"])
def test_a_structure_comes_back_with_the_rules_of_its_space(tmp_path, space):
    structure = searched(space, B=300, task="rte", seed=3)
    structure.save(tmp_path / "structure.json")
    again = Structure.load(tmp_path / "structure.json")
    assert again == structure and len(again) > 1
    assert again.rules == make_space(tiny("bert"), space).rules
    assert again.rules == (RANKS if space is RANKS else SPACES[space])
    assert make_space(tiny("bert"), again.rules).candidates == make_space(tiny("bert"), space).candidates
    lines = (tmp_path / "structure.json").read_text().splitlines()
    assert sum('"roles"' in line for line in lines) == len(again.rules)
    assert sum('"path"' in line for line in lines) == len(again)


@pytest.mark.parametrize("old, new, says", [
    ('"schema": 4', '"schema": 5', "its schema is '5', and schema 4 is read; make the structure again, or"),
    ('"schema": 4', '"schema": 1', "its schema is '1', and schema 4 is read; make the structure again, or"),
    ('"schema": 4', '"schema": true', "its schema is 'True', and schema 4 is read; make the structure again, or"),
    ('"schema": 4', '"schema": 3', "its schema is '3', and schema 4 is read; make the structure again, or"),
    ('"schema": 4', '"schema": 2', "its schema is '2', and schema 4 is read; make the structure again, or"),
    ('"masks": null', '"masks": 3', "masks is '3', which is of the wrong type"),
    ('"masks": null', '"mask": null', "fields mask, masks are not as expected"),
    ('"shape": ', '"shapes": ', "fields shape, shapes are not as expected"),
    ('"of": ', '"of": 1', "in part and there are no masks"),
    ('"score": null', '"score": NaN', "NaN is no number of JSON"),
    ('"score": null', '"score": true', "score is 'True', which is of the wrong type"),
    ('"module": "lora", "roles"', '"module": "lorra", "roles"', "unknown PET module 'lorra'"),
    ('"roles": ["q"', '"roles": ["query"', "unknown role 'query'"),
    ('"roles": ["q"', '"roles": [["q"]', "unknown role"),
    ('"roles": ["q", "v"]', '"roles": "q"', "roles is 'q', which is of the wrong type"),
    ('"settings": {"r": 2}', '"settings": {"rank": 2}', "unknown setting of lora 'rank'"),
    ('"settings": {"r": 2}', '"settings": {"r": "2"}', "r of lora is '2'"),
    ('"settings": {"r": 2}', '"settings": {"r": [2]}', "r of lora is"),
    ('"settings": {"r": 2}', '"settings": [2]', "settings is"),
    ('"settings": {"r": 2}}', '"settings": {"r": 2}, "more": 1}', "fields more are not as expected"),
    ('"rules": [', '"rules": [3, ', "fields are missing"),
    ('"rules": [', '"rule": [', "it has no list of rules")])
def test_rules_in_a_file_are_checked(tmp_path, old, new, says):
    path = tmp_path / "structure.json"
    searched(RANKS).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"is not a structure file: .*{re.escape(says)}"):
        Structure.load(path)


@pytest.mark.parametrize("settings, says", [({"rank": 2}, "unknown setting"), ({"r": True}, "r of lora is"),
                                            ({"r": 2.0}, "r of lora is 2.0")])
def test_settings_of_a_kept_module_are_checked(tmp_path, settings, says):
    path = tmp_path / "structure.json"
    searched(RANKS).save(path)
    file = json.loads(path.read_text())
    kept = next(line for line in file["modules"] if line["module"] == "lora")
    kept["settings"] = settings
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=says):
        Structure.load(path)


def test_modules_in_part_come_back_from_the_two_files(tmp_path):
    path = tmp_path / "found.json"
    for draw in range(4):
        structure = in_part(draw)
        structure.save(path)
        assert Structure.load(path) == structure
        assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "found.safetensors"]
        file = json.loads(path.read_text())
        assert file["masks"] == hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
        assert set(file["modules"][0]) == {"stack", "layer", "role", "module", "settings", "n", "of", "p",
                                           "score", "path"}
    first = path.with_suffix(".safetensors").read_bytes()
    Structure.load(path).save(path)
    assert path.with_suffix(".safetensors").read_bytes() == first, "the same structure, byte for byte"
    searched().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"] and Structure.load(path) == searched()


def test_another_file_of_the_sidecars_name_is_neither_written_over_nor_removed(tmp_path):
    weights, path = tmp_path / "model.safetensors", tmp_path / "model.json"
    for content in safetensors.numpy.save({"w": np.ones(3)}), b"no safetensors":
        weights.write_bytes(content)
        with pytest.raises(FileExistsError, match="is not free for the masks"):
            in_part().save(path)
        assert not path.exists()
        searched().save(path)
        assert weights.read_bytes() == content and Structure.load(path) == searched()
        path.unlink()


def spoil(path: Path, change) -> None:
    "Change the masks and make the sum in the structure file agree, as a maker of such files could."
    beside = path.with_suffix(".safetensors")
    masks = safetensors.numpy.load(beside.read_bytes())
    beside.write_bytes(safetensors.numpy.save(change(dict(masks))))
    file = json.loads(path.read_text())
    file["masks"] = hashlib.sha256(beside.read_bytes()).hexdigest()
    path.write_text(json.dumps(file))


FIRST = "encoder.0.q.lora(r=4,init=balanced).A"


@pytest.mark.parametrize("change, says", [
    (lambda masks: masks | {FIRST: 255 - masks[FIRST]}, r"entries of encoder.0.q.lora\(r=4,.*\), not"),
    (lambda masks: {k: m for k, m in masks.items() if k != FIRST}, "entries of encoder.0.q.lora"),
    (lambda masks: masks | {"encoder.9.q.lora.A": masks[FIRST]}, "encoder.9.q.lora.A is no mask of a kept"),
    (lambda masks: masks | {FIRST: masks[FIRST].astype(np.int32)}, "A is no mask of a kept"),
    (lambda masks: {}, "keeps 0 of")])
def test_masks_that_do_not_agree_with_the_counts_are_refused(tmp_path, change, says):
    path = tmp_path / "structure.json"
    in_part().save(path)
    assert FIRST in safetensors.numpy.load(path.with_suffix(".safetensors").read_bytes())
    spoil(path, change)
    with pytest.raises(ValueError, match=f"does not hold the masks of .*{says}.*; copy both files"):
        Structure.load(path)


@pytest.mark.parametrize("spoilt", [None, b"", b"\0" * 40, "other"])
def test_a_missing_torn_or_foreign_sidecar_is_named(tmp_path, spoilt):
    path, beside = tmp_path / "structure.json", tmp_path / "structure.safetensors"
    in_part().save(path)
    if spoilt is None:
        beside.unlink()
    elif spoilt == "other":
        in_part(1).save(tmp_path / "other.json")
        beside.write_bytes((tmp_path / "other.safetensors").read_bytes())
    else:
        beside.write_bytes(spoilt)
    why = "it is missing" if spoilt is None else "it was not saved with this structure"
    says = f"^{beside} does not hold the masks of {path}: {why}; copy both files$"
    with pytest.raises(ValueError, match=says):
        Structure.load(path)


def test_bytes_that_are_no_safetensors_are_refused_even_if_the_sum_agrees(tmp_path):
    path = tmp_path / "structure.json"
    in_part().save(path)
    path.with_suffix(".safetensors").write_bytes(b"\xff" * 64)
    file = json.loads(path.read_text())
    path.write_text(json.dumps(file | {"masks": hashlib.sha256(b"\xff" * 64).hexdigest()}))
    with pytest.raises(ValueError, match="does not hold the masks of .*; copy both files"):
        Structure.load(path)


def test_a_save_that_fails_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    from s3pet_nb.model import file
    path = tmp_path / "structure.json"
    in_part().save(path)

    def full_disk(path, text):
        raise OSError("No space left on device")

    monkeypatch.setattr(file, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        in_part(1).save(path)
    with pytest.raises(ValueError, match="was not saved with this structure; copy both files"):
        Structure.load(path)


def renamed(masks: dict) -> dict:
    return {name.replace(").A", ").C"): mask for name, mask in masks.items()}


def longer(masks: dict) -> dict:
    return masks | {FIRST: np.append(masks[FIRST], np.uint8(0))}


@pytest.mark.parametrize("change, says", [
    (renamed, "masks of encoder.0.q.lora.* are not those of its weights"),
    (longer, "a mask of 64 entries has 8 bytes, not 9")])
def test_masks_that_do_not_fit_the_weights_are_refused_before_anything_is_built(tmp_path, change, says):
    path = tmp_path / "structure.json"
    in_part().save(path)
    spoil(path, change)
    with pytest.raises(ValueError, match=says):
        kept_space(tiny("bert"), Structure.load(path))


def test_a_bit_behind_the_last_entry_keeps_nothing(tmp_path):
    model = tiny("bert", hidden_size=12)
    space = make_space(model, [Rule("bitfit", "q")])
    mask = torch.arange(12) < 5
    structure = Structure.pruned(space, {f"{candidate.name}.b": mask for candidate in space.candidates})
    path = tmp_path / "structure.json"
    structure.save(path)
    spoil(path, lambda masks: {name: np.array([0b11110000, 0b00000001], np.uint8) for name in masks})
    with pytest.raises(ValueError, match="masks of encoder.0.q.bitfit are not those of its weights"):
        kept_space(model, Structure.load(path))
