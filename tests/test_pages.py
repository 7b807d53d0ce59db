"""The pages of a run and of the runs beside it: what they hold, and in a browser what they show."""

import json
import re
import shutil
import subprocess

import pytest

import pix2pix
from conftest import side_by_side
from support.plots import write_page

ODD = """javascript:alert(1) #?<"'%"""  # the name of a run folder
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    data = side_by_side(root / "data </script><b>")
    run = ["--data", str(data), "--size", "64", "--width", "2", "--batch-size", "2", "--epochs"]
    for name, more in (("first", []), ("second", ["--lambda-l1", "10"])):
        out = ["--out", str(root / "runs" / name), "--cache", str(root / "cache")]
        pix2pix.main([*run, "2", "--log-every", "1", *out, *more])
    shutil.copytree(root / "runs" / "first", root / "runs" / ODD)
    write_page(root / "runs" / ODD)
    return root / "runs"


def data_of(page):
    text = page.read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', text)
    assert "<" not in data  # no name can end the element
    return json.loads(data)


def test_a_runs_page_holds_what_the_run_came_to(runs):
    data = data_of(runs / "second" / "index.html")
    assert data["samples"] == ["epoch_0001.png", "epoch_0002.png"] and data["epoch"] == 2
    assert data["steps"] == [1, 2, 3, 4, 5, 6] and data["columns"]["g_l1"][0] > 0
    scores = data["columns"]["val_rmse"]
    assert scores[:2] == [None, None] and scores[2] > 0 and scores[5] > 0
    assert "model" in data["evaluation"]["rows"]
    assert (data["options"]["lambda_l1"], data["defaults"]["lambda_l1"]) == (10, 100)


def test_the_page_of_all_runs_lists_them(runs):
    """A name is text there, but encoded as a part of a link."""
    found = {run["name"]: run["folder"] for run in data_of(runs / "index.html")}
    link = "javascript%3Aalert%281%29%20%23%3F%3C%22%27%25"
    assert found == {"first": "first", "second": "second", ODD: link}


def test_no_page_is_written_around_a_folder_of_another_name(runs):
    assert not (runs.parent / "index.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_them(runs, tmp_path):
    for page, texts in (
        (runs / "first" / "index.html", ["<figcaption><span>g_l1", "samples/epoch_0002.png", "M"]),
        (runs / "index.html", ['href="./second/index.html"', "--lambda-l1 10"]),
        (runs / "index.html", ['href="./javascript%3Aalert%281%29%20%23%3F']),
    ):
        call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        call += [f"--user-data-dir={tmp_path}", page.as_uri()]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
        assert all(text in done.stdout for text in texts), done.stdout[-2000:] + done.stderr
        assert "<b>" not in done.stdout.split('id="data"')[0]
