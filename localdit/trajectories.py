"""How pictures come about, from noise to picture, for every class: python -m localdit.trajectories --model FOLDER."""

from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from localdit import LocalDiTClassPipeline
from localdit.command_line import (
    Parser,
    best_device,
    check_device,
    check_output,
    load_pipeline,
    run,
    save_images,
    seed_number,
)


def main() -> None:
    parser = Parser(
        prog="python -m localdit.trajectories", description="Draw a strip for each class, one below another."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a LocalDiTClassPipeline")
    parser.add_argument("--num_inference_steps", type=int, help="by default the model's")
    parser.add_argument("--guidance_scale", type=float, help="1 turns guidance off; by default the model's")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the first strip, the next count up")
    parser.add_argument("--output", type=Path, default=Path("output/trajectories.png"), help="a .png")
    parser.add_argument("--overwrite", action="store_true", help="write over an existing file")
    parser.add_argument("--device", default=best_device(), help="cpu, cuda, mps; by default the best there is")
    arguments = parser.parse_args()
    check_device(arguments.device, "float32")
    check_output(arguments.output)

    pipeline = load_pipeline(LocalDiTClassPipeline, arguments.model, arguments.device, "float32")
    classes = pipeline.transformer.config.num_classes
    what = {"class_labels": list(range(classes))} if classes else {"batch_size": 1}
    strips = pipeline(
        **what,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        generator=[torch.Generator().manual_seed(arguments.seed + index) for index in range(classes or 1)],
        visualize=True,
    ).trajectories
    settings = {**vars(arguments), "output": str(arguments.output)}
    sheet = make_image_grid(strips, rows=len(strips), cols=1)
    (path,) = save_images([sheet], [settings], arguments.output, arguments.overwrite)
    print(path)


if __name__ == "__main__":
    run("localdit.trajectories", main)
