"Settings that every test shares, and the real data where they are."
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "Small tensors on shared cores: more threads only wait for each other."
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    "Tokenised rows of tests, also of the processes that they start, stay out of the user's cache."
    os.environ["S3PET_CACHE"] = str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "The folder that S3PET_DATA names; without it the test is skipped, or fails if S3PET_REQUIRE_DATA=1."
    folder = os.environ.get("S3PET_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"no data folder: S3PET_DATA is {folder!r}"
    if os.environ.get("S3PET_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    "Chromium; without it the test is skipped, or fails if S3PET_REQUIRE_BROWSER=1."
    executable = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if executable is None or sync_playwright is None:
        reason = "no browser: install chromium from your system's packages and `pip install playwright`"
        if os.environ.get("S3PET_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield chromium
        chromium.close()
