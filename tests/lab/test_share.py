"A trained structure as files: what is torn or foreign is refused, the card is text, the hub gets four files."
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml

from s3pet_nb.core import write_text
from s3pet_nb.lab.share import DELTA, card, from_hub, load, push_to_hub, read, save
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.train import TrainConfig, finetune, retrain
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import Structure, select

NASTY = ("it's <img src=x onerror=alert(1)> | `x` {y}\n# z ![i](https://evil.example/t.png) [l](https://evil.example) "
         "**b**")


def training(**about):
    model = tiny("bert")
    space = make_space(model)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Structure.of(space, select(p, space.n, 300), p, **{"task": "rte", "budget": 300, "method": "s3pet"} | about)
    data = [example_batch(model, seed=seed) for seed in range(2)]
    config = TrainConfig(3, lr=1e-2, evaluate_every=3)
    return model, data, retrain(model, found, data, data, config=config, callbacks=[])


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "run", training()[2], "classify")
    return tmp_path / "run"


def reach(folder: Path, change) -> None:
    "Write the weights anew, with other tensors or metadata."
    with safetensors.safe_open(folder / DELTA, "pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(told, tensors)
    safetensors.torch.save_file(tensors, folder / DELTA, told)


@pytest.mark.parametrize("change, says", [
    (lambda told, tensors: told.pop("holds"), "its metadata are not those of trained weights"),
    (lambda told, tensors: told.update(seed="-1"), "its metadata are not"),
    (lambda told, tensors: told.update(seed="9" * 40), "its metadata are not"),
    (lambda told, tensors: told.update(head="../x"), "its metadata are not"),
    (lambda told, tensors: told.update(n_labels="two"), "its metadata are not"),
    (lambda told, tensors: told.update(structure="0" * 64), "of another structure than the one beside"),
    (lambda told, tensors: told.update(n_labels="3000000"), "its head has no weight of so many rows"),
    (lambda told, tensors: tensors.update(more=torch.zeros(10 ** 6)), "1,000,288 weights, and the structure 288"),
    (lambda told, tensors: tensors.pop(next(name for name in tensors if not name.startswith("head."))),
     "and the structure 288")])
def test_weights_that_do_not_belong_are_refused(folder, change, says):
    reach(folder, change)
    with pytest.raises(ValueError, match=f"{DELTA} cannot be used: .*{says}"):
        read(folder)


@pytest.mark.parametrize("end", [0, 7, 200, -1])
def test_torn_weights_are_refused(folder, end):
    content = (folder / DELTA).read_bytes()
    (folder / DELTA).write_bytes(content[:end])
    with pytest.raises(ValueError, match="cannot be used"):
        read(folder)
    (folder / DELTA).unlink()
    with pytest.raises(FileNotFoundError, match="give the folder of a run that is done"):
        read(folder)


def test_names_of_weights_that_the_model_has_not_are_refused_when_they_are_put_on(folder):
    reach(folder, lambda told, tensors: tensors.update({"head.other": tensors.pop("head.classifier.weight")}))
    model = tiny("bert")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="belong to another structure"), load(model, folder):
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_that_was_trained_whole_is_no_structure(tmp_path):
    model, data, _ = training()
    whole = finetune(model, data, data, config=TrainConfig(1, evaluate_every=1), callbacks=[])
    with pytest.raises(ValueError, match="the whole model was trained; save it with its own save_pretrained"):
        save(tmp_path / "run", whole, "classify")


