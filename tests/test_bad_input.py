"""Bad input to the pipelines: each ends in one sentence that names the value, the rule and the way out, at once."""

import io
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel

EMBEDS, MASK = torch.zeros(1, 8, 24), torch.ones(1, 8)
NAN = float("nan")
GENERATOR = torch.Generator()
IMAGE = Image.new("RGB", (16, 16))


def truncated_picture():
    """A picture whose file ends too early."""
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:200]))


def ids(value):
    return value[0] if isinstance(value, list) else ""


SIZES = [
    ({"height": 17}, ["height=17", "multiple of 2", "16 and 18"]),
    ({"width": -4}, ["width=-4", "2 and 4"]),
    ({"height": 2**16, "width": 2**16}, ["height=65536 and width=65536 make 1073741824 tokens", "16777216"]),
    ({"height": 0}, ["height=0", "2 and 4"]),
    ({"height": "16"}, ["height='16'", "give an int"]),
    ({"width": 16.0}, ["width=16.0", "give an int"]),
    ({"height": True}, ["height=True", "give an int"]),
]
PROMPTS = [
    ({"prompt": None}, ["either prompt or prompt_embeds", "neither"]),
    ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, ["either prompt or prompt_embeds", "both"]),
    ({"prompt": []}, ["prompt is an empty list", "at least one"]),
    ({"prompt": 7}, ["prompt=7", "int", "str or a list"]),
    ({"prompt": ("a", "b")}, ["tuple", "list of str"]),
    ({"prompt": ["red", None]}, ["None", "every entry must be a str"]),
    ({"negative_prompt": []}, ["negative_prompt is an empty list"]),
    ({"negative_prompt": 1.5}, ["negative_prompt=1.5", "str or a list"]),
    ({"negative_prompt": ["a", "b"]}, ["negative_prompt has 2 texts for 1 prompts"]),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": MASK},
        ["either negative_prompt or negative_prompt_embeds"],
    ),
    ({"prompt_attention_mask": MASK}, ["prompt_embeds and prompt_attention_mask together"]),
    ({"attention_kwargs": 0.5}, ["attention_kwargs=0.5", "no dict"]),
    ({"max_sequence_length": 0}, ["max_sequence_length=0", "at least 1"]),
    ({"max_sequence_length": 2.5}, ["max_sequence_length=2.5", "whole number"]),
]
EMBEDDINGS = [
    ({"prompt_attention_mask": None}, ["prompt_embeds and prompt_attention_mask together"]),
    ({"prompt_embeds": torch.zeros(1, 8, 32)}, ["prompt_embeds has shape [1, 8, 32]", "[batch, tokens, 24]"]),
    ({"prompt_embeds": torch.zeros(8, 24)}, ["prompt_embeds has shape [8, 24]", "[batch, tokens, 24]"]),
    ({"prompt_embeds": EMBEDS.numpy()}, ["must be tensors", "ndarray"]),
    ({"prompt_embeds": EMBEDS * NAN}, ["prompt_embeds holds NaN"]),
    ({"prompt_attention_mask": torch.ones(1, 7)}, ["[1, 8, 24]", "[1, 7]", "do not fit"]),
    ({"prompt_embeds": EMBEDS[:0], "prompt_attention_mask": MASK[:0]}, ["at least one row"]),
    ({"negative_prompt_embeds": EMBEDS}, ["negative_prompt_embeds and negative_prompt_attention_mask together"]),
    (
        {"negative_prompt_embeds": EMBEDS[:, :4], "negative_prompt_attention_mask": MASK[:, :4]},
        ["[1, 8, 24]", "[1, 4, 24]", "same length"],
    ),
    (
        {"negative_prompt_embeds": EMBEDS.repeat(2, 1, 1), "negative_prompt_attention_mask": MASK.repeat(2, 1)},
        ["negative_prompt_embeds has 2 rows for 1 prompts"],
    ),
]
SAMPLING = [
    ({"num_inference_steps": 0}, ["num_inference_steps=0", "at least 1"]),
    ({"num_inference_steps": True}, ["num_inference_steps=True", "whole number"]),
    ({"num_inference_steps": "20"}, ["num_inference_steps='20'", "whole number"]),
    ({"num_images_per_prompt": -1}, ["num_images_per_prompt=-1", "at least 1"]),
    ({"num_images_per_prompt": 1.0}, ["num_images_per_prompt=1.0", "whole number"]),
    ({"guidance_scale": NAN}, ["guidance_scale=nan", "finite"]),
    ({"guidance_scale": float("inf")}, ["guidance_scale=inf", "finite"]),
    ({"guidance_scale": "4"}, ["guidance_scale='4'", "give a number"]),
    ({"guidance_scale": False}, ["guidance_scale=False", "give a number"]),
    ({"eta": 2}, ["eta=2", "[0, 1]"]),
    ({"eta": NAN}, ["eta=nan", "finite"]),
    ({"timesteps": [999, 500], "sigmas": [1.0, 0.5]}, ["either timesteps or sigmas", "both"]),
    ({"timesteps": []}, ["timesteps=[]", "at least one"]),
    ({"sigmas": [1.0, NAN]}, ["sigmas=[1.0, nan]", "finite"]),
    ({"sigmas": "high"}, ["sigmas='high'", "list of numbers"]),
    ({"sigmas": [1.0]}, ["DPMSolverMultistepScheduler", "leave sigmas out", "FlowMatchEuler"]),
    ({"timesteps": [999]}, ["DPMSolverMultistepScheduler", "leave timesteps out", "FlowMatchEuler"]),
    ({"output_type": "jpeg"}, ["output_type='jpeg'", "'pil', 'np', 'pt' or 'latent'"]),
    ({"callback_on_step_end": 3}, ["callback_on_step_end=3", "function"]),
    ({"callback_on_step_end_tensor_inputs": "latents"}, ["='latents' is a str", "a list"]),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, ["['noise']", "latents"]),
    ({"generator": 0}, ["generator", "0 of type int", "torch.Generator()"]),
    ({"generator": [GENERATOR, None]}, ["generator", "None of type NoneType"]),
    ({"generator": [GENERATOR] * 3}, ["generator is a list of 3 for 1 pictures"]),
    ({"latents": torch.zeros(2, 3, 16, 16)}, ["latents has shape [2, 3, 16, 16]", "[1, 3, 16, 16]"]),
    ({"latents": torch.full((1, 3, 16, 16), NAN)}, ["latents holds NaN", "finite"]),
    ({"latents": [0.0]}, ["latents is of type list", "tensor"]),
]
IMAGES = [
    ({"image": None}, ["image is missing", "PIL image"]),
    ({"image": []}, ["image is missing"]),
    ({"image": "a.png"}, ["'a.png'", "str", "load_image"]),
    ({"image": (IMAGE,)}, ["tuple", "list of them"]),
    ({"image": [IMAGE, 3]}, ["2 pictures for 1 prompts"]),
    ({"image": [3]}, ["3 of type int"]),
    ({"image": [IMAGE] * 3, "prompt": ["a", "b"]}, ["3 pictures for 2 prompts", "one for each"]),
    ({"image": [IMAGE] * 2, "prompt": ["a"] * 4}, ["2 pictures for 4 prompts", "one for each"]),
    ({"image": Image.new("RGB", (0, 16))}, ["0 x 16", "at least 1 x 1"]),
    ({"image": np.zeros((0, 16, 3))}, ["[0, 16, 3]", "at least one pixel"]),
    ({"image": np.zeros((16, 16))}, ["[16, 16]", "[height, width, 3]"]),
    ({"image": np.zeros((16, 16, 4))}, ["[16, 16, 4]", "[height, width, 3]"]),
    ({"image": torch.zeros(16, 16, 3)}, ["[16, 16, 3]", "[3, height, width]"]),
    ({"image": torch.zeros(16)}, ["[16]", "[3, height, width]"]),
    ({"image": torch.full((3, 16, 16), NAN)}, ["NaN", "finite"]),
    ({"image": np.full((16, 16, 3), 200.0)}, ["200", "[0, 1] or bytes"]),
    ({"image": np.ones((16, 16, 3), dtype=int)}, ["int64", "[0, 1] or bytes"]),
    ({"image": truncated_picture()}, ["image cannot be read", "truncated", "complete picture"]),
    ({"strength": 1.5}, ["strength=1.5", "[0, 1]"]),
    ({"strength": -0.1}, ["strength=-0.1", "[0, 1]"]),
    ({"strength": NAN}, ["strength=nan", "[0, 1]"]),
    ({"strength": "0.5"}, ["strength='0.5'", "[0, 1]"]),
    ({"strength": True}, ["strength=True", "[0, 1]"]),
]


