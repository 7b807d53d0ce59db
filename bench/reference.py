"""The training steps of the reference implementation (PyTorch CycleGAN and pix2pix by their
authors), on the scripts' networks, image pools and losses.

What it does otherwise than the scripts: it switches D's gradients off and on around each update,
updates each D with a backward pass of its own, and leaves Adam's form to PyTorch.
"""

import torch
import torch.nn.functional as F


def needed(nets, wanted):
    """Whether the gradients of these networks' weights are computed."""
    for net in nets:
        net.requires_grad_(wanted)


def pix2pix(state, batch, cfg):
    """backward_D, then backward_G of its pix2pix_model.py."""
    x, y = batch
    bce = F.binary_cross_entropy_with_logits
    fake = state.G(x)
    needed([state.D], True)
    state.opt_D.zero_grad()
    logits_fake, logits_real = state.D(x, fake.detach()), state.D(x, y)
    d_fake = bce(logits_fake, torch.zeros_like(logits_fake))
    d_real = bce(logits_real, torch.ones_like(logits_real))
    (0.5 * (d_fake + d_real)).backward()
    state.opt_D.step()
    needed([state.D], False)
    state.opt_G.zero_grad()
    logits = state.D(x, fake)
    g_adv, g_l1 = bce(logits, torch.ones_like(logits)), F.l1_loss(fake, y)
    (g_adv + cfg.lambda_l1 * g_l1).backward()
    state.opt_G.step()
    return {"d_real": d_real, "d_fake": d_fake, "g_adv": g_adv, "g_l1": g_l1}


def cyclegan(state, batch, cfg):
    """backward_G, backward_D_A, backward_D_B of its cycle_gan_model.py."""
    real_A, real_B = batch
    mse, ones, zeros = F.mse_loss, torch.ones_like, torch.zeros_like
    fake_B = state.G_AB(real_A)
    cycled_A = state.G_BA(fake_B)
    fake_A = state.G_BA(real_B)
    cycled_B = state.G_AB(fake_A)
    needed([state.D_A, state.D_B], False)
    state.opt_G.zero_grad()
    losses = {
        "identity_B": F.l1_loss(state.G_AB(real_B), real_B),
        "identity_A": F.l1_loss(state.G_BA(real_A), real_A),
        "cycle_A": F.l1_loss(cycled_A, real_A),
        "cycle_B": F.l1_loss(cycled_B, real_B),
    }
    logits_B, logits_A = state.D_B(fake_B), state.D_A(fake_A)
    losses |= {"adv_AB": mse(logits_B, ones(logits_B)), "adv_BA": mse(logits_A, ones(logits_A))}
    identity = cfg.lambda_identity * (losses["identity_A"] + losses["identity_B"])
    cycle = losses["cycle_A"] + losses["cycle_B"]
    (losses["adv_AB"] + losses["adv_BA"] + cfg.lambda_cycle * (cycle + identity)).backward()
    state.opt_G.step()
    needed([state.D_A, state.D_B], True)
    state.opt_D.zero_grad()
    for side, real, fake in (("A", real_A, fake_A), ("B", real_B, fake_B)):
        D, pool = getattr(state, f"D_{side}"), getattr(state, f"pool_{side}")
        logits_real, logits_fake = D(real), D(pool(fake.detach()))
        d_real, d_fake = mse(logits_real, ones(logits_real)), mse(logits_fake, zeros(logits_fake))
        losses[f"d_{side}"] = 0.5 * (d_real + d_fake)
        losses[f"d_{side}"].backward()
    state.opt_D.step()
    return losses


STEPS = {"pix2pix": pix2pix, "cyclegan": cyclegan}
