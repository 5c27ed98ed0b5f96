"""LPIPS: its formula, torchmetrics' own, and what is refused."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import lpips as reference

from localdit.evaluation.intervals import mean_interval
from localdit.evaluation.perceptual import Lpips, find_weights, load_network, lpips, main, score_pairs

BACKBONES = ("vgg", "alex")


def random_network(backbone: str) -> Lpips:
    """Weights by which deep layers tell pictures apart too (He et al. 2015), which torch's own hardly do."""
    torch.manual_seed(0)
    network = Lpips(backbone).eval()
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network


@pytest.fixture(scope="module", params=BACKBONES)
def network(request) -> Lpips:
    return random_network(request.param)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of AlexNet, named as torchvision's, with a classifier that LPIPS does not use."""
    state = {f"features.{name}": tensor for name, tensor in random_network("alex").features.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


def random_pictures(count: int = 2, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.rand(count, 3, height, width)


def write_pictures(folder, pictures: dict[str, tuple[int, int]], seed: int = 0):
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for name, (width, height) in pictures.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def plain_vgg(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
    """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16, by the numbers in torchvision's names."""
    found = []
    for stage in [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]:
        pixels = F.max_pool2d(pixels, 2) if stage[0] else pixels
        for number in stage:
            pixels = F.relu(F.conv2d(pixels, state[f"{number}.weight"], state[f"{number}.bias"], padding=1))
        found.append(pixels)
    return found


def plain_alex(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
    """The five ReLUs of AlexNet, by the numbers in torchvision's names."""
    found = []
    for number, stride, padding in [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]:
        pixels = F.max_pool2d(pixels, 3, 2) if number in (3, 6) else pixels
        pixels = F.relu(F.conv2d(pixels, state[f"{number}.weight"], state[f"{number}.bias"], stride, padding))
        found.append(pixels)
    return found


def test_lpips_is_the_formula_of_the_paper(network):
    first, second = random_pictures(1, 64, 64), random_pictures(1, 64, 64)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet's pictures
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    plain = {"vgg": plain_vgg, "alex": plain_alex}[network.backbone]
    maps = [plain(network.features.state_dict(), (pictures - mean) / deviation) for pictures in (first, second)]
    path = reference.__file__.replace("lpips.py", f"lpips_models/{network.backbone}.pth")
    heads = torch.load(path, map_location="cpu", weights_only=True)
    layers = []
    for number, (a, b) in enumerate(zip(*maps, strict=True)):
        head = heads[f"lin{number}.model.1.weight"].flatten()
        _, channels, height, width = a.shape
        assert len(head) == channels
        total = 0.0
        for row in range(height):
            for column in range(width):
                x, y = a[0, :, row, column], b[0, :, row, column]
                total += float((head * (x / x.norm() - y / y.norm()) ** 2).sum())
        layers.append(total / (height * width))
    assert float(lpips(first, second, network)) == pytest.approx(sum(layers), rel=1e-4)
    assert min(layers) > 1e-3 * sum(layers)  # so that each counts


def test_lpips_is_that_of_torchmetrics(network, monkeypatch):
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: network.features)
    theirs = reference._LPIPS(net=network.backbone, pnet_rand=True)
    first, second = random_pictures(3), random_pictures(3)
    expected = theirs(first, second, normalize=True).flatten()
    found = lpips(first, second, network)
    assert found.shape == (3,)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_lpips_is_zero_for_the_same_and_the_same_both_ways(network):
    first, second = random_pictures(), random_pictures()
    assert lpips(first, first, network).tolist() == [0.0, 0.0]
    there, back = lpips(first, second, network), lpips(second, first, network)
    assert (there > 0).all()
    torch.testing.assert_close(there, back)


def test_lpips_grows_with_the_noise_and_a_picture_does_not_depend_on_its_batch(network):
    clean, noise = torch.full((1, 3, 32, 32), 0.5), torch.randn(1, 3, 32, 32)
    noisy = torch.cat([(clean + strength * noise).clamp(0, 1) for strength in (0.02, 0.1, 0.3)])
    distances = lpips(clean.expand_as(noisy), noisy, network)
    assert distances[0] < distances[1] < distances[2]
    torch.testing.assert_close(lpips(clean, noisy[1:2], network), distances[1:2], rtol=1e-4, atol=1e-7)


def test_heads_do_not_drop_features_in_training_mode(network):
    first, second = random_pictures(), random_pictures()
    expected = lpips(first, second, network)
    torch.testing.assert_close(lpips(first, second, network.train()), expected)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 48), "cannot be compared"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32), "cannot be compared"),
        (torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32), "no \\[B, 3, H, W\\]"),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), "no \\[B, 3, H, W\\]"),
        (torch.zeros(1, 3, 31, 32), torch.zeros(1, 3, 31, 32), "sides of at least 32"),
        (torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), -1.0), "reach from -1 to -1"),
        (torch.full((1, 3, 32, 32), 255.0), torch.zeros(1, 3, 32, 32), "reach from 255 to 255"),
        (torch.full((1, 3, 32, 32), float("nan")), torch.zeros(1, 3, 32, 32), "are no numbers"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(network, first, second, message):
    with pytest.raises(ValueError, match=message):
        lpips(first, second, network)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_come_from_a_file_by_torchvisions_names(weights, tmp_path, ending):
    path = weights
    if ending == ".pth":
        path = tmp_path / "alexnet.pth"
        torch.save(load_file(weights), path)
    network = load_network(path)
    assert network.backbone == "alex" and not network.training
    stored = load_file(weights)
    for name, tensor in network.features.state_dict().items():
        assert torch.equal(tensor, stored[f"features.{name}"])
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_of_vgg_are_known_by_their_shapes(tmp_path):
    state = Lpips("vgg").features.state_dict()
    save_file({f"features.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert find_weights(str(tmp_path)) == tmp_path / "model.safetensors"
    network = load_network(tmp_path / "model.safetensors")
    assert network.backbone == "vgg"
    assert torch.equal(network.features.state_dict()["28.weight"], state["28.weight"])


def test_weights_that_are_not_there_or_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in ("timm/vgg16.tv_in1k", "no/such/place"):
        with pytest.raises(ValueError, match="is no file here, and the Hugging Face Hub .* cannot be reached"):
            find_weights(source)
    with pytest.raises(ValueError, match="vgg16.pth does not exist"):
        load_network(find_weights(str(tmp_path / "vgg16.pth")))
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="part.safetensors' holds the weights of none of vgg, alex"):
        load_network(tmp_path / "part.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        load_network(tmp_path / "damaged.pth")


def test_torchmetrics_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ValueError, match="pip install torchmetrics"):
        Lpips("alex")


def test_the_mean_is_over_pairs_of_one_name_whatever_the_size_of_each_pair(weights, tmp_path):
    sizes = {"a.png": (32, 32), "b.png": (48, 40), "c.png": (48, 40), "d.png": (48, 40), "e.png": (32, 64)}
    first, second = write_pictures(tmp_path / "1", sizes, seed=0), write_pictures(tmp_path / "2", sizes, seed=1)
    network = load_network(weights)
    result = score_pairs(first, second, network, batch_size=2)
    pixels = [
        [torch.tensor(np.array(Image.open(folder / name))).permute(2, 0, 1)[None] / 255 for folder in (first, second)]
        for name in sizes
    ]
    distances = [float(lpips(*pair, network)) for pair in pixels]
    assert result["value"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert result["real"]["count"] == result["generated"]["count"] == 5 and result["generated"]["size"] is None
    low, high = result["interval"]
    assert min(distances) <= low < result["value"] < high <= max(distances)
    same = score_pairs(first, first, network)
    assert (same["value"], same["interval"]) == (0, [0, 0])


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = mean_interval(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)


def test_pictures_without_a_partner_or_of_another_size_are_refused(weights, tmp_path):
    network = load_network(weights)
    first = write_pictures(tmp_path / "1", {"a.png": (32, 32), "b.png": (32, 32)})
    second = write_pictures(tmp_path / "2", {"a.png": (32, 32)})
    for folders in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=r"'.*/1/b.png' has no partner in '.*/2' \(1 like that\)"):
            score_pairs(*folders, network)
    write_pictures(second, {"b.png": (32, 40)})
    with pytest.raises(ValueError, match="b.png' and its partner have 32 x 32 and 32 x 40 pixels"):
        score_pairs(first, second, network)
    with pytest.raises(ValueError, match="is no folder"):
        score_pairs(first, tmp_path / "3", network)


def test_the_command_line_keeps_all_that_it_takes_to_repeat_the_score(weights, tmp_path, capsys):
    sizes = {"a.png": (32, 32), "b.png": (48, 40)}
    folders = [str(write_pictures(tmp_path / str(seed), sizes, seed)) for seed in (1, 2)]
    main([*folders, "--weights", str(weights), "--device", "cpu"])
    told = json.loads((tmp_path / "scores.jsonl").read_text())
    expected = score_pairs(*folders, load_network(weights))
    assert told["generated"]["count"] == 2
    command = f"python -m localdit.evaluation lpips {' '.join(folders)} --weights {weights} --device cpu"
    assert told == {**expected, "extractor": told["extractor"], "command": command}
    low, high = told["interval"]
    line = f"lpips {told['value']:.4g} ({low:.4g} to {high:.4g})"
    assert capsys.readouterr().out == f"{line}\n{tmp_path / 'scores.jsonl'}\n"
    assert told["extractor"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (told["metric"], told["extractor"]["family"], told["extractor"]["name"]) == ("lpips", "alex", weights.name)
    assert {"localdit", "torch", "torchmetrics"} <= told["versions"].keys()

    with pytest.raises(ValueError, match="see --help"):
        main([*folders, "--weight", str(weights)])
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        main([*folders, "--weights", "none", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="--device 'mars' is not available"):
        main([*folders, "--device", "mars"])


def test_layers_are_numbered_as_torchvisions():
    # the convolutions of torchvision's vgg16().features and alexnet().features
    numbers = {"vgg": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], "alex": [0, 3, 6, 8, 10]}
    for backbone, expected in numbers.items():
        layers = Lpips(backbone).features
        assert [number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)] == expected
