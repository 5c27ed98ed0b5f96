"""The example of docs/mixers.md works as it is printed there."""

import re
from pathlib import Path

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from localdit.mixers import MIXERS

PAGE = Path("docs/mixers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_mixer_is_described():
    assert all(f"| `{name}` |" in PAGE and f"\n`{name}`: " in PAGE for name in set(MIXERS) - {"full"})


def test_the_first_example_builds_and_changes_a_model():
    names = {}
    exec(BLOCKS[0], names)
    mixers = [block.attn.processor for block in names["transformer"].transformer_blocks]
    assert [mixer.dilation for mixer in mixers[:4]] == [1, 4, 1, 4]


def test_the_new_mixer_builds_trains_and_reloads(monkeypatch, tmp_path):
    names = {"__name__": "localdit.mixers.pool"}
    exec(BLOCKS[1], names)
    monkeypatch.setitem(MIXERS, "pool", eval("{" + BLOCKS[2] + "}", names)["pool"])
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 1,
        "caption_channels": None,
        "token_mixers": ("pool", "window"),
        "mixer_options": {"pool": {"pool_size": 5}},
    }
    model = LocalDiTTransformer2DModel(**options)
    torch.nn.init.normal_(model.proj_out.weight)
    given = {"hidden_states": torch.randn(2, 4, 8, 6), "timestep": torch.tensor([1.0, 900.0])}
    sample = model(**given).sample
    sample.square().mean().backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalDiTTransformer2DModel.from_pretrained(tmp_path)(**given).sample, sample)
    with pytest.raises(ValueError, match=r"unknown option\(s\) \['size'\]; 'pool' knows \['pool_size'\]"):
        LocalDiTTransformer2DModel(**{**options, "mixer_options": {"pool": {"size": 5}}})


def test_the_new_mixer_takes_the_mean_around_each_token():
    names = {"__name__": "localdit.mixers.pool"}
    exec(BLOCKS[1], names)
    value = torch.randn(1, 12, 2, 4)
    pooled = names["PoolProcessor"](2, 4, 0, None).mix(value, value, value, (3, 4))
    torch.testing.assert_close(pooled[0, 5], value[0, [0, 1, 2, 4, 5, 6, 8, 9, 10]].mean(0))
    torch.testing.assert_close(pooled[0, 0], value[0, [0, 1, 4, 5]].mean(0))
