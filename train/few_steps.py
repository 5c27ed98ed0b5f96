"""Drawing in few steps what a teacher draws in many, guidance included."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn

from config import TrainConfig
from train.components import Networks
from train.distillation import Teacher
from train.encoding import Example
from train.objective import TRAIN_TIMESTEPS, flow_sigmas


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
        self.config, self.prediction_type = config.few_step, config.objective.prediction_type
        super().__init__(str(self.config.teacher), config, networks, accelerator)
        self.sigmas = flow_sigmas(config.objective, self.config.teacher_steps).to(accelerator.device)
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
        target = picture if self.prediction_type == "sample" else (noised.inputs - picture) / sigma
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

    def guided_picture(
        self, states: torch.Tensor, sigma: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The clean picture that the teacher predicts with guidance."""
        timestep = sigma.flatten() * TRAIN_TIMESTEPS
        both = {name: torch.cat([value, without]) for name, value, without in self.pairs(condition)}
        said = self.denoiser(states.repeat(2, 1, 1, 1), timestep.repeat(2), **both).float()
        conditional, unconditional = said.chunk(2)
        predicted = unconditional + self.config.guidance_scale * (conditional - unconditional)
        return predicted if self.prediction_type == "sample" else states - sigma * predicted

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
