"""What may differ from layer to layer and block to block: mixers, their options, the feed-forward."""

import pytest
import torch

from localdit import LocalDiTTransformer2DModel

PATTERN = ("window", "window", "full")


def make(**options) -> LocalDiTTransformer2DModel:
    model = LocalDiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 3,
            "num_layers": 5,
            "sample_size": 12,
            "patch_size": 2,
            "caption_channels": None,
        }
        | options
    )
    torch.nn.init.normal_(model.proj_out.weight)
    return model.eval()


def given() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(2, 3, 12, 16), "timestep": torch.tensor([1.0, 900.0])}


def mixers_of(model) -> list:
    return [block.attn.processor for block in model.transformer_blocks]


def test_a_list_of_options_is_tiled_over_the_layers_of_its_mixer(tmp_path):
    options = {"window": [{"window_size": 2}, {"window_size": 4, "global_context": 2}, {"window_size": 3}]}
    model = make(token_mixers=PATTERN, mixer_options=options)
    sizes = [mixer.window_size for mixer in mixers_of(model) if hasattr(mixer, "window_size")]
    assert sizes == [2, 4, 3, 2]
    assert [mixer.layer for mixer in mixers_of(model)] == [0, 1, 0, 2, 3]
    inputs = given()
    sample = model(**inputs).sample
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalDiTTransformer2DModel.from_pretrained(tmp_path)(**inputs).sample, sample)


def test_lists_of_options_can_be_set_later():
    model = make()
    model.set_token_mixers("sliding_window", {"sliding_window": [{"dilation": 1}, {"dilation": 2}]})
    assert [mixer.dilation for mixer in mixers_of(model)] == [1, 2, 1, 2, 1]
    assert model.config.mixer_options == {"sliding_window": [{"dilation": 1}, {"dilation": 2}]}


@pytest.mark.parametrize("options", [[], 3, [{"window_size": 2}, 4]])
def test_options_that_are_neither_a_dictionary_nor_a_list_of_such_are_refused(options):
    with pytest.raises(ValueError, match="is not a dictionary of options by name, nor a list of such"):
        make(mixer_options={"window": options})


def test_an_unknown_option_in_a_list_is_named():
    with pytest.raises(ValueError, match=r"unknown option\(s\) \['size'\]"):
        make(mixer_options={"window": [{"window_size": 2}, {"size": 4}]})


def test_mix_ffn_sees_the_neighbours_on_the_grid_and_reloads(tmp_path):
    model = make(
        num_layers=1, feed_forward="mix_ffn", token_mixers=("window",), mixer_options={"window": {"window_size": 1}}
    )
    inputs = given()
    sample = model(**inputs).sample
    moved = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    moved["hidden_states"][:, :, 4:6, 8:10] += 1  # token (2, 4) of a grid of 6 x 8
    changed = (model(**moved).sample != sample).any(1).unflatten(-1, (8, 2)).unflatten(-3, (6, 2)).any(-1).any(2)[0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 3:6] = True
    assert torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalDiTTransformer2DModel.from_pretrained(tmp_path)(**inputs).sample, sample)


def test_mix_ffn_compiles_and_trains():
    model = make(num_layers=2, feed_forward="mix_ffn", token_mixers=("linear",), rope_theta=None).train()
    inputs = given()
    sample = model(**inputs).sample
    sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).sample, sample)


@pytest.mark.parametrize(("feed_forward", "weights"), [("mlp", 2), ("mix_ffn", 3)])
def test_mlp_ratio_is_the_width_of_the_feed_forward(feed_forward, weights):
    model = make(num_layers=1, feed_forward=feed_forward, mlp_ratio=1.5)
    matrices = [p for p in model.transformer_blocks[0].ff.parameters() if p.ndim > 1 and p.numel() % (24 * 36) == 0]
    assert sum(p.numel() for p in matrices) == weights * 24 * 36
    with pytest.raises(ValueError, match="mlp_ratio=0"):
        make(mlp_ratio=0)


def test_an_unknown_feed_forward_names_the_known_ones():
    with pytest.raises(ValueError, match="feed_forward='conv' is not known.*mlp.*mix_ffn"):
        make(feed_forward="conv")
