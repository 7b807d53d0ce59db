"""Tables of the times in bench/results/. python docs/tools/report.py writes them."""

import json

from paths import ROOT
from tables import seconds, table

from harness import FULL, SCRIPTS, SINGLE

TIMES = ROOT / "bench" / "results"
VARIANTS = (*SINGLE, "keep_memory", *reversed(FULL))
SERVED = {
    "serve-maps-64": "maps pairs, 600 x 1200 JPEG, to 64",
    "serve-maps-256": "maps pairs, 600 x 1200 JPEG, to 256",
    "serve-inria-256": "Inria tiles, 5000 x 5000 TIFF, to 256",
    "serve-land-cover-256": "photograph + land cover, one-hot .npz, 256",
}


def load():
    """Every kept benchmark as a dict, with its name and machine."""
    rows = []
    for path in sorted(TIMES.glob("*.json")):
        file = json.loads(path.read_text())
        for name, row in file["benchmarks"].items():
            rows.append({"name": name, "machine": file["machine"], **row})
    return rows


def of_scripts(rows, name):
    """The rows of one benchmark of the scripts, by device, size, batch size and script."""
    found = [row for row in rows if row["name"].startswith(name) and "script" in row]
    found = [row for row in found if "batch_size" in row]
    return sorted(found, key=order)


def order(row):
    return row["device"], row["size"], row["batch_size"], SCRIPTS.index(row["script"])


def steps(rows):
    """A training step: the plain one, and how many times as fast each variant is."""
    cases = {}
    for row in of_scripts(rows, "bench_step"):
        case = row["script"], row["size"], row["batch_size"], row["device"]
        cases.setdefault(case, {})[row["variant"]] = row
    variants = [name for name in VARIANTS if any(name in case for case in cases.values())]
    lines = []
    for (script, size, batch, device), case in cases.items():
        ratios = []
        for name in variants:
            row = case.get(name)
            ratios.append(ratio(row, "plain") if row else "")
        fast = case["fast"]
        rate = f"{fast['images_per_second']:.3g}"
        share = f"{100 * fast['share_of_matrix_rate']:.0f} %"
        plain = seconds(fast["plain_seconds"]) if "plain_seconds" in fast else ""
        lines.append([script, size, batch, plain, *ratios, rate, share, device])
    head = ["script", "size", "batch", "plain step", *variants]
    return table([*head, "images/s", "of matrix rate", "device"], lines)


def brief(rows):
    """Steps at full size and batch size 1, and 200 epochs of 1096 pairs."""
    lines = []
    for row in of_scripts(rows, "bench_step"):
        if (row["variant"], row["size"], row["batch_size"]) != ("fast", 256, 1):
            continue
        hours = row["seconds"] * 200 * 1096 / 3600
        hours = f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
        times = [seconds(row["plain_seconds"]), seconds(row["seconds"])]
        ratios = [ratio(row, "plain"), ratio(row, "reference")]
        lines.append([row["script"], *times, *ratios, hours, row["device"]])
    head = ["script", "plain step", "fast step", "plain / fast", "reference / fast"]
    return table([*head, "200 epochs of maps", "device"], lines)


def ratio(row, rival):
    """How many times as long a rival of a benchmark took, if it has been timed."""
    took = row.get(f"{rival}_seconds")
    return f"{took / row['seconds']:.2f}" if took else ""


def serving(rows):
    """The cost of an image, decoded every epoch and from the store."""
    lines = []
    for group, title in SERVED.items():
        found = [row for row in rows if row["group"] == group and "how" in row]
        costs = {row["how"]: row["milliseconds_per_image"] for row in found}
        for how, cost in costs.items():
            ratio = f"{costs['decode'] / cost:.3g}"
            lines.append([title, how.replace("-", " "), f"{cost:.3g} ms", ratio])
    return table(["data", "served by", "an image", "ratio to decode"], lines)


def store(rows):
    """Building the store with more threads, and serving from a larger one."""
    groups = ("build-store-256", "growth-256")
    found = [row for row in rows if row["group"] in groups and "how" in row]
    found.sort(key=lambda row: (row["group"], row.get("threads", 0), row.get("count", 0)))
    lines = []
    for row in found:
        size = f"{row['store_bytes'] / 1e6:.0f} MB" if "store_bytes" in row else ""
        task = "build" if "threads" in row else "serve"
        lines.append([task, row["how"], f"{row['milliseconds_per_image']:.3g} ms", size])
    return table(["256 pixels", "with", "an image", "store file"], lines)


def epochs(rows):
    """Loader and step together: the share of the time in which the step waits for data."""
    lines = []
    for row in of_scripts(rows, "bench_epoch"):
        waiting = f"{100 * row['share_waiting']:.1f} %"
        case = [row["script"], row["size"], row["batch_size"]]
        lines.append([*case, seconds(row["seconds_per_image"]), waiting, row["device"]])
    return table(["script", "size", "batch", "an image", "waiting", "device"], lines)


def generation(rows):
    """Images through translate, and GeoTIFFs from file to file."""
    lines = []
    for row in of_scripts(rows, "bench_images"):
        rates = [f"{row['images_per_second']:.3g}", f"{row['megapixels_per_second']:.3g}"]
        lines.append([row["script"], row["size"], row["batch_size"], *rates, "", row["device"]])
    for row in rows:
        if "outside_the_network" in row:
            side, window, size = row["side"], row["window"], row["size"]
            task = f"a {side} x {side} GeoTIFF by windows of {window} at {size}"
            rate = f"{row['megapixels_per_second']:.3g}"
            outside = f"{row['outside_the_network']:.0%}"
            lines.append([row["script"], task, "", "", rate, outside, row["device"]])
    head = ["script", "size", "batch", "images/s", "megapixels/s", "outside the network"]
    return table([*head, "device"], lines)


def memory(rows):
    """Peak memory of a process that translates a raster."""
    found = [row for row in rows if "peak_megabytes" in row]
    found.sort(key=lambda row: row["side"])
    head = ["raster", *(f"{row['side']} x {row['side']}" for row in found)]
    return table(head, [["peak memory", *(f"{row['peak_megabytes']:.0f} MB" for row in found)]])


def roofline(_):
    """bench/roofline.json: a step on the CPU, and its convolutions alone."""
    lines = []
    for script, kept in json.loads((ROOT / "bench/roofline.json").read_text()).items():
        alone, step = kept["convolutions_seconds"], kept["step"]
        times = [seconds(kept["step_memory_given_back"]), seconds(step)]
        rates = [kept["convolutions_gflop"] / alone, kept["matrix_rate"]]
        share = f"{100 * alone / step:.0f} %"
        lines.append([script, *times, share, *(f"{rate:.0f}" for rate in rates)])
    head = ["256 pixels, batch 1", "step, memory given back", "step, memory kept"]
    return table([*head, "convolutions alone", "GFLOP/s in them", "in matrix products"], lines)


TABLES = {
    "steps": steps,
    "brief": brief,
    "serving": serving,
    "store": store,
    "epochs": epochs,
    "generation": generation,
    "memory": memory,
    "roofline": roofline,
}
