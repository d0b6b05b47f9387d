"""The Python of README and docs runs as it stands there, on small models with random weights; their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastprompt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
]
WORDS = ("<unk>", "terrible", "awful", "great")


class Classifier(nn.Module):
    """1000 classes of an image of 224 x 224, with a head called fc as that of a ResNet."""

    def __init__(self):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 1000)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


def vision():
    prompt = fastprompt.nn.PaddedPrompt(canvas=224, image_size=32, mean=0.5, std=0.5)
    images, targets = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10
    return {
        "my_imagenet_model": Classifier, "resnet": Classifier(), "prompt": prompt, "images": images, "images_uint8": images,
        "targets": targets, "model": fastprompt.Reprogrammed(Classifier(), prompt, fastprompt.nn.LabelMap(1000, 10)),
    }  # fmt: skip


def vit():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=224, patch_size=16,
        num_labels=1000,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def language():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    return {
        "llama": transformers.LlamaForCausalLM(config).eval(), "ids": torch.randint(1, 99, (3, 16)), "labels": None,
        "tokenizer": tokenizer, "last_positions": torch.full((3,), -1), "get_peft_model": peft.get_peft_model,
        "PrefixTuningConfig": peft.PrefixTuningConfig,
    }  # fmt: skip


def small(block: str) -> str:
    for said, run in (("epochs=12", "epochs=1"), ("128256", "99"), ("layers=12", "layers=2"), ("width=768", "width=32")):
        block = block.replace(said, run)
    return block


def image_and_text():
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    def tokenizer(texts):  # a word is its length; SOS is 97, EOT 98
        rows = [[97, *map(len, text.split()), 98] for text in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return {"clip": clip, "tokenizer": tokenizer, "pixels": torch.randn(12, 3, 8, 8), "targets": torch.arange(12) % 3}


@pytest.mark.parametrize("place", range(len(BLOCKS)), ids=lambda place: f"{BLOCKS[place][0]}-{place}")
def test_the_example_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, block = BLOCKS[place][0], small(BLOCKS[place][1])
    names = {"torch": torch, "fastprompt": fastprompt}
    if re.search(r"images|resnet|my_imagenet_model", block):
        names |= vision()
    if "(vit, " in block:
        names["vit"] = vit()
    if "ImageFeatures" in block:
        names |= image_and_text()
    if "llama" in block:
        names |= language()
        names["labels"] = names["ids"]
    exec(compile(block, page, "exec"), names)


def test_every_example_is_found():
    assert len(BLOCKS) == sum(page.read_text().count("```python") for page in PAGES) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_module_has_a_place_in_the_taxonomy_page():
    page = (ROOT / "docs" / "taxonomy.md").read_text()
    assert [name for name in fastprompt.nn.__all__ if name not in page] == []
