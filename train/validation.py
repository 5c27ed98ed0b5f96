"""The loss on pictures that are held out, always the same ones with the same noise, so that its course can be read."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from config import TrainConfig
from train.data import Source
from train.encoding import BatchEncoder
from train.run_log import loss_by_timestep
from train.sharding import autocast
from train.stopping import StopSignals

FIRST_MICRO_STEP = 2**40  # beyond any of training, so that the noise is not the one that was learned from


class Validation:
    """Measures the loss of `validation_batches` batches a process, without a gradient."""

    def __init__(self, config: TrainConfig, source: Source, encode: BatchEncoder, accelerator: Accelerator):
        self.config = config
        self.source = source
        self.encode = encode
        self.accelerator = accelerator

    @torch.no_grad()
    def __call__(self, model: nn.Module, stop: StopSignals) -> dict[str, Any]:
        """The losses by name, or nothing where the run is told to stop meanwhile; all processes call this together."""
        model.eval()
        losses, timesteps = [], []
        for index in range(self.config.validation_batches):
            if stop.agreed():
                break
            example = self.encode(self._batch(index), FIRST_MICRO_STEP + index)
            with autocast(self.accelerator, self.config):
                prediction = model(example.noised.inputs, example.noised.timestep, **example.condition)
            losses.append(example.noised.losses(prediction))
            timesteps.append(example.noised.timestep)
        model.train()
        if len(losses) < self.config.validation_batches:
            return {}
        told = loss_by_timestep(self.accelerator, losses, timesteps)
        return {f"validation_{name}": value for name, value in told.items()}

    def _batch(self, index: int) -> dict:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        keys = self.source.keys(index, self.config.batch_size, rank, processes)
        return torch.utils.data.default_collate([self.source[key] for key in keys])
