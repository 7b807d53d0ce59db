"""Are generated photographs good for anything? Imagery from forged masks, to train a segmenter on.

    python bench/forged_masks.py                                   the demo world, minutes
    python bench/forged_masks.py --data landcover/ --patch 256     a data directory, longer
    python bench/forged_masks.py ... --keep                        also into docs/forged.json

For n real tiles, and several seeds: pix2pix learns land cover -> photograph from these n alone.
Masks are forged from theirs: turned, mirrored, a rectangle of one pasted into another, an ellipse
of some class drawn on top; pix2pix paints their photographs. A small U-Net then learns to segment
from the real tiles; from these turned and mirrored, too (ordinary augmentation); from these and
--forged times as many painted ones, with and without that. What counts is the mean IoU on held-out
tiles.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import common
import pix2pix
from support.demo import demo_world
from support.device import set_lr
from support.judge import Judge
from support.layouts import find_images
from support.measures import print_table
from support.pictures import to_bytes


def tiles_of(cfg, split):
    """(N, 4, S, S) uint8: photograph and land cover."""
    return torch.from_numpy(np.array(common.ImageStore(cfg, split, cfg.size).records))


def turned(records, rng):
    """Each record turned and mirrored at random: 8 ways."""
    ways = rng.integers(0, 8, len(records))
    turns = [torch.rot90(x, int(way % 4), (1, 2)) for x, way in zip(records, ways, strict=True)]
    turns = [x.flip(2) if way >= 4 else x for x, way in zip(turns, ways, strict=True)]
    return torch.stack(turns)


def forge(masks, count, rng):
    """Label maps (N, S, S) recombined: `count` of them, each with a rectangle of another and an
    ellipse of a class of any.
    """
    side, classes = masks.shape[-1], [k for k in masks.unique() if k != common.IGNORED]
    places, forged = np.arange(side), []
    for _ in range(count):
        a, b = turned(masks[rng.choice(len(masks), 2, replace=False)][:, None], rng)[:, 0]
        height, width = rng.integers(side // 4, side * 3 // 4, 2)
        top, left = rng.integers(0, (side - height + 1, side - width + 1))
        a = a.clone()
        a[top : top + height, left : left + width] = b[top : top + height, left : left + width]
        (y, x), (height, width) = rng.integers(0, side, 2), rng.integers(side // 8, side // 3, 2)
        ellipse = ((places[:, None] - y) / height) ** 2 + ((places - x) / width) ** 2 < 1
        a[torch.from_numpy(ellipse)] = classes[rng.integers(len(classes))]
        forged.append(a)
    return torch.stack(forged)


def learn_to_paint(records, cfg, steps):
    """A pix2pix State that has learnt land cover -> photograph from these records alone."""
    torch.manual_seed(cfg.seed)
    state, rng = pix2pix.build(cfg, torch.device("cpu")), np.random.default_rng(cfg.seed)
    for step in range(steps):
        rate = cfg.lr * min(1.0, 2 * (steps - step) / steps)
        for optimizer in (state.opt_G, state.opt_D):
            set_lr(optimizer, rate)
        batch = turned(records[rng.choice(len(records), cfg.batch_size)], rng)
        x = common.draw(batch[:, 3], cfg.classes)
        pix2pix.train_step(state, (x, common.from_bytes(batch[:, :3])), cfg)
    return state


def paint(state, masks, cfg):
    """Records of forged label maps (N, S, S) and their painted photographs."""
    fakes = [pix2pix.translate(state, common.draw(m, cfg.classes), cfg) for m in masks.split(8)]
    return torch.cat([to_bytes(torch.cat(fakes)), masks[:, None]], 1)


def mean_iou(records, val, classes, augment, seed, steps, batch=16):
    """Held-out mean IoU of a small U-Net that learnt to segment from these records."""
    torch.manual_seed(seed)
    net, rng = Judge(classes, width=16), np.random.default_rng(seed)
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        images = records[rng.choice(len(records), batch)]
        images = turned(images, rng) if augment else images
        logits = net(common.from_bytes(images[:, :3]))
        loss = F.cross_entropy(logits, images[:, 3].long(), ignore_index=common.IGNORED)
        adam.zero_grad()
        loss.backward()
        adam.step()
    scores = common.Scores()
    for images in val.split(32):
        seen = net.classes_of(common.from_bytes(images[:, :3]))
        scores.add_labels("net", seen, images[:, 3], classes)
    return scores.table()["net"]["mean_iou"]


@common.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--data", default="", help="a directory with land cover; without it, the demo world")
    arg("--lc-classes", default="", help="a class table, as of the scripts")
    arg("--patch", type=int, default=128, help="side of the pieces that images are cut into")
    arg("--cache", default="runs/cache", help="where decoded images are kept")
    arg("--size", type=int, default=64, help="side that the networks see")
    arg("--width", type=int, default=24, help="channels of pix2pix's first layer")
    arg("--tiles", type=int, nargs="+", default=[16, 64], help="numbers of real tiles to compare")
    arg("--forged", type=int, nargs="+", default=[1, 4], help="forged tiles for each real one")
    arg("--seeds", type=int, default=3, help="runs of each")
    arg("--paint-steps", type=int, default=800, help="steps of pix2pix, of 4 tiles each")
    arg("--steps", type=int, default=400, help="steps of the segmenter, of 16 tiles each")
    arg("--keep", action="store_true", help="also into docs/forged.json")
    args = parser.parse_args(argv)
    if min(args.forged) < 1 or args.seeds < 2:
        raise common.UserError("--forged: from 1, --seeds: from 2, since their spread is shown")
    data = args.data or demo_world(args.cache, "landcover")
    classes = find_images(data, "train", args.lc_classes).classes
    if not classes:
        what = "forging masks needs land cover: pass --lc-classes (maps for the maps data)"
        raise common.UserError(f"--data {data}: {what}")
    options = {"data": data, "patch": args.patch, "cache": args.cache, "size": args.size}
    options["lc_classes"] = classes.text
    held = len(tiles_of(pix2pix.Config(**options), "train"))
    if not 2 <= min(args.tiles) <= max(args.tiles) <= held:
        raise common.UserError(f"--tiles: from 2 to the {held} training tiles of {data}")
    found, began = {}, time.time()
    for n in args.tiles:
        for seed in range(args.seeds):
            cfg = pix2pix.Config(**options, width=args.width, batch_size=4, seed=seed)
            train, val = tiles_of(cfg, "train"), tiles_of(cfg, "val")
            rng = np.random.default_rng([seed, n])
            real = train[rng.choice(len(train), n, replace=False)]
            state = learn_to_paint(real, cfg, args.paint_steps)
            forged = paint(state, forge(real[:, 3], n * max(args.forged), rng), cfg)
            for times, augment in itertools.product([0, *args.forged], (False, True)):
                kind = f"real + {times} x forged" if times else "real"
                kind += ", augmented" if augment else ""
                records = torch.cat([real, forged[: n * times]])
                iou = mean_iou(records, val, len(cfg.classes), augment, seed, args.steps)
                found.setdefault(str(n), {}).setdefault(kind, []).append(iou)
                print(f"{n} tiles, seed {seed}, {kind}: {iou:.3f}", flush=True)
    minutes = (time.time() - began) / 60
    rows = {f"{n} tiles": {k: float(np.mean(v)) for k, v in by.items()} for n, by in found.items()}
    print_table(rows)
    if args.keep:
        name = f"{Path(args.data).name or 'demo world'}, {args.size} pixels"
        path = Path(__file__).parent.parent / "docs" / "forged.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        kept[name] = {"minutes": round(minutes, 1), "mean_iou": found}
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
