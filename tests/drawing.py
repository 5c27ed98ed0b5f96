"""Drawing with tiny pipelines, and listening to their transformers."""

import torch

PROMPT = "a red seven"


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def draw(pipeline, prompt=PROMPT, **arguments):
    """The raw output for a prompt and seed 0."""
    arguments = {"generator": seeded(0), "output_type": "latent", **arguments}
    return pipeline(prompt, **arguments).images


def calls_of(transformer):
    """The keyword arguments and the input of each call from now on, in a list that fills."""
    calls = []

    def record(module, arguments, keywords):
        calls.append({**keywords, "sample": arguments[0].clone()})

    transformer.register_forward_pre_hook(record, with_kwargs=True)
    return calls
