"""The command line: `accelerate launch -m train --config train/recipes/<name>.yaml --dotted.override value`."""

import sys

from jsonargparse import ArgumentParser

from config import TrainConfig
from train.trainer import Trainer


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Read recipes and overrides; what does not fit `TrainConfig` ends the program with exit code 2."""
    parser = ArgumentParser(prog="train", description="Train a LocalDiT pipeline.")
    parser.add_argument("--config", action="config", help="a recipe; may be given several times, later ones win")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    return TrainConfig(**parser.instantiate(namespace).as_dict())


def main() -> None:
    config = parse()
    try:
        trainer = Trainer(config)
        trainer.train()
    except (ValueError, FloatingPointError) as error:
        print(f"train: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
