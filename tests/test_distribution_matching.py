"""Few steps whose pictures are moved to where a guided teacher finds them likelier."""

import json
from dataclasses import replace

import pytest
import torch

from config import SampleConfig
from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel
from tests.training import matching_config, teacher_config, tiny_config
from train import distillation, dry_run
from train.distribution_matching import DistributionTeacher
from train.trainer import Trainer

STEPS = 3  # of `matching_config`
OTHER = {"sample": "flow_prediction", "flow_prediction": "sample"}


@pytest.fixture(scope="module", params=["sample", "flow_prediction"])
def teacher(tmp_path_factory, request):
    """The folder of a pipeline, trained for a moment so that its output is not zero, and its objective."""
    folder = tmp_path_factory.mktemp("teacher")
    config = teacher_config(folder, request.param)
    Trainer(config).train()
    return folder / "pipeline", config.objective


def student(folder, teacher, **changes):
    source, objective = teacher
    config = matching_config(folder, str(source))
    objective = replace(config.objective, prediction_type=objective.prediction_type)
    return replace(config, **{"objective": objective, **changes})


def batch_of(trainer, count):
    return torch.utils.data.default_collate([trainer.source[position] for position in range(count)])


def digest(trainer):
    """Parameters, averages and what the optimizers remember, of the student and of its critic."""
    optimizers = [*trainer.optimizers, *trainer.teacher.optimizers]
    moments = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [
        torch.as_tensor(value).detach().clone()
        for value in (*trainer.parameters, *trainer.ema.shadow_params, *trainer.teacher.critic.parameters(), *moments)
    ]


@torch.no_grad()
def test_the_student_draws_what_its_pipeline_draws(tmp_path, teacher):
    trainer = Trainer(student(tmp_path, teacher))
    pipeline = trainer.networks.pipeline(trainer.config)
    pipeline.set_progress_bar_config(disable=True)
    example = trainer.encode(batch := batch_of(trainer, 2), 0)
    drawn = trainer.teacher.draw(trainer.model, example.noised.inputs, trainer.teacher.with_states(example.condition))
    there = pipeline(batch["caption"], latents=example.noised.inputs, output_type="latent").images
    torch.testing.assert_close(drawn, there, rtol=1e-4, atol=1e-4)


def test_pictures_move_along_the_difference_of_critic_and_guided_teacher(tmp_path, teacher):
    trainer = Trainer(student(tmp_path, teacher))
    assert isinstance(distribution := trainer.teacher, DistributionTeacher)
    with torch.no_grad():
        for parameter in distribution.critic.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    example = trainer.encode(batch_of(trainer, 3), 0)
    kept = [generator.get_state() for generator in example.generators]
    moved = {}
    distribution.draw = lambda *_: moved.setdefault("pictures", torch.randn(3, 3, 64, 64, requires_grad=True))
    losses = distribution.losses(trainer.model, example)
    (gradient,) = torch.autograd.grad(losses.sum(), moved["pictures"])

    for generator, state in zip(example.generators, kept, strict=True):
        generator.set_state(state)
    condition, empty = distribution.with_states(example.condition), distribution.empty_text
    guidance = trainer.config.few_step.guidance_scale
    assert empty is not None
    for row, generator in enumerate(example.generators):
        picture = moved["pictures"][row : row + 1].detach()
        noised = distribution.renoise(picture, [generator])
        own = condition["encoder_hidden_states"][row : row + 1], condition["encoder_attention_mask"][row : row + 1]
        none = empty[0][None], empty[1][None]

        def predicted(denoiser, text, noised=noised):
            with torch.no_grad():
                said = denoiser(
                    noised.inputs, noised.timestep, encoder_hidden_states=text[0], encoder_attention_mask=text[1]
                )
            is_picture = trainer.config.objective.prediction_type == "sample"
            return said if is_picture else noised.inputs - noised.timestep.item() / 1000 * said

        without, said = (predicted(distribution.denoiser, text) for text in (none, own))
        taught = without + guidance * (said - without)
        direction = (predicted(distribution.critic, own) - taught) / (picture - taught).abs().mean()
        torch.testing.assert_close(losses[row].detach(), direction.square().mean(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradient[row : row + 1], 2 * direction / direction.numel(), rtol=1e-3, atol=1e-7)


def test_the_critic_learns_the_objective_on_the_students_pictures(tmp_path, teacher):
    trainer = Trainer(student(tmp_path, teacher, max_steps=100))
    distribution, pictures = trainer.teacher, torch.full((4, 3, 64, 64), 0.7)
    before = [parameter.detach().clone() for parameter in distribution.denoiser.parameters()]
    example = trainer.encode(batch_of(trainer, 4), 0)
    condition = distribution.with_states(example.condition)

    def error():
        noised = distribution.renoise(pictures, trainer.encode.generators(99, 4))
        with torch.no_grad():
            return float(noised.losses(distribution.critic(noised.inputs, noised.timestep, **condition)).mean())

    at_first = error()
    for step in range(20):
        distribution.seen = [(pictures, condition, trainer.encode.generators(step, 4))]
        finite, loss = distribution.update_critic()
        assert bool(finite) and loss < 2 * at_first
    assert error() < 0.9 * at_first  # of flow most is noise, which no one can tell
    assert not distribution.seen
    assert all(map(torch.equal, before, distribution.denoiser.parameters()))  # the teacher stays what it is


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_equal_to_the_bit(tmp_path, teacher, accumulation):
    changes = {"gradient_accumulation_steps": accumulation, "batch_size": 2, "checkpoint_every": 2}
    whole = Trainer(student(tmp_path / "whole", teacher, max_steps=4, **changes))
    at_first = digest(whole)
    whole.train()
    Trainer(student(tmp_path / "parts", teacher, max_steps=2, **changes)).train()
    resumed = Trainer(student(tmp_path / "parts", teacher, max_steps=4, resume="latest", **changes))
    assert resumed.state["step"] == 2
    resumed.train()
    assert all(map(torch.equal, digest(whole), digest(resumed)))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["critic_loss"] < 10 for line in lines if "loss" in line)
    assert sum(map(torch.equal, at_first, digest(whole))) < len(at_first) / 4  # both networks have learned
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "parts" / "pipeline")
    assert pipeline.scheduler.config.solver_order == 1


