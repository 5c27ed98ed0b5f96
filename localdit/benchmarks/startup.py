"""What it costs to begin: the time of the import, the time and memory of loading the 0.4B transformer.

python -m localdit.benchmarks.startup

Everything runs in fresh processes, in turn, as ratios to the same with diffusers' PixArt-Sigma. That pipeline has the
same components (a T5, an AutoencoderKL, the same sampler, and a transformer of the same shape), so it is what a user of
diffusers alone would import and load in the place of ours. One process imports first that and then ours, which tells
what ours adds where the processor is busy with other things too.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import PixArtTransformer2DModel

from localdit import LocalDiTTransformer2DModel
from localdit.command_line import Parser, counting_number, hide_loading_bars, run

BASE = """
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5EncoderModel, T5Tokenizer
"""
OURS = "from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel"
# processes, each of which runs its statements one after the other, by name
IMPORTS = {
    "diffusers": {"diffusers": BASE},
    "localdit": {"localdit": OURS},
    "both": {
        "diffusers": BASE,
        "+ AutoPipeline": "from diffusers import AutoPipelineForText2Image",
        "+ localdit": OURS,
    },
}
TIMED = """
import json, time
times = []
for statements in json.loads({statements!r}):
    wall, cpu = time.perf_counter(), time.process_time()
    exec(statements, {{}})
    times.append([time.perf_counter() - wall, time.process_time() - cpu])
print(json.dumps(times))
"""

MODELS: dict[str, type] = {"diffusers": PixArtTransformer2DModel, "localdit": LocalDiTTransformer2DModel}
# the released model's size, in arguments that both classes have
SIZE = {"num_layers": 18, "num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 4}
CASES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))  # on disk, as loaded
SAMPLE_EVERY = 0.002  # seconds


@dataclass(frozen=True)
class Seconds:
    """What something took, by the clock and of the processor."""

    clock: float
    processor: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.clock + other.clock, self.processor + other.processor)


def import_times(*statements: str) -> list[Seconds]:
    """What each of some statements takes in one fresh interpreter, whose own start is left out."""
    command = [sys.executable, "-c", TIMED.format(statements=json.dumps(statements))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{statements!r} failed: {result.stderr.strip()[-1000:]}")
    return [Seconds(*times) for times in json.loads(result.stdout.splitlines()[-1])]


def compare_imports(rounds: int) -> dict[tuple[str, str], list[Seconds]]:
    """By process and statement, the time from the process' first one on, in turn, round after round."""
    results: dict[tuple[str, str], list[Seconds]] = {}
    for number in range(rounds + 1):
        # forwards and backwards, so that none always comes after the same one
        for process, stages in list(IMPORTS.items())[:: -1 if number % 2 else 1]:
            so_far = itertools.accumulate(import_times(*stages.values()))
            for stage, seconds in zip(stages, so_far, strict=True):
                if number:  # the first round brings the files into memory
                    results.setdefault((process, stage), []).append(seconds)
    return dict(sorted(results.items(), key=lambda item: list(IMPORTS).index(item[0][0])))


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: all, and those that no file backs and that nothing could drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split() for line in lines}
    return 1024 * int(sizes["VmRSS"][1]), 1024 * int(sizes["RssAnon"][1])


class MemoryMeter:
    """By how much memory grows, at its peak, while the meter runs.

    Attributes:
        total, anonymous: bytes, as `memory` tells them apart.
    """

    def __init__(self) -> None:
        self.start = memory()
        self.total = self.anonymous = 0
        self.running = True

    def read(self) -> None:
        total, anonymous = memory()
        self.total = max(self.total, total - self.start[0])
        self.anonymous = max(self.anonymous, anonymous - self.start[1])

    def watch(self) -> None:
        while self.running:
            self.read()
            time.sleep(SAMPLE_EVERY)


@contextmanager
def metered():
    """A running `MemoryMeter`."""
    meter = MemoryMeter()
    thread = threading.Thread(target=meter.watch)
    thread.start()
    try:
        yield meter
        meter.read()
    finally:
        meter.running = False
        thread.join()


@dataclass(frozen=True)
class Loading:
    """What loading a model took.

    Attributes:
        seconds: until `from_pretrained` is back, and until every weight was read once.
        total, anonymous: peak growth of memory up to then, in multiples of the weights' size as loaded.
    """

    seconds: tuple[float, float]
    total: float
    anonymous: float


