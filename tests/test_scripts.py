"""What makes the scripts readable side by side: imports, sections, lengths, no drifting copies, no dead options."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [name for name in ("pix2pix", "cyclegan", "mixlc", "mixlc_acgan") if (ROOT / f"{name}.py").is_file()]
SECTIONS = ["Config", "data", "networks", "losses", "build", "train_step", "translate", "main"]

# Lines. A script's 400 and common's 800 were the aim. Scripts: pix2pix holds two generators, four discriminators and a
# content loss, cyclegan two modes, mixlc three generators, two discriminators and the editing of a user's photograph;
# cutting docstrings or options to fit would cost the reader more. common.py: five layouts, eight label formats, exact
# resume and an error line for each way to go wrong.
CAPS = {"common": 1660, "pix2pix": 540, "cyclegan": 550, "mixlc": 560, "mixlc_acgan": 700}

# Definitions of one name that differ between scripts, and the idea that makes them differ.
DIFFERS = {
    "Config": "each model has its own options",
    "State": "each model trains other networks",
    "build": "each model trains other networks",
    "train_step": "the model",
    "translate": "one generator, with the paper's noise and batch statistics, or one of two",
    "evaluate": "pairs in one direction, or cycles in two",
    "generate": "one direction, or two with land cover in or out",
    "report": "as evaluate",
    "main": "the data, networks and scores that its loop names",
    "jitter": "land cover looks the same upside down: CycleGAN's is mirrored both ways",
    "ResidualBlock": "CycleGAN's networks have InstanceNorm only, pix2pix's either norm",
    "ResNetGenerator": "as ResidualBlock, and CycleGAN's ends in logits for land cover",
    "Discriminator": "conditional on the input, with four receptive fields, or on an image alone",
    "init_weights": "InstanceNorm has no scales to initialise",
    "gan_loss": "pix2pix compares two adversarial losses, CycleGAN uses least squares",
    "l1_loss": "another equation of another paper",
    "learning_rate": "pix2pix has three schedules",
    "Edits": "mixlc_acgan also needs the land cover of both tiles, and has no complement to learn",
    "edit_mask": "mixlc's edit may be the complement of the box",
    "Generator": "another paper's",
    "UNet": "another paper's: down to 1x1, or to 1/32 with dropout",
    "VGG16Features": "one layer, or any; real weights, or random ones",
    "show_samples": "as Edits",
    "QUICK": "each model's own smallest useful size",
}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def definitions(name):
    """{name: source without comments} of everything a script defines at its top level."""
    found = {}
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.unparse(node)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """The standard library, torch, numpy, Pillow and common: nothing else, and no other script."""
    allowed = {"torch", "numpy", "PIL", "common"} | set(sys.stdlib_module_names)
    for node in ast.walk(tree(name)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {module.split(".")[0] for module in modules} <= allowed


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_are_the_same_and_in_order(name):
    banners = re.findall(r"^# -{20,} (\w+)$", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
    assert banners == SECTIONS


@pytest.mark.parametrize("name", ["common", *SCRIPTS])
def test_line_caps(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= CAPS.get(name, 400) and max(map(len, lines)) <= 120


def test_copies_do_not_drift():
    differing = set()
    everything = {name: definitions(name) for name in SCRIPTS}
    for one in SCRIPTS:
        for other in SCRIPTS[SCRIPTS.index(one) + 1 :]:
            shared = everything[one].keys() & everything[other].keys()
            differing |= {name for name in shared if everything[one][name] != everything[other][name]}
    assert differing == set(DIFFERS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_read(name):
    """Some expression cfg.option of the script or of common reads it; --quick is read where the command line is."""
    read = {"quick"}
    for source in (name, "common"):
        for node in ast.walk(tree(source)):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                read |= {node.attr} if owner == "cfg" else set()
    fields = {field.name for field in dataclasses.fields(importlib.import_module(name).Config)}
    assert fields <= read


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_that_scripts_share_mean_the_same(name):
    """Where two scripts have an option of the same name, its type, choices and bounds are the same."""
    ours = {f.name: f for f in dataclasses.fields(importlib.import_module(name).Config)}
    for other in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(other).Config):
            if field.name in ours:
                assert ours[field.name].type == field.type
                for bound in ("choices", "low", "high"):
                    assert ours[field.name].metadata[bound] == field.metadata[bound], field.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_step_never_reads_a_value(name):
    step = next(node for node in tree(name).body if getattr(node, "name", "") == "train_step")
    called = {node.attr for node in ast.walk(step) if isinstance(node, ast.Attribute)}
    assert not called & {"item", "tolist", "cpu", "numpy"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    """Everything public at the top level says what it is, and so does the head of the file, command first."""
    module = tree(name)
    assert f"python {name}.py --data" in ast.get_docstring(module) and "arXiv:" in ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Config"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_measured_numbers_are_those_of_the_kept_result(name):
    """docs/quick.json holds what --quick gave; the docstring quotes it, rounded."""
    kept = json.loads((ROOT / "docs" / "quick.json").read_text())[name]
    known = {f"{value:.1f}" for row in kept["rows"].values() for value in row.values()} | {f"{kept['seconds']} s"}
    quoted = re.findall(r"\d+\.\d|\d+ s\b", ast.get_docstring(tree(name)).split("Measured:")[1])
    assert len(quoted) >= 3 and set(quoted) <= known


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_has_no_side_effect(name, tmp_path):
    """No file, no output, and sys.argv is not read."""
    code = f"import sys; sys.argv = ['x', '--nonsense']; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_boolean_option_takes_a_value(name):
    source = (ROOT / f"{name}.py").read_text() + (ROOT / "common.py").read_text()
    assert "type=bool" not in source