def refused(call, phrases):
    """Assert that a call raises one sentence with all the phrases in it."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert all(phrase in message for phrase in phrases), message
    assert message.endswith(".") and "\n" not in message and len(message) < 400
    return message


@pytest.fixture
def idle(pipeline, img2img):
    """Both pipelines, with networks that must not run."""

    def run(*arguments, **keywords):
        raise AssertionError("heavy work began before the input was refused")

    for pipe in (pipeline, img2img):
        pipe.text_encoder.forward = pipe.transformer.forward = run
    return [pipeline, lambda *arguments, **keywords: img2img(*arguments, **{"image": IMAGE, **keywords})]


@pytest.mark.parametrize(("arguments", "phrases"), SIZES + PROMPTS + SAMPLING, ids=ids)
def test_both_pipelines_refuse(idle, arguments, phrases):
    for pipe in idle:
        refused(lambda pipe=pipe: pipe(**{"prompt": "a red seven", **arguments}), phrases)


@pytest.mark.parametrize(("arguments", "phrases"), EMBEDDINGS, ids=ids)
def test_both_pipelines_refuse_embeddings(idle, arguments, phrases):
    for pipe in idle:
        given = {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, **arguments}
        refused(lambda pipe=pipe, given=given: pipe(**given), phrases)


@pytest.mark.parametrize(("arguments", "phrases"), IMAGES, ids=ids)
def test_image_to_image_refuses(idle, arguments, phrases):
    refused(lambda: idle[1](**{"prompt": "a red seven", **arguments}), phrases)


def test_an_unknown_argument_is_refused(pipeline):
    with pytest.raises(TypeError, match="num_steps"):
        pipeline("a red seven", num_steps=3)


def test_numpy_numbers_are_numbers(pipeline):
    image = pipeline(
        "a red seven", height=np.int64(8), num_inference_steps=np.int32(1), guidance_scale=np.float32(2.0)
    ).images[0]
    assert image.size == (16, 8)


def test_latents_of_another_size_are_refused(make_pipeline, latent_components):
    pipeline = make_pipeline(LocalDiTImg2ImgPipeline, **latent_components)
    refused(lambda: pipeline("red", image=torch.zeros(1, 4, 6, 8)), ["latents of [6, 8]", "16 x 16", "[8, 8]"])
    refused(lambda: pipeline("red", image=torch.full((1, 4, 8, 8), NAN)), ["NaN", "finite"])


def test_a_prompt_needs_a_text_encoder(make_pipeline):
    pipeline = make_pipeline(text_encoder=None)
    refused(lambda: pipeline("red"), ["no text_encoder", "prompt_embeds"])
    embeds = {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}
    refused(lambda: pipeline(**embeds, guidance_scale=3.0), ["no text_encoder", "guidance_scale=1"])
    assert pipeline(**embeds, guidance_scale=1.0).images


def test_a_transformer_without_captions_takes_no_prompt(make_pipeline, tiny_transformer):
    pipeline = make_pipeline(transformer=tiny_transformer(caption_channels=None), text_encoder=None)
    embeds = {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}
    refused(lambda: pipeline(**embeds), ["takes no text", "caption_channels"])


def test_components_of_different_models_are_refused(make_pipeline, tiny_transformer, latent_components):
    other = tiny_transformer(caption_channels=32)
    refused(lambda: make_pipeline(transformer=other), ["24 wide", "caption_channels=32"])
    refused(lambda: make_pipeline(vae=latent_components["vae"]), ["4 channels", "in_channels=3"])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_sampler_that_would_pass_over_flow_sigmas_is_refused(idle, name):
    for pipe in (idle[0], idle[1].__closure__[0].cell_contents):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    for pipe in idle:
        refused(lambda pipe=pipe: pipe("red"), [name, "no use_flow_sigmas", "DPMSolverMultistepScheduler"])


def test_a_flow_sampler_of_second_order_is_refused_for_predicted_pictures(pipeline):
    config = {"prediction_type": "sample"}
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(config)
    refused(lambda: pipeline("red"), ["FlowMatchHeunDiscreteScheduler is of order 2", "FlowMatchEuler"])
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    assert pipeline("red").images


def test_weights_that_are_not_numbers_draw_nothing(pipeline):
    pipeline.transformer.proj_out.bias.data[0] = NAN
    refused(lambda: pipeline("red"), ["NaN", "DPMSolverMultistepScheduler in torch.float32", "damaged"])


def test_a_text_beside_embeddings_is_encoded_to_their_length(pipeline):
    short = {"max_sequence_length": 5}
    embeds, mask, _, _ = pipeline.encode_prompt("blue", do_classifier_free_guidance=False, **short)
    negative = {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    given = pipeline("red", **negative, generator=torch.Generator().manual_seed(0), output_type="np").images
    texts = pipeline(
        "red", negative_prompt="blue", **short, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    np.testing.assert_allclose(given, texts, atol=1e-5)


def test_call_defaults_that_are_no_dict_are_refused(make_pipeline):
    refused(lambda: make_pipeline(call_defaults="abc"), ["call_defaults='abc' is no dict", "num_inference_steps"])


def test_unknown_call_defaults_are_refused(make_pipeline):
    refused(lambda: make_pipeline(call_defaults={"steps": 3}), ["['steps']", "num_inference_steps"])


# Folders


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of a pipeline's folder, to damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def shard_without_the_second(folder):
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    save_file(weights, folder / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "diffusion_pytorch_model-00001-of-00002.safetensors")}
    index["weight_map"]["proj_out.bias"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def rename(folder, old: str, new: str | None, file: str = WEIGHTS):
    weights = load_file(folder / file)
    tensor = weights.pop(old)
    save_file(weights if new is None else {**weights, new: tensor}, folder / file, metadata={"format": "pt"})


def reconfigure(folder, **changes):
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES = {
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], ["model_index.json", "missing"]),
    "index cut": (lambda folder: truncate(folder / "model_index.json"), ["model_index.json", "damaged"]),
    "index a list": (lambda folder: (folder / "model_index.json").write_text("[]"), ["model_index.json", "damaged"]),
    "index binary": (lambda folder: (folder / "model_index.json").write_bytes(b"\xff\xfe\0"), ["model_index.json"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ["weights", "transformer", "missing"]),
    "weights cut": (lambda folder: truncate(folder / WEIGHTS), [WEIGHTS, "damaged"]),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), [WEIGHTS, "damaged"]),
    "shard missing": (shard_without_the_second, ["00002-of-00002.safetensors", "missing"]),
    "no text weights": (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), ["text_encoder"]),
    "text weights cut": (lambda folder: truncate(folder / "text_encoder/model.safetensors"), ["text_encoder"]),
    "text tensor missing": (
        lambda folder: rename(folder, "encoder.final_layer_norm.weight", None, "text_encoder/model.safetensors"),
        ["text_encoder", "lack 1 tensor(s) (encoder.final_layer_norm.weight"],
    ),
    "text of another width": (
        lambda folder: reconfigure(folder, caption_channels=64),
        ["caption_channels=64", "24 wide"],
    ),
    "no config": (lambda folder: (folder / "transformer/config.json").unlink(), ["transformer/config.json", "missing"]),
    "no component": (lambda folder: shutil.rmtree(folder / "scheduler"), ["scheduler_config.json", "missing"]),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer_config.json", "missing"]),
    "tokenizer cut": (lambda folder: truncate(folder / "tokenizer/tokenizer.json"), ["tokenizer.json", "damaged"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_with_the_file(folder, damage):
    harm, phrases = DAMAGES[damage]
    harm(folder)
    for pipeline_class in (LocalDiTPipeline, LocalDiTImg2ImgPipeline):
        message = refused(lambda cls=pipeline_class: cls.from_pretrained(folder), phrases)
        assert "copy or download the folder anew" in message


WRONG_WEIGHTS = {
    "tensor missing": (
        lambda folder: rename(folder, "scale_shift_table", None),
        ["/transformer lack 1", "(scale_shift_table"],
    ),
    "tensor renamed": (lambda folder: rename(folder, "proj_out.bias", "bias"), ["lack 1", "hold unknown 1", "(bias"]),
    "more layers": (lambda folder: reconfigure(folder, num_layers=5), ["lack", "transformer_blocks.2"]),
    "unknown setting": (lambda folder: reconfigure(folder, foo=2), ["unknown setting(s) ['foo']; correct"]),
    "misspelt setting": (lambda folder: reconfigure(folder, num_layer=2), ["unknown", "['num_layer']", "'num_layers'"]),
    "fewer layers": (lambda folder: reconfigure(folder, num_layers=1), ["hold unknown", "transformer_blocks.1"]),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_weights_that_are_not_the_models_are_no_model(folder, wrong):
    harm, phrases = WRONG_WEIGHTS[wrong]
    harm(folder)
    for load in (LocalDiTPipeline.from_pretrained, diffusers.DiffusionPipeline.from_pretrained):
        refused(lambda load=load: load(folder), phrases)
    refused(lambda: LocalDiTTransformer2DModel.from_pretrained(folder / "transformer"), phrases)


def test_a_pixart_folder_is_referred_to_from_pixart(folder, tmp_path):
    pixart = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        sample_size=16,
        caption_channels=24,
        cross_attention_dim=24,
        norm_num_groups=1,
    )
    shutil.rmtree(folder / "transformer")
    pixart.save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "PixArtTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(
        lambda: LocalDiTPipeline.from_pretrained(folder), ["PixArtTransformer2DModel", "from_pixart", "transformer="]
    )
    refused(lambda: LocalDiTTransformer2DModel.from_pretrained(folder / "transformer"), ["from_pixart"])


def test_a_folder_of_another_kind_is_refused(folder):
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}'
    )
    refused(lambda: LocalDiTPipeline.from_pretrained(folder), ["names no transformer", "LocalDiT pipeline"])


def test_weights_of_a_variant_alone_want_its_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    refused(lambda: LocalDiTPipeline.from_pretrained(tmp_path), ["fp16.safetensors", "give variant="])
    assert LocalDiTPipeline.from_pretrained(tmp_path, variant="fp16")


def test_an_index_of_shards_that_another_variant_has_is_no_damage(folder):
    index = {"weight_map": {"proj_out.bias": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert LocalDiTPipeline.from_pretrained(folder)


def test_a_damaged_component_that_is_given_instead_does_not_matter(folder, pipeline):
    shutil.rmtree(folder / "transformer")
    assert LocalDiTPipeline.from_pretrained(folder, transformer=pipeline.transformer)


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "../model", "~/model", "a/b/c", "tests/model", ""])
def test_a_folder_that_does_not_exist_is_said_to_be_missing(source, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    refused(lambda: LocalDiTPipeline.from_pretrained(source), [repr(source), "does not exist"])


def test_a_file_in_place_of_a_folder_is_refused(model_folder):
    refused(lambda: LocalDiTPipeline.from_pretrained(model_folder / "model_index.json"), ["is a file", "folder"])


def test_a_scheduler_that_takes_sigmas_is_not_refused(pipeline):
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert pipeline("red", sigmas=np.array([1.0, 0.5])).images
