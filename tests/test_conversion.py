"""Released LocalDiT checkpoints: the same outputs, nothing lost, and back again."""

import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from localdit import LocalDiTTransformer2DModel
from localdit.conversion import check_releasable, from_released, read_state_dict, to_released, write_state_dict
from localdit.convert import main as convert
from localdit.models import loading
from tests.released_reference import CAPTION, HEAD_DIM, HEADS, ReleasedAttention, inputs, released_model


@pytest.fixture
def checkpoint() -> dict[str, torch.Tensor]:
    return released_model().state_dict()


@pytest.fixture
def checkpoint_file(checkpoint, tmp_path) -> Path:
    path = tmp_path / "release" / "LocalDiT.safetensors"
    path.parent.mkdir()
    save_file(checkpoint, path)
    return path


@pytest.mark.parametrize("global_branch", ["expected", "off"])
@pytest.mark.parametrize(
    ("window_size", "grid", "sample_size"), [(2, (4, 6), 32), (3, (6, 3), 128), (4, (8, 4), 32), (4, (8, 8), 128)]
)
def test_a_released_model_gives_the_outputs_of_the_reference(window_size, grid, sample_size, global_branch):
    reference = released_model(sample_size, layers=window_size + 1)
    for layer, block in enumerate(reference.transformer_blocks):
        block.attn1.set_processor(ReleasedAttention(window_size, layer % window_size, grid, global_branch))
    model = LocalDiTTransformer2DModel.from_single_file(
        reference.state_dict(),
        config={
            "sample_size": sample_size,
            "mixer_options": {"window": {"window_size": window_size, "shift_schedule": "cyclic"}},
        },
        global_branch=global_branch,
    )
    given = inputs(2 * grid[0], 2 * grid[1])
    expected = reference(**given).sample
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("global_branch", ["expected", "off"])
def test_the_releases_own_code_runs_what_is_converted_to_its_format(global_branch):
    source = released_model().state_dict()
    model = LocalDiTTransformer2DModel.from_single_file(source, config={"sample_size": 32})
    for parameter in model.parameters():  # trained since
        torch.nn.init.normal_(parameter, std=0.2)
    reference = released_model()
    reference.load_state_dict(to_released(model.state_dict(), global_branch), strict=True)
    for layer, block in enumerate(reference.transformer_blocks):
        block.attn1.set_processor(ReleasedAttention(4, layer % 4, (4, 8), global_branch))
    given = inputs(8, 16)
    expected = reference(**given).sample
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_two_readings_of_the_global_branch_differ(checkpoint):
    given = inputs(8, 8)
    with torch.no_grad():
        readings = [
            LocalDiTTransformer2DModel.from_single_file(checkpoint, global_branch=branch)(**given).sample
            for branch in ("expected", "off")
        ]
    assert (readings[0] - readings[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="global_branch='seeded' is not known"):
        LocalDiTTransformer2DModel.from_single_file(checkpoint, global_branch="seeded")


def test_the_config_is_read_from_the_shapes(checkpoint):
    config = LocalDiTTransformer2DModel.from_single_file(checkpoint).config
    assert (config.num_attention_heads, config.attention_head_dim, config.num_layers) == (HEADS, HEAD_DIM, 3)
    assert (config.in_channels, config.out_channels, config.patch_size, config.caption_channels) == (4, 4, 2, CAPTION)
    assert config.attention_residual and config.use_additional_conditions and config.sample_size == 128
    assert config.mixer_options == {"window": {"window_size": 4, "shift_schedule": "cyclic"}}


def test_only_what_the_release_reads_is_loaded_and_the_rest_is_reported(checkpoint, caplog):
    disturbed = dict(checkpoint)
    for name in from_released(checkpoint)[1]:
        disturbed[name] = torch.randn_like(checkpoint[name])
    with caplog.at_level(logging.INFO, "localdit.models.loading"):
        model = LocalDiTTransformer2DModel.from_single_file(disturbed)
    assert "dropped 24 tensors (35280 parameters)" in caplog.text  # 3 layers, (3 + 1) pairs of weight and bias
    undisturbed = LocalDiTTransformer2DModel.from_single_file(checkpoint)
    for mine, theirs in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def same_weights(model: LocalDiTTransformer2DModel, checkpoint: dict[str, torch.Tensor]) -> bool:
    wanted = from_released(checkpoint)[0]
    mine = model.state_dict()
    return mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_tensors_load(checkpoint, tmp_path, suffix, dtype):
    checkpoint = {name: tensor.to(dtype) for name, tensor in checkpoint.items()}
    torch.save(checkpoint, tmp_path / f"LocalDiT{suffix}")
    model = LocalDiTTransformer2DModel.from_single_file(tmp_path / f"LocalDiT{suffix}", dtype=dtype)
    assert model.dtype == dtype and same_weights(model, checkpoint)
    assert not model.training and model.proj_out.weight.requires_grad


def test_safetensors_load_from_a_file_and_from_its_folder_in_fp32_by_default(checkpoint, checkpoint_file):
    for path in (checkpoint_file, str(checkpoint_file.parent)):
        model = LocalDiTTransformer2DModel.from_single_file(path)
        assert model.dtype == torch.float32 and same_weights(model, checkpoint)


@pytest.fixture
def sharded(checkpoint, tmp_path) -> Path:
    names = sorted(checkpoint)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: checkpoint[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_sharded_checkpoint_loads_from_its_index_and_from_its_folder(checkpoint, sharded):
    assert same_weights(LocalDiTTransformer2DModel.from_single_file(sharded), checkpoint)
    assert same_weights(LocalDiTTransformer2DModel.from_single_file(sharded.parent), checkpoint)
    (sharded.parent / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shards that are not there: \['model-00002-of-00002.safetensors'\]"):
        LocalDiTTransformer2DModel.from_single_file(sharded)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_unrun(checkpoint, tmp_path):
    torch.save({**checkpoint, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "LocalDiT.pt")
    with pytest.raises(ValueError, match="loading it could run code"):
        LocalDiTTransformer2DModel.from_single_file(tmp_path / "LocalDiT.pt")
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "LocalDiT.pt", weights_only=False)  # the bomb is real
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"hello world", b"\x80\x02", b"\x80\x02}q\x00X\x05\x00\x00\x00\xff\xfe\xfd\xfc\xfbq\x01."]
)
def test_a_damaged_pickle_is_said_to_be_damaged_and_not_to_run_code(content, tmp_path):
    file = tmp_path / "LocalDiT.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"LocalDiT\.pt is damaged or no \.pt file .*; download it anew"):
        LocalDiTTransformer2DModel.from_single_file(file)


def test_what_is_no_checkpoint_is_refused_in_one_sentence(checkpoint, checkpoint_file, tmp_path):
    def refused(source, phrase):
        with pytest.raises(ValueError, match=phrase):
            LocalDiTTransformer2DModel.from_single_file(source)

    refused(tmp_path / "nowhere.pt", "nowhere.pt does not exist")
    text = tmp_path / "notes.txt"
    text.write_text("no tensors")
    refused(text, "notes.txt is no checkpoint")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint_file.read_bytes()[:-100])
    refused(cut, "cut.safetensors is damaged")
    pickled = tmp_path / "cut.pt"
    torch.save(checkpoint, pickled)
    pickled.write_bytes(pickled.read_bytes()[: pickled.stat().st_size // 2])
    refused(pickled, "cut.pt is damaged")
    nested = tmp_path / "nested.pt"
    torch.save({"step": 3, "model": checkpoint}, nested)
    refused(nested, "is no state dict")
    torch.save({3: torch.zeros(2)}, nested)
    refused(nested, "is no state dict")
    nested.unlink()
    refused({**checkpoint, "pos_embed.proj.weight": torch.zeros(3)}, r"pos_embed.proj.weight is \[3\]; it is no rel")
    refused({**checkpoint, "transformer_blocks.x.weight": torch.zeros(3)}, "1 unexpected: transformer_blocks.x.weight")
    refused({"transformer.lora_A.weight": torch.zeros(3)}, "holds LoRA adapters, no model; load them with load_lora")
    fused = "transformer_blocks.0.attn1.to_qkv.weight"
    for shape in ((2, 48), ()):
        refused({**checkpoint, fused: torch.zeros(shape)}, r"to_qkv.weight is .*, no fused query, key and value")
    refused({**checkpoint, "proj_out.bias": torch.zeros(16, dtype=torch.int32)}, "holds proj_out.bias in torch.int32")
    prefixed = {f"module.{name}": tensor for name, tensor in checkpoint.items()}
    with pytest.raises(ValueError, match="holds no tensor by a name of this model .* prefix"):
        LocalDiTTransformer2DModel.from_single_file(prefixed, config={"num_layers": 1})
    with pytest.raises(TypeError, match="The state dict holds a ndarray as 'x'"):
        LocalDiTTransformer2DModel.from_single_file({"x": torch.zeros(3).numpy()})
    with pytest.raises(TypeError, match="config=3 is of type int"):
        LocalDiTTransformer2DModel.from_single_file(checkpoint, config=3)
    torch.save(checkpoint, tmp_path / "other.pt")
    refused(tmp_path, "holds 3 checkpoints")


def test_unknown_settings_and_arguments_are_refused(checkpoint):
    for arguments, phrase in (
        ({"config": {"window_size": 8}}, r"unknown key\(s\) \['window_size'\]"),
        ({"nonsense": 3}, r"does not know \['nonsense'\]"),
        ({"quantization_config": 1}, r"does not know \['quantization_config'\]"),
    ):
        with pytest.raises(ValueError, match=phrase):
            LocalDiTTransformer2DModel.from_single_file(checkpoint, **arguments)


def test_the_model_shares_no_memory_with_the_tensors_it_was_made_from(checkpoint):
    model = LocalDiTTransformer2DModel.from_single_file(checkpoint)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in checkpoint.values()}
    assert not theirs & {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_pickles_of_before_torch_1_6_load_and_a_bad_index_is_named(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same_weights(LocalDiTTransformer2DModel.from_single_file(tmp_path / "old.pt"), checkpoint)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{}", "garbage", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json is damaged"):
            LocalDiTTransformer2DModel.from_single_file(index)


def test_every_difference_is_listed(checkpoint):
    name = "transformer_blocks.1.attn2.to_k.weight"
    changes = {
        "1 missing: transformer_blocks.1.cross_attn.to_k.weight": lambda x: x.pop(name),
        "1 unexpected: extra.weight": lambda x: x.update({"extra.weight": torch.zeros(3)}),
        r"proj_out.bias is \[15\], not \[16\]": lambda x: x.update({"proj_out.bias": torch.zeros(15)}),
    }
    for phrase, change in changes.items():
        changed = dict(checkpoint)
        change(changed)
        with pytest.raises(ValueError, match=phrase):
            LocalDiTTransformer2DModel.from_single_file(changed)
    with pytest.raises(ValueError, match=r"is no released LocalDiT .* from_pretrained"):
        LocalDiTTransformer2DModel.from_single_file({"weight": torch.zeros(3)})


def test_the_way_to_this_format_and_back_keeps_every_bit(checkpoint):
    for name in list(checkpoint):  # as the original code has them before training
        if ".attn1.to_qkv." in name:
            for part, piece in zip("qkv", checkpoint[name].chunk(3), strict=True):
                checkpoint[name.replace("to_qkv", f"to_{part}")] = piece
        if ".attn2.to_kv." in name:
            key, value = (checkpoint[name.replace("to_kv", f"to_{part}")] for part in "kv")
            checkpoint[name] = torch.cat((key, value))
    for branch in ("expected", "off"):
        model = LocalDiTTransformer2DModel.from_single_file(checkpoint, global_branch=branch)
        check_releasable(model.config)
        back = to_released(model.state_dict(), branch)
        assert back.keys() == checkpoint.keys()
        assert all(torch.equal(back[name], checkpoint[name]) for name in back)
        live = to_released(model.state_dict(), branch, dead_copies=False)
        assert live.keys() == checkpoint.keys() - from_released(checkpoint)[1].keys()


def test_the_published_size_is_that_of_the_release():
    with init_empty_weights():
        model = LocalDiTTransformer2DModel(
            attention_residual=True,
            qk_norm_eps=1e-10,
            mixer_options={"window": {"window_size": 4, "shift_schedule": "cyclic"}},
        )
    check_releasable(model.config)
    released = to_released(model.state_dict())
    assert len(released) == 545 and sum(tensor.numel() for tensor in released.values()) == 518_323_408
    assert model.num_parameters() == 398_780_368
    assert released["transformer_blocks.17.attn2.to_kv.weight"].shape == (2304, 1152)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"attention_residual": False}, "attention_residual=False"),
        ({"token_mixers": ("full",), "mixer_options": None}, "token_mixers=\\('full',\\)"),
        ({"mixer_options": {"window": {"window_size": 4}}}, "shift_schedule='swin'"),
        ({"norm_eps": 1e-2}, "norm_eps=0.01"),
        ({"interpolation_scale": 7}, "interpolation_scale=7"),
        ({"mixer_options": {"window": {"shift_schedule": "cyclic", "global_context": 2}}}, "global_context"),
        ({"mixer_options": {"window": [{"window_size": 4}]}}, "differ by layer"),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2.0"),
        ({"feed_forward": "mix_ffn"}, "feed_forward='mix_ffn'"),
    ],
)
def test_a_model_that_the_release_cannot_express_is_refused(changes, phrase, checkpoint):
    model = LocalDiTTransformer2DModel.from_single_file(checkpoint)
    with pytest.raises(ValueError, match=phrase):
        check_releasable({**model.config, **changes})


