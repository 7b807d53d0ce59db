"""Tables of the results in docs/results/. python docs/tools/report.py writes them."""

import json
import statistics

from paths import RESULTS
from tables import hours, line, measure, table

from harness import SCRIPTS

# The rows of the README: run, task, the start of its rows in evaluation.json, measure.
FRONT = (
    ("pix2pix-satellite-to-map-256", "satellite → map", "", "rmse"),
    ("pix2pix-map-to-satellite-256", "map → satellite", "", "rmse"),
    ("pix2pix-landcover-to-satellite-256", "land cover → satellite", "", "rmse"),
    ("cyclegan-maps", "satellite → map, without pairs", "A to B: ", "rmse"),
    ("mixlc-dubai", "edit", "", "judge_mean_iou"),
    ("mixlc_acgan-dubai", "edit", "", "judge_mean_iou"),
)
MODEL = "model"
TITLES = {
    "rmse": "RMSE",
    "l1_inside": "L1 inside the edit",
    "judge_mean_iou": "IoU of a judge (more is better)",
}
# From the papers' own tables, on Cityscapes: pixel accuracy, class accuracy, mean IoU.
JUDGED_PAPERS = (
    ("Isola et al. 2017, table 1", "pix2pix, L1 + cGAN", 0.66, 0.23, 0.17),
    ("Isola et al. 2017, table 1", "real photographs", 0.80, 0.26, 0.21),
    ("Zhu et al. 2017, table 2", "CycleGAN", 0.52, 0.17, 0.11),
    ("Zhu et al. 2017, table 2", "pix2pix", 0.71, 0.25, 0.18),
)


def kept(name):
    """One of the JSON files in docs/results/."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def kept_results():
    """{name: result.json} of the runs in docs/results/."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(RESULTS.glob("*/result.json"))
    }


def best_trivial(rows, start, name):
    """The best value of a measure among rows that are neither a model's nor a real photograph's."""
    found = []
    for row, cells in rows.items():
        if row.startswith(start) and not row.endswith((MODEL, "photograph b")) and name in cells:
            found.append(cells[name])
    return max(found) if name.startswith("judge") else min(found)


def measured():
    """The README's rows: the model beside the best trivial baseline."""
    lines, results = [], kept_results()
    for name, task, start, which in FRONT:
        run = results[name]
        own = measure(which, run["rows"][f"{start}{MODEL}"][which])
        trivial = measure(which, best_trivial(run["rows"], start, which))
        data = f"{run['data']}, {run['options'].get('size', 256)} pixels"
        grid = f"[{name}](/docs/results/{name}/grid.jpg)"
        lines.append([grid, task, data, hours(run["hours"]), TITLES[which], own, trivial])
    head = ["run", "task", "data", "time", "measure", "model", "best trivial"]
    return table(head, lines)


def quick():
    """docs/results/quick.json: the first minute of each script, on the demo world."""
    file, lines = kept("quick"), []
    for script in SCRIPTS:
        if script in file:
            rows = file[script]["rows"]
            start = "A to B: " if f"A to B: {MODEL}" in rows else ""
            which = "rmse" if "rmse" in rows[f"{start}{MODEL}"] else "l1_inside"
            own = measure(which, rows[f"{start}{MODEL}"][which])
            trivial = measure(which, best_trivial(rows, start, which))
            lines.append([script, f"{file[script]['seconds']} s", TITLES[which], own, trivial])
    return table(["--quick", "time", "measure", "model", "best trivial"], lines)


def runs():
    """The commands of the kept runs, their cost and their pictures."""
    lines = []
    for name, run in kept_results().items():
        words = [f"python {run['script']}.py --data {run['data']}/"]
        for option, value in run["options"].items():
            if option != "sample_rows":
                no = "no-" if value is False else ""
                words.append(f"--{no}{option.replace('_', '-')}")
                words += [str(value)] if not isinstance(value, bool) else []
        pictures = f"[grid]({name}/grid.jpg), [curve]({name}/curve.png)"
        lines.append([name, f"`{' '.join(words)}`", hours(run["hours"]), pictures])
    return table(["run", "command", "time", "pictures"], lines)


