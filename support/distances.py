"""FID, KID and LPIPS of generated pictures, by torchmetrics."""

from support.errors import UserError
from support.pictures import shown, to_bytes

SUBSET = 50  # pictures in a subset of KID


class Distances:
    """Distances of generated pictures from real ones, gathered batch by batch.

    fid, kid  of the two sets, by the features of an Inception network: Heusel et al. 2017
              (arXiv:1706.08500), Binkowski et al. 2018 (arXiv:1801.01401)
    lpips     of pairs, if they are `paired`, by AlexNet: Zhang et al. 2018 (arXiv:1801.03924)
    features  a module (B, 3, S, S) uint8 -> (B, F) in place of the Inception network

    torchmetrics downloads both networks once. The number of pictures biases FID, but not KID.
    """

    def __init__(self, device, paired, features=2048):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.fid = FrechetInceptionDistance(features).to(device)
            self.kid = KernelInceptionDistance(self.fid.inception, subset_size=SUBSET).to(device)
            self.lpips = LearnedPerceptualImagePatchSimilarity().to(device) if paired else None
        except ImportError:
            raise UserError("--fid needs torchmetrics: pip install torchmetrics[image]") from None
        except OSError as error:
            raise UserError(f"--fid: its networks cannot be fetched: {error}") from None
        for metric in filter(None, (self.fid, self.kid, self.lpips)):
            metric.sync_on_compute = False  # each process of torchrun has all pictures
        self.count = 0

    def add(self, guess, real):
        """Adds generated and real pictures, (B, C, S, S) in [-1, 1], as colours."""
        guess, real = shown(guess), shown(real)
        self.count += len(guess)
        for distance in (self.fid, self.kid):
            distance.update(to_bytes(real), real=True)
            distance.update(to_bytes(guess), real=False)
        if self.lpips:
            self.lpips.update(guess.clamp(-1, 1), real)

    def measures(self):
        """{"fid", "kid", "lpips": value}; KID needs 50 pictures or more."""
        values = {"fid": self.fid.compute().item()}
        if self.count >= SUBSET:
            values["kid"] = self.kid.compute()[0].item()
        if self.lpips:
            values["lpips"] = self.lpips.compute().item()
        return values
