"""python -m localdit.evaluation: scores of folders of pictures, and what belongs to them."""

import importlib
import sys

from localdit.command_line import run

COMMANDS = {
    "generate": ("localdit.evaluation.generate", "draw pictures of prompts or classes with a pipeline"),
    "score": ("localdit.evaluation.score_folders", "FID, KID, CMMD, precision, recall, density, coverage, IS"),
    "align": ("localdit.evaluation.alignment", "how well pictures fit their prompts"),
    "lpips": ("localdit.evaluation.perceptual", "perceptual distance of pictures in pairs"),
    "reconstruct": ("localdit.evaluation.reconstruct", "what an autoencoder keeps of pictures, and PSNR"),
    "seams": ("localdit.evaluation.seams", "gradients at the borders of windows"),
    "long-range": ("localdit.evaluation.long_range", "attributes that match across the picture"),
    "digit-scenes": ("localdit.evaluation.digit_scenes", "train and use the reader of digit scenes"),
    "train-extractor": ("localdit.evaluation.digit_extractor", "a small extractor of handwritten digits"),
    "report": ("localdit.evaluation.report", "one page of several runs"),
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m localdit.evaluation COMMAND ...; each command has --help\n")
        for command, (_, description) in COMMANDS.items():
            print(f"  {command:<16} {description}")
        return
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is no command; choose among {', '.join(COMMANDS)}.")
    try:
        importlib.import_module(COMMANDS[name][0]).main(arguments)
    except ImportError as error:
        raise ValueError(f"A package is missing ({error}); pip install -e '.[evaluation]'.") from error


if __name__ == "__main__":
    run("localdit.evaluation", main)
