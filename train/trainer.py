"""The training loop."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader

from config import TrainConfig
from train.adapters import FOLDER as LORA_FOLDER
from train.adapters import add_lora, check_lora, save_lora
from train.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    find_start,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from train.components import Networks, build_networks, check_networks, check_samples, condition_of, model_settings
from train.data import MicroStepSampler, build_loader, end_workers, leave_signals_to_the_trainer
from train.distillation import FeatureTeacher
from train.distribution_matching import DistributionTeacher
from train.encoding import BatchEncoder, Example
from train.few_steps import FewStepTeacher
from train.fingerprint import check_fingerprint, fingerprint
from train.hub import BackgroundPush
from train.optimizers import (
    build_optimizers,
    build_schedules,
    check_averages,
    own_settings,
    restore_settings,
    step_if_finite,
)
from train.post_hoc_ema import FOLDER as POST_HOC_EMA
from train.post_hoc_ema import PowerAverages
from train.precomputed import check_precomputed, holds_starts
from train.run_log import RunLog, StepRecord, start_trackers
from train.run_plot import plot
from train.sampling import SampleScores, draw_sheet
from train.settings import as_plain, check_run, save_settings
from train.sharding import SavedAverage, WholeNetworks, autocast, build_accelerator, prepare, whole
from train.spikes import SpikeWatch
from train.stages import build_source
from train.stopping import Stopped, StopSignals
from train.stopwatch import Stopwatch
from train.unreadable import UnreadablePictures
from train.validation import Validation

logger = logging.getLogger(__name__)

DRAWN_EVERY = 60  # seconds, at the least, between two pictures of the log


class Trainer:
    """One run, from its config to a pipeline in `output_dir/pipeline`."""

    def __init__(self, config: TrainConfig):
        check_run(config)
        check_lora(config)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        resume = self._find_start()
        self.source = source = build_source(config, condition_of(model_settings(config)))
        set_seed(config.seed)

        self.networks = build_networks(config, source.words)
        self.networks.classes = source.classes
        if config.lora.rank:
            add_lora(self.networks, config.lora)
        check_networks(self.networks, source)
        self.fingerprint = fingerprint(config, self.networks, source)
        if resume is not None:
            check_fingerprint(read_state(resume).get("fingerprint"), self.fingerprint, resume.name)
        if config.data.name == "precomputed":
            check_precomputed(config)
        check_samples(self.networks.pipeline(config, complete=False), config.sample)
        self.denoiser = self.networks.denoiser
        self.whole = WholeNetworks(self.accelerator, self.networks) if self.accelerator.is_fsdp2 else None
        self.teacher = self._find_teacher()
        if self.networks.vae is not None and self.networks.reload is None:
            self.networks.vae.to(self.accelerator.device)
        # torch's own note on norms under autocast, which nothing here can change
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        if config.compile:
            self.denoiser.transformer.compile_repeated_blocks()
        optimizers = build_optimizers(self.denoiser, config.optimizer)
        check_averages(optimizers, config.optimizer)
        schedules = build_schedules(optimizers, config.optimizer, config.max_steps, self.accelerator.num_processes)
        self.model, self.optimizers, self.schedules = prepare(
            self.accelerator, config, self.denoiser, optimizers, schedules
        )
        self.learning, self.scheduled = [*self.optimizers], [*self.schedules]  # with what learns beside the model
        if isinstance(self.teacher, DistributionTeacher):
            self.teacher.prepare()
            self.learning += self.teacher.optimizers
            self.scheduled += self.teacher.schedules
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(SavedAverage(self.ema))
        if config.optimizer.post_hoc_ema:
            named = {name: value for name, value in self.denoiser.named_parameters() if value.requires_grad}
            self.power_averages = PowerAverages(named, config.optimizer.post_hoc_ema)
            self.accelerator.register_for_checkpointing(self.power_averages)
        self.state: dict[str, Any] = self._resume(resume) if resume else {"step": 0}
        self._let_optimizers("train")
        self.watch = Stopwatch(self.accelerator.device)
        if self.denoiser.text_encoder is not None:
            self.watch.attach("text", self.denoiser.text_encoder)
        self.encode = BatchEncoder(config, self.networks, self.accelerator, self.watch, source.empty_text)
        if config.validate_every:
            held_out = build_source(config, condition_of(model_settings(config)), "test")
            self.validation = Validation(config, held_out, self.encode, self.accelerator)
        if config.scores.every:
            self.sample_scores = SampleScores(config, self.networks, self.accelerator.device)
        self.loader = self._build_loader()

    def _build_loader(self) -> DataLoader:
        """The micro-batches of the steps to come."""
        config, passed_over = self.config, self.state.get("passed_over", 0)
        sampler = MicroStepSampler(
            self.source,
            config.batch_size,
            first=(self.state["step"] + passed_over) * config.gradient_accumulation_steps,
            last=(config.max_steps + passed_over) * config.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return build_loader(sampler, config.data.num_workers, leave_signals_to_the_trainer)

    def _find_teacher(self) -> FeatureTeacher | FewStepTeacher | None:
        """The teacher that the config names, if any."""
        config = self.config
        if holds_starts(config):
            return None  # what it would say is in the data
        if config.distillation.teacher is not None:
            return FeatureTeacher(config, self.networks, self.accelerator)
        if config.few_step.teacher is not None:
            matches = config.few_step.method == "distribution_matching"
            kind = DistributionTeacher if matches else FewStepTeacher
            return kind(config, self.networks, self.accelerator, self.source.empty_text)
        return None

    def _find_start(self) -> Path | None:
        """The checkpoint to go on from, or None; the main process looks for it, and all hear the same."""
        found: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            found[0] = find_start(self.config.resume, self.output_dir)
            if found[0] is not None:
                check_checkpoint(found[0], self.config, self.output_dir / "checkpoints")
        return broadcast_object_list(found)[0]

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """Restore a checkpoint, under this run's settings rather than the checkpoint's; returns its state."""
        own = own_settings(self.learning)
        state = load_checkpoint(self.accelerator, checkpoint)
        restore_settings(self.learning, self.scheduled, own)
        if self.ema is not None:
            self.ema.decay = self.config.optimizer.ema_decay
        return state

    def train(self) -> None:
        """Run from the first step to the last, then save the pipeline.

        Raises:
            Stopped: where a signal ended the run early; its checkpoint is then written.
            FloatingPointError: where too many losses or gradients were no numbers; no checkpoint is written then.
        """
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_settings(config, self.output_dir)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, config)
        pushes = config.hub_repo_id is not None and accelerator.is_main_process
        self.push = BackgroundPush(str(config.hub_repo_id), config.hub_private) if pushes else None
        self.log = RunLog(config, accelerator, self.watch, self.state)
        self.drawn = time.monotonic()
        self.unreadable = UnreadablePictures(self.output_dir, config.data.max_unreadable)
        with self.log.progress, StopSignals() as stop:
            while self.state["step"] < config.max_steps:
                self._train_until_spike(stop)
        self.save_pipeline()
        if self.push is not None:
            self.push.finish()
        accelerator.end_training()

    def _train_until_spike(self, stop: StopSignals) -> None:
        """Run to the last step, or to where the loss leaves its course and all is as at the last checkpoint again."""
        config, first, passed_over = self.config, self.state["step"], self.state.get("passed_over", 0)
        spikes = SpikeWatch(config.spike_factor, self.state.get("recent_losses", []))
        batches = iter(self.loader)
        with ExitStack() as at_the_end:
            at_the_end.callback(end_workers, batches)
            for step in range(first, config.max_steps):
                record = self.train_step(step + passed_over, batches)
                self.unreadable.note(record.unreadable)
                self.log.add(record)
                done, stops, validation_loss = step + 1, stop.agreed(), None
                saves = stops or done % config.checkpoint_every == 0 or done == config.max_steps
                if saves or done % config.log_every == 0:  # the log ends a run that learns nothing, unsaved
                    values = self.log.write(done, self.schedules[0].get_last_lr()[0])
                    if spikes.is_spike(values["loss"]) and self._roll_back(done):
                        return
                if done % config.sample_every == 0 and not stops:
                    self._draw_samples(done, stop)
                if config.scores.every and done % config.scores.every == 0 and not stops:
                    self._score_samples(done, stop)
                if config.validate_every and done % config.validate_every == 0 and not stops:
                    validation_loss = self._validate(done, stop)
                self.state |= {"step": done, "recent_losses": list(spikes.recent)}
                if saves:
                    self._save_checkpoint(validation_loss)
                if stops and done < config.max_steps:
                    self.accelerator.end_training()
                    raise Stopped(f"stopped at step {done} of {config.max_steps}; go on with --resume latest.")

    def _roll_back(self, step: int) -> bool:
        """Go back to the last checkpoint, if there is one, and on from there with the data that come after this step.

        Raises:
            FloatingPointError: where the run went back too often before.
        """
        checkpoints = list_checkpoints(self.output_dir / "checkpoints")
        if not checkpoints:
            logger.warning("The loss at step %d left its course, and there is no checkpoint to go back to.", step)
            return False
        rollbacks = self.state.get("rollbacks", 0) + 1
        if rollbacks > self.config.max_rollbacks:
            raise FloatingPointError(
                f"The loss at step {step} left its course again, after {rollbacks - 1} returns to a checkpoint; lower "
                f"optimizer.learning_rate, raise spike_factor={self.config.spike_factor}, and resume from the last one."
            )
        data_step = step + self.state.get("passed_over", 0)
        self.state = self._resume(find_checkpoint("latest", self.output_dir / "checkpoints"))
        self.state |= {"passed_over": data_step - self.state["step"], "rollbacks": rollbacks}
        self.loader = self._build_loader()
        self.log.went_back(step, self.state["step"])
        return True

    def _validate(self, step: int, stop: StopSignals) -> float | None:
        """Log the loss on held-out pictures, and return it, or None where a signal came meanwhile."""
        # eager, because compiling again without gradients takes longer than a few batches
        with self.averaged_weights(), torch.compiler.set_stance("force_eager"):
            values = self.validation(self.model, stop)
        if values:
            self.log.note(step, values)
        return values.get("validation_loss")

    def _save_checkpoint(self, validation_loss: float | None = None) -> None:
        state = {
            **self.state,
            "validation_loss": validation_loss,
            "config": as_plain(self.config),
            "fingerprint": self.fingerprint,
            "skipped_steps": self.log.skipped,
        }
        save_checkpoint(self.accelerator, self.output_dir / "checkpoints", self.config.keep_checkpoints, state)
        is_main = self.accelerator.is_main_process
        if self.config.optimizer.post_hoc_ema:
            dtype = getattr(torch, self.config.save_dtype)
            self.power_averages.save(self.output_dir / POST_HOC_EMA, dtype, writes=is_main)
        ends = self.state["step"] == self.config.max_steps
        if is_main and (ends or time.monotonic() - self.drawn > DRAWN_EVERY):
            plot(self.output_dir)
            self.drawn = time.monotonic()
        if self.config.hub_repo_id is not None:
            self._push(self.state["step"])

    def train_step(self, step: int, batches: Iterator[dict]) -> StepRecord:
        """Take the micro-steps of one step, and update the weights unless their gradient is no number."""
        config, record = self.config, StepRecord()
        accumulation = config.gradient_accumulation_steps
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            with self.watch("data", waits=True):
                batch = next(batches)
            self.encode.seed_dropout(micro_step)
            with self.accelerator.accumulate(self.model):
                example = self.encode(batch, micro_step)
                with self.watch("model"):
                    with autocast(self.accelerator, config):
                        losses = self._losses(example)
                    self.accelerator.backward(losses.mean())
                    if self.accelerator.sync_gradients:
                        self._update(record)
            record.losses.append(losses.detach())
            record.timesteps.append(example.noised.timestep)
            record.names += batch["name"]
            record.unreadable += batch.get("unreadable", [])
        return record

    def _losses(self, example: Example) -> torch.Tensor:
        """The losses of the pictures, [B]."""
        if self.teacher is not None:
            return self.teacher.losses(self.model, example)
        noised = example.noised
        return noised.losses(self.model(noised.inputs, noised.timestep, **example.condition))

    def _update(self, record: StepRecord) -> None:
        """Clip the gradients and step, unless they are no numbers; the schedule goes on in any case."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        record.grad_norm = whole(torch.as_tensor(norm, device=self.accelerator.device))
        if self.accelerator.scaler is None:  # with fp16 some are infinite by design, until its scale has come down
            record.finite = torch.isfinite(record.grad_norm)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            step_if_finite(optimizer, record.finite)
            schedule.step()
            optimizer.zero_grad()
        if isinstance(self.teacher, DistributionTeacher):
            finite, record.critic_loss = self.teacher.update_critic()
            record.finite = record.finite & finite
        if self.ema is not None:
            self.ema.step(self.parameters)
        if self.config.optimizer.post_hoc_ema:
            self.power_averages.step()

    @contextmanager
    def averaged_weights(self):
        """Inside, the networks hold the averaged weights: the EMA's, or those of an optimizer that averages itself."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._let_optimizers("eval")
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self._let_optimizers("train")
            with torch.no_grad():  # to the bit, which the optimizers' way back is not
                for parameter, values in zip(self.parameters, kept, strict=True):
                    parameter.copy_(values)

    @contextmanager
    def averaged_networks(self) -> Iterator[Networks | None]:
        """The networks with the averaged weights, whole, in the main process, and None in others.

        All processes go in together; inside, the main process is on its own.
        """
        if self.whole is not None:
            with self.averaged_weights():
                gathered = self.whole.gather(self.model)
            yield gathered
        elif self.accelerator.is_main_process:
            with self.averaged_weights():
                yield self.networks
        else:
            yield None

    def _let_optimizers(self, mode: Literal["train", "eval"]) -> None:
        """Tell the optimizers that have modes, as schedule-free ones do, to show the weights of one."""
        for optimizer in self.optimizers:
            if hasattr(optimizer.optimizer, mode):
                getattr(optimizer.optimizer, mode)()

    @torch.no_grad()
    def _draw_samples(self, step: int, stop: StopSignals) -> None:
        # eager, because compiling again for another batch size takes longer than a few pictures
        with self.averaged_networks() as networks, torch.compiler.set_stance("force_eager"):
            if networks is not None:
                path = self.output_dir / "samples" / f"{step:08d}.png"
                draw_sheet(networks, self.config, path, self.accelerator.device, stop)
                self.log.show(step, path)

    @torch.no_grad()
    def _score_samples(self, step: int, stop: StopSignals) -> None:
        with self.averaged_networks() as networks, torch.compiler.set_stance("force_eager"):
            if networks is not None and (values := self.sample_scores(networks, stop)):
                self.log.note(step, {"scores": values})

    def save_pipeline(self) -> None:
        """Write the averaged weights as a pipeline to `output_dir/pipeline`, or as adapters to `output_dir/lora`."""
        with self.averaged_networks() as networks:
            if networks is None:
                return
            if self.config.lora.rank:
                dtype = getattr(torch, self.config.save_dtype)
                save_lora(networks.denoiser.transformer, self.output_dir / LORA_FOLDER, dtype)
                return
            pipeline = self._copied_pipeline(networks)
        pipeline.save_pretrained(self.output_dir / "pipeline")

    def _copied_pipeline(self, networks: Networks) -> DiffusionPipeline:
        """A pipeline of copies of the networks, in the precision to save."""
        networks = deepcopy(networks)
        pipeline = networks.pipeline(self.config)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):  # nn.Module's own, as diffusers' warns of modules to keep in fp32
                nn.Module.to(part, getattr(torch, self.config.save_dtype))
        return pipeline

    def _push(self, step: int) -> None:
        """Start to push the averaged weights, unless the last push is still under way."""
        with self.averaged_networks() as networks:
            if networks is None or self.push is None or (self.push.busy and step < self.config.max_steps):
                return
            pipeline = self._copied_pipeline(networks)
        self.push.start(pipeline, f"Step {step} of {self.config.max_steps}")
