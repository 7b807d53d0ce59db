"""Turns benchmark results into the tables of README.md and bench/README.md.

    pytest bench --benchmark-only --benchmark-json=run.json
    python bench/report.py run.json      keep what matters in bench/results/, then write the tables
    python bench/report.py               write the tables from what is kept

A kept file holds, for every benchmark, its median, spread and rounds in seconds, and what the
benchmark noted.
"""

import ast
import difflib
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs/results/README.md")
NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second, one way, for each GPU: NVLink 4, and 400 Gb/s
SCRIPTS = ("pix2pix", "cyclegan", "mixlc", "mixlc_acgan")


def keep(path):
    """Files a run of pytest-benchmark under its device's name; a benchmark that is there already
    is replaced.
    """
    run = json.loads(Path(path).read_text())
    info = run["machine_info"]
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    machine = {
        "cpu": info["cpu"].get("brand_raw", info["machine"]),
        "python": info["python_version"],
    }
    machine |= {name: info[name] for name in ("device", "threads", "torch")}
    target = RESULTS / f"{slug}.json"
    found = json.loads(target.read_text())["benchmarks"] if target.is_file() else {}
    for benchmark in run["benchmarks"]:
        stats = {
            name: benchmark["stats"][name] for name in ("median", "min", "max", "stddev", "rounds")
        }
        found[benchmark["name"]] = {"group": benchmark["group"], **stats, **benchmark["extra_info"]}
    RESULTS.mkdir(exist_ok=True)
    about = {
        "date": run["datetime"][:10],
        "commit": run["commit_info"].get("id"),
        "machine": machine,
    }
    target.write_text(
        json.dumps({**about, "benchmarks": dict(sorted(found.items()))}, indent=1) + "\n"
    )
    return target


