"""Drawing in few steps what a teacher draws in many."""

from dataclasses import replace

import pytest
import torch

from config import DistillationConfig, FewStepConfig
from localdit import LocalDiTPipeline
from tests.training import teacher_config, tiny_config
from train.few_steps import FewStepTeacher
from train.objective import flow_sigmas, sampling_scheduler
from train.trainer import Trainer

STEPS, TEACHER_STEPS, GUIDANCE = 4, 12, 3.0
STRIDE = TEACHER_STEPS // STEPS


@pytest.fixture(scope="module", params=["sample", "flow_prediction"])
def teacher(tmp_path_factory, request):
    """The folder of a pipeline, trained for a moment so that its output is not zero, and its objective."""
    folder = tmp_path_factory.mktemp("teacher")
    config = teacher_config(folder, request.param)
    Trainer(config).train()
    return folder / "pipeline", config.objective


def student(folder, teacher, **changes):
    source, objective = teacher
    config = tiny_config(folder, sample_every=100, **changes)
    return replace(
        config,
        pretrained=str(source),
        objective=objective,
        text_encoder=replace(config.text_encoder, frozen=True),
        few_step=FewStepConfig(str(source), STEPS, TEACHER_STEPS, GUIDANCE),
        sample=replace(config.sample, num_inference_steps=STEPS, guidance_scale=1.0),
    )


def batch_of(trainer, count):
    return torch.utils.data.default_collate([trainer.source[position] for position in range(count)])


def begun(objective, steps, place):
    """The first-order sampler, about to take its step number `place`."""
    scheduler = sampling_scheduler(objective, first_order=True)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(place)
    return scheduler


@torch.no_grad()
def test_a_step_to_the_destination_ends_where_the_teachers_guided_steps_end(tmp_path, teacher):
    (source, objective), trainer = teacher, Trainer(student(tmp_path, teacher))
    assert isinstance(trainer.teacher, FewStepTeacher)
    pipeline = LocalDiTPipeline.from_pretrained(source)
    sigmas, states = flow_sigmas(objective, STEPS), torch.randn(STEPS, 3, 64, 64)
    condition = trainer.teacher.with_states(trainer.encode(batch_of(trainer, STEPS), 0).condition)
    found = trainer.teacher.destination(states, sigmas[:-1] * 1000, condition)

    tokens = pipeline.tokenizer([""], padding="max_length", return_tensors="pt")
    empty = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask
    for place in range(STEPS):
        row = slice(place, place + 1)
        own = condition["encoder_hidden_states"][row], condition["encoder_attention_mask"][row]
        slow, reached = begun(objective, TEACHER_STEPS, STRIDE * place), states[row]
        for step in range(STRIDE * place, STRIDE * (place + 1)):
            timestep = slow.sigmas[step : step + 1] * 1000
            without, said = (
                pipeline.transformer(
                    reached, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep
                ).sample
                for text, mask in (empty, own)
            )
            reached = slow.step(without + GUIDANCE * (said - without), slow.timesteps[step], reached).prev_sample
        quick, picture = begun(objective, STEPS, place), found[row]
        output = picture if objective.prediction_type == "sample" else (states[row] - picture) / sigmas[place]
        ends = quick.step(output, quick.timesteps[place], states[row]).prev_sample
        torch.testing.assert_close(ends, reached, rtol=1e-3, atol=1e-3)


def test_a_run_learns_the_few_steps_and_its_pipeline_takes_them(tmp_path, teacher):
    config = student(tmp_path / "run", teacher, max_steps=30, checkpoint_every=30, log_every=5, batch_size=8)
    trainer, timesteps = Trainer(config), set()
    for parameter in trainer.parameters:  # so that there is something to learn
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer.denoiser.register_forward_pre_hook(lambda _, inputs: timesteps.update(inputs[1].tolist()))
    example = trainer.encode(batch_of(trainer, 32), 10**6)

    def loss() -> float:
        with torch.no_grad():
            return float(trainer._losses(example).mean())

    at_first = loss()
    trainer.train()
    assert loss() < 0.9 * at_first
    assert sorted(timesteps) == pytest.approx(sorted((flow_sigmas(teacher[1], STEPS)[:-1] * 1000).tolist()))
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.solver_order == 1
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    pipeline("a red seven on a black background")
    assert calls == [1] * STEPS  # without guidance


def test_what_does_not_fit_is_one_sentence(tmp_path, teacher):
    config = student(tmp_path, teacher)
    diffusion = replace(config.objective, process="diffusion", prediction_type="sample", flow_shift=1.0)
    for changes, phrase in (
        (
            {"few_step": replace(config.few_step, teacher_steps=10)},
            "teacher_steps=10 is no multiple of",
        ),
        ({"distillation": DistillationConfig(str(teacher[0]))}, "learn from one at a time"),
        ({"text_encoder": replace(config.text_encoder, frozen=False)}, "set text_encoder.frozen to true"),
        ({"objective": diffusion}, "needs objective.process='flow'"),
    ):
        with pytest.raises(ValueError, match=phrase):
            Trainer(replace(config, **changes))
