"""A judge of generated photographs: the FCN score."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.batches import Loader
from support.checkpoints import load_weights, save_checkpoint
from support.classes import IGNORED
from support.errors import UserError, print_once, progress, refusing
from support.pictures import filled
from support.processes import rank
from support.store import ImageStore


class Judge(nn.Module):
    """A small U-Net that segments photographs: (B, C, S, S) in [-1, 1] -> (B, classes, S, S).

    It is trained on real photographs and their land cover, and measures whether generated ones
    show the land cover of their input: the FCN score of Isola et al. 2017, section 4.1, and Zhu et
    al. 2017, section 5.1.1.
    """

    def __init__(self, classes, bands=3, width=32):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        channels = bands
        for out in widths:
            conv = nn.Conv2d(channels, out, 4, 2, 1)
            self.downs.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            channels = out
        for out in (*widths[-2::-1], width):
            conv = nn.ConvTranspose2d(channels, out, 4, 2, 1)
            self.ups.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            channels = 2 * out
        self.last = nn.Conv2d(width + bands, classes, 3, 1, 1)

    def forward(self, image):
        skips = [image]
        for down in self.downs:
            skips.append(down(skips[-1]))  # (B, 32 .. 128, S/2 .. S/16, S/2 .. S/16)
        x = skips.pop()
        for up in self.ups:
            x = torch.cat([up(x), skips.pop()], 1)
        return self.last(x)

    @torch.no_grad()
    def classes_of(self, image):
        """Photographs (B, C, S, S) -> class indices (B, S, S)."""
        return self.eval()(filled(image)).argmax(1)


def find_judge(cfg, device, of_use=True):
    """The judge of --judge or of the run folder, or with --train-judge a new one; else None.

    of_use  whether photographs are generated from land cover that is known, and can be judged
    """
    if not of_use:
        if cfg.judge or cfg.train_judge:
            print_once("no judge is used: it measures photographs of given land cover")
        return None
    path = Path(cfg.judge or Path(cfg.out) / "judge.pt")
    trained = bool(cfg.judge) or path.is_file()
    if not cfg.classes or not (trained or cfg.train_judge):
        return None
    if trained:
        judge = load_judge(cfg, path).to(device)
    else:
        torch.manual_seed(cfg.seed)
        judge = Judge(len(cfg.classes), cfg.channels("A")).to(device)
        train_judge(judge, cfg, device)
        if rank() == 0:
            state = {"judge": judge.state_dict()}
            save_checkpoint(path, {"state": state} | _photographs_of(cfg))
    weights = b"".join(x.half().cpu().numpy().tobytes() for x in judge.state_dict().values())
    judge.name = f"{path.name} {hashlib.sha256(weights).hexdigest()[:8]}"
    anew = ": remove it to train another" if cfg.train_judge else ""
    print(f"the judge is {path}" + f", which was trained before{anew}" * trained)
    return judge


def load_judge(cfg, path):
    """The judge of a file; refuses one that was trained on other photographs or classes."""
    content, ours = load_weights(path), _photographs_of(cfg)
    judge = Judge(len(cfg.classes), cfg.channels("A"))
    with refusing(f"{path}: is not a judge of {len(cfg.classes)} classes"):
        judge.load_state_dict(content["state"]["judge"])
    for name, own in ours.items():
        theirs = content.get(name, own)
        if theirs != own:
            raise UserError(f"{path}: a judge of other {name}: {theirs or 'those of 8 bits'}")
    return judge


def _photographs_of(cfg):
    """What a judge must have in common with a run: classes, bands and limits of photographs."""
    bands = list(cfg.bands("A") or (1, 2, 3))
    return {"classes": list(cfg.classes.names), "bands": bands, "limits": cfg.limits_A}


def train_judge(judge, cfg, device):
    """Trains a Judge on the training images, turned at random, for --judge-epochs."""
    store = ImageStore(cfg, "train", cfg.size)
    loader = Loader(store.records, device)
    adam = torch.optim.Adam(judge.parameters(), 2e-3)
    rng, batch = np.random.default_rng(cfg.seed), min(16, len(loader))
    for _ in progress(range(cfg.judge_epochs), "training the judge", unit="epoch"):
        order = rng.permutation(len(loader))[: len(loader) // batch * batch].reshape(-1, batch)
        for images in loader.batches(order):
            turned = torch.stack(images).flip([axis for axis in (2, 3) if rng.random() < 0.5])
            turned = turned.transpose(2, 3) if rng.random() < 0.5 else turned
            logits = judge(filled(store.images("A", turned)))
            labels = store.images("B", turned).long()
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
            adam.zero_grad()
            loss.backward()
            adam.step()
