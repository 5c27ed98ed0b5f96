"""Checkpoints, signals and steps that are no numbers: what a run survives."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from config import DataConfig, OptimizerConfig, TrainConfig
from tests.training import tiny_config
from train.checkpoint import damage, find_checkpoint, list_checkpoints, save_checkpoint
from train.run_log import RunLog
from train.run_plot import plot, read_log
from train.settings import as_plain
from train.stopping import STOPPED, StopSignals
from train.trainer import Trainer

WEIGHTS = Path("pipeline") / "transformer" / "diffusion_pytorch_model.safetensors"


def start(config: TrainConfig, recipe: Path, *arguments: str, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    """`python -m train` in a process of its own."""
    recipe.write_text(yaml.safe_dump(as_plain(config)))
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "train", "--config", str(recipe), *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a file or folder is there."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)


def assert_same_weights(first: Path, second: Path) -> None:
    mine, theirs = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_checkpoints(first: Path, second: Path, step: int) -> None:
    """Parameters, optimizer states and averages are equal to the bit after a step of two runs."""
    mine, theirs = (folder / "checkpoints" / f"step-{step:08d}" for folder in (first, second))
    for name, tensor in load_file(mine / "model.safetensors").items():
        assert torch.equal(tensor, load_file(theirs / "model.safetensors")[name]), name
    for file in ("optimizer.bin", "custom_checkpoint_0.pkl"):
        assert same(*(torch.load(folder / file) for folder in (mine, theirs))), file


def same(mine, theirs) -> bool:
    """Whether nested states are equal to the bit."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs


@pytest.fixture
def captioned_folder(mixed_folder):
    """Twenty pictures of three shapes, with captions."""
    for path in mixed_folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"number {path.stem}")
    return mixed_folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path, processes, captioned_folder):
    """With buckets, accumulation, workers, averages and dropout, in the first and the third epoch."""
    data = DataConfig(name="imagefolder", path=str(captioned_folder), bucket_multiple=16, num_workers=2)
    config = tiny_config(tmp_path / "killed", data=data, batch_size=2, gradient_accumulation_steps=2)
    config = replace(config, model=replace(config.model, dropout=0.2), max_steps=24, checkpoint_every=1)
    config = replace(config, sample_every=1000)
    checkpoints, launch = tmp_path / "killed" / "checkpoints", ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    for step in (3, 14) if processes == 1 else (14,):
        resume = ("--resume", "latest") if list_checkpoints(checkpoints) else ()
        process = start(config, tmp_path / "recipe.yaml", *resume, launch=launch if processes == 2 else ())
        wait_for(checkpoints / f"step-{step:08d}", process)
        kill(process)
        assert step <= int(list_checkpoints(checkpoints)[-1].name[-8:]) < 24  # it really was cut short
    resumed = replace(config, resume="latest")
    whole = replace(config, output_dir=str(tmp_path / "whole"), checkpoint_every=24)
    for run in (resumed, whole):
        if processes == 1:
            Trainer(run).train()
            continue
        process = start(run, tmp_path / "recipe.yaml", launch=launch)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole", 24)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a process and all that it started, children first, so that nothing can say goodbye."""
    family = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in family.splitlines())
    members = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    for pid in [process.pid, *(members - {process.pid})]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_a_kill_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path):
    """A child writes the second checkpoint, and is killed at the n-th time that it touches the disk, for every n."""
    accelerator, touches = Accelerator(), 0
    while True:
        folder = tmp_path / str(touches)
        save_checkpoint(accelerator, folder, 1, {"step": 1})
        child = os.fork()
        if child == 0:
            kill_at(touches)
            save_checkpoint(accelerator, folder, 1, {"step": 2})
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = find_checkpoint("latest", folder)
        assert damage(found) is None
        if ended == 0:
            assert [path.name[-1] for path in folder.iterdir()] == ["2"]
            break
        assert ended == -signal.SIGKILL
        save_checkpoint(accelerator, folder, 1, {"step": 3})
        assert [path.name[-1] for path in folder.iterdir()] == ["3"]  # and what the kill left is gone
        touches += 1
    assert touches > 8


