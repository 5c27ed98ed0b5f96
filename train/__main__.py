"""The command line: `accelerate launch -m train --config train/recipes/<name>.yaml --dotted.override value`."""

from config import TrainConfig
from train.command_line import parse, run
from train.trainer import Trainer

if __name__ == "__main__":
    run("train", lambda: Trainer(parse(TrainConfig, "train")).train())
