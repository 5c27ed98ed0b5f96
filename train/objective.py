"""The objective: what the network sees, what it should say, and how its error is weighed."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling

from config import ObjectiveConfig

TRAIN_TIMESTEPS = 1000
PREDICTIONS = {"flow": ("flow_prediction", "sample"), "diffusion": ("epsilon", "v_prediction", "sample")}


@dataclass
class Noised:
    """One batch made ready: what goes in and what should come out, [B, C, H, W]; timestep and weight are [B]."""

    inputs: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    def losses(self, prediction: torch.Tensor) -> torch.Tensor:
        """Weighted mean squared error of each picture, [B], in fp32."""
        return self.weight * (prediction.float() - self.target.float()).square().mean(dim=(1, 2, 3))


class Objective:
    """Draws timesteps and noise and says what the network should predict.

    Raises:
        ValueError: where the prediction type does not belong to the process.
    """

    def __init__(self, config: ObjectiveConfig):
        allowed = PREDICTIONS[config.process]
        if config.prediction_type not in allowed:
            raise ValueError(
                f"objective.prediction_type={config.prediction_type!r} does not go with process={config.process!r}; "
                f"choose among {list(allowed)}."
            )
        self.config = config
        self.diffusion = DDPMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear")

    def __call__(self, clean: torch.Tensor, generator: torch.Generator, source: torch.Tensor | None = None) -> Noised:
        """Noise a batch of clean latents [B, C, H, W].

        Args:
            generator: lives on the CPU, so every device draws the same.
            source: with "flow", what is noised in the place of `clean` where the noise is strong enough
                (`recolour_sigma`), [B, C, H, W]. The target stays the way from the input to `clean`.
        """
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        if self.config.process == "flow":
            return self._flow(clean, clean if source is None else source, noise, generator)
        return self._diffusion(clean, noise, generator)

    def _flow(
        self, clean: torch.Tensor, source: torch.Tensor, noise: torch.Tensor, generator: torch.Generator
    ) -> Noised:
        sigma = compute_density_for_timestep_sampling(
            "logit_normal",
            len(clean),
            logit_mean=self.config.logit_mean,
            logit_std=self.config.logit_std,
            generator=generator,
        ).to(clean)
        mix = sigma[:, None, None, None]
        start = torch.where(mix < self.config.recolour_sigma, clean, source)
        inputs = (1 - mix) * start + mix * noise
        if self.config.prediction_type == "sample":
            # the squared error of the velocity (x_t - x_0) / s that the predicted picture implies
            weight = sigma.clamp(min=self.config.min_sigma) ** -2
            return Noised(inputs, sigma * TRAIN_TIMESTEPS, clean, weight)
        velocity = noise - clean + (1 - mix) / mix * (start - clean)  # (x_t - x_0) / s, without cancellation
        return Noised(inputs, sigma * TRAIN_TIMESTEPS, velocity, torch.ones_like(sigma))

    def _diffusion(self, clean: torch.Tensor, noise: torch.Tensor, generator: torch.Generator) -> Noised:
        timestep = torch.randint(TRAIN_TIMESTEPS, (len(clean),), generator=generator).to(clean.device)
        inputs = self.diffusion.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.diffusion.get_velocity(clean, noise, timestep),  # pyright: ignore[reportArgumentType]
            "sample": lambda: clean,
        }[self.config.prediction_type]()
        return Noised(inputs, timestep, target, torch.ones(len(clean), device=clean.device))


def sampling_scheduler(config: ObjectiveConfig) -> SchedulerMixin:
    """The sampler that fits the training: what it calls `prediction_type` is what the network learned."""
    if config.process == "flow" and config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=config.flow_shift)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="linear",
        prediction_type=config.prediction_type,
        use_flow_sigmas=config.process == "flow",
        flow_shift=config.flow_shift,
    )
