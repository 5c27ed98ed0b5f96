"""The optimizers of a run: which parameter goes where, at which rate, and what a resumed run may change."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from diffusers.optimization import get_scheduler
from torch import nn

from config import OptimizerConfig
from localdit.mixers.base import TokenMixer
from train.components import Denoiser

# of a group; some optimizers keep counts and sums beside them
SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "momentum", "eps")


def build_optimizers(denoiser: Denoiser, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with Muon beside it if asked, or the optimizer that `config.name` imports.

    Raises:
        ValueError: where there is no such optimizer, or it does not take its arguments.
    """
    groups, hidden = parameter_groups(denoiser, config)
    if config.name in ("adamw", "muon"):
        optimizers: list[torch.optim.Optimizer] = []
        if groups:  # adapters are matrices of the blocks alone
            optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True))
        if hidden:
            optimizers.append(torch.optim.Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
        return optimizers
    try:
        module, _, name = config.name.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        make = partial(kind, lr=config.learning_rate, **(config.arguments or {}))
        rehearse(make)
        return [make(groups)]
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"optimizer.name={config.name!r} with optimizer.arguments={config.arguments} makes no optimizer ({error}); "
            "give 'adamw', 'muon' or what can be imported, such as 'schedulefree.AdamWScheduleFree'."
        ) from error


def rehearse(make: Callable[[list], torch.optim.Optimizer]) -> None:
    """Take a step with an optimizer, which fails for some only then, as they want sparse gradients or a closure."""
    parameter = nn.Parameter(torch.zeros(2, 2, device="cuda" if torch.cuda.is_available() else "cpu"))
    parameter.grad = torch.ones_like(parameter)
    optimizer: Any = make([parameter])
    if hasattr(optimizer, "train"):  # schedule-free ones have modes
        optimizer.train()
    optimizer.step()


def parameter_groups(denoiser: Denoiser, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Groups of parameters with their weight decay, and those that are Muon's.

    Weight decay is on the matrices of linear layers and convolutions only; what a mixer learns slowly has its own rate.
    """
    matrices = {id(part.weight) for part in denoiser.modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    blocks = denoiser.transformer.transformer_blocks
    hidden = {id(part.weight) for part in blocks.modules() if isinstance(part, nn.Linear)}
    if config.name != "muon":
        hidden = set()
    slow = {
        id(part.get_parameter(name))
        for part in denoiser.modules()
        if isinstance(part, TokenMixer)
        for name in part.slow_parameters
    }
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices - hidden], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices | slow], "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in slow],
            "weight_decay": 0.0,
            "lr": min(config.learning_rate, config.slow_learning_rate),
        },
    ]
    return [group for group in groups if group["params"]], [p for p in trained if id(p) in hidden]


def check_averages(optimizers: list[torch.optim.Optimizer], config: OptimizerConfig) -> None:
    """Raise a ValueError where the weights would be averaged twice."""
    if config.ema_decay and any(hasattr(optimizer, "eval") for optimizer in optimizers):
        raise ValueError(
            f"{config.name} averages the weights by itself, so that optimizer.ema_decay={config.ema_decay} would do it "
            "twice; set it to 0."
        )


def build_schedules(
    optimizers: list[torch.optim.Optimizer], config: OptimizerConfig, max_steps: int, num_processes: int
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """The learning rates' course for each optimizer; accelerate steps it once per process."""
    return [
        get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.warmup_steps * num_processes,
            num_training_steps=max_steps * num_processes,
            num_cycles=config.lr_cycles,
        )
        for optimizer in optimizers
    ]


def step_if_finite(optimizer: AcceleratedOptimizer, finite: torch.Tensor) -> None:
    """Update the weights if `finite`, a scalar on their device, says so.

    The fused AdamW reads it there; for others the host waits for it. With fp16 accelerate's scaler looks by itself.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return  # it updated them, or not, at the end of the backward pass
    inner = optimizer.optimizer
    if optimizer.scaler is not None:
        optimizer.step()
    elif inner.defaults.get("fused"):
        inner.grad_scale, inner.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite.item():
        optimizer.step()


def own_settings(optimizers: list) -> list[list[dict[str, Any]]]:
    """The settings of each optimizer's groups, such as rates and weight decay, without what it has come to."""
    return [
        [{name: value for name, value in group.items() if name in SETTINGS} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def restore_settings(optimizers: list, schedules: list, settings: list[list[dict[str, Any]]]) -> None:
    """Give the groups the settings that they were built with, at the place of the schedule where a checkpoint left it.

    A checkpoint brings its own, so that without this a resumed run would not hear of a changed learning rate.

    Args:
        optimizers, schedules: as `accelerate.Accelerator.prepare` returns them.
        settings: what `own_settings` told of them before the checkpoint was loaded.
    """
    for optimizer, prepared, groups in zip(optimizers, schedules, settings, strict=True):
        schedule = prepared.scheduler
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        rates = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, own, rate in zip(optimizer.param_groups, groups, rates, strict=True):
            group.update(own, lr=rate)
        schedule._last_lr = rates
