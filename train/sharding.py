"""What several processes hold in parts: FSDP2 and DeepSpeed's ZeRO-2, as `accelerate launch` is told of them."""

from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from config import TrainConfig
from train.components import Denoiser, Networks
from train.stopping import PATIENCE


def by_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def accelerate_plugin(accelerator: Accelerator) -> Any:
    """What the launcher was told about FSDP, or DeepSpeed."""
    return accelerator.state.deepspeed_plugin if by_deepspeed(accelerator) else accelerator.state.fsdp_plugin


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, as its launcher says, but for what the config says.

    Raises:
        ValueError: where the launcher was told of what the run cannot do.
    """
    # of DeepSpeed accelerate would ask for weights in bf16, which no average is made of; `autocast` leaves them in fp32
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else config.mixed_precision,
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # else a launcher's number would win
    check_launcher(accelerator, config)
    return accelerator


def check_launcher(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raise a ValueError where the launcher was told of what the run cannot do."""
    fsdp, deepspeed = accelerator.distributed_type == DistributedType.FSDP, by_deepspeed(accelerator)
    if fsdp and not accelerator.is_fsdp2:
        raise ValueError("FSDP has fsdp_version=1; set 2, as in train/accelerate/fsdp2.yaml.")
    if deepspeed and (stage := accelerate_plugin(accelerator).zero_stage) > 2:
        raise ValueError(f"DeepSpeed has zero_stage={stage}; set 1 or 2, or take train/accelerate/fsdp2.yaml.")
    if (fsdp or deepspeed) and config.optimizer.name == "muon":
        raise ValueError(
            "optimizer.name='muon' needs whole matrices and a second optimizer, of which FSDP and DeepSpeed leave a "
            "process neither; choose 'adamw', or train/accelerate/ddp.yaml."
        )
    if (fsdp or deepspeed) and config.few_step.method == "distribution_matching":
        raise ValueError(
            "few_step.method='distribution_matching' trains a second network, for which FSDP and DeepSpeed have no "
            "place here; choose train/accelerate/ddp.yaml."
        )
    if deepspeed and config.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' is not for DeepSpeed here; choose 'bf16'.")


def prepare(
    accelerator: Accelerator,
    config: TrainConfig,
    denoiser: Denoiser,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LambdaLR],
) -> tuple[nn.Module, list, list]:
    """Model, optimizers and schedules by `accelerator.prepare`; what is sharded has other parameters afterwards."""
    if accelerator.is_fsdp2:
        plugin, text_encoder = accelerate_plugin(accelerator), denoiser.text_encoder
        if text_encoder is not None and config.text_encoder.frozen:
            plugin.ignored_modules = [text_encoder.to(accelerator.device)]  # a teacher asks it, too
        if config.mixed_precision == "bf16":
            # timesteps, which have no room in bf16, stay as they are, and gradients are summed in fp32
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
    if by_deepspeed(accelerator):
        accelerate_plugin(accelerator).deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.optimizer.max_grad_norm,
        }
    model, *rest = accelerator.prepare(denoiser, *optimizers, *schedules)
    if by_deepspeed(accelerator):
        rest[0].optimizer.check_grad_overflow = True  # else only fp16's gradients are looked at before they are used
    return model, rest[: len(optimizers)], rest[len(optimizers) :]


def autocast(accelerator: Accelerator, config: TrainConfig) -> AbstractContextManager:
    """Inside, matrices are multiplied in the run's precision."""
    if by_deepspeed(accelerator) and config.mixed_precision != "no":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Set a tensor, or the part of it that this process holds, from whole values."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(values)


def held(tensor: torch.Tensor) -> int:
    """How many of a tensor's numbers this process holds."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


class SavedAverage:
    """An `EMAModel` for checkpoints: saved whole, and loaded to the place and the parts that it has."""

    def __init__(self, ema: EMAModel):
        self.ema = ema

    def state_dict(self) -> dict[str, Any]:
        state = self.ema.state_dict()
        return {**state, "shadow_params": [whole(value) for value in state["shadow_params"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.ema.shadow_params
        self.ema.load_state_dict({**state, "shadow_params": []})
        for value, saved in zip(own, state["shadow_params"], strict=True):
            fill(value, saved)
        self.ema.shadow_params = own


class WholeNetworks:
    """A copy of the networks in the main process, to gather in it what the processes hold in parts."""

    def __init__(self, accelerator: Accelerator, networks: Networks):
        is_main = accelerator.is_main_process
        self.copy = replace(networks, denoiser=deepcopy(networks.denoiser)) if is_main else None

    def gather(self, model: nn.Module) -> Networks | None:
        """The networks with the weights of `model`, or None in other processes; all call this together."""
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.copy is not None:
            self.copy.denoiser.cpu().load_state_dict(weights)
        return self.copy
