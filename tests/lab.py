"JupyterLab on loopback and a notebook in it, as a browser sees them."
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
TOKEN = "token-of-a-test"
STATUS, DRAWN = ".s3pet-status", ".s3pet-lab .js-plotly-plot"
MINUTE = 60_000  # milliseconds


def notebook(path: Path, *cells: str) -> None:
    "Write a notebook of code cells."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)


@contextmanager
def jupyterlab(folder: Path, **environment: str) -> Iterator[str]:
    "The address of a `s3pet lab` on the notebooks of a folder."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / ".jupyter").mkdir()
    (folder / ".jupyter" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    own = {"JUPYTER_TOKEN": TOKEN, "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"), "PYTHONPATH": str(ROOT),
           "JUPYTER_DATA_DIR": str(folder / ".data")}
    command = [sys.executable, "-c", "from s3pet_nb.cli import main; main()", "lab", ".", "--port", str(port),
               "--no-browser"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own | environment, stdout=log,
                                  stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        else:
            raise TimeoutError((folder / "server.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


class Page:
    "A notebook that is open in JupyterLab."

    def __init__(self, browser, address, name, **settings):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1500}, **settings)
        self.asked, self.complaints = [], []
        for kind in "request", "websocket":
            self.page.on(kind, lambda asked: self.asked.append(asked.url))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = f"{address}/lab/tree/{name}?reset&token={TOKEN}"
        self.open()

    def open(self):
        self.page.goto(self.address)
        self.page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=MINUTE)
        self.page.get_by_text("| Idle").wait_for(timeout=MINUTE)

    def run_all(self):
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def wait(self, script, timeout=MINUTE, argument=None):
        return self.page.wait_for_function(script, arg=argument, timeout=timeout)

    @property
    def step(self):
        found = re.search(r"step ([\d,]+) of", self.page.locator(STATUS).first.inner_text())
        return int(found[1].replace(",", "")) if found else 0

    def until_step(self, step):
        self.wait("""step => Number(((document.querySelector('.s3pet-status')?.innerText ?? '')
                     .match(/step ([\\d,]+) of/)?.[1] ?? '0').replaceAll(',', '')) >= step""", argument=step)

    def button(self, name):
        return self.page.locator(".s3pet-lab").get_by_role("button", name=name)

    def heat(self):
        return self.page.evaluate(f"JSON.stringify(document.querySelector('{DRAWN}').data[0].z)")

    def points(self):
        return self.page.evaluate(f"document.querySelectorAll('{DRAWN}')[1].data[0].x.length")

    def close(self):
        assert not self.complaints, self.complaints
        assert all(re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:|about:", url) for url in self.asked)
        self.page.close()