def test_a_dry_run_counts_the_teacher_and_the_critic_with_gradients_and_moments(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(dry_run, "GIB", 1)
    trainer = Trainer(student(tmp_path, teacher))
    count = sum(parameter.numel() for parameter in trainer.networks.denoiser.transformer.parameters())
    assert dry_run.sizes(trainer)["memory of a teacher"].startswith(f"{4 * (1 + 4) * count:.2f} GiB")


def test_a_resumed_run_gives_the_critic_its_settings_too(tmp_path, teacher):
    Trainer(student(tmp_path, teacher, max_steps=2, checkpoint_every=2)).train()
    config = student(tmp_path, teacher, max_steps=4, resume="latest")
    resumed = Trainer(replace(config, optimizer=replace(config.optimizer, learning_rate=1e-5)))
    assert {group["initial_lr"] for group in resumed.learning[-1].param_groups} == {1e-5}
    with pytest.raises(ValueError, match="few_step.method='progressive', but step-00000002 was written with"):
        Trainer(replace(config, few_step=replace(config.few_step, method="progressive")))


def test_an_optimizer_with_modes_trains_the_critic_too(tmp_path, teacher):
    config = student(tmp_path, teacher, max_steps=2)
    settings = {"name": "schedulefree.AdamWScheduleFree", "lr_scheduler": "constant", "ema_decay": 0.0}
    trainer = Trainer(replace(config, optimizer=replace(config.optimizer, **settings)))
    before = [parameter.detach().clone() for parameter in trainer.teacher.critic.parameters()]
    trainer.train()
    assert not all(map(torch.equal, before, trainer.teacher.critic.parameters()))


def test_the_pipeline_takes_the_few_steps_unguided_unless_told_otherwise(tmp_path, teacher):
    config = student(tmp_path, teacher)
    for sample, expected in (({}, (STEPS, 1.0, 1.0)), ({"guidance_scale": 2.0}, (STEPS, 2.0, 1.0))):
        asked = replace(config, sample=replace(SampleConfig(), prompt=config.sample.prompt, **sample))
        defaults = Trainer(asked).networks.pipeline(asked).config.call_defaults
        names = ("num_inference_steps", "guidance_scale", "img2img_guidance_scale")
        assert tuple(defaults[name] for name in names) == expected


def test_a_teacher_that_is_asked_otherwise_is_refused(tmp_path, teacher, monkeypatch):
    wide = {**tiny_config(tmp_path).model.__dict__, "caption_channels": 20}
    monkeypatch.setattr(distillation, "load_teacher", lambda _: LocalDiTTransformer2DModel(**wide))
    with pytest.raises(ValueError, match="has caption_channels=20, and the student 16; make them equal"):
        Trainer(student(tmp_path, teacher))


def test_the_critic_trades_time_for_memory_as_the_student_does(tmp_path, teacher):
    trainer = Trainer(student(tmp_path, teacher, gradient_checkpointing=True))
    assert trainer.teacher.critic.transformer.gradient_checkpointing


def test_what_does_not_fit_is_one_sentence(tmp_path, teacher):
    config = student(tmp_path, teacher)
    other = replace(config.objective, prediction_type=OTHER[config.objective.prediction_type])
    for changes, phrase in (
        ({"few_step": replace(config.few_step, teacher=None)}, "needs few_step.teacher"),
        ({"mixed_precision": "fp16"}, "choose 'bf16'"),
        ({"objective": other}, "has learned process='flow' and prediction_type="),
        ({"validate_every": 2}, "learns from no picture of the data"),
        ({"data": replace(config.data, recoloured=0.5)}, "data.recoloured=0.5 must be 0"),
    ):
        with pytest.raises(ValueError, match=phrase):
            Trainer(replace(config, **changes))
