"""mixlc_acgan alone: the two heads, the style loss, class weights, the noise, the scores."""

import types

import numpy as np
import pytest
import torch

import common
import mixlc_acgan
from mixlc_acgan import Discriminator, main, style_loss
from runs import last, tiny_run
from tensors import batch_of, maps, pictures, tiny

TINY = tiny("mixlc_acgan")[1]


def test_the_class_head_never_sees_land_cover():
    """Changing it moves the adversarial logits, and the class logits not at all."""
    D, image = Discriminator(3, 3, 4).eval(), pictures()
    logits, classes = D.both(image, maps(0))
    other_logits, other_classes = D.both(image, maps(9))
    assert torch.equal(classes, other_classes) and not torch.equal(logits, other_logits)
    assert torch.equal(D(image, maps(0)), logits) and torch.equal(D.classify(image), classes)
    lc = maps(0).requires_grad_()
    assert torch.autograd.grad(D.both(image, lc)[1].sum(), lc, allow_unused=True)[0] is None


def test_as_a_judge_the_classifier_uses_running_statistics_and_keeps_them():
    D, image = Discriminator(3, 3, 4, 0.5), pictures()
    classes, before = D.classes_of(image), {k: v.clone() for k, v in D.state_dict().items()}
    assert torch.equal(D.classes_of(image[:1]), classes[:1]) and D.training
    assert all(torch.equal(value, before[name]) for name, value in D.state_dict().items())


def test_gram_style_loss_on_a_2x2x2_tensor():
    """Channels (1, 2, 3, 4) and (0, 1, 0, 1): Gram [[30, 6], [6, 2]] / 8; of zeros: zero."""
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    assert torch.equal(common.gram(features), torch.tensor([[[30.0, 6.0], [6.0, 2.0]]]) / 8)
    once = style_loss(lambda image: [image], features, torch.zeros_like(features)).item()
    twice = style_loss(lambda image: [image, image], features, torch.zeros_like(features)).item()
    assert once == pytest.approx((30**2 + 2 * 6**2 + 2**2) / 64) and twice == pytest.approx(
        2 * once
    )


def test_class_weights_by_hand():
    weights = mixlc_acgan.inverse_frequency(torch.tensor([6, 2, 0]))
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 2, 0.0])
    rare = mixlc_acgan.inverse_frequency(torch.tensor([1023, 1]))
    assert rare.tolist() == pytest.approx([512 / 1023, 10.0])


def test_a_judge_and_the_models_own_classifier_see_its_edits(monkeypatch):
    edit, made, judged = mixlc_acgan.Edit(*batch_of("mixlc_acgan", TINY)), pictures(7), {}

    def add_judged(scores, judge, edit, mask, fake, by):
        judged[by] = judge, mask, fake

    monkeypatch.setattr(mixlc_acgan, "add_judged", add_judged)
    monkeypatch.setattr(mixlc_acgan, "translate", lambda state, inputs, cfg: made)
    state, val = types.SimpleNamespace(D="D"), types.SimpleNamespace(in_order=lambda images: [edit])
    mixlc_acgan.evaluate(state, val, TINY, np.arange(2), judge="judge")
    assert set(judged) == {"own", "judge"}
    for by, (judge, mask, fake) in judged.items():
        assert judge == {"own": "D", "judge": "judge"}[by] and fake is made
        assert torch.equal(mask, mixlc_acgan.edit_mask(edit.box, edit.inside, 64))


def test_a_checkpoint_keeps_class_weights_and_no_vgg(trained, landcover, tmp_path):
    """Those of the training labels."""
    content = last(trained("mixlc_acgan"))
    assert set(content["state"]) == {"G", "D", "class_weights", "opt_G", "opt_D"}
    want = mixlc_acgan.inverse_frequency(content["histograms"]["B"][0, :3])
    assert torch.equal(content["state"]["class_weights"], want)
    assert not torch.equal(want, torch.ones(3))
    more = "--epochs 1 --no-class-weights"
    main(tiny_run("mixlc_acgan", landcover, tmp_path / "run", more))
    assert torch.equal(last(tmp_path / "run")["state"]["class_weights"], torch.ones(3))


def test_a_judge_changes_no_weight_of_a_run(trained, landcover, tmp_path):
    numbers = []
    for k, more in enumerate(("", f"--judge {trained('mixlc_acgan')}/judge.pt")):
        words = tiny_run("mixlc_acgan", landcover, tmp_path / f"{k}", more)
        common.begin(mixlc_acgan.Config, "", {}, words)
        numbers.append(torch.rand(1))
    assert torch.equal(*numbers)
