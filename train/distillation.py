"""Learning from a teacher: a transformer that says, and has in its blocks, what the student comes to say and have."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from config import TrainConfig
from localdit import LocalDiTTransformer2DModel
from train.components import Denoiser, Networks
from train.encoding import Example

# settings of the transformer in which teacher and student have to agree: its sizes, and what it is asked with
ALIKE = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "patch_size",
    "num_classes",
    "caption_channels",
    "use_additional_conditions",
)


class BlockOutputs:
    """Hears what the blocks of a transformer give, where it listens."""

    def __init__(self, transformer: LocalDiTTransformer2DModel):
        self.heard: list[torch.Tensor] | None = None
        for block in transformer.transformer_blocks:
            block.register_forward_hook(self._hear)

    def _hear(self, _block, _inputs, output: torch.Tensor) -> None:
        if self.heard is not None:
            self.heard.append(output)

    @contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """The outputs [B, N, D] of the blocks that run inside, in order."""
        self.heard = heard = []
        try:
            yield heard
        finally:
            self.heard = None


class Teacher:
    """A frozen transformer beside the one that is trained.

    Raises:
        ValueError: where it does not fit the student, or the text encoder is trained along.
    """

    def __init__(self, source: str, config: TrainConfig, networks: Networks, accelerator: Accelerator):
        student, transformer = networks.denoiser.transformer, load_teacher(source)
        for name in ALIKE:
            # what the config leaves open, the transformer has decided
            theirs, own = (vars(network).get(name, network.config[name]) for network in (transformer, student))
            if theirs != own:
                raise ValueError(f"The teacher {source!r} has {name}={theirs}, and the student {own}; make them equal.")
        self.text_encoder = networks.denoiser.text_encoder
        if self.text_encoder is not None and not config.text_encoder.frozen:
            raise ValueError("A teacher needs a text encoder that both hear alike; set text_encoder.frozen to true.")
        denoiser = Denoiser(transformer, text_encoder=None).eval().requires_grad_(False)
        self.denoiser = denoiser.to(accelerator.device)

    @torch.no_grad()
    def with_states(self, condition: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The condition with the states of its text, computed once for both."""
        if self.text_encoder is None or "input_ids" not in condition:
            return condition
        rest = dict(condition)
        states = self.text_encoder(rest.pop("input_ids"), attention_mask=rest.pop("attention_mask"))[0]
        return {**rest, "encoder_hidden_states": states}


class FeatureTeacher(Teacher):
    """Teaches what it says of a noisy picture, and what its blocks give on the way."""

    def __init__(self, config: TrainConfig, networks: Networks, accelerator: Accelerator):
        self.config = config.distillation
        super().__init__(str(self.config.teacher), config, networks, accelerator)
        self.own = BlockOutputs(self.denoiser.transformer)
        self.students = BlockOutputs(networks.denoiser.transformer)

    def losses(self, model: nn.Module, example: Example) -> torch.Tensor:
        """The losses [B] of the student's `model`: to the data, to the teacher's output, and to that of its blocks."""
        noised, condition, weights = example.noised, self.with_states(example.condition), self.config
        with self.students.listening() as learned:
            prediction = model(noised.inputs, noised.timestep, **condition)
        with torch.no_grad(), self.own.listening() as taught:
            target = self.denoiser(noised.inputs, noised.timestep, **condition).float()
        losses = weights.data_weight * noised.losses(prediction)
        losses = losses + weights.output_weight * replace(noised, target=target).losses(prediction)
        if not weights.feature_weight:
            return losses
        errors = [relative_error(mine, theirs) for mine, theirs in zip(learned, taught, strict=True)]
        return losses + weights.feature_weight * torch.stack(errors).mean(dim=0)


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The squared error of the states [B, N, D] of each picture over the mean square of what they should be, [B]."""
    error = (mine.float() - theirs.float()).square().mean(dim=(1, 2))
    return error / theirs.float().square().mean(dim=(1, 2))


def load_teacher(source: str, role: str = "teacher") -> LocalDiTTransformer2DModel:
    """The transformer of a LocalDiT's or a PixArt's pipeline, in fp32.

    Raises:
        ValueError: where there is none.
    """
    try:
        index: Any = DiffusionPipeline.load_config(source)
        if index["_class_name"].startswith("PixArt"):
            return LocalDiTTransformer2DModel.from_pixart(source, dtype=torch.float32)
        return LocalDiTTransformer2DModel.from_pretrained(source, subfolder="transformer", dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The {role} {source!r} cannot be loaded ({str(error).splitlines()[0]}); name the folder or Hub "
            "id of a LocalDiT's or a PixArt's pipeline."
        ) from error
