"""Policies that nobody should have to remember: who imports whom, what is public, what every file has."""

import ast
import dataclasses
import functools
import inspect
import sys
from pathlib import Path

import pytest

import config
import localdit
from config import ModelConfig
from localdit import LocalDiTTransformer2DModel

ROOT = Path(__file__).parents[1]
FRONT_DOOR = Path("localdit/__init__.py")
OURS = {"localdit", "pipelines", "train", "config", "infer_t2i", "infer_i2i", "tests", "setup"}
SHIPPED = ["localdit", "pipelines", "train", "config.py", "infer_t2i.py", "infer_i2i.py", "setup.py"]


def python_files(*places: str) -> list[Path]:
    """Paths, relative to the repository, of the Python files in folders and of single files."""
    found = [
        path
        for place in places
        for path in ([ROOT / place] if place.endswith(".py") else ROOT.glob(f"{place}/**/*.py"))
    ]
    assert found
    return sorted(path.relative_to(ROOT) for path in found)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported_modules(path: Path, source: str | None = None) -> set[str]:
    """Full names of the modules a file imports, anywhere in it: relative ones resolved, computed ones as written."""
    package = path.parent.parts
    modules = set()
    for node in ast.walk(parse(path) if source is None else ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, node.module) if node.module else base
            modules |= {".".join(base), *(".".join((*base, alias.name)) for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            modules.add(ast.unparse(node.args[0]).lstrip("f").strip("'\""))
    return modules - {""}


def imported_packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path)}


@pytest.mark.parametrize(
    ("places", "allowed"),
    [
        (["localdit"], {"localdit"}),
        (["pipelines"], {"pipelines"}),
        (["config.py"], set()),
        (["setup.py"], set()),
        (["train"], {"train", "config", "localdit"}),
        (["infer_t2i.py", "infer_i2i.py"], {"config", "localdit", "infer_t2i"}),
    ],
    ids=str,
)
def test_imports_follow_the_arrows(places, allowed):
    wrong = {
        str(path): sorted(packages)
        for path in python_files(*places)
        if path != FRONT_DOOR and (packages := imported_packages(path) & OURS - allowed)
    }
    assert not wrong


def test_the_front_door_alone_knows_the_pipelines():
    assert "localdit.pipelines.{module}" in imported_modules(FRONT_DOOR)
    others = [path for path in python_files("localdit") if path != FRONT_DOOR]
    assert not any(module.startswith("localdit.pipelines") for path in others for module in imported_modules(path))


def test_relative_nested_and_computed_imports_are_seen():
    source = """
from . import a
from ..train import b
def f():
    import config
importlib.import_module(f"pipelines.{x}")
"""
    found = imported_modules(Path("localdit/probe.py"), source)
    assert found == {"localdit", "localdit.a", "train", "train.b", "config", "pipelines.{x}"}


def test_the_models_need_only_torch_and_diffusers():
    # the exported folder runs where nothing else is installed
    for path in python_files("localdit/models", "localdit/mixers"):
        others = imported_packages(path) - set(sys.stdlib_module_names)
        # these are imported where a user asks for them by name
        allowed = {"torch", "diffusers", "localdit", *({"natten", "triton"} & {path.stem.rpartition("_")[2]})}
        assert others <= allowed, path


def test_torchvision_is_imported_nowhere():
    assert not [path for path in python_files(*SHIPPED, "tests") if "torchvision" in imported_packages(path)]


def test_a_pipeline_file_holds_one_pipeline_that_inherits_from_no_other():
    # the Hub loader refuses a file in which it finds two
    for path in python_files("pipelines"):
        classes = [node for node in parse(path).body if isinstance(node, ast.ClassDef)]
        bases = {node.name: {ast.unparse(base) for base in node.bases} for node in classes}
        pipelines = [name for name in bases if name.endswith("Pipeline")]
        assert len(pipelines) <= 1, path
        for name in pipelines:
            ours = {base for base in bases[name] if base.startswith("LocalDiT")}
            assert "DiffusionPipeline" in bases[name] and all(base.endswith("Mixin") for base in ours), path


def test_the_public_names_are_these():
    assert sorted(localdit.__all__) == localdit.__all__
    assert set(localdit.__all__) >= {"LocalDiTImg2ImgPipeline", "LocalDiTPipeline", "LocalDiTTransformer2DModel"}
    for name in localdit.__all__:
        assert getattr(localdit, name).__name__ == name
        assert inspect.getdoc(getattr(localdit, name))


def test_users_are_refused_with_exceptions_and_not_with_assert():
    # python -O removes assertions
    asserting = [
        f"{path}:{node.lineno}"
        for path in python_files(*SHIPPED)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert)
    ]
    assert not asserting


def test_every_file_says_what_it_is_for():
    assert not [str(path) for path in python_files(*SHIPPED, "tests") if not ast.get_docstring(parse(path))]


def test_model_config_is_the_models_signature():
    parameters = list(inspect.signature(LocalDiTTransformer2DModel.__init__).parameters.values())[1:]
    fields = dataclasses.fields(ModelConfig)
    assert [field.name for field in fields] == [parameter.name for parameter in parameters]
    assert {field.name: field.default for field in fields} == {p.name: p.default for p in parameters}
    assert {field.name: field.type for field in fields} == {p.name: p.annotation for p in parameters}


def test_every_name_in_a_config_is_an_annotated_frozen_field():
    classes = [value for value in vars(config).values() if isinstance(value, type) and value.__module__ == "config"]
    assert ModelConfig in classes
    for cls in classes:
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        named = [name for name, value in vars(cls).items() if not isinstance(value, property)]
        plain = [name for name in named if not name.startswith("_") and name not in cls.__annotations__]
        assert not plain, cls