def test_weights_are_written_whole_and_never_over_others(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "out" / "LocalDiT.safetensors"

    def fail(state_dict, partial, metadata):
        Path(partial).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("localdit.conversion.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            write_state_dict(checkpoint, path)
    assert list(path.parent.iterdir()) == []
    write_state_dict(checkpoint, path)
    assert read_state_dict(path).keys() == checkpoint.keys()
    with pytest.raises(ValueError, match="exists"):
        write_state_dict(checkpoint, path)
    with pytest.raises(ValueError, match="choose .*LocalDiT.safetensors"):
        write_state_dict(checkpoint, path.with_suffix(".pt"))


def test_the_command_line_goes_there_and_back(checkpoint, checkpoint_file, tmp_path, capsys):
    convert(["to-diffusers", str(checkpoint_file), str(tmp_path / "folder"), "--config", '{"sample_size": 32}'])
    assert "24 tensors (35,280 parameters)" in capsys.readouterr().out
    model = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert model.config.sample_size == 32 and same_weights(model, checkpoint)
    convert(["to-released", str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--no_dead_copies"])
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], checkpoint[name]) for name in back) and len(back) == len(model.state_dict()) - 12
    assert 'load it with config={"sample_size": 32}' in capsys.readouterr().out
    off = ["--dtype", "bfloat16", "--global_branch", "off"]
    convert(["to-diffusers", str(checkpoint_file.parent), str(tmp_path / "half"), *off])
    half = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_out.0.weight"
    assert torch.equal(half[name], checkpoint[name.replace(".attn.", ".attn1.")].bfloat16())
    convert(["to-released", str(tmp_path / "half"), str(tmp_path / "again.safetensors"), "--global_branch", "off"])
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == checkpoint.keys() and all(tensor.dtype == torch.bfloat16 for tensor in again.values())
    with pytest.raises(ValueError, match="exists"):
        convert(["to-diffusers", str(checkpoint_file), str(tmp_path / "folder")])
    with pytest.raises(ValueError, match="--config 'oops' is no JSON"):
        convert(["to-diffusers", str(checkpoint_file), str(tmp_path / "other"), "--config", "oops"])


@pytest.mark.parametrize(
    ("link", "revision"),
    [
        ("https://huggingface.co/me/it/blob/main/sub/x.safetensors", "main"),
        ("https://huggingface.co/me/it/resolve/main/sub/x.safetensors?download=true", "main"),
        ("https://hf.co/me/it/blob/v1/sub/x.safetensors", "v1"),
    ],
)
def test_a_link_to_the_hub_is_read_as_a_browser_gives_it(link, revision, checkpoint, checkpoint_file, monkeypatch):
    asked = []

    def get(repo_id, **where):
        asked.append((repo_id, where))
        return str(checkpoint_file)

    monkeypatch.setattr(loading, "_get_model_file", get)
    assert same_weights(LocalDiTTransformer2DModel.from_single_file(link), checkpoint)
    LocalDiTTransformer2DModel.from_single_file(link, revision="mine", token="t")
    told = {"weights_name": "sub/x.safetensors", "revision": revision}
    assert asked == [("me/it", told), ("me/it", {**told, "revision": "mine", "token": "t"})]
    with pytest.raises(ValueError, match="links to no file"):
        LocalDiTTransformer2DModel.from_single_file("https://huggingface.co/me/it")
