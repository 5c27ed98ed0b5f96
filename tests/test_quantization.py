"""Fewer bits: torchao and GGUF weights load through diffusers' own arguments, and draw nearly the same."""

import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig, TorchAoConfig
from transformers import T5EncoderModel
from transformers import TorchAoConfig as TextTorchAoConfig

from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel


@pytest.fixture
def transformer(tiny_transformer) -> LocalDiTTransformer2DModel:
    return tiny_transformer(attention_head_dim=16)  # rows of 32, a block of Q8_0


@pytest.fixture
def folder(transformer, tmp_path) -> str:
    transformer.save_pretrained(tmp_path / "transformer")
    return str(tmp_path / "transformer")


def predict(model) -> torch.Tensor:
    torch.manual_seed(0)
    text = torch.randn(1, 5, 24)
    with torch.no_grad():
        return model(torch.randn(1, 3, 16, 16), encoder_hidden_states=text, timestep=torch.tensor([500.0])).sample


def close(quantized: torch.Tensor, whole: torch.Tensor) -> bool:
    """Not the same, and within a few percent."""
    difference = ((quantized - whole).norm() / whole.norm()).item()
    return 0 < difference < 0.05


@pytest.fixture
def eight_bits():
    # not among the tests' own packages: where it is installed, importing diffusers prints warnings
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


def test_torchao_quantizes_the_transformer_while_it_loads(transformer, folder, eight_bits):
    quantized = LocalDiTTransformer2DModel.from_pretrained(
        folder, quantization_config=TorchAoConfig(eight_bits), dtype=torch.float32
    )
    assert type(quantized.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter"
    assert close(predict(quantized), predict(transformer))


def test_a_gguf_file_loads_and_computes_with_its_quantized_weights(transformer, folder, tmp_path):
    path = tmp_path / "localdit.gguf"
    writer = gguf.GGUFWriter(path, "localdit")
    quantized_names = []
    for name, tensor in transformer.state_dict().items():
        array = tensor.numpy()
        if tensor.ndim == 2 and name.endswith(".weight") and ".attn." in name:
            quantized_names.append(name)
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert quantized_names
    loaded = LocalDiTTransformer2DModel.from_single_file(
        path, config=folder, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32)
    )
    assert close(predict(loaded), predict(transformer))
    with pytest.raises(ValueError, match="localdit.gguf tells no config"):
        LocalDiTTransformer2DModel.from_single_file(path)


def test_a_quantized_text_encoder_serves_a_pipeline(model_folder, eight_bits):
    """What makes room for the T5 of 4.8 billion parameters: eight bits, chosen while it loads."""
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": TextTorchAoConfig(eight_bits)})
    quantized = LocalDiTPipeline.from_pretrained(model_folder, quantization_config=config)
    alone = T5EncoderModel.from_pretrained(
        model_folder, subfolder="text_encoder", quantization_config=TextTorchAoConfig(eight_bits)
    )
    whole = LocalDiTPipeline.from_pretrained(model_folder)
    embeds = [pipe.encode_prompt("a red seven")[0].detach() for pipe in (quantized, whole)]
    assert close(*embeds)
    given = LocalDiTPipeline.from_pretrained(model_folder, text_encoder=alone)
    assert torch.equal(given.encode_prompt("a red seven")[0].detach(), embeds[0])
