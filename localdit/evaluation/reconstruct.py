"""Pictures through an autoencoder and back: no pipeline on its latents can draw what it loses."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from localdit.command_line import Parser, best_device, check_device, hide_loading_bars, shortened, start_process
from localdit.evaluation.extractors import weights_hash
from localdit.evaluation.files import check_writable, write_whole
from localdit.evaluation.generation import FILE as GENERATION
from localdit.evaluation.images import SUFFIXES, list_images, read_rgb
from localdit.evaluation.intervals import mean_interval
from localdit.evaluation.processes import gathered, own_part, shown
from localdit.evaluation.records import (
    FILE,
    about_pictures,
    command_of,
    keep,
    make_record,
    scores_file,
    versions,
)

PEAK = 255.0  # of a pixel of eight bits
EQUAL = 100.0  # decibels of pictures without any difference, whose ratio has no bound


def psnr(first: Image.Image, second: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures of one size in dB: 10 log10(255² / mean squared difference).

    By torchmetrics, of 8-bit pixels; at most 100, which equal pictures have.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pixels = [torch.from_numpy(np.array(picture)).double() for picture in (first, second)]
    return min(EQUAL, float(peak_signal_noise_ratio(*pixels, data_range=PEAK)))


def load_autoencoder(source: str) -> AutoencoderKL:
    """The AutoencoderKL of a folder or Hub id, or of the pipeline there, in fp32.

    Raises:
        ValueError: where there is none.
    """
    hide_loading_bars()
    of_pipeline = (Path(source) / "vae").is_dir() or not Path(source).is_dir()
    reason = ""
    for subfolder in ("vae", None) if of_pipeline else (None,):
        try:
            kind = AutoencoderKL.load_config(source, subfolder=subfolder).get("_class_name")
            if kind != AutoencoderKL.__name__:
                raise ValueError(f"it is a {kind}, and not an {AutoencoderKL.__name__}")
            return AutoencoderKL.from_pretrained(source, subfolder=subfolder).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = shortened(" ".join(str(error).split()))
    raise ValueError(f"--vae {source!r} is, and holds, no autoencoder ({reason}); give its folder or a pipeline's.")


@torch.no_grad()
def reconstruct(vae: Any, image: Image.Image) -> Image.Image:
    """A picture decoded from the likeliest latents of its own.

    Raises:
        ValueError: where its sides are no multiples of the autoencoder's factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if image.width % factor or image.height % factor:
        raise ValueError(
            f"A picture of {image.width} x {image.height} pixels cannot be cut into squares of {factor}, as the "
            "autoencoder's latents stand for; bring its sides to multiples of that."
        )
    processor = VaeImageProcessor(vae_scale_factor=factor)
    pixels = processor.preprocess(image).to(vae.device, vae.dtype)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0]
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return processor.numpy_to_pil(processor.pt_to_numpy(pixels))[0]


def reconstruct_folder(folder: str | Path, vae: Any, output: str | Path) -> dict[str, Any]:
    """Write what an autoencoder makes of a folder's pictures, PNGs of their names; processes each take a part.

    Returns:
        the record of "psnr", the mean over pictures with its 95% bootstrap interval.
    """
    folder, output = Path(folder), Path(output)
    paths = list_images(folder)
    names = [path.relative_to(folder).with_suffix(".png") for path in paths]
    check_names(names)
    found = []
    for place in shown(own_part(range(len(paths))), f"reconstructions of {folder}"):
        image = read_rgb(paths[place])
        decoded = reconstruct(vae, image)
        write_whole(output, str(names[place]), lambda draft, decoded=decoded: decoded.save(draft, format="PNG"))
        found.append((psnr(image, decoded), image.size))
    values, sizes = zip(*gathered(found), strict=True)
    return make_record(
        "psnr",
        float(np.mean(values)),
        mean_interval(np.array(values)),
        real=about_pictures(folder, paths, sizes),
        generated=about_pictures(output, names, sizes),
    )


def check_names(names: Sequence[Path]) -> None:
    """Raise a ValueError where two pictures would be written to one file, as of a.png and a.jpg."""
    if twice := sorted(str(name) for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"Two pictures would be written to {twice[0]!r}; give them names of their own.")


def check_new(output: str) -> None:
    """Raise a ValueError where a folder has pictures already, which might be those that are read."""
    check_writable("--output", output)
    if any(path.suffix.lower() in SUFFIXES for path in Path(output).rglob("*")):
        raise ValueError(f"--output {output!r} holds pictures already; choose a folder of its own.")


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation reconstruct", description=__doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", help="pictures whose sides are multiples of the autoencoder's factor"
    )
    parser.add_argument("--vae", required=True, help="folder or Hub id of an AutoencoderKL, or of a pipeline with one")
    parser.add_argument("--output", required=True, help="folder of the reconstructions, PNGs")
    parser.add_argument("--scores", help=f"by default {FILE} beside the output; a line is added")
    parser.add_argument("--device", default=best_device(), help="cpu, cuda, mps; by default the best there is")
    options = parser.parse_args(arguments)
    state, device = start_process(options.device)
    check_device(device, "float32")
    check_new(options.output)
    scores = scores_file(options.output, options.scores)
    state.wait_for_everyone()
    vae = load_autoencoder(options.vae)
    vae.to(device)  # pyright: ignore[reportArgumentType]
    record = reconstruct_folder(options.folder, vae, options.output)
    command = command_of(parser, arguments)
    told = {"vae": options.vae, "vae_sha256": weights_hash(vae), "dtype": "float32", "command": command}
    if state.is_main_process:
        text = json.dumps({**told, "versions": versions()}, indent=2) + "\n"
        write_whole(Path(options.output), GENERATION, lambda draft: draft.write_text(text))
    keep([{**record, "generation": told}], scores, command)
