"""LPIPS: how different two pictures look, by what they stir in a network that learnt to tell objects."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn

from localdit.command_line import Parser, best_device, check_device, counting_number, start_process
from localdit.conversion import STATE_DICT_SUFFIXES, read_state_dict
from localdit.evaluation.generation import read_generation
from localdit.evaluation.images import list_images, read_rgb
from localdit.evaluation.intervals import mean_interval
from localdit.evaluation.processes import gathered, own_part, shown
from localdit.evaluation.records import FILE, about_pictures, command_of, keep, make_record, scores_file

VGG = "timm/vgg16.tv_in1k"  # torchvision's weights, for which LPIPS' heads were fitted
WEIGHTS_FILE = "model.safetensors"
PREFIX = "features."  # of the convolutions, in torchvision's and timm's weights
SMALLEST = 32  # pixels, of which AlexNet's strides leave one


def vgg_layers() -> list[nn.Module]:
    """The convolutions of VGG16 (arXiv 1409.1556), numbered as torchvision's."""
    channels, layers = 3, []
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def alex_layers() -> list[nn.Module]:
    """The convolutions of AlexNet (arXiv 1404.5997), numbered as torchvision's."""
    pool, relu = nn.MaxPool2d(3, stride=2), nn.ReLU()
    return [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), relu, pool),
        *(nn.Conv2d(64, 192, 5, padding=2), relu, pool),
        *(nn.Conv2d(192, 384, 3, padding=1), relu),
        *(nn.Conv2d(384, 256, 3, padding=1), relu),
        *(nn.Conv2d(256, 256, 3, padding=1), relu),
    ]


# each with the numbers of the layers whose outputs LPIPS compares
BACKBONES = {"vgg": (vgg_layers, (3, 8, 15, 22, 29)), "alex": (alex_layers, (1, 4, 7, 9, 11))}


class Lpips(nn.Module):
    """The network of LPIPS, with the linear heads (version 0.1) and the scaling that torchmetrics ships.

    Zhang et al. 2018, arXiv 1801.03924, equation 1: the maps of five layers, of unit length along their channels, are
    subtracted, squared, weighted by channel, averaged over places and summed over layers.

    Args:
        backbone: "vgg" or "alex". Its weights are random until `load_network` has loaded some.

    Raises:
        ValueError: where torchmetrics is not installed.
    """

    def __init__(self, backbone: str = "vgg"):
        super().__init__()
        try:
            from torchmetrics.functional.image import lpips as reference
        except ImportError as error:
            raise ValueError(f"LPIPS needs the package torchmetrics ({error}); pip install torchmetrics.") from error
        self.backbone = backbone
        layers, self.compared = BACKBONES[backbone]
        self.features = nn.Sequential(*layers())
        self.scale = reference.ScalingLayer()
        heads = Path(reference.__file__).parent / "lpips_models" / f"{backbone}.pth"
        self.heads = nn.ParameterList(read_state_dict(heads).values())  # [1, C, 1, 1] for each layer compared
        self.requires_grad_(False)

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """The maps [B, C, h, w] of pictures [B, 3, H, W] in [0, 1], of unit length along C, of the layers compared."""
        found, state = [], self.scale(2 * pictures - 1)
        for number, layer in enumerate(self.features):
            state = layer(state)
            if number in self.compared:
                # torchmetrics' way to keep a place where nothing is stirred from dividing by 0
                found.append(state * (state.square().sum(1, keepdim=True) + 1e-8).rsqrt())
        return found

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.heads, self.maps(first), self.maps(second), strict=True)
        return torch.stack([(head * (a - b).square()).sum(1).mean((1, 2)) for head, a, b in pairs]).sum(0)


def lpips(first: torch.Tensor, second: torch.Tensor, network: Lpips) -> torch.Tensor:
    """The distance of each picture to its partner, [B]; 0 for the same, and seldom above 1.

    Args:
        first, second: float [B, 3, H, W] in [0, 1], where H and W are at least 32.

    Raises:
        ValueError: for other shapes or values.
    """
    for pictures in (first, second):
        if pictures.ndim != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < SMALLEST:
            raise ValueError(
                f"Pictures of shape {list(pictures.shape)} are no [B, 3, H, W] with sides of at least {SMALLEST}; "
                "give colour pictures, or larger ones."
            )
        if not bool(((pictures >= 0) & (pictures <= 1)).all()):
            raise ValueError(
                f"Pixels reach from {pictures.min():.3g} to {pictures.max():.3g}, or are no numbers; scale them to "
                "[0, 1]."
            )
    if first.shape != second.shape:
        raise ValueError(
            f"Pictures of shapes {list(first.shape)} and {list(second.shape)} cannot be compared; bring both to one."
        )
    return network(first, second)


