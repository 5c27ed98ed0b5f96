"""The trainer: what it learns, saves and continues."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import GeneralTracker
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
)
from localdit import LocalDiTClassPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from tests.training import tiny_config
from train.dry_run import dry_run
from train.trainer import Trainer, build_optimizers


def test_only_recoloured_pictures_that_keep_their_caption_start_from_their_source(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, data=DataConfig(num_workers=0, recoloured=0.5)))
    image = torch.rand(3, 3, 64, 64)
    batch = {"image": image, "source": torch.cat([image[:1], torch.rand(2, 3, 64, 64)])}
    source = trainer.encode.source(batch, image, dropped=torch.tensor([False, True, False]))
    assert torch.equal(source[:2], image[:2]) and torch.equal(source[2], batch["source"][2])


def test_dropped_tokens_are_not_seen_but_the_last_always_is(tmp_path):
    config = tiny_config(tmp_path, batch_size=64)
    trainer = Trainer(replace(config, objective=replace(config.objective, token_dropout=0.4, condition_dropout=0.5)))
    batch = torch.utils.data.default_collate([trainer.source[position] for position in range(64)])
    condition = trainer.encode(batch, micro_step=3).condition
    tokens, seen = condition["attention_mask"], condition["encoder_attention_mask"]
    assert (seen <= tokens).all()
    last = tokens.sum(dim=1) - 1
    assert (last == 0).any() and seen.gather(1, last[:, None]).all()  # also of the empty caption, which is its end
    others = tokens.sum() - 64
    assert 0.3 < 1 - (seen.sum() - 64) / others < 0.5
    assert torch.equal(trainer.encode(batch, micro_step=3).condition["encoder_attention_mask"], seen)
    states = []
    trainer.denoiser.transformer.register_forward_pre_hook(
        lambda _, __, keywords: states.append(keywords["encoder_attention_mask"]), with_kwargs=True
    )
    trainer.train_step(0, iter([batch]))
    assert (states[0].sum(dim=1) < tokens.sum(dim=1)).any()


def test_training_lowers_the_loss_and_leaves_a_pipeline(tmp_path):
    config = tiny_config(tmp_path, max_steps=40, batch_size=8, checkpoint_every=40, sample_every=40, log_every=5)
    Trainer(config).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert Image.open(tmp_path / "samples" / "00000040.png").size == (2 * 64, 64)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red seven on a black background").images[0].size == (64, 64)
    assert pipeline.config.call_defaults == {"num_inference_steps": 2, "max_sequence_length": 16}


def test_the_saved_pipeline_holds_the_averaged_weights(tmp_path):
    trainer = Trainer(tiny_config(tmp_path))
    trainer.train()
    saved = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [name for name, _ in trainer.denoiser.named_parameters()]
    averaged = dict(zip(names, trainer.ema.shadow_params, strict=True))
    for name, tensor in saved.items():
        assert torch.equal(tensor, averaged[f"transformer.{name}"])
    live = trainer.denoiser.transformer.proj_out.weight
    assert not torch.equal(saved["proj_out.weight"], live)


@pytest.mark.parametrize(("num_workers", "optimizer"), [(0, "adamw"), (1, "adamw"), (0, "muon")])
def test_an_interrupted_run_ends_in_the_same_weights_to_the_bit(tmp_path, num_workers, optimizer):
    config = tiny_config(
        tmp_path / "whole",
        data=DataConfig(num_workers=num_workers),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=2e-3, warmup_steps=2, ema_decay=0.9),
        gradient_accumulation_steps=2,
        sample_every=100,
    )
    whole = Trainer(config)
    whole.train()
    # "killed" after step 3: the newest checkpoint is the one of step 3
    Trainer(replace(config, output_dir=str(tmp_path / "parts"), max_steps=3)).train()
    resumed = Trainer(replace(config, output_dir=str(tmp_path / "parts"), resume="latest"))
    assert resumed.state["step"] == 3
    resumed.train()
    for mine, theirs in zip(resumed.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_can_start_from_the_weights_of_a_pipeline(tmp_path):
    first = Trainer(tiny_config(tmp_path / "first"))
    first.train()
    config = tiny_config(tmp_path / "second", pretrained=str(tmp_path / "first" / "pipeline"), model=ModelConfig())
    second = Trainer(config)
    for mine, theirs in zip(second.denoiser.parameters(), first.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)
    second.train()
    assert DiffusionPipeline.from_pretrained(tmp_path / "second" / "pipeline").transformer.config.num_layers == 2


@pytest.mark.parametrize(("num_classes", "name"), [(10, "sklearn_digits"), (None, "photo_patches")])
def test_a_model_without_text_trains_on_classes_or_on_nothing_and_can_be_tuned(tmp_path, num_classes, name):
    tiny = tiny_config(tmp_path / "first")
    channels = 1 if num_classes else 3
    model = replace(
        tiny.model, in_channels=channels, sample_size=16, patch_size=4, caption_channels=None, num_classes=num_classes
    )
    config = replace(tiny, model=model, data=DataConfig(name=name, resolution=16, num_workers=0))
    Trainer(config).train()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "first" / "pipeline")
    assert isinstance(pipeline, LocalDiTClassPipeline)
    assert pipeline.labels.get("seven") == (7 if num_classes else None)
    sheet = Image.open(next((tmp_path / "first" / "samples").iterdir()))
    assert sheet.size == (2 * 16, 16 * (num_classes or 1))

    again = replace(
        config, output_dir=str(tmp_path / "tuned"), pretrained=str(tmp_path / "first" / "pipeline"), model=ModelConfig()
    )
    trainer = Trainer(again)
    assert torch.equal(trainer.denoiser.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)
    trainer.train()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, optimizer=OptimizerConfig(name="muon", muon_learning_rate=0.03)))
    adamw, muon = build_optimizers(trainer.denoiser, trainer.config.optimizer)
    assert isinstance(muon, torch.optim.Muon) and muon.param_groups[0]["lr"] == 0.03
    names = {id(parameter): name for name, parameter in trainer.denoiser.named_parameters()}
    by_muon = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    by_adamw = {names[id(parameter)] for group in adamw.param_groups for parameter in group["params"]}
    assert "transformer.transformer_blocks.0.attn.to_q.weight" in by_muon
    assert "transformer.transformer_blocks.1.ff.net.2.weight" in by_muon
    assert "transformer.transformer_blocks.0.scale_shift_table" in by_adamw
    assert {"transformer.proj_out.weight", "transformer.pos_embed.proj.weight"} <= by_adamw
    assert by_muon.isdisjoint(by_adamw) and by_muon | by_adamw == set(names.values())
    undecayed = [group for group in adamw.param_groups if group["weight_decay"] == 0]
    assert not any(names[id(p)].endswith("proj_out.weight") for group in undecayed for p in group["params"])


def test_the_slow_parameters_of_a_mixer_have_their_own_rate_and_no_decay(tmp_path):
    config = tiny_config(tmp_path)
    model = replace(config.model, token_mixers=("ssm", "window"), mixer_options={"ssm": {"state_size": 4}})
    settings = OptimizerConfig(name="muon", learning_rate=3e-3, slow_learning_rate=1e-4, weight_decay=0.1)
    trainer = Trainer(replace(config, model=model, optimizer=settings))
    groups = build_optimizers(trainer.denoiser, settings)[0].param_groups
    names = {id(parameter): name for name, parameter in trainer.denoiser.named_parameters()}
    slow = {names[id(parameter)] for group in groups if group["lr"] == 1e-4 for parameter in group["params"]}
    kernel = "transformer.transformer_blocks.0.attn.processor.kernel."
    assert slow == {kernel + name for name in ("log_step", "log_decay", "frequency")}
    assert all(group["weight_decay"] == 0 for group in groups if group["lr"] == 1e-4)
    trainer.train()


def test_muon_moves_every_matrix_of_the_blocks(tmp_path):
    config = tiny_config(tmp_path, max_steps=2, optimizer=OptimizerConfig(name="muon", warmup_steps=0, ema_decay=0))
    trainer = Trainer(config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.denoiser.named_parameters()}
    trainer.train()
    blocks = {name: p for name, p in trainer.denoiser.named_parameters() if ".attn." in name and p.ndim == 2}
    assert blocks and not any(torch.equal(before[name], parameter) for name, parameter in blocks.items())


def test_a_pixart_is_tuned_with_its_size_conditions_and_its_variance_left_alone(tmp_path, pipeline):
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=64,
        patch_size=16,
        caption_channels=24,
        use_additional_conditions=True,
    )
    transformer = LocalDiTTransformer2DModel.from_pixart(pixart, "window", {"window": {"window_size": 2}})
    start = LocalDiTPipeline(
        pipeline.tokenizer,
        pipeline.text_encoder,
        None,
        transformer,
        pipeline.scheduler,
        {"aspect_ratio": "width/height"},
    )
    start.save_pretrained(tmp_path / "start")
    trainer = Trainer(tiny_config(tmp_path / "run", pretrained=str(tmp_path / "start"), model=ModelConfig()))
    trainer.train()
    tuned = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert tuned.config.call_defaults["aspect_ratio"] == "width/height"
    before, after = transformer.proj_out.weight, tuned.transformer.proj_out.weight
    assert not torch.equal(before.unflatten(0, (-1, 6))[:, :3], after.unflatten(0, (-1, 6))[:, :3])
    variance = [weight.unflatten(0, (-1, 6))[:, 3:] for weight in (before, after)]
    torch.testing.assert_close(*variance, rtol=1e-3, atol=0)  # weight decay alone


def test_only_the_last_checkpoints_are_kept(tmp_path):
    Trainer(tiny_config(tmp_path, checkpoint_every=1, keep_checkpoints=2)).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


class Notebook(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, main_process_only = "notebook", False, True

    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails, self.settings, self.values, self.pictures = fails, {}, {}, {}

    def start(self) -> None:
        if self.fails:
            raise RuntimeError("no API key\nconfigured")

    @property
    def tracker(self) -> "Notebook":
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int | None = None, **_) -> None:
        self.values[step] = values

    def log_images(self, values: dict, step: int | None = None, **_) -> None:
        self.pictures[step] = values


def test_trackers_hear_of_settings_losses_and_samples(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=2, sample_every=2, report_to=("tensorboard",))
    trainer, notebook = Trainer(config), Notebook()
    trainer.accelerator.log_with.append(notebook)
    trainer.train()
    assert notebook.settings["optimizer.learning_rate"] == 2e-3 and notebook.settings["model.token_mixers"]
    assert notebook.values[2]["loss"] > 0 and "shares_of_time/model" in notebook.values[2]
    assert notebook.pictures[2]["samples"].shape == (1, 64, 128, 3)
    (events,) = (tmp_path / "run" / "train").glob("events.*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert tags["images"] == ["samples"] and "loss" in tags["scalars"]


def test_a_tracker_that_cannot_start_ends_a_run_before_its_first_step(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, report_to=("tensorboard",)))
    trainer.accelerator.log_with = [Notebook(fails=True)]
    with pytest.raises(ValueError, match=r"cannot start \(no API key configured\); log in, or leave it out"):
        trainer.train()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_dropped_out_depends_on_seed_step_and_process_alone(tmp_path, rank):
    config = tiny_config(tmp_path)
    encode = Trainer(config).encode
    encode.accelerator = SimpleNamespace(process_index=rank)
    drawn = []
    for step in (3, 4, 3):
        torch.rand(step)  # whatever was drawn before
        encode.seed_dropout(step)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    encode.accelerator = SimpleNamespace(process_index=1 - rank)
    encode.seed_dropout(3)
    assert not torch.equal(torch.rand(4), drawn[0])


def test_gradient_checkpointing_changes_nothing_with_dropout_either(tmp_path):
    weights = []
    for checkpointing in (False, True):
        config = tiny_config(tmp_path, gradient_checkpointing=checkpointing)
        trainer = Trainer(replace(config, model=replace(config.model, dropout=0.3)))
        batches = iter(trainer.loader)
        for step in range(2):
            trainer.train_step(step, batches)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.parameters]))
    torch.testing.assert_close(*weights)


def test_two_processes_train_together(tmp_path):
    """Launched as a user would on a machine of two processes; gloo on the CPU."""
    recipe = ["--config", "train/recipes/digit_scenes.yaml", "--output_dir", str(tmp_path), "--max_steps", "2"]
    small = ["--batch_size", "2", "--model.num_layers", "1", "--compile", "false", "--data.num_workers", "0"]
    pixels = ["--vae", "null", "--model.in_channels", "3", "--model.sample_size", "64", "--model.patch_size", "8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "train"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *recipe, *small, *pixels, "--log_every", "1"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_trained_alone_and_load_into_the_pipeline_they_were_trained_on(tmp_path, use_dora):
    base = tmp_path / "base" / "pipeline"
    Trainer(tiny_config(tmp_path / "base", sample_every=100)).train()
    lora = LoraConfig(rank=2, alpha=4.0, use_dora=use_dora)
    config = tiny_config(tmp_path / "run", pretrained=str(base), lora=lora, max_steps=10, checkpoint_every=5)
    fast = replace(config.optimizer, learning_rate=2e-2)  # for adapters that can be seen
    config = replace(config, optimizer=fast)
    trainer = Trainer(config)
    trained = [name for name, parameter in trainer.denoiser.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    before = trainer.denoiser.transformer.proj_out.weight.clone()
    trainer.train()
    assert torch.equal(trainer.denoiser.transformer.proj_out.weight, before)
    assert not (tmp_path / "run" / "pipeline").exists()

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("a red seven", generator=torch.Generator().manual_seed(0), output_type="pt").images

    pipeline = LocalDiTPipeline.from_pretrained(base)
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    adapted = draw(pipeline)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    with trainer.averaged_weights():
        mine = draw(trainer.networks.pipeline(replace(config, sample=config.sample)))
    torch.testing.assert_close(adapted, mine, rtol=0, atol=1e-5)  # alpha and DoRA's lengths came along

    Trainer(replace(config, output_dir=str(tmp_path / "parts"), max_steps=2)).train()
    resumed = Trainer(replace(config, output_dir=str(tmp_path / "parts"), resume="latest"))
    resumed.train()
    for mine, theirs in zip(resumed.parameters, trainer.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_muon_trains_adapters_which_are_all_matrices(tmp_path, model_folder):
    settings = OptimizerConfig(name="muon", warmup_steps=0)
    config = tiny_config(tmp_path, optimizer=settings, pretrained=str(model_folder), lora=LoraConfig(rank=2))
    trainer = Trainer(config)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.train_step(0, iter(trainer.loader))
    moved = [not torch.equal(*pair) for pair in zip(before, trainer.parameters, strict=True)]
    assert len(trainer.optimizers) == 1 and any(moved)


def test_adapters_that_could_not_be_trained_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lora.rank needs a model to adapt; name its pipeline by pretrained"):
        Trainer(tiny_config(tmp_path, lora=LoraConfig(rank=2)))
    Trainer(tiny_config(tmp_path, max_steps=1)).train()
    lora = LoraConfig(rank=2, target_modules=("to_nowhere",))
    with pytest.raises(
        ValueError, match=r"\['to_nowhere'\] name no layer of the transformer; choose among .*attn.to_q"
    ):
        Trainer(tiny_config(tmp_path / "run", pretrained=str(tmp_path / "pipeline"), lora=lora))


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, picture_folder, capsys):
    Image.new("RGB", (200, 60)).save(picture_folder / "cat" / "wide.png")
    (picture_folder / "cat" / "wide.txt").write_text("a wide cat")
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=0, bucket_multiple=16)
    config = tiny_config(tmp_path / "run", data=data, max_steps=7, dry_run=True)
    before = sorted(tmp_path.rglob("*"))
    dry_run(config)
    told = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if line.count(":"))
    assert sorted(tmp_path.rglob("*")) == before
    trained = sum(parameter.numel() for parameter in Trainer(config).parameters)
    assert told["parameters"].split() == [
        f"{trained / 1e6:.2f}M,",
        "of",
        "which",
        f"{trained / 1e6:.2f}M",
        "are",
        "trained",
    ]
    assert told["steps"].strip() == "7 of 4 pictures, 28 in all"
    assert told["epochs"].strip() == "4.0 of 7 pictures"
    assert "wide" not in told and len(told["pictures by size"].split(",")) >= 2
    assert "GiB of the process" in told["peak memory"] and told["max_steps"].strip() == "7"


def test_a_schedule_free_optimizer_resumes_to_the_bit_and_saves_its_average(tmp_path):
    settings = OptimizerConfig(
        name="schedulefree.AdamWScheduleFree", arguments={"betas": (0.9, 0.99)}, ema_decay=0.0, lr_scheduler="constant"
    )
    config = tiny_config(tmp_path / "whole", optimizer=settings, sample_every=2)
    whole = Trainer(config)
    whole.train()
    live = whole.denoiser.transformer.proj_out.weight.clone()
    saved = load_file(tmp_path / "whole" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(saved["proj_out.weight"], live)
    with whole.averaged_weights():
        assert torch.equal(saved["proj_out.weight"], whole.denoiser.transformer.proj_out.weight)
    Trainer(replace(config, output_dir=str(tmp_path / "parts"), max_steps=3)).train()
    resumed = Trainer(replace(config, output_dir=str(tmp_path / "parts"), resume="latest"))
    resumed.train()
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"name": "adam"}, "optimizer.name='adam' .* makes no optimizer"),
        ({"name": "torch.optim.Nothing"}, "makes no optimizer .*Nothing"),
        ({"name": "torch.optim.SGD", "arguments": {"betas": 1}}, "makes no optimizer .*betas"),
        ({"name": "torch.optim.SparseAdam"}, "makes no optimizer .*dense gradients"),
        ({"name": "torch.optim.SGD", "arguments": {"lr": 1}}, "makes no optimizer .*lr"),
        ({"name": "torch.optim.LBFGS"}, "makes no optimizer .*closure"),
        ({"name": "schedulefree.AdamWScheduleFree"}, "averages the weights by itself, .*ema_decay=0.9.* set it to 0"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused(tmp_path, settings, phrase):
    with pytest.raises(ValueError, match=phrase):
        Trainer(tiny_config(tmp_path, optimizer=OptimizerConfig(ema_decay=0.9, **settings)))


def test_a_run_pushes_its_averaged_weights_and_outlives_a_failure(tmp_path, monkeypatch, caplog):
    pushed = []

    def push_to_hub(pipeline, repo_id, private, commit_message):
        pushed.append((repo_id, private, commit_message, pipeline.transformer.proj_out.weight.clone()))
        if len(pushed) == 1:
            raise ConnectionError("nobody there")
        return "address"

    monkeypatch.setattr(LocalDiTPipeline, "push_to_hub", push_to_hub)
    trainer = Trainer(tiny_config(tmp_path, hub_repo_id="me/mine", sample_every=100))
    trainer.train()
    assert pushed[0][:3] == ("me/mine", True, "Step 3 of 6") and pushed[-1][2] == "Step 6 of 6"
    assert "Step 3 of 6 was not pushed to me/mine (nobody there); the training goes on." in caplog.text
    saved = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["proj_out.weight"], pushed[-1][3])
