"""Few steps whose pictures are where a guided teacher finds them likely, wherever its own steps would have ended."""

from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from config import TrainConfig
from train.components import Denoiser, Networks
from train.distillation import load_teacher
from train.encoding import Example
from train.few_steps import FewStepTeacher
from train.objective import TRAIN_TIMESTEPS, Objective, first_order_timesteps, flow_sigmas
from train.optimizers import build_optimizers, build_schedules, step_if_finite
from train.sharding import autocast

LEAST_ERROR = 1e-4  # of a mean of latents or pixels, which the gradient is divided by


class DistributionTeacher(FewStepTeacher):
    """Lets the student draw from noise, and moves its pictures to where the teacher finds them likelier.

    Distribution matching (arXiv 2311.18828 and 2405.14867): the picture is noised anew, and what the guided teacher
    makes of it is set against what a critic does, a copy of the teacher that learns on the student's pictures along the
    way. The difference is the gradient of the divergence of the two distributions, and goes back through all steps of
    the student, which are those that its pipeline takes.

    Args:
        empty_text: as in `FewStepTeacher`.
    """

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        accelerator: Accelerator,
        empty_text: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        super().__init__(config, networks, accelerator, empty_text)
        self.run, self.accelerator = config, accelerator
        self.own_sigmas = flow_sigmas(config.objective, self.config.steps).to(accelerator.device)
        self.renoise = Objective(config.objective)
        self.timesteps = first_order_timesteps(config.objective, self.config.steps).to(accelerator.device)
        critic = Denoiser(load_teacher(str(self.config.teacher)), text_encoder=None).train()
        if config.gradient_checkpointing:
            critic.transformer.enable_gradient_checkpointing()
        if config.compile:
            self.denoiser.transformer.compile_repeated_blocks()
            critic.transformer.compile_repeated_blocks()
        self.critic: nn.Module = critic
        self.optimizers: list[Any] = build_optimizers(critic, config.optimizer)
        self.schedules: list[Any] = []
        self.seen: list[tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Generator]]] = []

    def prepare(self) -> None:
        """Let accelerate have the critic; after the student, whose weights then come first in checkpoints."""
        config, accelerator, count = self.run, self.accelerator, len(self.optimizers)
        schedules = build_schedules(self.optimizers, config.optimizer, config.max_steps, accelerator.num_processes)
        self.critic, *rest = accelerator.prepare(self.critic, *self.optimizers, *schedules)
        self.optimizers, self.schedules = rest[:count], rest[count:]
        for optimizer in self.optimizers:
            if hasattr(optimizer.optimizer, "train"):  # schedule-free ones have modes
                optimizer.optimizer.train()

    def losses(self, model: nn.Module, example: Example) -> torch.Tensor:
        """What moves the student's pictures, [B]: its gradient with respect to them is along `direction`.

        The value is the mean square of that, zero where the critic finds the student's pictures as likely as the
        guided teacher does.
        """
        condition = self.with_states(example.condition)
        pictures = self.draw(model, example.noised.inputs, condition)
        self.seen.append((pictures.detach(), condition, example.generators))
        goal = pictures.detach() - self.direction(pictures.detach(), condition, example.generators)
        return (pictures - goal).square().mean(dim=(1, 2, 3))

    def draw(self, model: nn.Module, noise: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The pictures [B, C, H, W] that the student's steps lead to from noise."""
        states = noise.float()
        for (here, there), timestep in zip(pairwise(self.own_sigmas), self.timesteps, strict=True):
            told = here.expand(len(states)), condition, timestep.expand(len(states))
            picture = self.picture(model, states, *told)
            states = there / here * states + (1 - there / here) * picture
        return states

    @torch.no_grad()
    def direction(
        self, pictures: torch.Tensor, condition: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Where pictures [B, C, H, W] are likelier among the student's than the teacher's, over its mean error."""
        noised = self.renoise(pictures, generators)
        sigma = noised.timestep / TRAIN_TIMESTEPS
        taught = self.guided_picture(noised.inputs, sigma, condition)
        drawn = self.picture(self.critic, noised.inputs, sigma, condition)
        error = (pictures - taught).abs().mean(dim=(1, 2, 3), keepdim=True)
        return (drawn - taught) / error.clamp(min=LEAST_ERROR)

    def update_critic(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the critic learn on the pictures drawn since the last time.

        Returns:
            Whether its gradients were numbers, and its mean loss before the last of its updates.
        """
        finite = torch.tensor(True, device=self.accelerator.device)
        mean = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.config.critic_updates):
            mean.zero_()
            for pictures, condition, generators in self.seen:
                noised = self.renoise(pictures, generators)
                with autocast(self.accelerator, self.run):
                    losses = noised.losses(self.critic(noised.inputs, noised.timestep, **condition))
                self.accelerator.backward(losses.mean())
                mean += losses.detach().mean() / len(self.seen)
            norm: Any = self.accelerator.clip_grad_norm_(self.critic.parameters(), self.run.optimizer.max_grad_norm)
            finite &= torch.isfinite(norm)
            for optimizer in self.optimizers:
                step_if_finite(optimizer, torch.isfinite(norm))
                optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        self.seen = []
        return finite, mean
