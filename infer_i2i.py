"""Image to image from the command line: python infer_i2i.py --image in.png --prompt "..." --strength 0.6."""

from infer_t2i import add_sample_arguments, call_arguments, check_arguments, sample_config, write
from localdit import LocalDiTImg2ImgPipeline
from localdit.command_line import Parser, load_pipeline, read_image, run


def main() -> None:
    parser = Parser(description="Change a picture by text.")
    parser.add_argument("--image", required=True, help="the picture to start from")
    parser.add_argument("--strength", type=float, help="0 returns the picture, 1 ignores it; by default the model's")
    add_sample_arguments(parser, output="output/i2i.png")
    arguments = parser.parse_args()
    check_arguments(arguments)
    sample = sample_config(arguments)
    image = read_image(arguments.image)
    pipeline = load_pipeline(LocalDiTImg2ImgPipeline, arguments.model, arguments.device, arguments.dtype)
    images = pipeline(**call_arguments(sample), image=image, strength=sample.strength).images
    write(images, sample, pipeline, arguments, before=[image.resize(images[0].size)])


if __name__ == "__main__":
    run("infer_i2i", main)
