"""python -m localdit.evaluation score: pictures of a folder against real ones."""

from pathlib import Path

from localdit.command_line import Parser, best_device, check_device, counting_number, start_process
from localdit.evaluation.extractors import load_extractor
from localdit.evaluation.features import about, features_of_folder, load_features
from localdit.evaluation.files import check_target
from localdit.evaluation.generation import read_generation
from localdit.evaluation.images import LARGEST, find_images
from localdit.evaluation.limits import counting_to
from localdit.evaluation.records import FILE, command_of, keep, scores_file
from localdit.evaluation.scores import METRICS, check_counts, check_extractors, check_resamples, score_features


def parser() -> Parser:
    parser = Parser(prog="python -m localdit.evaluation score", description=__doc__)
    parser.add_argument("--generated", help="folder of pictures")
    parser.add_argument("--real", help="folder of pictures")
    parser.add_argument("--reference", help="their features, kept by --save_reference")
    parser.add_argument("--extractor", required=True, help="inception, or a folder or Hub id: see docs/evaluation.md")
    parser.add_argument("--weights", help="file of Inception's weights")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="by default all that fit")
    parser.add_argument("--size", type=counting_to(LARGEST), help="cut and scale all to squares of so many pixels")
    parser.add_argument("--resamples", type=int, default=50, help="for the intervals; 0 for none")
    parser.add_argument("--force", action="store_true", help="FID of fewer pictures than features, too")
    parser.add_argument("--save_reference", help="file for the features of the real pictures (.safetensors)")
    parser.add_argument("--output", help=f"by default {FILE} beside the generated pictures' folder; lines are added")
    parser.add_argument("--batch_size", type=counting_number, default=32)
    parser.add_argument("--device", default=best_device())
    return parser


def main(arguments: list[str]) -> None:
    options = (command_line := parser()).parse_args(arguments)
    if options.real and options.reference:
        raise ValueError("--real and --reference are two of one; give one of them.")
    if options.save_reference and not options.real:
        raise ValueError("--save_reference keeps the features of --real; give it.")
    if options.save_reference and Path(options.save_reference).exists():
        raise ValueError(f"--save_reference {options.save_reference!r} exists; choose another file.")
    if not options.generated and not options.save_reference:
        raise ValueError("There is nothing to do; give --generated, or --real with --save_reference.")
    state, device = start_process(options.device)
    check_device(device, "float32")
    output = scores_file(options.generated or ".", options.output)
    if options.save_reference:
        check_target("--save_reference", options.save_reference)
    check_resamples(options.resamples)
    # what is wrong is told before hours go into features
    counts = [len(find_images(folder)) for folder in (options.real, options.generated) if folder]
    extractor = load_extractor(options.extractor, device, options.weights)
    real = load_features(options.reference) if options.reference else None
    if real is not None:
        check_extractors(real.extractor, about(extractor))
        counts.append(len(real.values))
    if options.generated and len(counts) == 2:
        chosen = options.metrics is not None  # what was not asked for is left out
        check_counts(min(counts), extractor.dimension, options.metrics or METRICS, options.force or not chosen)
    if options.real:
        real = features_of_folder(options.real, extractor, options.batch_size, options.size)
    if real is not None and options.save_reference and state.is_main_process:
        real.save(options.save_reference)
        print(options.save_reference)
    if not options.generated:
        return
    generated = features_of_folder(options.generated, extractor, options.batch_size, options.size)
    if not state.is_main_process:
        return
    generation = read_generation(options.generated)
    records = score_features(real, generated, options.metrics, generation, options.resamples, options.force)
    keep(records, output, command_of(command_line, without(arguments, "--save_reference")))


def without(arguments: list[str], option: str) -> list[str]:
    """The arguments but for an option and its value."""
    kept = [each for each in arguments if not each.startswith(f"{option}=")]
    if option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept
