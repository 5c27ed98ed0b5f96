"""Drawing in few steps what a teacher draws in many, guidance included."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from config import ObjectiveConfig, TrainConfig
from train.components import Networks
from train.distillation import Teacher
from train.encoding import Example
from train.objective import TRAIN_TIMESTEPS, flow_sigmas, sampler_of_pictures


def check_prediction(source: str, objective: ObjectiveConfig) -> None:
    """Raise a ValueError where the pipeline of a teacher says that it predicts something else than the objective."""
    settings: Any = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")  # of any kind
    is_euler = settings["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    process = "flow" if is_euler or settings.get("use_flow_sigmas") else "diffusion"
    predicted = settings.get("prediction_type", "flow_prediction")
    if (process, predicted) != (objective.process, objective.prediction_type):
        raise ValueError(
            f"The teacher {source!r} has learned process={process!r} and prediction_type={predicted!r}, and objective "
            f"says {objective.process!r} and {objective.prediction_type!r}; few steps need the teacher's, and 'flow'."
        )


class FewStepTeacher(Teacher):
    """Teaches each step of a short schedule to end where several steps of its own, guided, end.

    Both step along the straight line to the picture x that is predicted: z_t = (t / s) z_s + (1 - t / s) x.

    Args:
        empty_text: states [L, D] and mask [L] of the empty caption, where the data are precomputed.
    """

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        accelerator: Accelerator,
        empty_text: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        self.config, self.objective = config.few_step, config.objective
        super().__init__(str(self.config.teacher), config, networks, accelerator)
        self.sigmas = flow_sigmas(config.objective, self.config.teacher_steps).to(accelerator.device)
        check_prediction(str(self.config.teacher), config.objective)
        self.null_class = networks.denoiser.transformer.config.num_classes
        self.empty_text = empty_text
        if self.text_encoder is not None and networks.tokenizer is not None:
            tokens = networks.tokenizer([""], padding="max_length", return_tensors="pt").to(self.text_encoder.device)
            states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            self.empty_text = states[0].detach(), tokens.attention_mask[0]

    def losses(self, model: nn.Module, example: Example) -> torch.Tensor:
        """The losses [B] of the student's `model` to where the teacher's steps lead."""
        noised, condition = example.noised, self.with_states(example.condition)
        picture = self.destination(noised.inputs, noised.timestep, condition)
        sigma = (noised.timestep / TRAIN_TIMESTEPS)[:, None, None, None]
        target = picture if self.objective.prediction_type == "sample" else (noised.inputs - picture) / sigma
        prediction = model(noised.inputs, noised.timestep, **condition)
        return replace(noised, target=target).losses(prediction)

    @torch.no_grad()
    def destination(
        self, inputs: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The picture [B, C, H, W] that one step has to predict to end where the teacher's steps end."""
        stride = self.config.teacher_steps // self.config.steps
        first = (self.sigmas[None] - (timestep / TRAIN_TIMESTEPS)[:, None]).abs().argmin(dim=1)  # [B]
        start, states = inputs.float(), inputs.float()
        for step in range(stride):
            here, there = (self.sigmas[first + step + ahead][:, None, None, None] for ahead in (0, 1))
            ratio = there / here
            states = ratio * states + (1 - ratio) * self.guided_picture(states, here, condition)
        ratio = (self.sigmas[first + stride] / self.sigmas[first])[:, None, None, None]
        return (states - ratio * start) / (1 - ratio)

    @torch.no_grad()
    def lead(
        self, noise: torch.Tensor, condition: dict[str, torch.Tensor], student: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the K steps of the student begin at, and the pictures they have to predict there, both [B, K, C, H, W].

        The teacher's steps lead from the noise [B, C, H, W] to the picture, and are of second order here, which needs
        fewer of them. With a `student` its own steps do, and the teacher sets out anew from where each of them begins.
        """
        stride, states, found = self.config.teacher_steps // self.config.steps, noise.float(), []
        sampler = sampler_of_pictures(self.objective, self.config.teacher_steps)
        for first in range(0, self.config.teacher_steps, stride):
            start = states
            if student is not None:
                sampler = sampler_of_pictures(self.objective, self.config.teacher_steps, first)
            for step in range(first, first + stride):
                picture = self.guided_picture(states, self.sigmas[step].expand(len(states)), condition)
                states = sampler.step(picture, sampler.timesteps[step], states).prev_sample
            ratio = self.sigmas[first + stride] / self.sigmas[first]
            found.append((start, (states - ratio * start) / (1 - ratio)))
            if student is not None:
                own = self.picture(student, start, self.sigmas[first].expand(len(start)), condition)
                states = ratio * start + (1 - ratio) * own
        starts, pictures = zip(*found, strict=True)
        return torch.stack(starts, dim=1), torch.stack(pictures, dim=1)

    def guided_picture(
        self, states: torch.Tensor, sigma: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The clean picture that the teacher predicts with guidance."""
        both = {name: torch.cat([value, without]) for name, value, without in self.pairs(condition)}
        pictures = self.picture(self.denoiser, states.repeat(2, 1, 1, 1), sigma.flatten().repeat(2), both)
        conditional, unconditional = pictures.chunk(2)
        return unconditional + self.config.guidance_scale * (conditional - unconditional)

    def picture(
        self,
        model: nn.Module,
        states: torch.Tensor,
        sigma: torch.Tensor,
        condition: dict[str, torch.Tensor],
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The clean picture that a model predicts of states with noise of `sigma` [B], told it as `timestep` [B]."""
        said = model(states, sigma * TRAIN_TIMESTEPS if timestep is None else timestep, **condition).float()
        return said if self.objective.prediction_type == "sample" else states - sigma[:, None, None, None] * said

    def pairs(self, condition: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each argument of the denoiser by its name, with what it is without a condition."""
        empty = dict(zip(("encoder_hidden_states", "encoder_attention_mask"), self.empty_text or (), strict=False))
        for name, value in condition.items():
            without = value
            if name == "class_labels":
                without = torch.full_like(value, self.null_class)
            elif name in empty:
                without = empty[name].to(value).expand_as(value)
            yield name, value, without
