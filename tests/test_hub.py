"""Folders and repositories that carry their code, proven against a server that speaks the Hub's HTTP API."""

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from localdit import LocalDiTPipeline, hub

ROOT = Path(__file__).parents[1]
REPO = "me/tiny"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as creating, committing, listing and downloading take; one repository, in memory."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status: int = 200, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content, status: int = 200, **headers):
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def allowed(self) -> bool:
        return not self.server.private or self.headers.get("Authorization") == "Bearer hf_fake"

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            self.server.private = json.loads(content).get("visibility") == "private"
            return self.answer_json({"url": f"{self.server.endpoint}/{REPO}", "name": REPO, "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if "/branch/" in self.path:
            self.server.branches[self.path.rpartition("/")[2]] = {}
            return self.answer_json({})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(content)["files"]
            ]
            return self.answer_json({"files": files})
        if "/commit/" in self.path:
            files = self.server.branches[self.path.rpartition("/")[2]]
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.endpoint}/{REPO}/commit/{self.sha(files)}"
            return self.answer_json({"success": True, "commitOid": self.sha(files), "commitUrl": url})
        return self.answer(404)

    def sha(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.server.branches.setdefault(sha, files)
        return sha

    def do_GET(self):
        path = self.path.partition("?")[0]
        if not self.allowed():
            return self.answer(401, X_Error_Code="RepoNotFound")
        listing = re.fullmatch(rf"/api/models/{REPO}(?:/(?:revision|tree)/([^/]+)(?:/(.*))?)?", path)
        if listing:
            files = self.server.branches.get(listing[1] or "main")
            if files is None:
                return self.answer_json({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
            if "/tree/" in path:
                return self.answer_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.answer_json({"id": REPO, "modelId": REPO, "sha": self.sha(files), "siblings": siblings})
        wanted = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.*)", path)
        if not wanted:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = self.server.branches.get(wanted[1], {})
        if wanted[2] not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        data = files[wanted[2]]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": self.sha(files)}
        first = int(re.search(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.server.downloads.append((wanted[2], first))
        if self.command == "GET" and wanted[2].endswith(self.server.cut) and self.server.cuts:
            self.server.cuts -= 1
            self.send_response(206 if first else 200)
            for name, value in {"Content-Length": str(len(data) - first), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[first : first + (len(data) - first) // 2])
            self.close_connection = True
            return None
        if first:
            content_range = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[first:], Content_Range=content_range, **headers)
        return self.answer(200, data, Accept_Ranges="bytes", **headers)

    do_HEAD = do_GET


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.branches, server.private, server.downloads = {"main": {}}, False, []
    server.cut, server.cuts = (".safetensors",), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from PIL import Image

def draw(pipe, to, **image):
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red seven", generator=torch.Generator().manual_seed(0), output_type="pt", **image).images
    torch.save(picture, to)

IMAGE = dict(image=Image.linear_gradient("L").convert("RGB"), strength=0.5)
"""
WITHOUT = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("localdit", "pipelines"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
WITH = "import localdit\n"


def run(code: str, folder: Path, server=None, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run a program in its own process, with caches of its own in `folder`."""
    settings = {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_fake",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": server.endpoint if server else "http://127.0.0.1:9",
    }
    result = subprocess.run(
        [sys.executable, "-c", DRAW + textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def pictures(folder: Path, *names: str) -> list[torch.Tensor]:
    return [torch.load(folder / f"{name}.pt") for name in names]


def test_an_exported_folder_runs_with_localdit_and_without_and_so_does_what_is_saved_again(model_folder, tmp_path):
    hub.export(LocalDiTPipeline.from_pretrained(model_folder), tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"pipeline.py", "pipeline_img2img.py", "pipeline_common.py", "README.md"} <= names
    assert not any("__pycache__" in str(path) for path in (tmp_path / "model").rglob("*"))
    load = """
    pipe = DiffusionPipeline.from_pretrained("model", {})
    draw(pipe, "{}.pt")
    """
    trusting = 'custom_pipeline="pipeline", trust_remote_code=True'
    img2img = """
    pipe = DiffusionPipeline.from_pretrained("model", custom_pipeline="pipeline_img2img", trust_remote_code=True)
    draw(pipe, "img2img without.pt", **IMAGE)
    pipe.save_pretrained("again_img2img")
    import os
    os.makedirs("elsewhere")
    other = type(pipe).from_pipe(DiffusionPipeline.from_pretrained("model", {}))
    draw(other, "img2img of a pipe without.pt", **IMAGE)
    texts = DiffusionPipeline.from_pretrained("model", transformer=None, vae=None, {})
    texts.save_pretrained("again_texts")
    os.chdir("elsewhere")  # from where the folder cannot be found by the name that it was loaded by
    pipe.save_pretrained("../again_from_elsewhere")
    """
    run(
        WITHOUT
        + textwrap.dedent(load.format(trusting, "without"))
        + 'pipe.save_pretrained("again")'
        + textwrap.dedent(img2img.format(trusting, trusting)),
        tmp_path,
    )
    run(
        WITH
        + """
from localdit import LocalDiTImg2ImgPipeline
draw(DiffusionPipeline.from_pretrained("model"), "with.pt")
draw(DiffusionPipeline.from_pretrained("again"), "again with.pt")
draw(LocalDiTImg2ImgPipeline.from_pretrained("model"), "img2img with.pt", **IMAGE)
both = DiffusionPipeline.from_pretrained("model", custom_pipeline="pipeline", trust_remote_code=True)
both.save_pretrained("again_both")  # the folder's pipeline around the installed transformer
""",
        tmp_path,
    )
    run(
        WITHOUT
        + """
for folder in ("again", "again_both", "again_img2img", "again_from_elsewhere"):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    draw(pipe, folder + ".pt")
again = dict(custom_pipeline="pipeline_img2img", trust_remote_code=True)
draw(DiffusionPipeline.from_pretrained("again_img2img", **again), "img2img again.pt", **IMAGE)
""",
        tmp_path,
    )
    same = ("with", "without", "again with", "again", "again_both", "again_img2img", "again_from_elsewhere")
    first, *others = pictures(tmp_path, *same)
    assert all(torch.equal(first, other) for other in others)
    names = ("img2img with", "img2img without", "img2img again", "img2img of a pipe without")
    first, *others = pictures(tmp_path, *names)
    assert all(torch.equal(first, other) for other in others)


PUSH = """
from localdit import LocalDiTPipeline
pipe = LocalDiTPipeline.from_pretrained(MODEL)
draw(pipe, "pushed.pt")
samples = {"a red seven": Image.new("RGB", (16, 16))}
print(pipe.push_to_hub("me/tiny", private=True, license="mit", images=samples, scores={"one digit": 0.38}))
"""


def test_what_was_pushed_is_pulled_back_with_localdit_and_without(model_folder, tmp_path, server):
    result = run(WITH + f"MODEL = {str(model_folder)!r}\n" + PUSH, tmp_path, server)
    assert f"{server.endpoint}/{REPO}/commit/" in result.stdout and server.private
    files = server.branches["main"]
    ast.parse(files["transformer/localdit.py"])
    card = files["README.md"].decode()
    assert "license: mit" in card and "window-attention" in card and "| one digit | 0.38 |" in card
    assert "![a red seven](samples/0.png)" in card and "samples/0.png" in files
    pull = 'draw(DiffusionPipeline.from_pretrained("me/tiny", {}), "{}.pt")\n'
    trusting = 'custom_pipeline="pipeline", trust_remote_code=True'
    run(WITH + pull.format("", "with"), tmp_path, server)
    (tmp_path / "elsewhere").mkdir()
    run(WITHOUT + pull.format(trusting, "without"), tmp_path / "elsewhere", server)
    run(WITH + pull.format("", "offline"), tmp_path, HF_HUB_OFFLINE="1")
    pushed, pulled, offline = pictures(tmp_path, "pushed", "with", "offline")
    (without,) = pictures(tmp_path / "elsewhere", "without")
    assert torch.equal(pushed, pulled) and torch.equal(pushed, without) and torch.equal(pushed, offline)

    refused = run(
        WITH + pull.format("", "no"),
        tmp_path / "elsewhere",
        server,
        check=False,
        HF_TOKEN="hf_wrong",
        HF_HOME=str(tmp_path / "new"),
    )
    assert refused.returncode and "me/tiny" in refused.stderr


def test_a_download_that_breaks_off_is_resumed_or_refused_but_never_half_a_model(model_folder, tmp_path, server):
    push = PUSH.replace("private=True", 'revision="v1"')
    run(WITH + f"MODEL = {str(model_folder)!r}\n" + push, tmp_path, server)
    assert not server.branches["main"] and "model_index.json" in server.branches["v1"]
    small_bites = "import huggingface_hub.constants\nhuggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000\n"
    pull = WITH + small_bites + 'draw(DiffusionPipeline.from_pretrained("me/tiny", revision="v1"), "pulled.pt")\n'
    server.cuts = 10**6
    broken = run(pull, tmp_path, server, check=False)
    assert broken.returncode and not (tmp_path / "pulled.pt").exists()
    assert not list((tmp_path / "cache").rglob("snapshots/*/transformer/*.safetensors"))
    server.cuts, server.downloads = 1, []
    run(pull, tmp_path, server)
    pushed, pulled = pictures(tmp_path, "pushed", "pulled")
    assert torch.equal(pushed, pulled)
    assert not server.cuts, "one download broke off"
    assert any(first for _, first in server.downloads), "and went on where it was"


def test_what_cannot_be_exported_is_refused_before_anything_is_made(pipeline, tmp_path):
    with pytest.raises(TypeError, match=r"images\['a red seven'\] is of type str; give PIL images"):
        hub.export(pipeline, tmp_path / "folder", images={"a red seven": "red.png"})
    with pytest.raises(TypeError, match="export takes a LocalDiT pipeline with its transformer, not str"):
        hub.export("pipeline", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_saving_may_push_as_well(pipeline, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(LocalDiTPipeline, "push_to_hub", lambda *given, **named: pushed.append((*given[1:], named)))
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO)
    assert pushed == [("mine", {"private": True}), (REPO, {})]
    assert (tmp_path / "mine" / "model_index.json").is_file()


def test_a_misspelt_argument_is_refused_before_anything_is_made(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda **kwargs: pytest.fail("the Hub was called"))
    with pytest.raises(TypeError, match="privat"):
        hub.push_to_hub(pipeline, REPO, privat=True)
    with pytest.raises(TypeError, match="scors"):
        hub.export(pipeline, tmp_path / "folder", scors={})
    assert not (tmp_path / "folder").exists()


def test_the_bundle_is_one_file_that_imports_nothing_of_ours():
    code = hub.bundle(hub.TRANSFORMER)
    assert code == hub.bundle(hub.TRANSFORMER)
    tree = ast.parse(code)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("localdit" in ast.unparse(node) for node in imported)
    assert "class WindowAttnProcessor" in code and "class LocalDiTTransformer2DModel" in code
    assert "# RoPE sees differences only" in code, "comments travel too"


@pytest.mark.parametrize(
    ("files", "phrase"),
    [
        ({"a": "from localdit.b import x\ny = 1\n", "b": "x = 1\ny = 2\n"}, "both define y"),
        ({"a": "import localdit.b\n", "b": ""}, "'import localdit.b' cannot be bundled"),
        ({"a": "from localdit.b import x as z\n", "b": "x = 1"}, "cannot be bundled"),
        ({"a": "from . import b\n", "b": ""}, "cannot be bundled"),
    ],
)
def test_what_cannot_be_one_file_is_refused(files, phrase, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PACKAGE", tmp_path)
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(ValueError, match=phrase):
        hub.bundle(tmp_path / "a.py")


def test_a_plain_save_and_an_export_hold_the_same_pipeline(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "plain")
    hub.export(pipeline, tmp_path / "export", images={"a red seven": Image.new("RGB", (8, 8))})
    plain, exported = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("plain", "export"))
    assert plain == exported and plain["transformer"] == ["localdit", "LocalDiTTransformer2DModel"]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "export")) is LocalDiTPipeline
    card = (tmp_path / "export" / "README.md").read_text()
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    assert f"transformer {count:,}" in card and 'custom_pipeline="pipeline"' in card