def load():
    """Every kept benchmark as a dict, with its name and machine."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        file = json.loads(path.read_text())
        rows += [
            {"name": name, "machine": file["machine"], **row}
            for name, row in file["benchmarks"].items()
        ]
    return rows


def table(header, rows):
    """Markdown; columns of numbers are aligned right."""
    rows = [[str(cell) for cell in row] for row in rows]
    numbers = [
        all(re.match(r"-?\d|$", cell) for cell in column) for column in zip(*rows, strict=True)
    ]
    rule = "".join("--:|" if number else "---|" for number in numbers)
    lines = ["| " + " | ".join(header) + " |", "|" + rule]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def seconds(value):
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def steps(rows):
    """One training step: the plain path, and how many times as fast each variant is, the two
    taking turns.
    """
    found = {}
    for row in rows:
        if row["name"].startswith("bench_step") and "script" in row:
            key = row["device"], row["size"], row["batch_size"], row["script"]
            found.setdefault(key, {})[row["variant"]] = row
    variants = ("channels_last", "norm_by_image", "fused", "bf16", "compile", "graph")
    variants += ("keep_memory", "vgg_bf16", "fast")
    variants = [variant for variant in variants if any(variant in by for by in found.values())]
    lines = []
    for (device, size, batch, script), by in sorted(found.items(), key=lambda item: order(item[0])):
        fast = by["fast"]
        ratios = [
            f"{by[v]['plain_seconds'] / by[v]['seconds']:.2f}" if v in by else "" for v in variants
        ]
        share = f"{100 * fast['share_of_matrix_rate']:.0f} %"
        plain, rate = seconds(fast["plain_seconds"]), f"{fast['images_per_second']:.3g}"
        lines.append([script, size, batch, plain, *ratios, rate, share, device])
    header = [
        "script",
        "size",
        "batch",
        "plain step",
        *variants,
        "images/s",
        "of matrix rate",
        "device",
    ]
    return table(header, lines)


def order(key):
    device, size, batch, script = key
    return device, size, batch, SCRIPTS.index(script)


def serving(rows):
    """What an image costs to serve, decoded every epoch and from the store."""
    titles = {
        "serve-maps-64": "maps pairs, 600 x 1200 JPEG, to 64",
        "serve-maps-256": "maps pairs, 600 x 1200 JPEG, to 256",
        "serve-inria-256": "Inria tiles, 5000 x 5000 TIFF, to 256",
        "serve-land-cover-256": "photograph + land cover, one-hot .npz, 256",
    }
    lines = []
    for group, title in titles.items():
        found = {
            row["how"]: row["milliseconds_per_image"]
            for row in rows
            if row["group"] == group and "how" in row
        }
        for how, cost in found.items():
            lines.append(
                [title, how.replace("-", " "), f"{cost:.3g} ms", f"{found['decode'] / cost:.3g}"]
            )
    return table(["data", "served by", "an image", "ratio to decode"], lines)


def store(rows):
    """Building the store as threads grow, and the cost of an image as the dataset grows."""
    found = [
        row for row in rows if row["group"] in ("build-store-256", "growth-256") and "how" in row
    ]
    found.sort(key=lambda row: (row["group"], row.get("threads", 0), row.get("count", 0)))
    lines = []
    for row in found:
        size = f"{row['store_bytes'] / 1e6:.0f} MB" if "store_bytes" in row else ""
        what = "build" if "threads" in row else "serve"
        lines.append([what, row["how"], f"{row['milliseconds_per_image']:.3g} ms", size])
    return table(["256 pixels", "with", "an image", "store file"], lines)


def epochs(rows):
    """Loader and step together: the share of the time in which the step waits for data."""
    lines = []
    found = [row for row in rows if row["name"].startswith("bench_epoch") and "script" in row]
    for row in sorted(
        found, key=lambda row: order((row["device"], row["size"], row["batch_size"], row["script"]))
    ):
        hours = row.get("hours_of_the_full_schedule")
        full = f"{hours:.3g} h" if hours else ""
        waiting, each = f"{100 * row['share_waiting']:.1f} %", seconds(row["seconds_per_image"])
        lines.append(
            [row["script"], row["size"], row["batch_size"], each, waiting, full, row["device"]]
        )
    return table(
        ["script", "size", "batch", "an image", "waiting", "200 epochs of maps", "device"], lines
    )


def generation(rows):
    """Images through translate, and GeoTIFFs from file to file."""
    lines = []
    for row in sorted(
        (row for row in rows if row["name"].startswith("bench_images") and "script" in row),
        key=lambda row: order((row["device"], row["size"], row["batch_size"], row["script"])),
    ):
        rates = f"{row['images_per_second']:.3g}", f"{row['megapixels_per_second']:.3g}"
        lines.append([row["script"], row["size"], row["batch_size"], *rates, "", row["device"]])
    for row in (row for row in rows if "outside_the_network" in row):
        side, size = f"{row['side']} x {row['side']}", f"{row['window']} at {row['size']}"
        what = f"a {side} GeoTIFF by windows of {size}"
        rate, outside = row["megapixels_per_second"], row["outside_the_network"]
        lines.append([row["script"], what, "", "", f"{rate:.3g}", f"{outside:.0%}", row["device"]])
    header = ["script", "size", "batch", "images/s", "megapixels/s", "outside the network"]
    return table([*header, "device"], lines)


def strokes(rows):
    """How long the page to paint on takes from a stroke to its picture."""
    found = [row for row in rows if "seconds_to_picture" in row]
    found.sort(key=lambda row: (row["device"], SCRIPTS.index(row["script"])))
    lines = [[row["script"], seconds(row["seconds_to_picture"]), row["device"]] for row in found]
    return table(["256 x 256, width 64", "from a stroke to its picture", "device"], lines)


def memory(rows):
    """Peak memory of a process that translates a raster."""
    found = sorted((row for row in rows if "peak_megabytes" in row), key=lambda row: row["side"])
    header = ["raster", *(f"{row['side']} x {row['side']}" for row in found)]
    line = ["peak memory", *(f"{row['peak_megabytes']:.0f} MB" for row in found)]
    return table(header, [line])


def controls(_):
    """docs/controls.json: one thing changed each time, and whether pictures follow their input."""
    lines = []
    for title, kept in json.loads((HERE.parent / "docs" / "controls.json").read_text()).items():
        rates = [f"{kept[name]:.3f}" for name in ("accuracy_5", "accuracy_10", "alike")]
        lines.append([title, f"{kept['rmse']:.1f}", *rates])
    lines.append(["the maps themselves", "", "", "", f"{kept['targets_alike']:.3f}"])
    return table(["run", "rmse", "accuracy_5", "accuracy_10", "two places alike"], lines)


def roofline(_):
    """docs/roofline.json: what is left of a step on the CPU besides its convolutions."""
    lines = []
    for script, kept in json.loads((HERE.parent / "docs" / "roofline.json").read_text()).items():
        work, alone = kept["convolutions_gflop"], kept["convolutions_seconds"]
        lines.append(
            [script, seconds(kept["step_memory_given_back"]), seconds(kept["step"])]
            + [f"{100 * alone / kept['step']:.0f} %"]
            + [f"{rate:.0f}" for rate in (work / alone, kept["matrix_rate"])]
        )
    head = ["256 pixels, batch 1", "step, memory given back", "step, memory kept"]
    return table([*head, "convolutions alone", "GFLOP/s in them", "in matrix products"], lines)


def seams(_):
    """docs/seams.json: how far windows show, by the reach of their statistics."""
    kept = json.loads((HERE.parent / "docs" / "seams.json").read_text())
    reaches = list(next(iter(kept.values())))
    names = {"reach 0": "each window's own", "reach inf": "one for all"}
    lines = [
        [name, *(f"{run[k]['step']:.2f} ({run[k]['gradient']:.2f})" for k in reaches)]
        for name, run in kept.items()
    ]
    return table(["step (gradient)", *(names.get(k, k) for k in reaches)], lines)


def ranks(rows):
    """What a step sends: a ring all-reduce moves 2 (N - 1) / N times the gradients through every
    GPU's link.
    """
    lines = []
    for row in sorted(
        (row for row in rows if "gradient_bytes" in row),
        key=lambda row: SCRIPTS.index(row["script"]),
    ):
        sent = row["gradient_bytes"]
        eight, many = 2 * 7 / 8 * sent / NVLINK, 2 * 63 / 64 * sent / INFINIBAND
        lines.append([row["script"], f"{sent / 1e6:.0f} MB", seconds(eight), seconds(many)])
    return table(
        ["script", "gradients a step", "8 GPUs, one machine", "64 GPUs, 8 machines"], lines
    )


def brief(rows):
    """README's few lines: full-size steps at batch 1, and what they make of 200 epochs of 1096
    pairs.
    """
    found = [
        row
        for row in rows
        if row.get("variant") == "fast" and (row["size"], row["batch_size"]) == (256, 1)
    ]
    lines = []
    for row in sorted(found, key=lambda row: (row["device"], SCRIPTS.index(row["script"]))):
        ratio, hours = row["plain_seconds"] / row["seconds"], row["seconds"] * 200 * 1096 / 3600
        times = (
            seconds(row["plain_seconds"]),
            seconds(row["seconds"]),
            f"{ratio:.2f}",
            f"{hours:.3g} h",
        )
        lines.append([row["script"], *times, row["device"]])
    return table(
        ["script", "plain step", "fast step", "ratio", "200 epochs of maps", "device"], lines
    )


IDEAS = {
    "Config": "each model's own options",
    "data": "pairs; two domains drawn apart; edits pasted from two tiles (in both edits alike)",
    "networks": "a U-Net; a ResNet and an image pool; two U-Nets joined; two heads on one trunk",
    "losses": "adversarial and L1; cycles and labels; a local window; classes and style",
    "build": "which networks there are",
    "train_step": "the model",
    "main": "which scores close an epoch, a schedule or none",
    "use": "one direction or two, noise, what is measured and written",
}


def sections(one, other):
    """{section: how many lines of code differ} between two scripts, docstrings left out."""
    found = [code_of(name) for name in (one, other)]
    changed = {}
    for section in IDEAS:
        lines = difflib.ndiff(*(code[section] for code in found))
        changed[section] = sum(line[0] in "+-" for line in lines)
    return changed


def code_of(script):
    """{section: its lines} of a script, without docstrings, comments and empty lines."""
    text = (HERE.parent / f"{script}.py").read_text()
    hidden = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            hidden |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    found, lines = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        if banner := re.match(r"# -{20,} (\w+)$", line):
            lines = found.setdefault(banner[1], [])
        elif number not in hidden and line.strip() and not line.lstrip().startswith("#"):
            lines.append(re.sub(r"\s+# .*", "", line))
    return found


def reading(_):
    """The lines by which each section differs between each two scripts, and why."""
    pairs = [(a, b) for k, a in enumerate(SCRIPTS) for b in SCRIPTS[k + 1 :]]
    changed = [sections(*pair) for pair in pairs]
    header = ["section", *(f"{a} – {b}" for a, b in pairs), "what makes it differ"]
    lines = [[name, *(counts[name] for counts in changed), IDEAS[name]] for name in IDEAS]
    return table(header, lines)


def edits(_):
    """What was tried on the edits, from docs/edits.json: a row a run, beside its baselines."""
    kept = json.loads((HERE.parent / "docs" / "edits.json").read_text())
    lines = []
    for run in kept["runs"]:
        measures = [run.get(name) for name in ("l1_inside", "l1_to_input", "l1_outside")]
        levels = ["" if value is None else f"{value:.1f}" for value in measures]
        names = ("judge_pixel_accuracy", "judge_class_accuracy", "judge_mean_iou")
        judged = [f"{run[name]:.3f}" if name in run else "" for name in names]
        what = f"{run['script']} `{run['options']}`" if run["options"] else run["script"]
        lines.append([run["data"], what, *levels, *judged, run["answer"]])
    lines.sort(key=lambda line: line[0])  # stable: runs of one data set together
    header = ["data", "run", "to target", "to input", "outside", "judge: pixels", "classes", "IoU"]
    return table([*header, "verdict"], lines)


def kept_results():
    """docs/results: {name: what bench/results.py kept of a run}."""
    paths = sorted((HERE.parent / "docs" / "results").glob("*/result.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


# What a run is measured by in the README: (the start of its rows, the measure).
MEASURES = {
    "pix2pix": (("", "rmse"),),
    "cyclegan": (("A to B: ", "rmse"), ("B to A: ", "rmse"), ("A to B: ", "pixel_accuracy")),
    "mixlc": (("", "l1_inside"),),
    "mixlc_acgan": (("", "l1_inside"),),
}


def runs(_):
    """The commands of the kept runs, what they cost, and a measure beside the best constant's."""
    lines = []
    for name, run in kept_results().items():
        options = " ".join(
            ("--" + option.replace("_", "-")) + (f" {value}" if value is not True else "")
            for option, value in run["options"].items()
            if option != "sample_rows"
        )
        command = f"`python {run['script']}.py --data {run['data']}/ {options}`"
        hours = run["hours"]
        cost = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        found = []
        for way, measure in MEASURES[run["script"]]:
            if measure in run["rows"].get(f"{way}model", {}):
                best = max if measure == "pixel_accuracy" else min
                trivial = best(
                    cells[measure]
                    for row, cells in run["rows"].items()
                    if row.startswith(way) and not row.endswith("model") and measure in cells
                )
                own = run["rows"][f"{way}model"][measure]
                found.append(f"{way}{measure} {shown(measure, own)} ({shown(measure, trivial)})")
        folder = f"/docs/results/{name}"
        pictures = f"[grid]({folder}/grid.jpg), [curve]({folder}/curve.png)"
        lines.append([name, command, cost, "; ".join(found), pictures])
    return table(["run", "command", "cost", "measure (best trivial)", "pictures"], lines)


