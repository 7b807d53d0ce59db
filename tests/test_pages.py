"""The page of a run: what it holds, and in a browser what it shows."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

import pix2pix
from files import side_by_side
from pages import BROWSER
from support.plots import write_page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    data = side_by_side(root / "data </script><b>")
    run = ["--data", str(data), "--size", "64", "--width", "2", "--batch-size", "2", "--epochs"]
    out = root / """<b>#?"'%"""
    pix2pix.main([*run, "2", "--log-every", "1", "--lambda-l1", "10", "--out", str(out)])
    return out / "index.html"


def data_of(page):
    text = page.read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', text)
    assert "<" not in data  # no name can end the element
    return json.loads(data)


def test_a_runs_page_holds_what_the_run_came_to(page):
    data = data_of(page)
    assert data["samples"] == ["epoch_0001.png", "epoch_0002.png"] and data["epoch"] == 2
    assert data["steps"] == [1, 2, 3, 4, 5, 6] and data["columns"]["g_l1"][0] > 0
    scores = data["columns"]["val_rmse"]
    assert scores[:2] == [None, None] and scores[2] > 0 and scores[5] > 0
    assert "model" in data["evaluation"]["rows"]
    assert (data["options"]["lambda_l1"], data["defaults"]["lambda_l1"]) == (10, 100)
    assert shlex.split(data["out"]) == [str(page.parent)]
    assert data["name"] == page.parent.name and not {"epoch", "step"} & data["columns"].keys()


def test_scores_of_a_long_run_are_kept(page, tmp_path):
    for name in ("config.json", "evaluation.json"):
        shutil.copy(page.with_name(name), tmp_path)
    rows = [f"{k // 1000 + 1},{k},{k if k % 1000 == 999 else ''}" for k in range(5000)]
    (tmp_path / "metrics.csv").write_text("\n".join(["epoch,step,val_rmse", *rows]))
    write_page(tmp_path)
    scores = data_of(tmp_path / "index.html")["columns"]["val_rmse"]
    assert len(scores) < 2010 and [x for x in scores if x] == [999, 1999, 2999, 3999, 4999]


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_it(page, tmp_path):
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    call += [f"--user-data-dir={tmp_path}", page.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    texts = "<figcaption><span>g_l1", "samples/epoch_0002.png", "M", "steps 1 to 6"
    assert all(text in done.stdout for text in texts), done.stdout[-2000:] + done.stderr
    assert "<b>" not in done.stdout.split('id="data"')[0]