def kill_at(touch: int) -> None:
    """Let this process be killed when it is about to touch the disk after so many times."""
    left = [touch]

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_a_run_after_the_step_with_a_checkpoint(tmp_path, number):
    config = tiny_config(tmp_path / "run", max_steps=100_000, checkpoint_every=100_000, sample_every=100_000)
    process = start(replace(config, data=DataConfig(num_workers=1)), tmp_path / "recipe.yaml")
    wait_for(tmp_path / "run" / "log.jsonl", process)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == STOPPED, errors[-2000:]
    checkpoint = find_checkpoint("latest", tmp_path / "run" / "checkpoints")
    step = int(checkpoint.name[-8:])
    assert f"train: stopped at step {step} of 100000; go on with --resume latest." in errors
    assert not (tmp_path / "run" / "pipeline").exists()
    Trainer(replace(config, max_steps=step + 1, resume="latest")).train()
    Trainer(replace(config, output_dir=str(tmp_path / "whole"), max_steps=step + 1)).train()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("told", ["second process", "torchrun"])
def test_two_processes_stop_together_at_the_signal_of_one_or_of_their_launcher(tmp_path, told):
    config = tiny_config(tmp_path / "run", max_steps=100_000, checkpoint_every=100_000, sample_every=100_000)
    passed_on = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "120")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", *passed_on)
    process = start(config, tmp_path / "recipe.yaml", launch=launch)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]) if told == "second process" else process.pid, signal.SIGUSR1)
    errors = process.communicate(timeout=120)[1]
    assert "go on with --resume latest" in errors and process.returncode == 1, errors[-3000:]
    assert told == "torchrun" or f"exitcode  : {STOPPED}" in errors, errors[-3000:]
    find_checkpoint("latest", tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer_state.json"])
def test_resuming_the_latest_passes_over_a_damaged_checkpoint(tmp_path, file, caplog):
    config = tiny_config(tmp_path, max_steps=3, checkpoint_every=1, keep_checkpoints=2)
    Trainer(config).train()
    damaged = tmp_path / "checkpoints" / "step-00000003" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1 if file != "trainer_state.json" else 255
    damaged.write_bytes(content)
    trainer = Trainer(replace(config, resume="latest", max_steps=4))
    assert trainer.state["step"] == 2
    assert f"{damaged.parent} is passed over, because it is damaged" in caplog.text
    trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003", "step-00000004"]


def test_a_run_of_damaged_checkpoints_alone_is_refused(tmp_path):
    config = tiny_config(tmp_path, max_steps=1)
    Trainer(config).train()
    (tmp_path / "checkpoints" / "step-00000001" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match=r"1 damaged checkpoint\(s\) and no whole one"):
        Trainer(replace(config, resume="latest", max_steps=2))


def test_a_full_disk_ends_a_run_with_the_last_checkpoint_whole(tmp_path):
    config = tiny_config(tmp_path, max_steps=2, checkpoint_every=1)
    trainer = Trainer(config)
    save = trainer._save_checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(validation_loss):
        if trainer.state["step"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes that a file may have
        save(validation_loss)

    trainer._save_checkpoint = save_on_a_full_disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            OSError, match=r"step-00000002 cannot be written .*GiB are free\); the last whole .*00000001"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert Trainer(replace(config, resume="latest")).state["step"] == 1


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    for step, loss in enumerate([0.5, 0.2, 0.4, 0.3, 0.3], start=1):
        save_checkpoint(Accelerator(), tmp_path, 2, {"step": step, "validation_loss": loss})
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "4", "5"]


def test_held_out_pictures_are_validated_with_and_the_best_checkpoint_stays(tmp_path):
    config = tiny_config(
        tmp_path, max_steps=6, checkpoint_every=2, validate_every=2, validation_batches=2, keep_checkpoints=1
    )
    trainer = Trainer(config)
    measured = []
    validate = trainer.validation

    def worse_and_worse(model, stop):
        values = validate(model, stop)
        measured.append(values["validation_loss"])
        return {**values, "validation_loss": float(len(measured))}

    trainer.validation = worse_and_worse
    trainer.train()
    assert len(set(measured)) == 3
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "checkpoints")] == ["2", "6"]
    lines = {line["step"]: line for line in read_log(tmp_path)}
    assert lines[4]["validation_loss"] == 2 and lines[4]["loss"] > 0 and len(lines[4]["loss_by_timestep"]) == 10
    # the same weights give the same loss, whenever they are asked
    with StopSignals() as stop, trainer.averaged_weights():
        again = validate(trainer.model, stop)
    assert again["validation_loss"] == pytest.approx(measured[-1])
    assert trainer.model.training and len(again["validation_loss_by_timestep"]) == 10