def shown(measure, value):
    """A measure as text: levels and decibels with one decimal, shares with three."""
    levels = measure.startswith(("rmse", "l1_")) or measure == "psnr"
    return f"{value:.1f}" if levels else f"{value:.3f}"


def of_kept(*measures):
    """A table of these measures: the models of the kept runs, each beside what costs nothing."""

    def made(_):
        lines = []
        for name, run in kept_results().items():
            rows = {row: cells for row, cells in run["rows"].items() if measures[0] in cells}
            for row, cells in rows.items():
                if "copy of the input" not in row:
                    texts = [shown(m, cells[m]) if m in cells else "" for m in measures]
                    lines.append([name, row, *texts])
        return table(["run", "row", *measures], lines)

    return made


# From the papers' own tables, on Cityscapes: FCN scores, by a classifier of its photographs, and
# accuracies of its labels. Pixel accuracy, class accuracy, mean IoU.
PAPERS = {
    "judged": (
        ("Isola et al. 2017, table 1", "pix2pix, L1 + cGAN", 0.66, 0.23, 0.17),
        ("Isola et al. 2017, table 1", "real photographs", 0.80, 0.26, 0.21),
        ("Zhu et al. 2017, table 2", "CycleGAN", 0.52, 0.17, 0.11),
        ("Zhu et al. 2017, table 2", "pix2pix", 0.71, 0.25, 0.18),
    ),
    "labels": (
        ("Zhu et al. 2017, table 3", "CycleGAN", 0.58, 0.22, 0.16),
        ("Zhu et al. 2017, table 3", "pix2pix", 0.85, 0.40, 0.32),
    ),
}


