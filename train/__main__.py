"""The command line: `accelerate launch -m train --config train/recipes/<name>.yaml --dotted.override value`."""

import sys

from jsonargparse import ArgumentParser

from config import TrainConfig
from train.trainer import Trainer


def main() -> None:
    parser = ArgumentParser(prog="train", description="Train a LocalDiT pipeline.")
    parser.add_argument("--config", action="config", help="a recipe; may be given several times, later ones win")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    arguments = parser.parse_args()
    arguments.pop("config", None)
    try:
        config = TrainConfig(**parser.instantiate_classes(arguments).as_dict())
        trainer = Trainer(config)
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trainer.train()


if __name__ == "__main__":
    main()
