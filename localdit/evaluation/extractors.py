"""Networks that turn pictures into features to compare: transformers', torchmetrics' Inception, or one trained here."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from localdit.command_line import hide_loading_bars, shortened
from localdit.evaluation.digit_extractor import FILE as DIGITS_FILE
from localdit.evaluation.digit_extractor import load_digit_network
from localdit.evaluation.images import RESIZE

INCEPTION = "inception"


class Extracted(NamedTuple):
    """Features [B, D], and of networks that know classes their logits [B, K]."""

    features: torch.Tensor
    logits: torch.Tensor | None = None


class FeatureExtractor(Protocol):
    """What makes features of RGB pictures of any size.

    Attributes:
        name: the folder or Hub id that it came from.
        family: what kind of network it is, such as "clip".
        sha256: of the weights.
        dimension: of the features, D.
        preprocessing: what it does to a picture before.
    """

    name: str
    family: str
    sha256: str
    dimension: int
    preprocessing: str

    def __call__(self, images: list[Image.Image]) -> Extracted: ...


def load_extractor(source: str, device: str = "cpu", weights: str | None = None) -> FeatureExtractor:
    """The extractor of a folder or Hub id of transformers (CLIP, SigLIP, ALIGN, DINOv2, ...), or of one trained here.

    Args:
        source: a folder, a Hub id, or "inception" for FID's own network.
        weights: a file of Inception's weights; None lets torch-fidelity download them.

    Raises:
        ValueError: where there is no such network.
    """
    if source == INCEPTION:
        return InceptionExtractor(device, weights)
    if weights is not None:
        raise ValueError(f"weights={weights!r} are for {INCEPTION!r}; {source!r} has its own, so leave them out.")
    if (Path(source) / DIGITS_FILE).is_file():
        return DigitExtractor(source, device)
    return TransformersExtractor(source, device)


class DigitExtractor:
    """The hidden layer of a small network trained on handwritten digits, and its classes."""

    family = "digits"
    preprocessing = f"grey, 28 x 28 by {RESIZE}, [0, 1]"

    def __init__(self, source: str, device: str = "cpu"):
        self.network = load_digit_network(source).to(device).eval()
        self.device, self.name, self.sha256 = device, Path(source).name, weights_hash(self.network)
        self.dimension = self.network.dimension

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Extracted:
        small = [np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(small)).to(self.device)[:, None].float() / 255
        features = self.network.features(pixels)
        return Extracted(features, self.network.classes(features))


class TransformersExtractor:
    """The image encoder of a model of transformers; models of pictures and texts give their common embedding.

    A picture is scaled as a whole to the square that the encoder sees, averaging over all that a pixel covers (as the
    CMMD paper's bicubic does, and not every port of it), and normalised by the model's own processor.
    """

    def __init__(self, source: str, device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        hide_loading_bars()
        self.device, self.name = device, source
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(source)
            self.model: Any = AutoModel.from_pretrained(source, dtype=torch.float32).to(device).eval()
            self.side = seen_side(self.processor)
            self.dimension = self(2 * [Image.new("RGB", (self.side, self.side))]).features.shape[1]
        except Exception as error:  # loading fails in many ways, and so does what is no image encoder
            reason = first_sentence(error)
            if isinstance(error, OSError) and not Path(source).is_dir():
                reason = "it is no folder here, and the Hugging Face Hub has no such model or cannot be reached"
            raise ValueError(
                f"The extractor {source!r} cannot be loaded ({reason}); give {INCEPTION!r}, or the folder or Hub id of "
                "an image encoder of transformers or of train-extractor."
            ) from error
        self.family, self.sha256 = self.model.config.model_type, weights_hash(self.model)
        self.preprocessing = f"{self.side} x {self.side} by {RESIZE}, {type(self.processor).__name__}"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Extracted:
        scaled = [image.resize((self.side, self.side), Image.Resampling.BICUBIC) for image in images]
        inputs = self.processor(scaled, do_resize=False, do_center_crop=False, return_tensors="pt").to(self.device)
        encode = getattr(self.model, "get_image_features", self.model)
        return Extracted(pooled(encode(pixel_values=inputs["pixel_values"])))


def first_sentence(error: Exception) -> str:
    """What the libraries tell at length."""
    return shortened(" ".join(str(error).split()).split(". ")[0], 150)


def pooled(output: Any) -> torch.Tensor:
    """The one vector of each picture or text, which transformers up to 4 gives bare and later ones in an output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output.flatten(1)


def seen_side(processor: Any) -> int:
    """Pixels along the side of the square that a processor leaves of a picture."""
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = processor.crop_size if crops else processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


class InceptionExtractor:
    """The network of the published FIDs, as torchmetrics has it of torch-fidelity; it scales pictures itself."""

    name = family = INCEPTION
    dimension = 2048
    preprocessing = "299 x 299 by TensorFlow's bilinear, inside the network"

    def __init__(self, device: str = "cpu", weights: str | None = None):
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except (ModuleNotFoundError, OSError) as error:
            raise ValueError(
                f"The extractor 'inception' cannot be loaded ({' '.join(str(error).split())[:200]}); pip install "
                "torch-fidelity torchvision, and give its weights by --weights where there is no network."
            ) from error
        self.network = network.to(device)
        self.device, self.sha256 = device, weights_hash(network)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Extracted:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(self.device).permute(0, 3, 1, 2)
        features, logits = self.network._torch_fidelity_forward(pixels)
        return Extracted(features, logits)


def weights_hash(module: nn.Module) -> str:
    """The sha256 of the names and values of a network's weights."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