def beside_papers(name, *measures):
    """A table of_kept with the papers' rows below."""

    def made(rows):
        cited = [[*row[:2], *(f"{value:.2f}" for value in row[2:])] for row in PAPERS[name]]
        lines = ["| " + " | ".join(row) + " |" for row in cited]
        return "\n".join([of_kept(*measures)(rows), *lines])

    return made


# What each script adds, for the README's first table.
NEW = {
    "pix2pix": "a loss that is learnt, on pairs: D sees input and output together",
    "cyclegan": "no pairs: there and back again must give the same picture",
    "mixlc": "edits: a collage of two places as the target, and a photograph with the edit blanked",
    "mixlc_acgan": "D also says which class each pixel shows, G must please it; style, noise",
}


def scripts(_):
    """The scripts: task, paper, lines to read, the one new idea."""
    lines = []
    for name in SCRIPTS:
        text = (HERE.parent / f"{name}.py").read_text()
        task = text.split("\n")[0].split(": ", 1)[1].rstrip(".")
        lines_to_read = len(re.split(r"\n# -+ use\n", text)[0].splitlines())
        found = re.findall(r"arXiv:(\d{4}\.\d{5})", text)[0]
        paper = f"[{found}](https://arxiv.org/abs/{found})"
        lines.append([f"`{name}.py`", task, paper, lines_to_read, NEW[name]])
    return table(["script", "task", "builds on", "lines to read", "the one new idea"], lines)


