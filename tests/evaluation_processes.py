"""Commands of evaluation, run by torchrun in two processes or by tests/test_evaluation_processes.py in one."""

import importlib
import json
import sys


def run_all(commands: list[tuple[str, list[str]]]) -> None:
    """Run each command, a module and its arguments, one after the other."""
    for module, arguments in commands:
        importlib.import_module(f"localdit.evaluation.{module}").main(arguments)


if __name__ == "__main__":
    run_all(json.loads(sys.argv[1]))