def load(library: str, folder: str, dtype: str) -> Loading:
    """Load a transformer and read all of its weights, which are mapped from the file until then."""
    hide_loading_bars()
    with metered() as meter:
        start = time.perf_counter()
        model = MODELS[library].from_pretrained(folder, dtype=getattr(torch, dtype))
        loaded = time.perf_counter() - start
        for parameter in model.parameters():
            parameter.sum()
        read = time.perf_counter() - start
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Loading((loaded, read), meter.total / size, meter.anonymous / size)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What a function of this module gives in a process that has done the imports and nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["localdit.command_line"])  # imports once for all processes
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(function, *arguments).result()


def save_models(folder: Path) -> None:
    """Write both transformers with random weights, once for each dtype of the files."""
    for library, model_class in MODELS.items():
        model = model_class(**SIZE)
        for dtype in sorted({stored for stored, _ in CASES}, reverse=True):  # fp32 first, it cannot come back
            torch.nn.Module.to(model, getattr(torch, dtype)).save_pretrained(folder / library / dtype)


def compare_loading(folder: Path, rounds: int) -> dict[tuple[str, str, str], list[Loading]]:
    """What each library's transformer takes, by dtype on disk, dtype as loaded and library, in turn."""
    results: dict[tuple[str, str, str], list[Loading]] = {}
    for number in range(rounds + 1):
        for stored, dtype in CASES:
            for library in MODELS:
                measured = in_fresh_process(load, library, str(folder / library / stored), dtype)
                if number:  # the first round warms up
                    results.setdefault((stored, dtype, library), []).append(measured)
    return results


def ratio(mine: list[float], base: list[float]) -> str:
    """Median and spread of the rounds' ratios."""
    ratios = [own / other for own, other in zip(mine, base, strict=True)]
    return f"x {median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report_imports(results: dict[tuple[str, str], list[Seconds]]) -> None:
    """Print the times; of two processes as ratios round by round, inside one to what came first in it."""
    print("\nimport                        clock, s           ratio (spread)   processor, s           ratio (spread)")
    for (process, stage), mine in results.items():
        base = results["both" if process == "both" else "diffusers", "diffusers"]
        clock, processor = [one.clock for one in mine], [one.processor for one in mine]
        print(
            f"{stage if process != 'both' else f'one process: {stage}':28s}{median(clock):10.2f} "
            f"{ratio(clock, [one.clock for one in base]):>24s} {median(processor):14.2f} "
            f"{ratio(processor, [one.processor for one in base]):>24s}"
        )


def report_loading(results: dict[tuple[str, str, str], list[Loading]]) -> None:
    print(f"\n{'loading':32s} {'peak memory':>12s} {'anonymous':>10s} {'load, s':>8s} {'and read, s':>12s}  ratio")
    for (stored, dtype, library), measured in results.items():
        base = results[stored, dtype, "diffusers"]
        loaded, read = zip(*(one.seconds for one in measured), strict=True)
        name = f"{stored} as {dtype}, {library}"
        print(
            f"{name:32s} {max(one.total for one in measured):12.2f} {max(one.anonymous for one in measured):10.2f} "
            f"{median(loaded):8.2f} {median(read):12.2f}  {ratio(list(read), [one.seconds[1] for one in base])}"
        )
    print(
        "\npeak memory: growth in multiples of the weights as loaded, until every weight was read once. Of that is\n"
        "anonymous what no file backs; the rest are pages of the file, which the system drops when it wants them."
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["import", "loading"], choices=["import", "loading"])
    parser.add_argument("--rounds", type=counting_number, default=5)
    options = parser.parse_args()
    if "loading" in options.part and not Path("/proc/self/status").exists():
        raise ValueError("--part loading reads /proc, which only Linux has; choose --part import.")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads"
    print(f"{versions}, {platform.machine()}, {options.rounds} rounds")
    if "import" in options.part:
        report_imports(compare_imports(options.rounds))
    if "loading" in options.part:
        with tempfile.TemporaryDirectory() as folder:
            save_models(Path(folder))
            report_loading(compare_loading(Path(folder), options.rounds))


if __name__ == "__main__":
    run("localdit.benchmarks.startup", main)
