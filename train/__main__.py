"""The command line: `accelerate launch -m train --config train/recipes/<name>.yaml --dotted.override value`."""

from config import TrainConfig
from train.command_line import parse, run
from train.dry_run import dry_run
from train.trainer import Trainer


def main() -> None:
    config = parse(TrainConfig, "train")
    if config.dry_run:
        dry_run(config)
    else:
        Trainer(config).train()


if __name__ == "__main__":
    run("train", main)
