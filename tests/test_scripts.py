"""What makes the scripts readable side by side: imports, sections, lengths, copies, options."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
from paths import ROOT

import support.options
from harness import SCRIPTS

SECTIONS = ["networks", "losses", "Config", "data", "build", "train_step", "main", "use"]

# Lines down to the end of main, which is what a reader reads. Lower them when a file shrinks.
CAPS = {"pix2pix": 485, "cyclegan": 465, "mixlc": 607, "mixlc_acgan": 550}

# The files of support/, floor by floor: each imports only from floors below its own.
FLOORS = [
    "errors processes channels_last",
    "files classes device batches",
    "options layouts opening labels demo pictures plots",
    "rasters writing checkpoints distances windows",
    "limits pairs measures run vgg16",
    "store edits",
    "judge canvases",
    "begin studio",
    "serve",
    "generate",
]
HOUSE = [f"support/{name}" for floor in FLOORS for name in floor.split()]

EACH, EDITS = [[script] for script in SCRIPTS[:4]], [["mixlc", "mixlc_acgan"]]

# Definitions of one name: which scripts hold the same copy, and what makes the groups differ.
COPIES = {
    "Config": (EACH, "its own options"),
    "QUICK": (EACH, "smallest useful size"),
    "SCORES": ([["pix2pix"], ["mixlc"], ["mixlc_acgan"]], "other measures"),
    "State": (EACH, "other networks"),
    "build": (EACH, "other networks"),
    "train_step": (EACH, "the model"),
    "main": (EACH, "data, networks and scores"),
    "jitter": ([["pix2pix", "cyclegan"]], ""),
    "ResidualBlock": ([["pix2pix"], ["cyclegan"], ["mixlc_acgan"]], "norm, padding"),
    "ResNetGenerator": ([["pix2pix"], ["cyclegan"]], "either norm; logits for land cover"),
    "Discriminator": (EACH, "another paper's"),
    "UNet": ([["mixlc"], ["mixlc_acgan"]], "down to 1x1, or to 1/32 with dropout"),
    "Generator": ([["mixlc"], ["mixlc_acgan"]], "fusions; a residual block at full size"),
    "init_weights": (
        [["pix2pix", "mixlc_acgan"], ["cyclegan"], ["mixlc"]],
        "InstanceNorm has no scales; mixlc has linear layers",
    ),
    "doubling": ([["pix2pix", "cyclegan"]], ""),
    "gan_loss": (EACH, "either; LSGAN; BCE; BCE, at edits"),
    "label_loss": ([["cyclegan"], ["mixlc"]], "mixlc weighs rare classes more"),
    "l1_loss": ([["pix2pix", "cyclegan", "mixlc_acgan"]], ""),
    "learning_rate": ([["pix2pix"], ["cyclegan"]], "pix2pix has three schedules"),
    "translate": (EACH, "one input or two, one generator or two, noise"),
    "sample": ([["pix2pix"], ["cyclegan"], ["mixlc", "mixlc_acgan"]], "what a grid shows"),
    "evaluate": (EACH, "what is measured"),
    "report": ([["pix2pix"], ["cyclegan"], ["mixlc", "mixlc_acgan"]], "as evaluate"),
    "generate": (EACH, "what is written"),
    "use": ([["pix2pix"], ["cyclegan"], ["mixlc", "mixlc_acgan"]], "one --init, two or none"),
    "add_judged": ([["pix2pix", "cyclegan"], ["mixlc", "mixlc_acgan"]], "photographs; edits"),
    "add_floor": ([["pix2pix"], ["cyclegan"]], "other batches"),
    "visible": (EDITS, ""),
    "Edit": (EDITS, ""),
    "Edits": (EDITS, ""),
    "mirror": (EDITS, ""),
    "edit_mask": (EDITS, ""),
    "joined": (EDITS, ""),
    "show_samples": (EDITS, ""),
}


# Every option: its default, a number's bounds, * if a resumed run may have another value (~: where
# the saved options allow it), ! if a checkpoint fixes it. Numbers are a paper's or an experiment's.
OPTIONS = {
    "Options": "data=* patch=0(0..) stride=0(0..) max_images=0(0..) flip=auto cache=* "
    "val_images=100(0..) size=256(..) width=64(1..1024) lc_classes= bands_A= bands_B= "
    "limits_A= limits_B= "
    "beta1=0.5(0..0.999) seed=0(0..4294967295) quick=False out=* resume=False* log_every=50(1..) "
    "save_every=10(0..)* sample_rows=6(1..) track=* device=auto* precision=auto graph=True* "
    "checkpoint= evaluate=False split=val judge=* train_judge=False* judge_epochs=20(1..)* "
    "generate=() overwrite=False serve=False address=127.0.0.1 port=8000(0..65535) window=0(0..) "
    "norm_reach=2(0..inf)",
    "EditOptions": "box=any use_ba=False own=0.5(0..1) composite=True erase=True eval_norm=auto "
    "show_samples=0(0..) lc= lc_before= paint=() samples=1(1..64) keep_outside=True",
    "pix2pix": "direction=BtoA generator=unet blocks=0(0..) norm=batch patch_gan=70(..) "
    "dropout=0.5(0..0.9) upsample=transposed gan=bce d_weight=0.5(0..) content=l1 "
    "lambda_l1=100(0..) lambda_vgg=2(0..) vgg16=* load_size=0(0..) lr=0.0002(0..) "
    "batch_size=1(1..)! epochs=200(1..1000000)~ epochs_decay=-1(-1..) schedule=linear init= "
    "eval_norm=auto fid=False",
    "cyclegan": "blocks=0(0..) upsample=transposed lambda_cycle=10(0..) lambda_identity=0.5(0..) "
    "pool_size=50(0..10000) load_size=0(0..) lr=0.0002(0..) batch_size=1(1..)! "
    "epochs=200(1..1000000) epochs_decay=-1(-1..) init_AB= init_BA= direction=AtoB fid=False",
    "mixlc": "fusion=middle skips=both d=label local_d=False collage=False lambda_adv=2(0..) "
    "lambda_l1=10(0..) lambda_local=5(0..) lambda_color=0(0..) lr=0.0005(0..) batch_size=8(1..)! "
    "epochs=200(1..1000000)*",
    "mixlc_acgan": "dropout=0.5(0..0.9) d_dropout=0(0..0.9) lambda_adv=0.05(0..) "
    "lambda_l1=0.5(0..) lambda_style=0.45(0..) lambda_class=0.05(0..) lambda_id=0(0..) "
    "class_weights=True style_features=vgg16 style_layers=relu3_3 vgg16=* lr=0.0002(0..) "
    "batch_size=16(1..)! epochs=200(1..1000000)*",
}
QUICK = {
    "pix2pix": "size=64 width=24 batch_size=4 epochs=20 log_every=12",
    "cyclegan": "size=64 width=16 blocks=3 batch_size=2 epochs=8 log_every=12",
    "mixlc": "size=64 width=16 batch_size=4 epochs=20 log_every=12",
    "mixlc_acgan": "size=64 width=12 batch_size=4 epochs=8 log_every=12 lr=0.0005 "
    "style_features=random style_layers=relu2_2",
}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def definitions(name):
    """{name: source without comments and docstrings} of what a script defines at its top level."""
    found = {}
    for node in tree(name).body:
        for inner in ast.walk(node):
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(inner, kinds) and ast.get_docstring(inner) and len(inner.body) > 1:
                del inner.body[0]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.unparse(node)
    return found


def described(field):
    """An option as OPTIONS has it."""
    about, bounds, default = field.metadata, "", field.default
    if type(default) in (int, float):
        low, high = (f"{about[name]:.10g}" for name in ("low", "high"))
        bounds = f"({low.replace('-inf', '')}..{high.replace('2147483647', '')})"
        default = f"{default:.10g}"
    change = about.get("may_change", False)
    marks = "~" * callable(change) + "*" * (change is True) + "!" * about.get("fixed", False)
    return f"{field.name}={default}{bounds}{marks}"


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    config = getattr(support.options, name, None) or importlib.import_module(name).Config
    inherited = dataclasses.fields(config.__base__) if name != "Options" else ()
    own = dataclasses.fields(config)[len(inherited) :]
    assert [described(field) for field in own] == OPTIONS[name].split()
    assert config.demo == ("landcover" if "lc" in name or "Edit" in name else "maps")


@pytest.mark.parametrize("name", QUICK)
def test_quick_is_small(name):
    quick = importlib.import_module(name).QUICK
    assert [f"{key}={value}" for key, value in quick.items()] == QUICK[name].split()


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
    source = (ROOT / f"{name}.py").read_text()
    assert re.findall(r"^# -{20,} (\w+)$", source, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("name", CAPS)
def test_line_caps(name):
    (end,) = (node.end_lineno for node in tree(name).body if getattr(node, "name", "") == "main")
    assert end <= CAPS[name]
    networks = [node.lineno for node in tree(name).body if "nn.Module" in ast.unparse(node)]
    assert networks[0] <= 110  # a reader meets a network first


def test_copies_do_not_drift():
    """What two scripts name alike is the same to the letter in each group, and differs between."""
    everything = {name: definitions(name) for name in SCRIPTS}
    groups = {}
    for script, found in everything.items():
        for name, source in found.items():
            groups.setdefault(name, {}).setdefault(source, []).append(script)
    shared = {name: list(copies.values()) for name, copies in groups.items()}
    shared = {name: copies for name, copies in shared.items() if len(sum(copies, [])) > 1}
    assert COPIES.keys() <= shared.keys()
    for name, copies in shared.items():
        groups, _ = COPIES.get(name, ([sum(copies, [])], ""))  # a name not listed has one copy
        listed = [[script for script in copy if script in sum(groups, [])] for copy in copies]
        assert [copy for copy in listed if copy] == groups, name
        # a script that is not listed uses a listed copy, unless every script has its own
        assert all(listed) or all(len(group) == 1 for group in groups), name
    assert all(bool(why) == (len(copies) > 1) for copies, why in COPIES.values())


def test_imports_in_support_point_down():
    """And none hides in a function. Without an __init__.py another package could be imported."""
    assert (ROOT / "support" / "__init__.py").is_file()
    assert {path.stem for path in (ROOT / "support").glob("[!_]*.py")} == set(
        " ".join(FLOORS).split()
    )
    below = set()
    for floor in FLOORS:
        for name in floor.split():
            found = set()
            for node in ast.walk(tree(f"support/{name}")):
                if isinstance(node, ast.ImportFrom):
                    module = f"{node.module}.{node.names[0].name}"  # from support import x
                    found |= {module.split(".")[1]} if "support" in node.module else set()
                    assert node.module != "common"
            assert found <= below, name
        below |= set(floor.split())


def test_common_hands_on_just_the_names_that_scripts_use():
    used = set()
    for script in SCRIPTS:
        for node in ast.walk(tree(script)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id == "common" else set()
            elif isinstance(node, ast.ImportFrom) and node.module == "common":
                used |= {alias.name for alias in node.names}
    imports = [node for node in tree("common").body if isinstance(node, ast.ImportFrom)]
    assert used == {alias.name for node in imports for alias in node.names}
    assert len(tree("common").body) == 1 + len(imports)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_read(name):
    """Some expression cfg.option of the script or of support/ reads it; --quick in parse."""
    read = {"quick"}
    for source in (name, *HOUSE):
        for node in ast.walk(tree(source)):
            if isinstance(node, ast.Attribute):
                value = node.value
                owner = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
                read |= {node.attr} if owner in ("cfg", "self") else set()
    fields = {field.name for field in dataclasses.fields(importlib.import_module(name).Config)}
    assert fields <= read


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_that_scripts_share_mean_the_same(name):
    """Where two scripts have an option of one name, its type, choices and bounds are the same."""
    ours = {f.name: f for f in dataclasses.fields(importlib.import_module(name).Config)}
    for other in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(other).Config):
            if field.name in ours:
                assert ours[field.name].type == field.type
                for bound in ("choices", "low", "high"):
                    theirs = field.metadata[bound]
                    assert ours[field.name].metadata[bound] == theirs, field.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    """Everything at the top level says what it is, and so does the head, command first."""
    module = tree(name)
    head = ast.get_docstring(module)
    assert f"python {name}.py --data" in head and "arXiv:" in head
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.slow
def test_importing_has_no_side_effect(tmp_path):
    """No file, no output, and sys.argv is not read."""
    code = f"import sys; sys.argv = ['x', '--nonsense']; sys.path.insert(0, {str(ROOT)!r})"
    call = [sys.executable, "-B", "-c", f"{code}; import {', '.join(SCRIPTS)}"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