def of_runs(*measures):
    """A table of these measures: each model beside its trivial baselines."""
    lines = []
    for name, run in kept_results().items():
        for row, cells in run["rows"].items():
            if measures[0] in cells and "copy of the input" not in row:
                lines.append([name, row, *(measure(m, cells.get(m)) for m in measures)])
    return table(["run", "row", *measures], lines)


def translations():
    return of_runs("rmse_rgb", "rmse", "accuracy_5", "accuracy_10", "psnr", "ssim")


def judged():
    """The judge's scores, and below them the papers' of their own judges."""
    ours = of_runs("judge_pixel_accuracy", "judge_class_accuracy", "judge_mean_iou")
    papers = [line([*row[:2], *(f"{value:.2f}" for value in row[2:])]) for row in JUDGED_PAPERS]
    return "\n".join([ours, *papers])


def edited():
    return of_runs("l1_inside", "l1_to_input", "l1_outside")


def texture():
    """docs/results/texture.json: how far the texture of pictures is from that of their targets."""
    lines = []
    for run, rows in kept("texture").items():
        for row, cells in rows.items():
            if "copy of the input" not in row:
                lines.append([run, row, f"{cells['texture']:.2f}"])
    return table(["run", "row", "texture"], lines)


def parts():
    """docs/results/parts.json: what each part of the edits' training brings."""
    measures = ("judge_pixel_accuracy", "judge_class_accuracy", "judge_mean_iou")
    measures += ("l1_inside", "l1_outside", "d_real", "d_fake")
    lines = []
    for run in kept("parts")["runs"]:
        cells = [measure(name, run.get(name)) for name in measures]
        lines.append([run["data"], run["run"], *cells])
    head = ["data", "run", "judge: pixels", "classes", "IoU", "L1 inside", "outside"]
    return table([*head, "D on real", "on fake"], lines)


def controls():
    """docs/results/controls.json: runs that differ in one thing from the first."""
    lines = []
    for title, row in kept("controls").items():
        rates = [f"{row[name]:.3f}" for name in ("accuracy_5", "accuracy_10", "alike")]
        lines.append([title, f"{row['rmse']:.1f}", *rates])
        of_maps = f"{row['targets_alike']:.3f}"
    lines.append(["the maps themselves", "", "", "", of_maps])
    return table(["run", "rmse", "accuracy_5", "accuracy_10", "two places alike"], lines)


def seams():
    """docs/results/seams.json: how visible windows are, by the reach of shared statistics."""
    runs = kept("seams")
    lines = []
    for name, run in runs.items():
        cells = [f"{reach['step']:.2f} ({reach['gradient']:.2f})" for reach in run.values()]
        lines.append([name, *cells])
    names = {"reach 0": "each window's own", "reach inf": "one for all"}
    reaches = [names.get(reach, reach) for reach in run]
    return table(["step (gradient)", *reaches], lines)


def forged():
    """docs/results/forged.json: mean IoU of a segmenter by its training tiles, mean and spread."""
    lines, kinds = [], []
    for data, run in kept("forged").items():
        for tiles, found in run["mean_iou"].items():
            cells = {"mean IoU": f"{data}: {tiles} real tiles"}
            for kind, seeds in found.items():
                cells[kind] = f"{statistics.mean(seeds):.3f} ± {statistics.stdev(seeds):.3f}"
            kinds += [kind for kind in cells if kind not in kinds]
            lines.append(cells)
    return table(kinds, [[cells.get(kind, "") for kind in kinds] for cells in lines])


TABLES = {
    "measured": measured,
    "quick": quick,
    "runs": runs,
    "translations": translations,
    "edited": edited,
    "judged": judged,
    "texture": texture,
    "parts": parts,
    "forged": forged,
    "controls": controls,
    "seams": seams,
}
