"""The tables and pictures of the pages are those that docs/tools makes of the kept results."""

import json
import re

import benchmark_tables
import draw_front
import keep_run
import numpy as np
import pytest
import report
from paths import DOCS, RESULTS, ROOT
from PIL import Image

import mixlc
from files import side_by_side
from support.options import flag


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_made_from_the_results(page):
    text = page.read_text()
    assert report.write(text) == text


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in report.PAGES)
    assert {*re.findall(r"<!-- (\w+) -->\n\n", text)} - {"end"} == {
        *benchmark_tables.TABLES,
        *report.OTHERS,
    }


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    table = "<!-- scripts -->.*?<!-- end -->"  # a row for each
    text = re.sub(table, "", text, flags=re.DOTALL)
    assert len(text.split()) <= 1330 and len(text.splitlines()) <= 167


def test_results_name_no_machine():
    for path in (*DOCS.rglob("*.json"), *(ROOT / "bench").rglob("*.json")):
        text = path.read_text()
        assert '"node"' not in text and not re.search(r'"/\w', text), path


def test_the_front_picture_is_drawn_from_a_kept_grid():
    drawn = np.asarray(draw_front.front(), np.int16)
    kept = np.asarray(Image.open(DOCS / "front.jpg"), np.int16)
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 3


def test_kept_grids_are_small():
    sizes = [path.stat().st_size for path in RESULTS.glob("*/grid.jpg")]
    assert sizes and max(sizes) < keep_run.GRID_BYTES


def test_what_is_kept_of_a_run(tmp_path):
    data = side_by_side(tmp_path / "maps", train=4, val=2, drawn=True)
    run, folder = tmp_path / "run", tmp_path / "kept"
    asked = {"lc_classes": "maps", "size": 64, "width": 2, "batch_size": 2, "epochs": 2}
    words = [word for name, value in asked.items() for word in (flag(name), str(value))]
    mixlc.main(["--data", str(data), "--out", str(run), *words])
    keep_run.main([str(run), str(folder), "5400"])
    kept = json.loads((folder / "result.json").read_text())
    measured = json.loads((run / "evaluation.json").read_text())
    assert kept["options"] == asked and (kept["data"], kept["hours"]) == ("maps", 1.5)
    assert kept["rows"] == measured["rows"] and [row["epoch"] for row in kept["curve"]] == [1, 2]
    names = {path.name for path in folder.iterdir()}
    assert names == {"result.json", "curve.png", "grid.jpg"}


def test_ratios_by_hand():
    row = {"name": "bench_step[x]", "device": "d", "script": "pix2pix", "variant": "fast"}
    row |= {"size": 256, "batch_size": 1, "plain_seconds": 3.0, "seconds": 0.5}
    row |= {"reference_seconds": 2.0}
    row |= {"images_per_second": 2.0, "share_of_matrix_rate": 0.6}
    last = benchmark_tables.steps([row]).splitlines()[-1]
    assert last == "| pix2pix | 256 | 1 | 3 s | 6.00 | 2 | 60 % | d |"
    last = benchmark_tables.brief([row]).splitlines()[-1]
    assert last == "| pix2pix | 3 s | 500 ms | 6.00 | 4.00 | 30.4 h | d |"


def test_keeping_a_run_replaces_benchmarks_of_the_same_name(tmp_path, monkeypatch):
    for module in (report, benchmark_tables):
        monkeypatch.setattr(module, "TIMES", tmp_path / "results")
    machine = {"device": "cpu", "machine": "x86_64", "cpu": {}, "python_version": "3"}
    run = {
        "machine_info": machine | {"threads": 2, "torch": "2"},
        "commit_info": {"id": "abc"},
        "datetime": "2026-11-21T00:00:00",
    }
    for median in (1.0, 2.0):
        stats = {"median": median, "min": 1.0, "max": 1.0, "stddev": 0.0, "rounds": 1, "data": [1]}
        bench = {"name": "bench_x", "group": "g", "stats": stats, "extra_info": {"how": "decode"}}
        (tmp_path / "run.json").write_text(json.dumps(run | {"benchmarks": [bench]}))
        report.keep(tmp_path / "run.json")
    (row,) = benchmark_tables.load()
    assert (row["median"], row["how"], row["machine"]["torch"]) == (2.0, "decode", "2")
    assert "data" not in row


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_point_at_what_is_there(page):
    """Files, and headings in them."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        base = ROOT if name.startswith("/") else page.parent
        file = (base / name.lstrip("/")) if name else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target
