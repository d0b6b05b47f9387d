"""The README's Python runs as it stands there, on small models with random weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastprompt

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
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


@pytest.mark.parametrize("place", range(len(BLOCKS)), ids=lambda place: BLOCKS[place].split("\n")[0][:40])
def test_the_example_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[place].replace("epochs=12", "epochs=1").replace("128256", "99")
    names = {"torch": torch, "fastprompt": fastprompt}
    if re.search(r"images|resnet", block):
        names |= vision()
    if "llama" in block:
        names |= language()
        names["labels"] = names["ids"]
    exec(compile(block, "README.md", "exec"), names)


def test_every_example_is_found():
    assert len(BLOCKS) == README.count("```python") >= 5
