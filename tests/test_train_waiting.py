"""A step never waits for the device: what it computes there is read when a line of the log is due."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import DataConfig, ObjectiveConfig, TrainConfig
from tests.training import tiny_config
from train.stopping import StopSignals
from train.trainer import Trainer

READERS = ("cpu", "numpy", "tolist", "__array__")  # what copies to the host without an operation of its own on a CPU


class Followed(TorchDispatchMode):
    """Follows what comes of some tensors, as if they were on another device, and counts how often the host reads it."""

    def __init__(self, tensors: list[torch.Tensor], monkeypatch):
        super().__init__()
        self.followed = {id(tensor): tensor for tensor in tensors}
        self.reads = 0
        for name in READERS:
            monkeypatch.setattr(torch.Tensor, name, self.watched(getattr(torch.Tensor, name)))

    def watched(self, reader):
        def read(tensor, *arguments, **settings):
            self.reads += id(tensor) in self.followed
            return reader(tensor, *arguments, **settings)

        return read

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        tensors = [part for part in torch.utils._pytree.tree_leaves((arguments, settings)) if torch.is_tensor(part)]
        if any(id(tensor) in self.followed for tensor in tensors):
            self.reads += operation is torch.ops.aten._local_scalar_dense.default
            for made in torch.utils._pytree.tree_leaves(result):
                if torch.is_tensor(made):
                    self.followed[id(made)] = made  # kept, so that no other tensor gets its number
        return result


def of_classes(config: TrainConfig) -> TrainConfig:
    model = replace(config.model, caption_channels=None, num_classes=10, in_channels=1, sample_size=16, patch_size=4)
    objective = ObjectiveConfig("diffusion", "v_prediction", loss_weighting="min_snr")
    return replace(config, model=model, objective=objective, data=DataConfig("sklearn_digits", resolution=16))


def of_captions(config: TrainConfig) -> TrainConfig:
    objective = replace(config.objective, token_dropout=0.3, loss_weighting="min_snr", shift_resolution=32)
    return replace(config, objective=objective, data=replace(config.data, recoloured=1.0), gradient_checkpointing=True)


@pytest.mark.parametrize("kind", [of_captions, of_classes])
def test_steps_read_nothing_that_the_networks_computed_until_a_line_is_due(tmp_path, kind, monkeypatch):
    config = kind(tiny_config(tmp_path, gradient_accumulation_steps=2))
    trainer = Trainer(replace(config, optimizer=replace(config.optimizer, post_hoc_ema=(0.05, 0.1))))
    batches, stop = iter(trainer.loader), StopSignals()
    own = [*trainer.parameters, *trainer.ema.shadow_params]
    with Followed(own, monkeypatch) as host:
        records = []
        for step in range(3):
            records.append(trainer.train_step(step, batches))
            assert not stop.agreed()
        assert id(records[-1].grad_norm) in host.followed  # the test sees what it is about
        assert host.reads == 0
        float(records[-1].losses[0].detach().mean())
        assert host.reads == 1
        torch.stack([record.finite for record in records]).cpu()
        assert host.reads == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [of_captions, of_classes])
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, kind):
    trainer = Trainer(kind(tiny_config(tmp_path, gradient_accumulation_steps=2)))
    batches = iter(trainer.loader)
    trainer.train_step(0, batches)  # the first one allocates, and makes what is kept
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_step(1, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
