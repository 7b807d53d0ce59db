"""Tables of the scripts themselves. python docs/tools/report.py writes them."""

import ast
import difflib
import itertools
import re
import sys

from paths import ROOT
from tables import table

from harness import SCRIPTS

# The one new idea of each script, where it has been put into words.
NEW = {
    "pix2pix": "a learnt loss on pairs: D sees input and output together",
    "cyclegan": "no pairs: translating there and back must give the same picture",
    "mixlc": "G gets noise in place of the edit; D labels each pixel: its land cover, or generated",
    "mixlc_acgan": "D has two heads: real or fake, and the class of each pixel",
}
# The sections of a script, and what makes them differ.
SECTIONS = {
    "networks": "a U-Net; a ResNet and an image pool; two U-Nets joined; two heads on one trunk",
    "losses": "adversarial and L1; cycles and labels; a local window; classes and style",
    "Config": "each model's own options",
    "data": "pairs; two domains drawn apart; edits pasted from two tiles (alike in both editors)",
    "build": "which networks there are",
    "train_step": "the model",
    "main": "which scores close an epoch, a schedule or none",
    "use": "one direction or two, noise, what is measured and written",
}
# The files of support/ by topic, in the order in which the tree shows them.
TOPICS = {
    "a run": "errors files options begin processes device channels_last run checkpoints plots",
    "data": "layouts classes demo pairs store batches",
    "image files": "opening rasters labels limits pictures writing",
    "measures": "measures distances judge vgg16",
    "generation": "windows generate edits",
    "the page": "serve studio canvases",
}
# What the tree shows beside these files.
FOLDERS = {
    "support/*.html": "Pages: to paint on, and of a run",
    "tests/plain.py": "A second, textbook version of every training step",
    "tests/": "Tests of the code and of these pages",
    "bench/": "Benchmarks, and their results",
    "docs/": "More pages, and results; docs/tools/ makes their tables and pictures",
}


def scripts():
    """Task, paper, lines down to the end of main, the one new idea."""
    lines = []
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text()
        task = text.split("\n")[0].split(": ", 1)[1].rstrip(".")
        count = len(re.split(r"\n# -+ use\n", text)[0].splitlines())
        numbers = re.findall(
            r"arXiv:(\d{4}\.\d{5})", re.search(r"\nPapers?: .*?\n\n", text, re.S)[0]
        )
        papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)
        lines.append([f"`{name}.py`", task, papers, count, NEW.get(name, "")])
    return table(["script", "task", "builds on", "lines to read", "the one new idea"], lines)


def code_of(script):
    """{section: its lines} of a script, without docstrings, comments and empty lines."""
    text = (ROOT / f"{script}.py").read_text()
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


def sections(one, other):
    """{section: number of lines added and removed} between two scripts."""
    ours, theirs = code_of(one), code_of(other)
    changed = {}
    for section in SECTIONS:
        lines = difflib.ndiff(ours[section], theirs[section])
        changed[section] = sum(line[0] in "+-" for line in lines)
    return changed


def reading():
    """The lines by which each section differs between each two scripts, and why."""
    pairs = list(itertools.combinations(SCRIPTS, 2))
    changed = [sections(*pair) for pair in pairs]
    lines = []
    for name, why in SECTIONS.items():
        lines.append([name, *(counts[name] for counts in changed), why])
    return table(["section", *(f"{a} – {b}" for a, b in pairs), "what makes it differ"], lines)


def tree():
    """A line a file beside the scripts: the first line of its docstring."""
    shown = {"": ["common.py"]}
    for topic, names in TOPICS.items():
        shown[f"# {topic}"] = [f"support/{name}.py" for name in names.split()]
    there = {f"support/{path.name}" for path in (ROOT / "support").glob("[!_]*.py")}
    if lost := there.symmetric_difference(sum(shown.values(), [])[1:]):
        sys.exit(f"TOPICS and support/ differ: {lost}")
    lines = ["```"]
    for topic, names in shown.items():
        lines += [topic] if topic else []
        for name in names:
            text = ast.get_docstring(ast.parse((ROOT / name).read_text())).split("\n")[0]
            lines.append(f"{name:<26}{text.rstrip('.')}")
    lines += ["# more", *(f"{name:<26}{text}" for name, text in FOLDERS.items())]
    return "\n".join([*lines, "```"])


TABLES = {"scripts": scripts, "reading": reading, "tree": tree}
