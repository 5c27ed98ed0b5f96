"""What the transformer refuses, in one sentence each."""

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from tests.small_transformers import (
    CLASSES,
    SIZES,
    make_inputs,
    make_model,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption_channels": 8, "num_classes": 3}, ["caption_channels=8", "num_classes=3", "exclude"]),
        ({"patch_size": 17}, ["patch_size=17", "sample_size=16"]),
        ({"patch_size": 3}, ["sample_size=16", "multiple of patch_size=3"]),
        ({"patch_size": 0}, ["patch_size=0", "at least 1"]),
        ({"token_mixers": ()}, ["token_mixers is empty", "'full'", "'window'"]),
        ({"token_mixers": ("window", "widow")}, ["'widow'", "'full'", "'window'"]),
        ({"mixer_options": {"window": {"size": 2}}}, ["'size'", "window_size"]),
        ({"mixer_options": {"window": {"window_size": 0}}}, ["window_size=0", "at least 1"]),
        ({"num_attention_heads": 1, "attention_head_dim": 6, "rope_theta": None}, ["= 6", "multiple of 4"]),
        ({"attention_head_dim": 6}, ["attention_head_dim=6", "multiple of 4", "rope_theta=None"]),
        ({"attention_head_dim": 8, **SIZES}, ["16", "multiple of 3"]),
        ({"qk_norm": "layer"}, ["'layer'", "'rms_norm'"]),
        ({"activation_fn": "relu"}, ["'relu'", "'gelu-approximate'"]),
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"num_layers": "2"}, ["num_layers='2'", "whole number"]),
        ({"num_layers": True}, ["num_layers=True", "whole number"]),
        ({"patch_size": 2.0}, ["patch_size=2.0", "whole number"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
        ({"attention_head_dim": -12}, ["attention_head_dim=-12", "at least 1"]),
        ({"out_channels": 0}, ["out_channels=0", "at least 1"]),
        ({"caption_channels": 0}, ["caption_channels=0", "at least 1"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0", "above 0"]),
        ({"qk_norm_eps": float("nan")}, ["qk_norm_eps=nan", "finite"]),
        ({"mlp_ratio": -4.0}, ["mlp_ratio=-4.0", "above 0"]),
        ({"interpolation_scale": 0}, ["interpolation_scale=0", "above 0"]),
        ({"rope_theta": -1.0}, ["rope_theta=-1.0", "above 0"]),
        ({"attention_bias": "yes"}, ["attention_bias='yes'", "True or False"]),
        ({"attention_residual": 1}, ["attention_residual=1", "True or False"]),
        ({"mixer_options": {"window": {"global_context": "x"}}}, ["global_context='x'", "whole number"]),
        ({"mixer_options": {"window": {"relative_position_bias": 2}}}, ["relative_position_bias=2", "True or False"]),
        ({"mixer_options": {"window": {"shift_schedule": [0.5]}}}, ["shift 0.5", "whole number"]),
        ({"mixer_options": {"window": {"shift_schedule": [0, 0, 0, 9]}}}, ["shift 9", "[0, 4)"]),
        ({"mixer_options": {"window": {"shift_schedule": [True]}}}, ["shift True", "whole number"]),
        ({"caption_channels": None, "num_classes": 0}, ["num_classes=0", "at least 1"]),
        ({"mixer_options": {"window": None}}, ["'window'", "None", "dictionary"]),
        ({"mixer_options": 4}, ["mixer_options=4", "dictionary"]),
        ({"token_mixers": None}, ["token_mixers=None", "neither a name nor a list", "'window'"]),
        ({"token_mixers": {"window"}}, ["neither a name nor a list", "'window'"]),
        ({"token_mixers": [["window"]]}, ["token_mixers=[['window']]", "neither a name nor a list"]),
        (
            {"token_mixers": "linear", "mixer_options": {"linear": {"feature_map": ["relu"]}}},
            ["feature_map=['relu']", "'softmax'"],
        ),
        ({"mlp_ratio": 0.01}, ["mlp_ratio=0.01", "24", "1 / 24"]),
        ({"mlp_ratio": 0.01, "feed_forward": "mix_ffn"}, ["mlp_ratio=0.01", "1 / 24"]),
        ({"use_additional_conditions": "no"}, ["use_additional_conditions='no'", "True or False"]),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        make_model(**changes)
    assert_is_one_helpful_sentence(refusal, words)


def assert_is_one_helpful_sentence(refusal, words):
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and ". " not in message and "\n" not in message, message


@pytest.mark.parametrize(
    ("model_changes", "input_changes", "words"),
    [
        ({}, {"hidden_states": torch.zeros(2, 4, 12, 15)}, ["12 x 15", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 13, 16)}, ["13 x 16", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 0, 16)}, ["0 x 16", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 3, 12, 16)}, ["[2, 3, 12, 16]", "[batch, 4, height, width]"]),
        ({}, {"hidden_states": torch.zeros(4, 12, 16)}, ["[4, 12, 16]", "[batch, 4, height, width]"]),
        ({}, {"timestep": None}, ["timestep is missing", "[batch]"]),
        ({}, {"timestep": torch.zeros(3)}, ["timestep has shape [3]", "[2]"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 12, 16, dtype=torch.long)}, ["torch.int64", "floating-point"]),
        ({}, {"encoder_attention_mask": torch.ones(2, 3)}, ["encoder_attention_mask has shape [2, 3]", "[2, 6]"]),
        ({}, {"encoder_hidden_states": None}, ["encoder_hidden_states is missing", "text"]),
        ({}, {"encoder_hidden_states": torch.zeros(2, 6, 21)}, ["21 wide", "caption_channels=20"]),
        (CLASSES, {"class_labels": None}, ["class_labels is missing", "0 to 4", "5 for no label"]),
        (CLASSES, {"class_labels": torch.tensor([0, 6])}, ["class_labels holds 6", "0 to 4", "5 for no label"]),
        (CLASSES, {"class_labels": torch.tensor([-1, 0])}, ["class_labels holds -1", "0 to 4"]),
        (CLASSES, {"class_labels": torch.zeros(3).long()}, ["class_labels has shape [3] for 2 pictures", "[batch]"]),
        (CLASSES, {"class_labels": torch.zeros(2, 1).long()}, ["class_labels has shape [2, 1]", "[batch]"]),
        (CLASSES, {"class_labels": torch.zeros(2)}, ["class_labels is of type torch.float32", "whole numbers"]),
        (CLASSES, {"class_labels": [0, 1]}, ["class_labels is of type list", "give a tensor"]),
        (SIZES, {"added_cond_kwargs": None}, ["lacks ['aspect_ratio', 'resolution']", "[batch, 2]"]),
        (SIZES, {"added_cond_kwargs": {}}, ["lacks ['aspect_ratio', 'resolution']", "[batch, 1]"]),
        (SIZES, {"added_cond_kwargs": {"resolution": torch.ones(2, 2)}}, ["lacks ['aspect_ratio']", "[batch, 1]"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_input_that_does_not_fit_is_refused(model_changes, input_changes, words):
    model = make_model(num_layers=1, **model_changes)
    inputs = {**make_inputs(model), **input_changes}
    with pytest.raises(ValueError) as refusal:
        model(**inputs)
    assert_is_one_helpful_sentence(refusal, words)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="window_size"):
        LocalDiTTransformer2DModel(2, 12, window_size=4)
    model = make_model(num_layers=1)
    with pytest.raises(TypeError, match="text_embeds"):
        model(**make_inputs(model), text_embeds=None)
