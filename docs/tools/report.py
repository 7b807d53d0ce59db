"""Write the tables of the pages anew, from the results that are kept.

    python docs/tools/report.py              writes every table
    python docs/tools/report.py run.json     first keeps the times of a run of the benchmarks:
    pytest bench --benchmark-only --benchmark-json=run.json

A table stands between <!-- its name --> and <!-- end -->.
"""

import json
import re
import sys
from pathlib import Path

import benchmark_tables
import result_tables
import script_tables
from benchmark_tables import TIMES
from paths import DOCS, ROOT

PAGES = (ROOT / "README.md", ROOT / "bench/README.md", *sorted(DOCS.glob("**/*.md")))
OTHERS = result_tables.TABLES | script_tables.TABLES


def keep(path):
    """Keeps a run of pytest-benchmark in bench/results/, in a file for each device; a benchmark
    that is there already is replaced.
    """
    run = json.loads(Path(path).read_text())
    info = run["machine_info"]
    machine = {
        "cpu": info["cpu"].get("brand_raw", info["machine"]),
        "python": info["python_version"],
        "device": info["device"],
        "threads": info["threads"],
        "torch": info["torch"],
    }
    target = TIMES / (re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-") + ".json")
    found = json.loads(target.read_text())["benchmarks"] if target.is_file() else {}
    for benchmark in run["benchmarks"]:
        wanted = ("median", "min", "max", "stddev", "rounds")
        stats = {name: benchmark["stats"][name] for name in wanted}
        found[benchmark["name"]] = {"group": benchmark["group"], **stats, **benchmark["extra_info"]}
    about = {
        "date": run["datetime"][:10],
        "commit": run["commit_info"].get("id"),
        "machine": machine,
        "benchmarks": dict(sorted(found.items())),
    }
    TIMES.mkdir(exist_ok=True)
    target.write_text(json.dumps(about, indent=1) + "\n")
    return target


def write(text):
    """A page with its tables made anew."""
    rows = benchmark_tables.load()

    def fill(match):
        name = match[1]
        timed = benchmark_tables.TABLES.get(name)
        made = timed(rows) if timed else OTHERS[name]()
        return f"<!-- {name} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    for file in sys.argv[1:]:
        print(f"kept in {keep(file)}")
    for page in PAGES:
        page.write_text(write(page.read_text()))