def test_a_card_is_text_whatever_names_there_are(tmp_path):
    model, _, trained = training(task=" ".join(NASTY.split()))
    save(tmp_path / "run", trained, "classify")
    run = Run(tmp_path / "run")
    run.save_result({"metric": NASTY, "rows": [
        {"label": NASTY, "n_params": 288, "validation": 0.5, "test": None},
        {"n_params": NASTY, "validation": NASTY, "test": [NASTY]},
        {"label": "random-1", "n_params": 280, "validation": 0.25, "test": 0.125}]})
    text = card(tmp_path / "run", 'me/"x"')
    assert "<img" not in text and "](https" not in text and "**b" not in text
    assert "it's &lt;img src=x onerror=alert(1)&gt; &#124; &#96;x&#96; {y} &#35; z" in text
    assert not re.search(r"^# z", text, re.M) and "| seed | 0 |" in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "s3pet_nb" and head["base_model"] == "bert"
    assert "| random-1 " in text and "0.1250" in text and re.search(r"\| +– \| +– \| +– \|", text)
    sizes = sum(int(n.replace(",", "")) for line in text.split("## Where they are")[1].split("##")[0].splitlines()
                if line.startswith("| encoder") for n in re.findall(r"[·░▒▓█] ([\d,]+)", line))
    assert sizes == trained.structure.n_params
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_hub_gets_our_files_and_the_card_and_gives_them_back(folder, tmp_path, monkeypatch):
    "The hub is a folder here: what is uploaded lies in it, what is downloaded is what the patterns ask for."
    hub = tmp_path / "hub"

    def create_repo(repo_id, private, exist_ok):
        assert private and exist_ok
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def create_commit(repo_id, operations, commit_message):
        for operation in operations:
            with operation.as_file() as content:
                (hub / repo_id / operation.path_in_repo).write_bytes(content.read())

    def snapshot_download(repo_id, revision, allow_patterns):
        here = tmp_path / "cache" / (revision or "main")
        here.mkdir(parents=True)
        for name in allow_patterns:
            if (hub / repo_id / name).exists():
                shutil.copyfile(hub / repo_id / name, here / name)
        return str(here)

    for function in create_repo, create_commit, snapshot_download:
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    (folder / "log.jsonl").write_text("{}")
    assert push_to_hub(folder, "me/rte") == "https://hub/me/rte"
    assert sorted(path.name for path in (hub / "me/rte").iterdir()) == ["README.md", DELTA, "structure.json"]
    (hub / "me/rte" / "evil.py").write_text("raise SystemExit")
    here = from_hub("me/rte", revision="v1")
    assert sorted(path.name for path in here.iterdir()) == [DELTA, "structure.json"]
    model, batch = tiny("bert"), example_batch(tiny("bert"))
    with load(model, here) as mine, torch.no_grad():
        logits = mine(**batch).logits
    with load(model, folder) as gated, torch.no_grad():
        assert torch.equal(gated(**batch).logits, logits)


def test_nothing_is_sent_of_a_folder_that_does_not_hold_together(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *given, **more: pytest.fail("sent"))
    write_text(folder / "structure.json", (folder / "structure.json").read_text().replace('"rte"', '"cola"'))
    with pytest.raises(ValueError, match="of another structure"):
        push_to_hub(folder, "me/rte")


def test_a_head_that_gives_a_number_has_one_output(tmp_path):
    model = tiny("bert", "regress", num_labels=1)
    space = make_space(model, "bias")
    found = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    data = [example_batch(model) | {"labels": torch.zeros(4)}]
    save(tmp_path, retrain(model, found, data, data, config=TrainConfig(1, evaluate_every=1), callbacks=[]), "regress")
    assert (read(tmp_path).head, read(tmp_path).n_labels) == ("regress", 1)


def test_what_would_not_be_read_is_not_written(tmp_path):
    model, _, trained = training()
    for given, says in ((("classification",), "unknown head 'classification'; did you mean 'classify'"),
                        (("classify", 3), "n_labels is 3, and its head has no weight of so many rows")):
        with pytest.raises((ValueError, LookupError), match=says):
            save(tmp_path / "run", trained, *given)
    assert not (tmp_path / "run").exists()


class Refuses(BaseHTTPRequestHandler):
    "A hub that knows nobody."

    def do_POST(self):
        body = b'{"error": "Invalid username or password."}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST

    def log_message(self, *given):
        pass


ASK = """\
import sys
from s3pet_nb.lab.share import from_hub, push_to_hub
for asked in (lambda: push_to_hub(sys.argv[1], "me/rte")), (lambda: from_hub("me/rte")):
    try:
        asked()
    except OSError as refused:
        print(" ".join(str(refused).split()))"""


def ask_both(port, folder, home):
    "What pushing to the hub at a port of this machine, and fetching from it, end with."
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0",
                                "HF_HOME": str(home), "HF_TOKEN": "hf_none"}
    told = subprocess.run([sys.executable, "-c", ASK, str(folder)], env=environment, capture_output=True, text=True,
                          check=True)
    return told.stdout.splitlines()


def test_a_hub_that_refuses_is_one_sentence(folder, tmp_path):
    "The real client of the hub, asking a server on loopback."
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = ask_both(server.server_port, folder, tmp_path / "home")
        server.shutdown()
    assert len(said) == 2
    for sentence in said:
        assert sentence.startswith("the hub gave no access to 'me/rte' (Client error '401 Unauthorized' for url ")
        assert sentence.endswith("; check the name and the network, and log in with `hf auth login`")


def test_a_hub_that_is_not_there_is_one_sentence(folder, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and never listening
        pushed, fetched = ask_both(nobody.getsockname()[1], folder, tmp_path / "home")
    assert pushed.startswith("the hub gave no access to 'me/rte' (") and "Connection refused" in pushed
    assert "Connection refused" in fetched


@pytest.mark.parametrize("backbone", ["/home/me/bert", "./my/bert", "minilm", "a b", "a/b/c"])
def test_only_a_name_of_the_hub_is_a_base_model(tmp_path, backbone):
    _, _, trained = training()
    save(tmp_path / "run", replace(trained, structure=replace(trained.structure, backbone=backbone)), "classify")
    assert "base_model" not in yaml.safe_load(card(tmp_path / "run", "me/x").split("---\n")[1])
