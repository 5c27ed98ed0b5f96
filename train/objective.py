"""The objective: what the network sees, what it should say, and how its error is weighed."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from diffusers.utils.torch_utils import randn_tensor

from config import ObjectiveConfig
from train.devices import to_device

TRAIN_TIMESTEPS = 1000
FLOW_WEIGHTINGS = ("sigma_sqrt", "cosmap")
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

    Args:
        sigmas: with "flow", the shares of noise to draw among, alike, in the place of the density.

    Raises:
        ValueError: where the prediction type or the weighting does not belong to the process.
    """

    def __init__(self, config: ObjectiveConfig, sigmas: torch.Tensor | None = None):
        self.sigmas = sigmas
        allowed = PREDICTIONS[config.process]
        if config.prediction_type not in allowed:
            raise ValueError(
                f"objective.prediction_type={config.prediction_type!r} does not go with process={config.process!r}; "
                f"choose among {list(allowed)}."
            )
        if config.loss_weighting in FLOW_WEIGHTINGS and config.process != "flow":
            raise ValueError(
                f"objective.loss_weighting={config.loss_weighting!r} needs process='flow'; with 'diffusion' choose "
                "among ['none', 'min_snr', 'p2']."
            )
        self.config = config
        self.diffusion = DDPMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear")

    def __call__(
        self, clean: torch.Tensor, generators: list[torch.Generator], source: torch.Tensor | None = None
    ) -> Noised:
        """Noise a batch of clean latents [B, C, H, W].

        Args:
            generators: one for each picture, so that what it is noised with does not depend on its batch; they live on
                the CPU, so that every device draws the same.
            source: with "flow", what is noised in the place of `clean` where the noise is strong enough
                (`recolour_sigma`), [B, C, H, W]. The target stays the way from the input to `clean`.
        """
        noise = to_device(randn_tensor(clean.shape, generator=generators), clean.device).to(clean)
        if self.config.process == "flow":
            return self._flow(clean, clean if source is None else source, noise, generators)
        return self._diffusion(clean, noise, generators)

    def _flow(
        self, clean: torch.Tensor, source: torch.Tensor, noise: torch.Tensor, generators: list[torch.Generator]
    ) -> Noised:
        sigma = self._draw_sigma(clean, generators)
        mix = sigma[:, None, None, None]
        start = torch.where(mix < self.config.recolour_sigma, clean, source)
        inputs = (1 - mix) * start + mix * noise
        velocity = noise - clean + (1 - mix) / mix * (start - clean)  # (x_t - x_0) / s, without cancellation
        return self._noised(inputs, clean, velocity, sigma)

    def _noised(self, inputs: torch.Tensor, clean: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> Noised:
        weight = self._velocity_weight(sigma)
        if self.config.prediction_type == "sample":
            # the squared error of the velocity (x_t - x_0) / s that the predicted picture implies
            weight = weight * sigma.clamp(min=self.config.min_sigma) ** -2
            return Noised(inputs, sigma * TRAIN_TIMESTEPS, clean, weight)
        return Noised(inputs, sigma * TRAIN_TIMESTEPS, velocity, weight)

    def a_step(self, starts: torch.Tensor, pictures: torch.Tensor, generators: list[torch.Generator]) -> Noised:
        """One of the K steps of each row, drawn alike: its start, and the picture that it has to predict.

        Args:
            starts, pictures: [B, K, C, H, W], for each of `sigmas`, as `FewStepTeacher.lead` gives them.
        """
        if self.sigmas is None:
            raise ValueError("The data hold the starts of few steps; set few_step.teacher to whose steps they are.")
        drawn = [torch.randint(starts.shape[1], (1,), generator=generator) for generator in generators]
        places = torch.cat(drawn)
        sigma = to_device(self.sigmas[places], starts.device)
        rows, places = to_device(torch.stack((torch.arange(len(starts)), places)), starts.device)
        inputs, clean = starts[rows, places], pictures[rows, places]
        return self._noised(inputs, clean, (inputs - clean) / sigma[:, None, None, None], sigma)

    def first_step(self, shape: tuple[int, ...], generators: list[torch.Generator], device: torch.device) -> Noised:
        """Noise of a shape (B, C, H, W), where the first of few steps begins; where these end is not known here."""
        if self.sigmas is None:
            raise ValueError("There is noise alone only for few steps; set few_step.teacher.")
        noise = to_device(randn_tensor(shape, generator=generators), device)
        timestep = to_device(self.sigmas[:1], device).expand(len(noise)) * TRAIN_TIMESTEPS
        return Noised(noise, timestep, target=torch.zeros_like(noise), weight=torch.ones_like(timestep))

    def _draw_sigma(self, clean: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """The share of noise s in (0, 1) of each picture, [B]."""
        config = self.config
        if self.sigmas is not None:
            places = [torch.randint(len(self.sigmas), (1,), generator=generator) for generator in generators]
            return to_device(self.sigmas[torch.cat(places)], clean.device).to(clean)
        drawn = [
            compute_density_for_timestep_sampling(
                config.timestep_density,
                batch_size=1,
                logit_mean=config.logit_mean,
                logit_std=config.logit_std,
                mode_scale=config.mode_scale,
                generator=generator,
            )
            for generator in generators
        ]
        sigma = torch.cat(drawn).clamp(min=1e-4)  # a uniform s may be zero, and the velocity is divided by it
        if config.shift_resolution is not None:
            shift = (clean.shape[-2] * clean.shape[-1]) ** 0.5 / config.shift_resolution
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return to_device(sigma, clean.device).to(clean)

    def _velocity_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """What the squared error of the velocity is weighed by, [B]; that of the clean picture is s² times it."""
        weighting, floored = self.config.loss_weighting, sigma.clamp(min=self.config.min_sigma)
        if weighting in ("min_snr", "p2"):
            return sigma**2 * self._picture_weight(((1 - sigma) / floored) ** 2)
        return compute_loss_weighting_for_sd3(weighting, floored)

    def _picture_weight(self, snr: torch.Tensor) -> torch.Tensor:
        """What the squared error of the clean picture is weighed by at a ratio of signal to noise, [B]."""
        if self.config.loss_weighting == "min_snr":
            return snr.clamp(max=self.config.min_snr_gamma)
        # p2 weighs the error of the noise, which is snr times that of the picture, by 1 / (1 + snr)
        return snr / (1 + snr)

    def _diffusion(self, clean: torch.Tensor, noise: torch.Tensor, generators: list[torch.Generator]) -> Noised:
        drawn = [torch.randint(TRAIN_TIMESTEPS, (1,), generator=generator) for generator in generators]
        timestep = to_device(torch.cat(drawn), clean.device)
        inputs = self.diffusion.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.diffusion.get_velocity(clean, noise, timestep),  # pyright: ignore[reportArgumentType]
            "sample": lambda: clean,
        }[self.config.prediction_type]()
        return Noised(inputs, timestep, target, self._diffusion_weight(timestep))

    def _diffusion_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the network's own squared error is weighed by, [B]."""
        if self.config.loss_weighting == "none":
            return torch.ones(len(timestep), device=timestep.device)
        snr = compute_snr(self.diffusion, timestep)
        # the squared error of the clean picture over the network's
        ratio = {"epsilon": 1 / snr, "v_prediction": 1 / (1 + snr), "sample": 1.0}[self.config.prediction_type]
        return self._picture_weight(snr) * ratio


def flow_sigmas(config: ObjectiveConfig, steps: int) -> torch.Tensor:
    """The shares of noise that the first-order sampler goes through in so many steps, from nearly 1 to 0, [steps + 1].

    Raises:
        ValueError: where the process is not "flow".
    """
    if config.process != "flow":
        raise ValueError(f"few_step needs objective.process='flow', not {config.process!r}.")
    scheduler: Any = sampling_scheduler(config, first_order=True)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.float()


def first_order_timesteps(config: ObjectiveConfig, steps: int) -> torch.Tensor:
    """What that sampler tells a network of these shares of noise, in whole numbers, [steps]."""
    scheduler: Any = sampling_scheduler(config, first_order=True)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float()


def sampler_of_pictures(config: ObjectiveConfig, steps: int, first: int = 0) -> DPMSolverMultistepScheduler:
    """The second-order sampler over `flow_sigmas`, about to take its step number `first`, told predicted pictures."""
    settings = sampling_scheduler(config, first_order=True).config
    scheduler: Any = DPMSolverMultistepScheduler.from_config(settings, solver_order=2, prediction_type="sample")
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(first)
    return scheduler


def sampling_scheduler(config: ObjectiveConfig, first_order: bool = False) -> SchedulerMixin:
    """The sampler that fits the training: what it calls `prediction_type` is what the network learned.

    With `first_order` it goes straight to what is predicted, which a network of few steps was taught for.
    """
    if config.process == "flow" and config.prediction_type == "flow_prediction" and not first_order:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=config.flow_shift)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="linear",
        prediction_type=config.prediction_type,
        use_flow_sigmas=config.process == "flow",
        solver_order=1 if first_order else 2,
        flow_shift=config.flow_shift,
    )
