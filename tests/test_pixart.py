"""PixArt as a starting point: its own outputs with full attention, and a local model that learns."""

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.convert import main as convert
from tests.released_reference import CAPTION, inputs

PIXARTS = {
    "alpha": {"use_additional_conditions": True, "out_channels": 8, "sample_size": 128},
    "alpha 512": {"use_additional_conditions": False, "out_channels": 8, "sample_size": 64},
    "sigma": {"use_additional_conditions": False, "out_channels": 8, "sample_size": 128, "interpolation_scale": 2},
}


def pixart(**changes) -> PixArtTransformer2DModel:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=CAPTION,
        **changes,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", PIXARTS)
def test_a_pixart_with_full_attention_gives_its_own_outputs(kind, tmp_path):
    source = pixart(**PIXARTS[kind])
    source.save_pretrained(tmp_path / "pixart" / "transformer")
    given = inputs(8, 12)
    if not source.config.use_additional_conditions:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    expected = source(**given).sample
    for form in (source, tmp_path / "pixart", str(tmp_path / "pixart" / "transformer")):
        model = LocalDiTTransformer2DModel.from_pixart(form)
        with torch.no_grad():
            torch.testing.assert_close(
                model(**given).sample, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
            )


def test_a_pixart_starts_a_local_model_that_learns():
    source = pixart(**PIXARTS["sigma"])
    options = {"window": {"window_size": 2, "global_context": 2, "relative_position_bias": True}}
    model = LocalDiTTransformer2DModel.from_pixart(source, ("window", "full"), options)
    assert model.config.token_mixers == ("window", "full")
    key = model.transformer_blocks[0].attn.to_k.weight
    assert torch.equal(key, source.transformer_blocks[0].attn1.to_k.weight)
    assert key.data_ptr() != source.transformer_blocks[0].attn1.to_k.weight.data_ptr()
    given = inputs(8, 8) | {"added_cond_kwargs": None}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = model(**given).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.transformer_blocks[0].attn.processor.context_embedding.grad.any()


def test_what_a_mixer_keeps_in_fp32_stays_so_and_nothing_is_warned_of(caplog):
    model = LocalDiTTransformer2DModel.from_pixart(pixart(**PIXARTS["sigma"]), "ssm", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".kernel." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".kernel." not in name} == {torch.bfloat16}
    assert not caplog.messages


def test_the_command_line_makes_a_local_model_of_a_pixart(tmp_path, capsys):
    source = pixart(**PIXARTS["sigma"])
    source.save_pretrained(tmp_path / "pixart" / "transformer")
    options = {"window": {"window_size": 2}}
    mixers = ["--token_mixers", "window", "full", "--mixer_options", json.dumps(options), "--dtype", "bfloat16"]
    convert(["from-pixart", str(tmp_path / "pixart"), str(tmp_path / "local"), *mixers])
    assert "load it with from_pretrained" in capsys.readouterr().out
    model = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "local", dtype=torch.bfloat16)
    assert tuple(model.config.token_mixers) == ("window", "full") and model.config.mixer_options == options
    expected = source.transformer_blocks[1].attn2.to_v.weight.bfloat16()
    assert torch.equal(model.transformer_blocks[1].cross_attn.to_v.weight, expected)
    with pytest.raises(ValueError, match="token mixer 'widow' is not known"):
        convert(["from-pixart", str(tmp_path / "pixart"), str(tmp_path / "other"), "--token_mixers", "widow"])


def test_a_pixart_that_is_not_there_or_has_other_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no PixArt transformer"):
        LocalDiTTransformer2DModel.from_pixart(tmp_path)
    source = pixart(**PIXARTS["sigma"])
    source.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "caption_projection.y_embedding": torch.zeros(3)}, weights, metadata={"format": "pt"})
    assert LocalDiTTransformer2DModel.from_pixart(tmp_path / "cut")
    tensors.pop("proj_out.bias")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensor\(s\) \(proj_out.bias"):
        LocalDiTTransformer2DModel.from_pixart(tmp_path / "cut")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="holds no PixArt transformer that can be loaded") as caught:
        LocalDiTTransformer2DModel.from_pixart(tmp_path / "cut")
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="from_pixart was given a NoneType"):
        LocalDiTTransformer2DModel.from_pixart(None)
    with pytest.raises(ValueError, match="upcast_attention=True"):
        LocalDiTTransformer2DModel.from_pixart(pixart(**PIXARTS["sigma"], upcast_attention=True))


def test_the_learned_variance_of_a_pixart_is_left_to_no_sampler(make_pipeline, latent_components):
    transformer = LocalDiTTransformer2DModel.from_pixart(pixart(**{**PIXARTS["sigma"], "sample_size": 8}))
    both = make_pipeline(vae=latent_components["vae"], transformer=transformer)
    mean = LocalDiTTransformer2DModel(**{**transformer.config, "out_channels": 4})
    rows = transformer.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):  # a token's outputs are [patch, patch, channels]
        rows[name] = rows[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    mean.load_state_dict(rows)
    alone = make_pipeline(vae=latent_components["vae"], transformer=mean.eval(), text_encoder=both.text_encoder)
    image, mask = torch.full((1, 3, 16, 16), 0.3), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    for pipeline_class, given in (
        (LocalDiTPipeline, {}),
        (LocalDiTImg2ImgPipeline, {"image": image, "strength": 0.5}),
        (LocalDiTInpaintPipeline, {"image": image, "mask_image": mask, "strength": 0.5}),
    ):
        pictures = []
        for pipe in (both, alone):
            pipe = pipeline_class.from_pipe(pipe)
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(1)
            pictures.append(pipe("a red seven", generator=generator, output_type="pt", **given).images)
        torch.testing.assert_close(*pictures)
