"""A teacher beside the data: what is learned from it, and by whom."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from config import DistillationConfig, MixersConfig
from localdit import LocalDiTPipeline
from tests.training import tiny_config
from train.distillation import load_teacher, relative_error
from train.settings import as_plain
from train.trainer import Trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a pipeline with full attention, trained for a moment so that its output is not zero."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_config(folder, max_steps=20, checkpoint_every=20, sample_every=100)
    model = replace(config.model, token_mixers=("full",), mixer_options=None)
    Trainer(replace(config, model=model)).train()
    return folder / "pipeline"


def student(folder, teacher, weights=(1.0, 1.0, 1.0), token_mixers=("window",), **changes):
    """A run that turns the teacher into a student with other mixers, and learns from it."""
    config = tiny_config(folder, sample_every=100, **changes)
    names = ("data_weight", "output_weight", "feature_weight")
    return replace(
        config,
        pretrained=str(teacher),
        text_encoder=replace(config.text_encoder, frozen=True),
        mixers=MixersConfig(token_mixers, {"window": {"window_size": 2}} if "window" in token_mixers else None),
        distillation=DistillationConfig(str(teacher), **dict(zip(names, weights, strict=True))),
    )


def batch_of(trainer, count=4):
    return torch.utils.data.default_collate([trainer.source[position] for position in range(count)])


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 3.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path, teacher, weights):
    trainer = Trainer(student(tmp_path, teacher, weights))
    example = trainer.encode(batch_of(trainer), 0)
    noised, told = example.noised, LocalDiTPipeline.from_pretrained(teacher)
    heard = {"mine": [], "theirs": []}
    for name, transformer in (("mine", trainer.denoiser.transformer), ("theirs", told.transformer)):
        for block in transformer.transformer_blocks:
            block.register_forward_hook(lambda _, __, output, name=name: heard[name].append(output.detach()))
    losses = trainer._losses(example)
    states = told.text_encoder(example.condition["input_ids"], attention_mask=example.condition["attention_mask"])[0]
    common = {"timestep": noised.timestep, "encoder_attention_mask": example.condition["attention_mask"]}
    with torch.no_grad():
        said = told.transformer(noised.inputs, encoder_hidden_states=states, **common).sample
        mine = trainer.denoiser(noised.inputs, noised.timestep, **example.condition)
    expected = weights[0] * noised.weight * (mine - noised.target).square().mean((1, 2, 3))
    expected += weights[1] * noised.weight * (mine - said).square().mean((1, 2, 3))
    blocks = [
        ((own - its) ** 2).mean((1, 2)) / (its**2).mean((1, 2))
        for own, its in zip(heard["mine"][:2], heard["theirs"], strict=True)
    ]
    expected += weights[2] * torch.stack(blocks).mean(0)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert losses.requires_grad and (losses > 0).all()


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it(tmp_path, teacher):
    trainer = Trainer(student(tmp_path, teacher, (0.0, 1.0, 1.0), token_mixers=("full",)))
    losses = trainer._losses(trainer.encode(batch_of(trainer), 0))
    assert losses.abs().max() < 1e-8


def led_astray(config) -> Trainer:
    """A run whose student has forgotten some of what its teacher knows."""
    trainer, generator = Trainer(config), torch.Generator().manual_seed(0)
    for parameter in trainer.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


def test_a_student_comes_nearer_to_its_teacher_which_stays_as_it_is(tmp_path, teacher):
    trainer = led_astray(student(tmp_path / "run", teacher, (0.0, 1.0, 1.0), max_steps=40, checkpoint_every=20))
    before = {name: value.clone() for name, value in trainer.teacher.denoiser.transformer.state_dict().items()}
    example = trainer.encode(batch_of(trainer, 8), 10**6)

    def distance() -> float:
        with torch.no_grad():
            return float(trainer._losses(example).mean())

    at_first = distance()
    trainer.train()
    assert distance() < 0.7 * at_first
    for name, value in trainer.teacher.denoiser.transformer.state_dict().items():
        assert torch.equal(value, before[name])
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert set(pipeline.transformer.config.token_mixers) == {"window"}
    assert pipeline.transformer.config.mixer_options == {"window": {"window_size": 2}}
    resumed = replace(trainer.config, output_dir=str(tmp_path / "parts"), max_steps=20)
    led_astray(resumed).train()
    again = Trainer(replace(resumed, max_steps=40, resume="latest"))
    again.train()
    for mine, theirs in zip(again.parameters, trainer.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_gradient_checkpointing_changes_nothing(tmp_path, teacher):
    gradients = []
    for checkpointing in (False, True):
        trainer = Trainer(student(tmp_path, teacher, gradient_checkpointing=checkpointing))
        trainer._losses(trainer.encode(batch_of(trainer), 0)).mean().backward()
        gradients.append([parameter.grad for parameter in trainer.parameters])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_relative_errors_do_not_depend_on_the_scale():
    mine, theirs = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(relative_error(mine, theirs), relative_error(10 * mine, 10 * theirs))
    assert relative_error(torch.zeros_like(theirs), theirs).tolist() == pytest.approx([1.0] * 3)


def test_a_pixart_teaches_too(tmp_path):
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        out_channels=6,
        in_channels=3,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    pixart.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    loaded = load_teacher(str(tmp_path))
    arguments = {"timestep": torch.tensor([10, 500]), "encoder_hidden_states": torch.randn(2, 5, 16)}
    sample, mask = torch.randn(2, 3, 8, 8), torch.ones(2, 5)
    with torch.no_grad():
        theirs = pixart.eval()(sample, encoder_attention_mask=mask, added_cond_kwargs={}, **arguments).sample
        torch.testing.assert_close(loaded(sample, encoder_attention_mask=mask, **arguments).sample, theirs)


def test_what_does_not_fit_is_one_sentence(tmp_path, teacher):
    config = student(tmp_path, teacher)

    def refused(**changes) -> str:
        with pytest.raises(ValueError) as caught:
            Trainer(replace(config, **changes))
        return str(caught.value)

    assert "set text_encoder.frozen to true" in refused(text_encoder=replace(config.text_encoder, frozen=False))
    assert "The teacher 'nowhere' cannot be loaded" in refused(distillation=DistillationConfig("nowhere"))
    assert "for a new transformer model.token_mixers" in refused(pretrained=None)
    narrow = replace(config.model, num_layers=1)
    fresh = {"pretrained": None, "mixers": MixersConfig(), "model": narrow}
    assert "has num_layers=2, and the student 1" in refused(**fresh)
    assert as_plain(config)["mixers"]["token_mixers"] == ["window"]
