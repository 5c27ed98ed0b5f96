"""Pictures of classes: labels by number and name, guidance, trajectories, saving, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from localdit import LocalDiTClassPipeline, LocalDiTPipeline
from localdit.hub import export

NAMES = {0: "zero, nought", 1: "one", 2: "two"}


@pytest.fixture
def make(tiny_transformer, latent_components):
    def make(latent: bool = False, **changes) -> LocalDiTClassPipeline:
        settings = {"caption_channels": None, "num_classes": 3, **changes}
        vae = latent_components["vae"] if latent else None
        size = {"in_channels": 4, "sample_size": 8} if latent else {}
        pipeline = LocalDiTClassPipeline(
            vae=vae,
            transformer=tiny_transformer(**settings, **size),
            scheduler=DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
            id2label=NAMES if settings["num_classes"] else None,
            call_defaults={"num_inference_steps": 3, "guidance_scale": 2.0},
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("id2label", [["cat"], {"a": "cat"}, {0: None}, {0: ""}, {-1: "cat"}, {1.5: "cat"}])
def test_names_that_are_not_by_number_are_refused(make, id2label):
    parts = make().components
    with pytest.raises(ValueError, match=r"id2label=.* does not name classes by number; give a dict such as"):
        LocalDiTClassPipeline(**{**parts, "id2label": id2label})


def test_a_name_of_two_classes_is_refused_and_their_numbers_told(make):
    parts = make().components
    pipeline = LocalDiTClassPipeline(**{**parts, "id2label": {0: "crane, bird", 1: "bus", 2: "crane, machine"}})
    assert pipeline.get_label_ids(["bird", "machine"]) == [0, 2]
    with pytest.raises(ValueError, match=r"'crane' is the name of the classes \[0, 2\]; give the number"):
        pipeline("crane")


def draw(pipeline, *args, **kwargs) -> np.ndarray:
    return np.asarray(pipeline(*args, output_type="np", **kwargs).images)


@pytest.mark.parametrize("latent", [False, True])
def test_labels_by_number_and_by_name_give_the_same_picture(make, latent):
    pipeline = make(latent)
    by_number = draw(pipeline, [0, 2], generator=seeded(1, 2))
    assert by_number.shape == (2, 16, 16, 3)
    assert np.array_equal(draw(pipeline, ["nought", "two"], generator=seeded(1, 2)), by_number)
    assert np.allclose(draw(pipeline, 0, generator=seeded(1)), by_number[:1], atol=1e-5)
    assert not np.allclose(draw(pipeline, 1, generator=seeded(1)), by_number[:1], atol=1e-3)


def test_guidance_leads_away_from_no_class_in_particular(make):
    pipeline = make()
    latents = torch.randn(1, 3, 16, 16)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    given = {"latents": latents, "num_inference_steps": 1, "callback_on_step_end": keep, "output_type": "latent"}
    pipeline(1, guidance_scale=3.0, **given)
    pipeline(1, guidance_scale=1.0, **given)
    pipeline(None, **given)
    guided, conditional, unconditional = seen
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_several_pictures_of_each_label_lie_beside_each_other(make):
    pipeline = make()
    images = draw(pipeline, [0, 1], num_images_per_label=2, generator=seeded(1, 2, 3, 4))
    assert np.allclose(images[2:], draw(pipeline, [1, 1], generator=seeded(3, 4)), atol=1e-5)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_without_a_label_it_draws_a_batch_of_no_class_in_particular(make, num_classes):
    pipeline = make(num_classes=num_classes)
    images = draw(pipeline, batch_size=3, generator=seeded(1, 2, 3))
    assert images.shape == (3, 16, 16, 3)
    assert np.allclose(draw(pipeline, guidance_scale=7.0, generator=seeded(1)), images[:1], atol=1e-5)


@pytest.mark.parametrize("latent", [False, True])
def test_a_trajectory_goes_from_the_noise_to_the_picture(make, latent):
    pipeline = make(latent)
    noise = torch.randn(2, *((4, 8, 8) if latent else (3, 16, 16)))
    output = pipeline([0, 1], latents=noise, visualize=True)
    assert len(output.trajectories) == 2
    for strip, picture, start in zip(output.trajectories, output.images, noise, strict=True):
        assert strip.size == (16 * 4, 16)
        assert np.array_equal(np.asarray(strip.crop((48, 0, 64, 16))), np.asarray(picture))
        with torch.no_grad():
            first = pipeline.decode(start[None], "pil")[0]
        assert np.array_equal(np.asarray(strip.crop((0, 0, 16, 16))), np.asarray(first))
    assert pipeline([0, 1], latents=noise).trajectories is None
    images, strips = pipeline([0, 1], latents=noise, visualize=True, return_dict=False)
    assert strips[0].size == (64, 16) and images[0].size == (16, 16)


def test_it_is_saved_loaded_and_exported_like_the_others(make, tmp_path):
    pipeline = make()
    expected = draw(pipeline, "two", generator=seeded(5))
    export(pipeline, tmp_path)
    for loaded in (
        LocalDiTClassPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="pipeline_class", trust_remote_code=True),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(loaded, "two", generator=seeded(5)), expected)
        assert loaded.labels == {"zero": 0, "nought": 0, "one": 1, "two": 2}
    assert "pipeline_class" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"class_labels": 3}, r"class 3 is outside \[0, 3\)"),
        ({"class_labels": -1}, "class -1 is outside"),
        ({"class_labels": "three"}, "The class 'three' is not known.*nought.*two"),
        ({"class_labels": 1.5}, "holds 1.5 of type float"),
        ({"class_labels": True}, "holds True of type bool"),
        ({"class_labels": []}, "empty list"),
        ({"class_labels": 1, "batch_size": 2}, "either class_labels or batch_size=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"class_labels": 1, "num_images_per_label": 0}, "num_images_per_label=0"),
        ({"class_labels": 1, "height": 15}, "height=15"),
        ({"class_labels": [0, 1], "generator": seeded(1)}, "list of 1 for 2 pictures"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make, arguments, phrase):
    with pytest.raises((ValueError, TypeError), match=phrase) as caught:
        make()(**arguments)
    assert "\n" not in str(caught.value)


def test_labels_need_a_model_of_classes_and_text_needs_its_own_pipeline(make, make_pipeline):
    with pytest.raises(ValueError, match="this model has no classes"):
        make(num_classes=None)(1)
    text = make_pipeline(LocalDiTPipeline)
    with pytest.raises(ValueError, match="use LocalDiTPipeline"):
        LocalDiTClassPipeline(vae=None, transformer=text.transformer, scheduler=text.scheduler)()


def test_a_pipeline_without_texts_has_no_method_for_them(make):
    assert not hasattr(make(), "encode_prompt")
