"""The tables of the READMEs are those that bench/report.py makes from bench/results."""

import json
import re

import numpy as np
import pytest
import report
import results
from PIL import Image

import common
import mixlc
from conftest import side_by_side


@pytest.mark.parametrize(
    "page", report.PAGES, ids=lambda page: str(page.relative_to(report.HERE.parent))
)
def test_tables_are_made_from_the_results(page):
    text = page.read_text()
    assert "<!-- end -->" in text and report.write(text, report.load()) == text


def test_the_readme_is_short():
    assert len((report.HERE.parent / "README.md").read_text().splitlines()) < 350


def test_results_name_no_machine():
    for path in report.RESULTS.glob("*.json"):
        text = path.read_text()
        assert '"node"' not in text and "/home" not in text and "/tmp" not in text
        assert {"date", "commit", "machine", "benchmarks"} == json.loads(text).keys()


def test_the_front_picture_is_drawn_from_the_kept_grids(tmp_path):
    results.front(path=tmp_path / "front.jpg")
    drawn, kept = (
        np.asarray(Image.open(folder / "front.jpg"), np.int16)
        for folder in (tmp_path, report.HERE.parent / "docs")
    )
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 1


def test_kept_grids_are_small():
    sizes = [path.stat().st_size for path in results.RESULTS.glob("*/grid.jpg")]
    assert sizes and max(sizes) < results.GRID_BYTES


def test_what_is_kept_of_a_run(tmp_path):
    data = side_by_side(tmp_path / "maps", train=4, val=2)
    asked = {"lc_classes": "maps", "size": 64, "width": 2, "batch_size": 2, "epochs": 2}
    words = [word for name, value in asked.items() for word in (common.flag(name), str(value))]
    mixlc.main(["--data", str(data), "--out", str(tmp_path / "run"), *words])
    results.keep(tmp_path / "run", tmp_path / "kept", "5400")
    kept = json.loads((tmp_path / "kept" / "result.json").read_text())
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert kept["options"] == asked and (kept["data"], kept["hours"]) == ("maps", 1.5)
    assert kept["rows"] == measured["rows"] and [row["epoch"] for row in kept["curve"]] == [1, 2]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "result.json",
        "curve.png",
        "grid.jpg",
    }


def test_ratios_by_hand():
    row = {
        "name": "bench_step[x]",
        "device": "d",
        "size": 256,
        "batch_size": 1,
        "script": "pix2pix",
    }
    row |= {"variant": "fast", "plain_seconds": 3.0, "seconds": 0.5, "images_per_second": 2.0}
    rows = [row | {"share_of_matrix_rate": 0.6}]
    assert (
        report.steps(rows).splitlines()[-1] == "| pix2pix | 256 | 1 | 3 s | 6.00 | 2 | 60 % | d |"
    )
    assert report.brief(rows).splitlines()[-1] == "| pix2pix | 3 s | 500 ms | 6.00 | 30.4 h | d |"


def test_gradients_on_the_ring_by_hand():
    lines = report.ranks([{"script": "cyclegan", "gradient_bytes": 450e6}]).splitlines()
    assert lines[-1] == "| cyclegan | 450 MB | 1.75 ms | 17.7 ms |"


def test_keeping_a_run_replaces_benchmarks_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    stats = {"median": 1.0, "min": 1.0, "max": 1.0, "stddev": 0.0, "rounds": 1, "data": [1.0]}
    info = {
        "device": "cpu",
        "machine": "x86_64",
        "cpu": {},
        "python_version": "3",
        "threads": 2,
        "torch": "2",
    }
    run = {"machine_info": info, "commit_info": {"id": "abc"}, "datetime": "2026-11-21T00:00:00"}
    for median in (1.0, 2.0):
        bench = {
            "name": "bench_x",
            "group": "g",
            "stats": stats | {"median": median},
            "extra_info": {"how": "decode"},
        }
        (tmp_path / "run.json").write_text(json.dumps(run | {"benchmarks": [bench]}))
        report.keep(tmp_path / "run.json")
    (row,) = report.load()
    assert (row["median"], row["how"], row["machine"]["torch"]) == (
        2.0,
        "decode",
        "2",
    ) and "data" not in row


def test_pages_point_at_what_is_there():
    root = report.HERE.parent
    for page in report.PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                base = root if target.startswith("/") else page.parent
                assert (base / target.lstrip("/")).exists(), f"{page.name}: {target}"


def test_results_name_no_path_of_a_machine():
    for path in (report.HERE.parent / "docs").rglob("*.json"):
        assert not re.search(r'"/\w', path.read_text())
