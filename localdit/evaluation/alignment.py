"""How well pictures fit their prompts, by a model of pictures and texts (CLIP, SigLIP, ALIGN)."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from localdit.command_line import Parser, best_device, check_device, counting_number, shortened, start_process
from localdit.evaluation.extractors import TransformersExtractor, first_sentence, pooled
from localdit.evaluation.features import about
from localdit.evaluation.generation import read_generation
from localdit.evaluation.images import list_images, read_rgb
from localdit.evaluation.intervals import mean_interval
from localdit.evaluation.processes import gathered, own_part, shown
from localdit.evaluation.prompt_sets import read_text
from localdit.evaluation.records import FILE, about_pictures, command_of, keep, make_record, scores_file

logger = logging.getLogger(__name__)

PROMPTS = "prompts.jsonl"  # in a folder of pictures: {"file": ..., "prompt": ...} a line


class AlignmentModel(TransformersExtractor):
    """An image encoder with the text encoder that it was trained with.

    Raises:
        ValueError: where there is no text encoder, or no tokenizer.
    """

    def __init__(self, source: str, device: str = "cpu"):
        from transformers import AutoTokenizer

        super().__init__(source, device)
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{source!r} is a {self.family} without a text encoder; give a CLIP, SigLIP or ALIGN.")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # as loading the model does, it fails in many ways
            why = f"cannot be loaded ({first_sentence(error)}); put the model's there."
            raise ValueError(f"The tokenizer of {source!r} {why}") from error
        known, wanted = len(self.tokenizer), self.model.config.text_config.vocab_size
        if known < wanted / 2:  # transformers makes up a bare one where a folder has none
            raise ValueError(f"The tokenizer of {source!r} knows {known} tokens of {wanted}; put the model's there.")
        # SigLIP has learned from texts filled up to its full length, the others read their own length
        self.padding = "max_length" if self.family.startswith("siglip") else True

        self.longest = self.model.config.text_config.max_position_embeddings  # tokens

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings of prompts, [B, D], of which no more than the first `longest` tokens are read."""
        inputs = self.tokenizer(
            prompts, padding=self.padding, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.device)
        return pooled(self.model.get_text_features(**inputs))

    def too_long(self, prompts: list[str]) -> int:
        """How many prompts are cut, since they have more than `longest` tokens."""
        return sum(len(tokens) > self.longest for tokens in self.tokenizer(prompts, verbose=False).input_ids)

    def cosines(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """The cosine of each picture's embedding with that of its prompt, [B] in [-1, 1]."""
        seen, read = self(images).features.double(), self.texts(prompts).double()
        return ((seen * read).sum(1) / seen.norm(dim=1) / read.norm(dim=1)).cpu()


def read_pairs(folder: str | Path) -> list[tuple[Path, str]]:
    """The pictures of a folder with their prompts, of its prompts.jsonl, or of a .txt beside each picture.

    Raises:
        ValueError: where a picture has none.
    """
    folder = Path(folder)
    images, listed = list_images(folder), listed_prompts(folder)
    for path in images:
        if path not in listed and path.with_suffix(".txt").is_file():
            listed[path] = read_text(path.with_suffix(".txt"))
    if bare := [path.name for path in images if path not in listed]:
        raise ValueError(
            f"There are pictures without a prompt in {str(folder)!r} ({len(bare)}, such as {shortened(bare[0], 60)}); "
            f"put a .txt beside each, or list them in {PROMPTS}."
        )
    if empty := [path.name for path in images if not listed[path].strip()]:
        raise ValueError(f"The prompt of {empty[0]} in {str(folder)!r} is empty; say what was asked for.")
    return [(path, listed[path].strip()) for path in images]


def listed_prompts(folder: Path) -> dict[Path, str]:
    """The prompts of a folder's prompts.jsonl, or {}; raises a ValueError for a damaged line, or one of no picture."""
    file, listed = folder / PROMPTS, {}
    lines = read_text(file).split("\n") if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, prompt = folder / entry["file"], entry["prompt"]
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt is {prompt!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file} has no {{"file": ..., "prompt": ...}} in line {number} ({error}); mend it.'
            ) from error
        if path in listed or not path.is_file():
            what = "was named before" if path in listed else "is no file there"
            raise ValueError(f"Line {number} of {file} names {entry['file']!r}, which {what}; mend it or take it away.")
        listed[path] = prompt
    return listed


def score_alignment(folder: str | Path, model: AlignmentModel, batch_size: int = 32) -> dict[str, Any]:
    """The mean cosine x 100 of the pictures of a folder and their prompts, as CLIPScore (arXiv 2104.08718) without 2.5.

    Several processes of accelerate each take a part.

    Returns:
        a record whose "metric" is "clip_score", "siglip_score", ...; its "interval" is of 2,000 bootstrap resamples.

    Raises:
        ValueError: where a picture has no prompt or cannot be read, or the model gives no numbers.
    """
    pairs = read_pairs(folder)
    if cut := model.too_long([text for _, text in pairs]):
        told = "%d of %d prompts have more than %d tokens, of which %s reads no more."
        logger.warning(told, cut, len(pairs), model.longest, model.name)
    own = own_part(pairs)
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    found: list[tuple[float, tuple[int, int]]] = []
    for batch in shown(batches, f"{model.family} of {folder}"):
        pictures = [read_rgb(path) for path, _ in batch]
        cosines = model.cosines(pictures, [text for _, text in batch]).tolist()
        found += zip(cosines, [picture.size for picture in pictures], strict=True)
    cosines, sizes = zip(*gathered(found), strict=True)
    values = 100 * np.array(cosines)
    if not np.isfinite(values).all():
        raise ValueError(f"The cosines of {model.name!r} are no numbers; its weights are damaged, so give another.")
    return make_record(
        f"{model.family}_score",
        float(np.mean(values)),
        mean_interval(values),
        extractor=about(model),
        generated=about_pictures(folder, [path for path, _ in pairs], sizes),
        generation=read_generation(folder),
        detail={"prompts_cut": cut, "longest_prompt": model.longest},
    )


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation align", description=__doc__)
    parser.add_argument("folder", help=f"of pictures, with {PROMPTS} or a .txt beside each")
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLIP, SigLIP or ALIGN")
    parser.add_argument("--output", help=f"by default {FILE} beside the folder; a line is added")
    parser.add_argument("--batch_size", type=counting_number, default=32)
    parser.add_argument("--device", default=best_device())
    options = parser.parse_args(arguments)
    _, device = start_process(options.device)
    check_device(device, "float32")
    output = scores_file(options.folder, options.output)
    read_pairs(options.folder)  # before the model is loaded
    keep(
        [score_alignment(options.folder, AlignmentModel(options.model, device), options.batch_size)],
        output,
        command_of(parser, arguments),
    )
