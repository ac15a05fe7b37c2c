"The example run: it is what a search leaves, and the same each time."
import pytest

from s3pet_nb.lab.example import example_run
from s3pet_nb.lab.plot import p_frame
from s3pet_nb.model.structure import Structure


def files(run):
    return {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}


def test_the_same_arguments_give_the_same_files(tmp_path):
    one, same, other = (example_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert set(files(one)) == {"params.json", "log.jsonl", "structure.json", "result.json"}
    assert files(one) == files(same) and one.id == same.id != other.id
    assert p_frame(one).p.tolist() != p_frame(other).p.tolist()


@pytest.mark.parametrize("budget", [16, 50, 100, 176])
def test_the_structure_is_what_the_gates_select_under_the_budget(tmp_path, budget):
    run = example_run(tmp_path, budget=budget)
    structure = Structure.load(run.folder / "structure.json")
    frame = p_frame(run.records(), B=budget)
    assert {kept.path for kept in structure.modules} == set(frame.name[frame.selected])
    assert structure.n_params == run.result["rows"][0]["n_params"] <= budget
    assert frame.p.tolist() == pytest.approx(p_frame(run).p.tolist(), abs=1e-9)


def test_a_search_logs_what_the_figures_read(tmp_path):
    records = example_run(tmp_path).records()
    steps = [record for record in records if record["event"] == "step" and record["phase"] == "search"]
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert all(abs(record["expected_size"] - 50) < 1e-6 for record in steps)
    assert [record["step"] for record in records if record["event"] == "gates"] == [0, 20, 40]