def forged(_):
    """docs/forged.json: what a segmenter learnt from, and its mean IoU, mean and spread."""
    kept = json.loads((HERE.parent / "docs" / "forged.json").read_text())
    lines, kinds = [], {}
    for data, run in kept.items():
        for tiles, found in run["mean_iou"].items():
            spread = {
                kind: f"{statistics.mean(seeds):.3f} ± {statistics.stdev(seeds):.3f}"
                for kind, seeds in found.items()
            }
            kinds |= spread
            lines.append({"mean IoU": f"{data}: {tiles} real tiles"} | spread)
    head = ["mean IoU", *kinds]
    return table(head, [[line.get(kind, "") for kind in head] for line in lines])


TABLES = {
    "scripts": scripts,
    "runs": runs,
    "translations": of_kept("rmse_rgb", "rmse", "accuracy_5", "accuracy_10", "psnr", "ssim"),
    "labels": beside_papers("labels", "pixel_accuracy", "class_accuracy", "mean_iou"),
    "edited": of_kept("l1_inside", "l1_to_input", "l1_outside"),
    "judged": beside_papers(
        "judged", "judge_pixel_accuracy", "judge_class_accuracy", "judge_mean_iou"
    ),
    "edits": edits,
    "forged": forged,
    "reading": reading,
    "steps": steps,
    "brief": brief,
    "serving": serving,
    "store": store,
    "epochs": epochs,
    "generation": generation,
    "memory": memory,
    "strokes": strokes,
    "controls": controls,
    "roofline": roofline,
    "seams": seams,
    "ranks": ranks,
}


def write(text, rows):
    """A page with the tables between <!-- name --> and <!-- end --> made anew."""

    def fill(match):
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(f"kept in {keep(file)}")
    for page in PAGES:
        page.write_text(write(page.read_text(), load()))
