"""What the steps of a few-step student begin at, and have to predict, computed once for many epochs."""

import hashlib

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor

from config import PrecomputeConfig
from train.components import build_networks
from train.data import Source
from train.distillation import load_teacher
from train.encoding import BatchEncoder
from train.few_steps import FewStepTeacher
from train.stopwatch import Stopwatch


class StepEncoder:
    """Leads noise to pictures, and keeps where each step of the student begins and what it has to predict there.

    The steps begin where the teacher comes by; or where the student's own steps have come to, from where the teacher
    goes on, so that the student learns to mend its own errors.

    Raises:
        ValueError: where teacher, student and run do not fit each other.
    """

    def __init__(self, config: PrecomputeConfig, accelerator: Accelerator, source: Source):
        run = config.run
        if source.empty_text is not None:
            raise ValueError("few_step_starts needs captions, and run.data is precomputed; name where they come from.")
        networks = build_networks(run, source.words)
        self.seed, self.channels = run.seed, networks.denoiser.transformer.config.in_channels
        self.scale, self.accelerator = networks.vae_scale_factor, accelerator
        self.teacher = FewStepTeacher(run, networks, accelerator, None)
        if run.compile:
            self.teacher.denoiser.transformer.compile_repeated_blocks()
        networks.denoiser.to(accelerator.device)
        self.encode = BatchEncoder(run, networks, accelerator, Stopwatch(accelerator.device))
        self.student = None
        if config.student is not None:
            student = load_teacher(config.student, "student").eval().requires_grad_(False)
            networks.denoiser.transformer, self.student = student.to(accelerator.device), networks.denoiser

    @torch.no_grad()
    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The states and the pictures [B, K, C, h, w] of the K steps, from a noise that belongs to each name.

        Args:
            batch: with "image" [B, C, H, W], of which the size counts, "name", and "caption" or "label".
        """
        generators = [self.generator(name) for name in batch["name"]]
        height, width = (side // self.scale for side in batch["image"].shape[-2:])
        noise = randn_tensor((len(generators), self.channels, height, width), generator=generators)
        noise = noise.to(self.accelerator.device)
        dropped = torch.zeros(len(generators), dtype=torch.bool)
        condition = {**self.encode.condition(batch, dropped, generators), **self.encode.sizes(noise)}
        condition = self.teacher.with_states(condition)
        with self.accelerator.autocast():
            starts, pictures = self.teacher.lead(noise, condition, self.student)
        return starts.cpu(), pictures.cpu()

    def generator(self, name: str) -> torch.Generator:
        """What the noise of a picture is drawn from; it depends on the seed and the name alone."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
