"""The steps of few that are computed once: where they start, what they predict, and learning from them alone."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from safetensors import safe_open

from config import DataConfig, FewStepConfig, PrecomputeConfig, StageConfig
from localdit import LocalDiTPipeline
from tests.training import teacher_config
from train.datasets import build_dataset
from train.few_step_starts import StepEncoder
from train.objective import flow_sigmas, sampling_scheduler
from train.precompute import precompute
from train.trainer import Trainer

STEPS, TEACHER_STEPS, GUIDANCE = 4, 12, 3.0
PICTURES = 8


@pytest.fixture(scope="module", params=["sample", "flow_prediction"])
def run(tmp_path_factory, request):
    """A run of few steps that learns from a pipeline trained for a moment, so that its output is not zero."""
    folder = tmp_path_factory.mktemp("teacher")
    config = teacher_config(folder, request.param)
    Trainer(config).train()
    source = str(folder / "pipeline")
    return replace(
        config,
        output_dir=str(folder / "run"),
        pretrained=source,
        objective=replace(config.objective, condition_dropout=0.0),
        text_encoder=replace(config.text_encoder, frozen=True),
        few_step=FewStepConfig(source, STEPS, TEACHER_STEPS, GUIDANCE),
        sample=replace(config.sample, num_inference_steps=STEPS, guidance_scale=1.0),
    )


@pytest.fixture(scope="module")
def student(run, tmp_path_factory):
    """The folder of a pipeline that differs from the teacher's."""
    pipeline = LocalDiTPipeline.from_pretrained(run.pretrained)
    torch.manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("student")
    pipeline.save_pretrained(folder)
    return str(folder)


def job(run, folder, **changes):
    changes = {"pictures": PICTURES, "shard_size": 6, "dtype": "float32", "few_step_starts": True, **changes}
    return PrecomputeConfig(run=run, output_dir=str(folder), **changes)


def cached(run, folder, **changes):
    return replace(run, data=DataConfig(name="precomputed", path=str(folder), num_workers=0), **changes)


def steps_of(run, count=3, **changes):
    """The encoder of a job, a batch of scenes, and the starts and pictures that it makes of them."""
    source = build_dataset(run.data, run.seed, "caption")
    encode = StepEncoder(job(run, "unused", **changes), Accelerator(), source)
    batch = torch.utils.data.default_collate([source[position] for position in range(count)])
    return encode, batch, *encode(batch)


def stepped(ends_at, start, picture, run):
    """Where the student's first-order step from each start [B, K, ...] to its picture ends, K of them."""
    sigmas = flow_sigmas(run.objective, STEPS)
    return [
        sigmas[k + 1] / sigmas[k] * start[:, k] + (1 - sigmas[k + 1] / sigmas[k]) * picture[:, k]
        for k in range(ends_at)
    ]


