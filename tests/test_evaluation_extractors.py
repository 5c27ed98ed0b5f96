"""Image encoders of transformers as extractors, and pictures against prompts, with small networks of random weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from localdit.evaluation.alignment import AlignmentModel, main, read_pairs, score_alignment
from localdit.evaluation.extractors import TransformersExtractor, load_extractor, pooled

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 8, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VISION = {**SMALL, "image_size": 20, "patch_size": 10}


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    return transformers.CLIPModel(config), transformers.CLIPImageProcessor(**sizes)


def siglip():
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessor(size={"height": 20, "width": 20})


def align():
    vision = {"image_size": 32, "hidden_dim": 2560, "depth_coefficient": 0.1, "width_coefficient": 0.1}
    text = {**TEXT, "type_vocab_size": 2}
    config = transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=32)
    sizes = {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    return transformers.AlignModel(config), transformers.EfficientNetImageProcessor(**sizes)


def dinov2():
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    return transformers.Dinov2Model(config), transformers.BitImageProcessor(**sizes)


def save_tokenizer(folder) -> None:
    words = {word: index for index, word in enumerate(["<s>", "</s>", "a", "red", "blue", "seven", "three", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ends = {"pad_token": "</s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


@pytest.fixture(params=[clip, siglip, align, dinov2], ids=lambda build: build.__name__)
def saved(request, tmp_path):
    """A folder of a small model, and what it was made of."""
    torch.manual_seed(0)
    model, processor = request.param()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path, model.eval(), processor


def save_clip(folder) -> None:
    for part in clip():
        part.save_pretrained(folder)


def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)) for _ in range(3)]


def test_features_are_the_models_own_of_pictures_scaled_by_pil(saved):
    folder, model, processor = saved
    extractor = load_extractor(str(folder))
    side = {"clip": 20, "siglip": 20, "align": 32, "dinov2": 28}[extractor.family]
    scaled = [image.resize((side, side), Image.Resampling.BICUBIC) for image in photographs()]
    pixels = np.stack(scaled).astype(np.float32) / 255
    if extractor.family == "align":
        inputs = processor(scaled, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    else:
        inputs = torch.from_numpy((pixels - processor.image_mean) / processor.image_std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = pooled(getattr(model, "get_image_features", model)(pixel_values=inputs))
    torch.testing.assert_close(extractor(photographs()).features, expected, rtol=1e-4, atol=1e-5)
    assert extractor.dimension == expected.shape[1]
    assert extractor.preprocessing.startswith(f"{side} x {side} by PIL bicubic")


def test_the_hash_is_of_the_weights(saved):
    folder, model, _ = saved
    first = TransformersExtractor(str(folder)).sha256
    assert first == TransformersExtractor(str(folder)).sha256
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(folder)
    assert TransformersExtractor(str(folder)).sha256 != first


def test_alignment_is_the_mean_cosine(saved, tmp_path_factory):
    folder, model, _ = saved
    if not hasattr(model, "get_text_features"):
        with pytest.raises(ValueError, match="without a text encoder"):
            AlignmentModel(str(folder))
        return
    pictures, prompts = tmp_path_factory.mktemp("pictures"), ["a red seven", "a blue three", "blue"]
    for index, picture in enumerate(photographs()):
        picture.save(pictures / f"{index}.png")
    lines = [json.dumps({"file": f"{index}.png", "prompt": prompt}) for index, prompt in enumerate(prompts)]
    (pictures / "prompts.jsonl").write_text("\n".join(lines))
    aligned = AlignmentModel(str(folder))
    record = score_alignment(pictures, aligned, batch_size=2)
    cosines = []
    for picture, prompt in zip(photographs(), prompts, strict=True):
        mine, theirs = (each[0].double().numpy() for each in (aligned([picture]).features, aligned.texts([prompt])))
        cosines.append(mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs))
    assert record["value"] == pytest.approx(100 * np.mean(cosines), rel=1e-4)
    assert record["metric"] == f"{aligned.family}_score"
    assert record["interval"][0] <= record["value"] <= record["interval"][1]
    main([str(pictures), "--model", str(folder), "--device", "cpu", "--output", str(pictures / "scores.jsonl")])
    assert json.loads((pictures / "scores.jsonl").read_text())["value"] == pytest.approx(record["value"], rel=1e-4)


def test_maps_of_one_pixel_are_features_as_well(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    assert load_extractor(str(tmp_path))(photographs()).features.shape == (3, 16)


def damage(folder, what: str) -> None:
    if what == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:300])
    elif what == "processor":
        (folder / "preprocessor_config.json").unlink()
    elif what == "config":
        (folder / "config.json").write_text('{"model_type": "never heard of"}')
    else:
        transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=8)).save_pretrained(folder)


@pytest.mark.parametrize("what", ["weights", "processor", "config", "kind"])
def test_what_is_no_image_encoder_is_told_in_one_sentence(tmp_path, what):
    save_clip(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match="cannot be loaded .* give 'inception', or the folder") as error:
        load_extractor(str(tmp_path))
    assert len(str(error.value)) < 400


def test_weights_are_for_inception_alone(tmp_path):
    with pytest.raises(ValueError, match="weights='inception.pth' are for 'inception'"):
        load_extractor(str(tmp_path), weights="inception.pth")


def test_a_model_without_its_tokenizer_aligns_nothing(tmp_path):
    save_clip(tmp_path)
    with pytest.raises(ValueError, match="The tokenizer of .* knows 2 tokens of 8; put the model's there"):
        AlignmentModel(str(tmp_path))
    for part in siglip():  # for which transformers makes up none
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The tokenizer of .* cannot be loaded") as error:
        AlignmentModel(str(tmp_path))
    assert len(str(error.value)) < 400


def test_cosines_that_are_no_numbers_are_refused(tmp_path):
    save_clip(tmp_path)
    save_tokenizer(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red seven")
    aligned = AlignmentModel(str(tmp_path))
    torch.nn.init.constant_(aligned.model.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="are no numbers; its weights are damaged"):
        score_alignment(tmp_path, aligned)


def test_where_scores_cannot_go_is_told_before_a_model_is_loaded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red seven")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        main([str(tmp_path), "--model", "none", "--device", "cpu", "--output", str(tmp_path)])


def test_pictures_without_prompts_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"pictures without a prompt in .* \(1, such as a.png\)"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_text("a red seven\n")
    assert read_pairs(tmp_path) == [(tmp_path / "a.png", "a red seven")]
    (tmp_path / "prompts.jsonl").write_text("no json")
    with pytest.raises(ValueError, match="in line 1"):
        read_pairs(tmp_path)


def listed(file: str = "a.png", prompt: str = "a red seven") -> bytes:
    return json.dumps({"file": file, "prompt": prompt}, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b" \n", "prompt of a.png in .* is empty"),
        ("a.txt", b"caf\xe9", "a.txt' is no UTF-8 at byte 3"),
        ("prompts.jsonl", listed(prompt=""), "prompt of a.png in .* is empty"),
        ("prompts.jsonl", listed() + b"\n" + listed("b.png"), "Line 3 of .* names 'b.png', which is no file there"),
        ("prompts.jsonl", listed() + listed(), "Line 2 of .* names 'a.png', which was named before"),
        ("prompts.jsonl", listed(prompt="\xe9").replace(b"\xc3", b""), "prompts.jsonl' is no UTF-8"),
    ],
)
def test_damaged_prompts_are_refused(tmp_path, file, content, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path)


def test_prompts_are_read_as_editors_leave_them(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    lines = [b"\xef\xbb\xbf", listed(prompt="two\u2028lines"), b"\n", listed("b.png", "caf\xe9")]
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(lines))
    assert [text for _, text in read_pairs(tmp_path)] == ["two\u2028lines", "caf\xe9"]


def test_prompts_that_are_cut_are_told_of(tmp_path, caplog):
    save_clip(tmp_path)
    save_tokenizer(tmp_path)
    for name, prompt in (("a", "a red seven"), ("b", "a red seven " * 30)):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(prompt)
    aligned = AlignmentModel(str(tmp_path))
    record = score_alignment(tmp_path, aligned)
    assert record["detail"] == {"prompts_cut": 1, "longest_prompt": aligned.longest}
    assert f"1 of 2 prompts have more than {aligned.longest} tokens" in caplog.text
