"""UA counts images of the forgotten class, and nothing else; images depend on seed, place and label alone."""

from __future__ import annotations

import pytest
import torch

from fastunlearn.evaluation.classes import classify, draw_classes, unlearning_accuracy


def test_ua_counts_only_the_forgotten_class():
    asked = torch.tensor([0] * 10 + [1] * 10 + [2] * 80)
    predicted = asked.clone()
    predicted[:4] = 1
    assert unlearning_accuracy(predicted, asked, 0) == pytest.approx(0.4)
    # Images of other classes are of no account, right or wrong.
    predicted[20:] = 0
    assert unlearning_accuracy(predicted, asked, 0) == pytest.approx(0.4)
    assert unlearning_accuracy(predicted, asked, [0, 1]) == pytest.approx(0.2)
    assert unlearning_accuracy(asked, asked, 2) == 0.0


@pytest.mark.parametrize(
    ("predicted", "asked", "words"),
    [
        (torch.zeros(3), torch.zeros(4), "predicted: want one label an image"),
        (torch.ones(3), torch.ones(3), "asked: no image was drawn for"),
    ],
)
def test_bad_input(predicted, asked, words):
    with pytest.raises(ValueError, match=words):
        unlearning_accuracy(predicted.long(), asked.long(), 0)


@pytest.mark.parametrize("one_step", [440, None])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_do_not_depend_on_batches(one_step, prediction_type):
    pytest.importorskip("diffusers")
    from tests.methods.test_pecker import tiny_unet

    unet, scheduler = tiny_unet(prediction_type=prediction_type)
    labels = torch.tensor([0, 1, 2, 0, 1])
    drawn = [
        draw_classes(unet, scheduler, labels, one_step=one_step, steps=3, batch_size=n, progress=False) for n in (2, 5)
    ]
    assert drawn[0].shape == (5, 1, 8, 8)
    assert drawn[0].dtype == torch.uint8
    assert (drawn[0].int() - drawn[1].int()).abs().max() <= 1
    other = draw_classes(unet, scheduler, labels, one_step=one_step, steps=3, seed=1, progress=False)
    assert not torch.equal(other, drawn[0])


def test_ddim_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler

    from fastunlearn.evaluation.classes import _ddim
    from fastunlearn.objectives.diffusion import NoiseSchedule
    from tests.methods.test_pecker import tiny_unet

    # Of diffusers' spacings only a step for every timestep is ours, too.
    unet, scheduler = tiny_unet(steps=25)
    x = torch.randn(2, 1, 8, 8)
    label = torch.tensor([0, 2])
    theirs = DDIMScheduler.from_config(scheduler.config, clip_sample=True, set_alpha_to_one=True)
    theirs.set_timesteps(25)
    want = x.clone()
    with torch.no_grad():
        got = _ddim(unet, NoiseSchedule.of(scheduler), x, label, 25)
        for t in theirs.timesteps:
            want = theirs.step(
                unet(want, t, class_labels=label).sample, t, want, use_clipped_model_output=True
            ).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_classify():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    assert classify(
        lambda x: torch.nn.functional.one_hot(x.flatten().long(), 7), images, batch_size=3
    ).tolist() == list(range(7))