def test_the_steps_lead_where_the_pipeline_with_guidance_ends(run):
    encode, batch, starts, pictures = steps_of(run)
    noise = torch.stack([torch.randn(starts.shape[2:], generator=encode.generator(name)) for name in batch["name"]])
    torch.testing.assert_close(starts[:, 0], noise)
    for place, end in enumerate(stepped(STEPS - 1, starts, pictures, run)):
        torch.testing.assert_close(end, starts[:, place + 1], rtol=1e-4, atol=1e-4)

    pipeline = LocalDiTPipeline.from_pretrained(run.pretrained)
    settings = sampling_scheduler(run.objective, first_order=True).config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings, solver_order=2)
    drawn = pipeline(
        batch["caption"],
        latents=noise,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).images
    torch.testing.assert_close(pictures[:, -1], drawn, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_with_a_student_its_own_steps_lead_to_the_starts_and_the_teacher_goes_on_from_them(run, student):
    _, _, taught, _ = steps_of(run)
    encode, batch, starts, pictures = steps_of(run, student=student)
    torch.testing.assert_close(starts[:, 0], taught[:, 0])
    assert (starts[:, 1] - taught[:, 1]).abs().max() > 0.01  # it has errors to mend
    generators = [torch.Generator() for _ in batch["name"]]
    condition = encode.encode.condition(batch, torch.zeros(len(starts), dtype=torch.bool), generators)
    condition = encode.teacher.with_states(condition)
    pipeline = LocalDiTPipeline.from_pretrained(student)
    sigmas = flow_sigmas(run.objective, STEPS)
    for place in range(STEPS):
        first, sigma = starts[:, place], sigmas[place].expand(len(starts))
        said = pipeline.transformer(first, timestep=1000 * sigma, **condition).sample
        own = said if run.objective.prediction_type == "sample" else first - sigmas[place] * said
        if place + 1 < STEPS:
            ratio = sigmas[place + 1] / sigmas[place]
            torch.testing.assert_close(starts[:, place + 1], ratio * first + (1 - ratio) * own, rtol=1e-4, atol=1e-4)
        # the first-order teacher of training ends nearly where the second-order one does, and the student elsewhere
        slow = encode.teacher.destination(first, 1000 * sigma, condition)
        assert (pictures[:, place] - slow).norm() < 0.5 * (pictures[:, place] - own).norm()


def test_a_run_learns_from_the_starts_without_a_teacher(tmp_path, run, student):
    precompute(job(run, tmp_path / "ready"))
    precompute(job(replace(run, seed=1), tmp_path / "own", student=student))
    config = cached(run, tmp_path / "ready", output_dir=str(tmp_path / "run"), max_steps=40, batch_size=8)
    own = replace(config.data, path=str(tmp_path / "own"))
    config = replace(config, pretrained=student, mixture=(own,), checkpoint_every=40)
    trainer = Trainer(config)
    assert trainer.teacher is None
    assert trainer.denoiser.text_encoder is None
    batch = torch.utils.data.default_collate([trainer.source[0, (row, 0)] for row in range(PICTURES)])
    example = trainer.encode(batch, 0)
    sigmas = flow_sigmas(run.objective, STEPS)
    for row, (timestep, seen) in enumerate(zip(example.noised.timestep, example.noised.inputs, strict=True)):
        place = int((1000 * sigmas - timestep).abs().argmin())
        assert torch.equal(seen, batch["starts"][row, place])
        right = batch["latents"][row, place]
        if run.objective.prediction_type == "flow_prediction":
            right = (seen - right) / sigmas[place]
        torch.testing.assert_close(example.noised.target[row], right)

    def loss() -> float:
        with torch.no_grad():
            return float(trainer._losses(example).mean())

    at_first = loss()
    trainer.train()
    assert loss() < 0.9 * at_first
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.scheduler.config.solver_order == 1
    assert pipeline.config.call_defaults["num_inference_steps"] == STEPS


def test_a_resumed_run_on_starts_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, run):
    precompute(job(run, tmp_path / "ready"))
    whole = Trainer(cached(run, tmp_path / "ready", output_dir=str(tmp_path / "whole"), max_steps=6))
    whole.train()
    part = cached(run, tmp_path / "ready", output_dir=str(tmp_path / "part"), max_steps=3)
    Trainer(part).train()
    resumed = Trainer(replace(part, max_steps=6, resume="latest"))
    resumed.train()
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_the_noise_of_a_picture_depends_on_its_name_and_the_seed_alone(tmp_path, run):
    def starts(name, seed=0, **changes):
        precompute(job(replace(run, seed=seed), tmp_path / name, **changes))
        files = sorted((tmp_path / name).glob("shard-*.safetensors"))
        shards = [safe_open(file, framework="pt") for file in files]
        return torch.cat([shard.get_tensor("starts")[:, 0] for shard in shards])

    found = starts("one")
    assert torch.equal(found, starts("other", shard_size=3))
    assert not torch.isclose(found, starts("another", seed=1)).all(dim=(1, 2, 3)).any()
    assert len(found.flatten(1).unique(dim=0)) == PICTURES


def test_what_does_not_fit_is_one_sentence(tmp_path, run):
    for changes, phrase in (
        ({"few_step_starts": False, "student": "somewhere"}, "set few_step_starts to true"),
        ({"run": replace(run, few_step=FewStepConfig())}, "needs run.few_step.teacher"),
        ({"student": str(tmp_path)}, "The student .* cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=phrase):
            precompute(replace(job(run, tmp_path / "refused"), **changes))
    precompute(job(run, tmp_path / "ready"))
    precompute(job(run, tmp_path / "latents", few_step_starts=False))
    config = cached(run, tmp_path / "ready", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="other few_step"):
        precompute(job(replace(run, few_step=replace(run.few_step, guidance_scale=4.0)), tmp_path / "ready"))
    for changes, phrase in (
        ({"few_step": FewStepConfig()}, "set few_step.teacher to whose steps"),
        ({"objective": replace(run.objective, condition_dropout=0.1)}, "objective.condition_dropout to 0"),
        ({"objective": replace(run.objective, flow_shift=3.0)}, "steps that start at noise of"),
        ({"few_step": replace(run.few_step, steps=2)}, "steps that start at noise of"),
        ({"mixture": (replace(config.data, path=str(tmp_path / "latents")),)}, "some hold the starts"),
        ({"stages": (StageConfig(1, run.data.resolution, path=str(tmp_path / "latents")),)}, "some hold the starts"),
    ):
        with pytest.raises(ValueError, match=phrase):
            Trainer(replace(config, **changes))
