"""Folders and Hub repositories that carry their code: they run with localdit installed, and without it."""

import ast
import importlib
import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import huggingface_hub
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

PACKAGE = Path(__file__).parent
TRANSFORMER = PACKAGE / "models" / "transformer_localdit.py"
# the pipeline files by the names under which diffusers finds them as `custom_pipeline`; the others keep theirs
CUSTOM_PIPELINES = {
    "pipeline_localdit.py": "pipeline.py",
    "pipeline_localdit_img2img.py": "pipeline_img2img.py",
    "pipeline_localdit_inpaint.py": "pipeline_inpaint.py",
    "pipeline_localdit_class.py": "pipeline_class.py",
}


def export(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    license: str = "apache-2.0",
    images: Mapping[str, Image.Image] | None = None,
    scores: Mapping[str, float | str] | None = None,
    repo_id: str | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a pipeline with its code and a model card.

    The folder, or the Hub repository made of it, loads in two ways:

    - `import localdit`, then `DiffusionPipeline.from_pretrained(folder)` runs the installed code and trusts nothing;
    - where localdit is not installed, `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline",
      trust_remote_code=True)` runs the code in the folder ("pipeline_img2img" for image to image, "pipeline_inpaint"
      for inpainting, "pipeline_class" for a model without text).

    Args:
        pipeline: a LocalDiT pipeline.
        folder: where to; made if it does not exist.
        license: of the weights, by its name on the Hub.
        images: sample pictures for the card, by their prompts.
        scores: figures for the card, by their names.
        repo_id: what the card's examples load; the folder's name by default.
        variant: in the names of the weights' files, such as "fp16".
        max_shard_size: of the weights' files, such as "5GB".

    Returns:
        the folder.
    """
    if not isinstance(getattr(pipeline, "transformer", None), torch.nn.Module):
        raise TypeError(f"export takes a LocalDiT pipeline with its transformer, not {type(pipeline).__name__}.")
    for prompt, image in (images or {}).items():
        if not isinstance(image, Image.Image):
            raise TypeError(f"images[{prompt!r}] is of type {type(image).__name__}; give PIL images by their prompts.")
    folder = Path(folder)
    pipeline.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    front_door = importlib.import_module("localdit")  # which alone knows where the pipelines' files are
    write_code(folder, Path(inspect.getfile(front_door.LocalDiTPipeline)).parent)
    write_card(pipeline, folder, repo_id or folder.name, license, images or {}, scores or {})
    return folder


def push_to_hub(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a LocalDiT pipeline",
    create_pr: bool = False,
    **kwargs,
) -> str:
    """Push what `export` writes to the Hub, in one commit.

    Args:
        pipeline: a LocalDiT pipeline.
        repo_id: "owner/name"; made if it does not exist.
        private: whether a new repository is private.
        token: a Hub token; by default the one that `hf auth login` saved.
        revision: the branch to push to, made if it does not exist; by default the main one.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch.
        kwargs: for `export`.

    Returns:
        the commit's address.
    """
    inspect.signature(export).bind(pipeline, "", **kwargs)  # a typing error ends here, before anything is made
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        export(pipeline, folder, repo_id=repo_id, **kwargs)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url


def write_code(folder: Path, pipelines: Path) -> None:
    """Put the pipelines' files into a saved pipeline's folder, and the transformer's code as one file beside it."""
    for source in sorted(pipelines.glob("pipeline_*.py")):
        shutil.copyfile(source, folder / CUSTOM_PIPELINES.get(source.name, source.name))
    # the loader looks for the file that has the name of the library in model_index.json, and downloads no other
    (folder / "transformer" / "localdit.py").write_text(bundle(TRANSFORMER), encoding="utf-8")


def bundle(path: Path) -> str:
    """The code of a module of this package and of all the modules of it that it imports, as one file.

    Raises:
        ValueError: where two of the modules define one name, or one imports ours otherwise than by
            `from localdit.module import name`.
    """
    modules: dict[Path, ast.Module] = {}
    _collect(path, modules)
    imports, bodies, owners = set(), [], {}
    for module, tree in modules.items():
        for name in _defined_names(tree):
            if name in owners:
                raise ValueError(f"{module} and {owners[name]} both define {name}; one file cannot hold both.")
            owners[name] = module
        lines = module.read_text(encoding="utf-8").splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if _our_module(node) is None:
                    imports.add(ast.unparse(node))
            elif node is not tree.body[0] or not isinstance(node, ast.Expr):  # anything but the docstring
                continue
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
        body = "\n".join(lines).strip()
        if body:
            bodies.append(f"# {module.relative_to(PACKAGE.parent)}\n\n{body}")
    header = (
        f'"""{path.stem} of localdit and all it needs, bundled by localdit.hub for diffusers '
        f'{diffusers.__version__}."""'
    )
    return "\n\n\n".join([header, "\n".join(sorted(imports, key=lambda line: (line.split()[1], line))), *bodies]) + "\n"


def _collect(path: Path, modules: dict[Path, ast.Module]) -> None:
    """Add a module, and before it the modules of ours that it imports."""
    if path in modules:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and (needed := _our_module(node)) is not None:
            _collect(needed, modules)
    modules[path] = tree


def _our_module(node: ast.Import | ast.ImportFrom) -> Path | None:
    """The file of the module of ours that a statement imports from, or None where it imports another's."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    if not any(name.split(".")[0] in ("localdit", "") for name in names):
        return None
    if isinstance(node, ast.Import) or node.level or any(alias.asname for alias in node.names):
        raise ValueError(f"'{ast.unparse(node)}' cannot be bundled; write 'from localdit.module import name'.")
    module = PACKAGE.joinpath(*names[0].split(".")[1:])
    return module / "__init__.py" if module.is_dir() else module.with_suffix(".py")


def _defined_names(tree: ast.Module) -> set[str]:
    """The names that a module defines at its top."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def write_card(
    pipeline: DiffusionPipeline,
    folder: Path,
    repo_id: str,
    license: str,
    images: Mapping[str, Image.Image],
    scores: Mapping[str, float | str],
) -> None:
    """Write the model card README.md, and the sample pictures beside it."""
    config = pipeline.transformer.config
    mixers = list(dict.fromkeys(config.token_mixers))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image" if config.caption_channels else "unconditional-image-generation",
        tags=["localdit", "diffusion-transformer", *(f"{mixer}-attention" for mixer in mixers)],
    )
    parameters = {
        name: sum(parameter.numel() for parameter in component.parameters())
        for name, component in pipeline.components.items()
        if hasattr(component, "parameters")
    }
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"A LocalDiT of {config.num_layers} layers whose tokens are mixed by {', '.join(mixers)} "
        f"({', '.join(f'{name} {count:,}' for name, count in parameters.items())} parameters).",
        _usage(repo_id, "pipeline" if config.caption_channels else "pipeline_class"),
    ]
    if scores:
        rows = [f"| {name} | {value} |" for name, value in scores.items()]
        sections.append("\n".join(["## Scores", "", "| | |", "|---|---|", *rows]))
    if images:
        (folder / "samples").mkdir(exist_ok=True)
        for number, image in enumerate(images.values()):
            image.save(folder / "samples" / f"{number}.png")
        pictures = [f"![{prompt}](samples/{number}.png)" for number, prompt in enumerate(images)]
        sections.append("\n\n".join(["## Samples", *pictures]))
    ModelCard("\n\n".join(sections) + "\n").save(folder / "README.md")


def _usage(repo_id: str, custom_pipeline: str) -> str:
    return f"""## Use

```python
import localdit  # pip install localdit; makes its classes known to diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
```

Without localdit, with the code of this repository (read it before you trust it, and pin a `revision`):

```python
pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{custom_pipeline}", trust_remote_code=True)
```"""