def test_a_signal_ends_a_validation_without_a_result(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, validate_every=1))
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert trainer.validation(trainer.model, stop) == {}


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Let the pictures of some steps hold a value that is no number."""
    encode = trainer.encode

    def poisoned(batch: dict, micro_step: int):
        example = encode(batch, micro_step)
        if micro_step in steps:
            example.noised.inputs[0, 0, 0, 0] = float("nan")
        return example

    poisoned.seed_dropout = encode.seed_dropout
    trainer.encode = poisoned


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_no_number_leaves_the_weights_as_they_are_and_is_told(tmp_path, optimizer):
    settings = OptimizerConfig(name=optimizer, ema_decay=0.0, warmup_steps=0)
    trainer = Trainer(tiny_config(tmp_path, max_steps=4, optimizer=settings, log_every=4))
    poison(trainer, {2})
    weights, batches = [], iter(trainer.loader)
    for step in range(4):
        trainer.train_step(step, batches)
        weights.append([parameter.detach().clone() for parameter in trainer.parameters])
    assert all(torch.equal(before, after) for before, after in zip(weights[1], weights[2], strict=True))
    for step in (1, 3):
        assert not all(torch.equal(a, b) for a, b in zip(weights[step - 1], weights[step], strict=True))

    again = Trainer(tiny_config(tmp_path, max_steps=4, optimizer=settings, log_every=4))
    poison(again, {2})
    again.train()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.parameters, weights[3], strict=True))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert line["skipped_steps"] == 1 and line["loss"] > 0
    told = json.loads((tmp_path / "skipped_steps.jsonl").read_text())
    assert told == {"step": 3, "samples": [f"scene {position}" for position in range(8, 12)]}


def test_too_many_steps_that_are_no_numbers_end_the_run_unsaved(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, max_steps=6, checkpoint_every=3, log_every=3, max_skipped_steps=1))
    poison(trainer, {2, 3, 4})
    with pytest.raises(FloatingPointError, match="3 steps up to step 6 .* more than max_skipped_steps=1"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_the_log_tells_losses_by_timestep_and_where_the_time_went(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda _, text: told.append(text))
    Trainer(tiny_config(tmp_path, batch_size=16, checkpoint_every=6, log_every=6)).train()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    by_timestep = [loss for loss in line["loss_by_timestep"] if loss is not None]
    assert len(line["loss_by_timestep"]) == 10 and min(by_timestep) < line["loss"] < max(by_timestep)
    assert line["grad_norm"] > 0
    assert line["shares_of_time"].keys() == {"data", "text", "model"}
    assert 0.3 < sum(line["shares_of_time"].values()) <= 1
    assert re.fullmatch(r"loss [\d.]+, \d+ images/s \(data \d+%, model \d+%, text \d+%\), 0 min left", told[-1]), told


def test_the_time_that_is_left_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda _, text: told.append(text))
    trainer = Trainer(tiny_config(tmp_path, max_steps=1001))
    log = RunLog(trainer.config, trainer.accelerator, trainer.watch, {"step": 0})
    log.add(trainer.train_step(0, iter(trainer.loader)))
    log.since = time.perf_counter() - 6  # seconds that the step took
    log.write(1, 1e-3)
    assert told[-1].endswith("100 min left")


def test_the_log_is_drawn_with_steps_done_again_once_and_steps_without_a_loss_left_out(tmp_path):
    Trainer(tiny_config(tmp_path, sample_every=100)).train()
    assert Image.open(tmp_path / "log.png").size == (1000, 600)
    before = (tmp_path / "log.png").read_bytes()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    empty = {**json.loads(lines[-1]), "step": 8, "loss": None, "grad_norm": None, "loss_by_timestep": [None] * 10}
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0], json.dumps(empty)]) + "\n")
    assert [line["step"] for line in read_log(tmp_path)] == [2, 3, 4, 6, 8]
    assert plot(tmp_path).read_bytes() != before
    with pytest.raises(ValueError, match="has no log.jsonl; give the output_dir of a run"):
        plot(tmp_path / "checkpoints")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interruption_in_the_second_epoch_changes_nothing_either(tmp_path, workers, picture_folder):
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=workers)
    config = tiny_config(tmp_path / "whole", data=data, max_steps=5, sample_every=100)
    Trainer(config).train()
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    Trainer(replace(parts, max_steps=3)).train()
    Trainer(replace(parts, resume="latest", data=replace(data, num_workers=2 - workers))).train()
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