def find_weights(source: str) -> Path:
    """The file of a backbone's weights: itself, or that of a folder or Hub id such as "timm/vgg16.tv_in1k".

    Raises:
        ValueError: where the Hub has no such weights or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source) / WEIGHTS_FILE
    if Path(source).is_file() or source.endswith(STATE_DICT_SUFFIXES):
        return Path(source)
    try:
        return Path(hf_hub_download(source, WEIGHTS_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is no file here, and the Hugging Face Hub has no such weights or cannot be reached; give the "
            "path of a backbone's weights, as torchvision and timm have them."
        ) from error


def load_network(path: str | Path) -> Lpips:
    """LPIPS' network with the weights of a file, VGG16's or AlexNet's, named as torchvision's: "features.0.weight".

    Raises:
        ValueError: where there is no such file, it is damaged, or its weights are another network's.
    """
    state = read_state_dict(path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    for backbone in BACKBONES:
        network = Lpips(backbone)
        if shapes(network.features.state_dict()) == shapes(weights):
            network.features.load_state_dict(weights)
            return network.eval()
    raise ValueError(
        f"{str(path)!r} holds the weights of none of {', '.join(BACKBONES)} under torchvision's names "
        f"({PREFIX}0.weight and so on); give others, such as those of {VGG}."
    )


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def paired(first: str | Path, second: str | Path) -> list[tuple[Path, Path]]:
    """The pictures of two folders that have one name, by name.

    Raises:
        ValueError: where a folder holds none, or one has no partner.
    """
    folders = Path(first), Path(second)
    found = [{path.relative_to(folder): path for path in list_images(folder)} for folder in folders]
    for here, there, folder in ((*found, folders[1]), (*found[::-1], folders[0])):
        if alone := sorted(here.keys() - there.keys()):
            raise ValueError(
                f"{str(here[alone[0]])!r} has no partner in {str(folder)!r} ({len(alone)} like that); give each "
                "picture one of the same name, ending included."
            )
    return [(path, found[1][name]) for name, path in found[0].items()]


Pair = tuple[torch.Tensor, torch.Tensor]


def read_pairs_of(paths: Iterable[tuple[Path, Path]]) -> Iterator[Pair]:
    """The pictures of each pair, float [1, 3, H, W] in [0, 1]; raises a ValueError where their sizes differ."""
    for first, second in paths:
        pictures = read_rgb(first), read_rgb(second)
        if pictures[0].size != pictures[1].size:
            sizes = " and ".join(f"{picture.width} x {picture.height}" for picture in pictures)
            raise ValueError(f"{str(first)!r} and its partner have {sizes} pixels; bring both to one size.")
        yield to_tensor(pictures[0]), to_tensor(pictures[1])


def batches_of(pairs: Iterable[Pair], batch_size: int) -> Iterator[Pair]:
    """Pairs in batches [B, 3, H, W] as long as neighbours have one size."""
    batch: list[Pair] = []
    for pair in pairs:
        if batch and (len(batch) == batch_size or pair[0].shape != batch[0][0].shape):
            yield torch.cat([first for first, _ in batch]), torch.cat([second for _, second in batch])
            batch = []
        batch.append(pair)
    if batch:
        yield torch.cat([first for first, _ in batch]), torch.cat([second for _, second in batch])


def score_pairs(first: str | Path, second: str | Path, network: Lpips, batch_size: int = 8) -> dict[str, Any]:
    """LPIPS between the pictures of two folders that have one name; several processes of accelerate each take a part.

    Returns:
        a record of the mean over pairs, with its 95% bootstrap "interval"; "real" is the first folder.

    Raises:
        ValueError: where a picture has no partner, another size than its partner, or cannot be read.
    """
    device, paths = next(network.parameters()).device, paired(first, second)
    own = read_pairs_of(shown(own_part(paths), f"{network.backbone} of {second}"))
    found: list[tuple[float, tuple[int, int]]] = []
    for pictures in batches_of(own, batch_size):
        with torch.no_grad():
            distances = lpips(*(each.to(device) for each in pictures), network).tolist()
        height, width = pictures[0].shape[2:]
        found += [(distance, (width, height)) for distance in distances]
    distances, sizes = zip(*gathered(found), strict=True)
    values = np.array(distances)
    return make_record(
        "lpips",
        float(values.mean()),
        mean_interval(values),
        real=about_pictures(first, [path for path, _ in paths], sizes),
        generated=about_pictures(second, [path for _, path in paths], sizes),
        generation=read_generation(second),
    )


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as float [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation lpips", description="LPIPS between two folders.")
    parser.add_argument("first", metavar="FOLDER1", help="pictures, such as those given to image to image")
    parser.add_argument("second", metavar="FOLDER2", help="pictures of the same names and sizes")
    parser.add_argument("--weights", default=VGG, help="VGG16's or AlexNet's: a file or Hub id; by default %(default)s")
    parser.add_argument("--output", help=f"by default {FILE} beside FOLDER2; a line is added")
    parser.add_argument("--batch_size", type=counting_number, default=8)
    parser.add_argument("--device", default=best_device(), help="cpu, cuda, mps; by default the best there is")
    options = parser.parse_args(arguments)
    _, device = start_process(options.device)
    check_device(device, "float32")
    output = scores_file(options.second, options.output)
    paired(options.first, options.second)  # which fails before half a gigabyte is fetched
    path = find_weights(options.weights)
    network = load_network(path).to(device)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    preprocessing = "as it is, normalised as LPIPS does"
    name = Path(options.weights).name if Path(options.weights).exists() else options.weights
    seen_by = {"name": name, "family": network.backbone, "sha256": digest, "preprocessing": preprocessing}
    keep(
        [{**score_pairs(options.first, options.second, network, options.batch_size), "extractor": seen_by}],
        output,
        command_of(parser, arguments),
    )
