"""The embedded default: source data without digits, a frozen source model, a fixed target split."""

from __future__ import annotations

import unicodedata

import pytest
import torch

from fastprompt.demo import glyphs, source
from fastprompt.demo.digits import load_digits


@pytest.fixture(scope="module")
def classes():
    return glyphs.classes()


@pytest.fixture(scope="module")
def kept(classes):
    return [members for members in classes if glyphs.is_kept(members)]


@pytest.mark.parametrize("char", "0٣९Ⅷ²₃①½㊉ƻƽ𝟗")  # noqa: RUF001
def test_is_digit_finds_every_form(char):
    assert glyphs.is_digit(char)


def test_source_classes_are_letters_and_symbols_of_several_alphabets(classes):
    codes = [code for members in classes for code in members]
    assert len(codes) == len(set(codes))
    assert 350 <= len(classes) <= 500
    for code in codes:
        assert not glyphs.is_digit(chr(code))
    scripts = {unicodedata.name(chr(code)).split()[0] for code in codes}
    assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN"} <= scripts


@pytest.mark.parametrize("twins", ["AΑА", "OoΟοОо", "SsЅѕ", "BВв"])  # noqa: RUF001
def test_characters_of_one_shape_are_one_class(classes, twins):
    assert any(set(map(ord, twins)) <= set(members) for members in classes)


@pytest.mark.parametrize("pair", ["EF", "OQ", "bd", "ЗЭ"])
def test_characters_of_two_shapes_are_two_classes(classes, pair):
    assert not any(set(map(ord, pair)) <= set(members) for members in classes)


def test_rendering_fills_the_box_and_says_what_a_font_lacks():
    glyph = glyphs.render("DejaVuSans", ord("H"))
    assert glyph.dtype == torch.uint8
    assert glyph.shape == (glyphs.BOX, glyphs.BOX)
    assert glyph.amax() == 255
    assert glyph.amax(1).count_nonzero() >= glyphs.BOX - 2
    assert glyphs.render("STIXGeneral", 0x0531) is None  # an Armenian letter
    assert not set(glyphs.TRAIN_FONTS) & set(glyphs.HELD_OUT_FONTS)


def test_augmentation_repeats_with_its_generator(classes):
    bank, labels = glyphs.glyph_bank(classes[:5], ("DejaVuSans",))
    assert sorted(set(labels.tolist())) == list(range(5))
    first, again, other = (glyphs.augment(bank, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (len(bank), 1, glyphs.CANVAS, glyphs.CANVAS)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_frames_of_noise_leave_the_ink_alone(classes):
    bank, _ = glyphs.glyph_bank(classes[:20], ("DejaVuSans",))
    images = glyphs.augment(bank, torch.Generator().manual_seed(1))
    framed = glyphs.surround(images, torch.Generator().manual_seed(1))  # one that keeps its resolution
    changed = framed != images
    assert changed.flatten(1).any(1).float().mean() > 0.4
    assert not changed[images > 0.5].any()


def test_source_model_is_frozen_float32_and_small(kept):
    model = source.load_source()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
    folder = source.WEIGHTS.parent
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) <= 6_000_000
    assert model.class_characters == ["".join(map(chr, members)) for members in kept]
    assert model.class_names[0] == unicodedata.name(model.class_characters[0][0])
    images = torch.zeros(2, 1, 32, 32)
    assert model.tokens(images).shape == (2, 16, source.WIDTH)
    assert model.features(images).shape == (2, source.WIDTH)
    assert model(images).shape == (2, len(kept))


def test_source_model_reads_a_font_it_never_saw(kept):
    model = source.load_source()
    bank, labels = glyphs.glyph_bank(kept, ("DejaVuSans-BoldOblique",))
    images = glyphs.augment(bank, torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = model((images - source.MEAN) / source.STD).argmax(1)
    stated = source.source_info()["held_out_accuracy"]["top1"]
    assert 100 * (best == labels).float().mean() > stated - 10  # one font of four, one drawing each


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    payload = bytearray(source.WEIGHTS.read_bytes())
    payload[-1] ^= 1
    damaged = tmp_path / source.WEIGHTS.name
    damaged.write_bytes(payload)
    monkeypatch.setattr(source, "WEIGHTS", damaged)
    with pytest.raises(ValueError, match=r"source\.safetensors is damaged: expected sha256"):
        source.load_source()


def test_digits_are_split_once_and_completely():
    parts, again = load_digits(), load_digits()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {
        "train": 600,
        "validation": 400,
        "test": 797,
    }
    for name, (images, labels) in parts.items():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (1, 8, 8)
        assert images.amax() == 255
        counts = labels.bincount(minlength=10)
        assert counts.min() >= 0.09 * len(labels)  # stratified
        assert torch.equal(images, again[name][0])
        assert torch.equal(labels, again[name][1])
    everything = torch.cat([images.flatten(1) for images, _ in parts.values()])
    from sklearn.datasets import load_digits as original

    total = torch.from_numpy(original().data).sum() * (255 / 16)
    assert abs(everything.double().sum() - total) / total < 1e-3


@pytest.mark.slow
def test_demo_shows_what_it_promises(tmp_path, capsys):
    from fastprompt.demo.run import TITLES, run

    first = run(tmp_path, device="cpu")
    mean = {name: sum(values) / len(values) for name, values in first.items()}
    assert set(first) == set(TITLES)
    assert mean["iterative"] > mean["frequent"]
    assert mean["iterative"] >= mean["untrained"] + 8
    assert mean["random"] < mean["untrained"]
    for name in ("prompt.png", "label_map.png", "accuracy.png", "checkpoint/fastprompt.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "{0:.2f} % before, {0:.2f} % after".format(first["iterative"][0]) in shown
    assert run(tmp_path, device="cpu") == first


def test_demo_runs_through_quickly(tmp_path, capsys):
    from fastprompt.demo.run import run

    accuracy = run(tmp_path, seeds=1, device="cpu", quick=True)
    assert accuracy["probe"][0] > accuracy["pixels"][0] > 90
    assert "after loading it again" in capsys.readouterr().out
    assert (tmp_path / "checkpoint" / "fastprompt_config.json").exists()
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        run(tmp_path, seeds=0)


def test_alignments_are_compared(tmp_path, capsys, monkeypatch):
    from fastprompt.__main__ import main
    from fastprompt.demo import compare as module
    from fastprompt.demo.compare import ALIGNMENTS, compare

    few = {name: (x[:64], y[:64]) for name, (x, y) in load_digits().items()}
    monkeypatch.setattr(module, "load_digits", lambda: few)
    table = compare(tmp_path, ["linear", "blm+", "frequent"], seeds=1, device="cpu", quick=True)
    assert list(table) == ["frequent", "blm+", "linear"]
    assert table["linear"]["trained"] > table["blm+"]["trained"] == table["frequent"]["trained"]
    assert table["linear"]["refresh"] is None
    shown = capsys.readouterr().out
    for name, row in table.items():
        assert f"{ALIGNMENTS[name][0]:30}{row['accuracy'][0]:8.2f}" in shown
        assert (tmp_path / f"alignment-{name}.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"alignment: expected all or some of random, first, .*got best"):
        compare(tmp_path, ["best"])
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        compare(tmp_path, ["all"], seeds=0)
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert set(ALIGNMENTS) <= set(capsys.readouterr().out.split())
