"""The frozen source model of the demo: it reads printed letters and has never seen a digit.

A small convolutional stem (7 layers) turns a 32x32 image into 4x4 tokens; four plain transformer
blocks and a linear head follow. The input has one channel, because ink is all there is to see. Ink
is bright and the ground is black, so that the zero padding around a small picture is the ground
that the model was trained on, and an untrained border changes nothing.

    model = load_source()            # eval mode, float32, frozen
    logits = model(images)           # float [B, 1, 32, 32], (pixel / 255 - MEAN) / STD  ->  [B, S]
    model.features(images)           # [B, 192], what the head reads
    model.tokens(images)             # [B, 16, 192], what the first block reads
    model.blocks                     # each [B, N, 192] -> [B, N, 192], any N: prompts fit inside
    model.class_names[i]             # "LATIN CAPITAL LETTER O"
    model.class_characters[i]        # all characters of that shape, in one string
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path(__file__).with_name("source.safetensors")
INFO = Path(__file__).with_name("source.json")

IMAGE_SIZE = 32
MEAN, STD = 0.15, 0.30
WIDTH, DEPTH, HEADS, MLP_RATIO = 192, 4, 3, 2
# (channels, stride) of each 3x3 convolution; the first one strides, as every step of training a
# prompt goes back to the pixels and most of that cost is in the large maps.
STEM = ((24, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (WIDTH, 1))


class Block(nn.Module):
    """A pre-norm transformer block: [B, N, WIDTH] -> [B, N, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, MLP_RATIO * WIDTH)
        self.fc2 = nn.Linear(MLP_RATIO * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, count, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, WIDTH)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SourceModel(nn.Module):
    """float [B, 1, 32, 32], normalised with MEAN and STD -> logits [B, num_classes]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, stride in STEM:
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
            channels = width
        self.stem = nn.Sequential(*layers)
        self.position = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)
        self.class_names: list[str] = []
        self.class_characters: list[str] = []

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """float [B, 1, 32, 32] -> [B, 16, WIDTH]: the stem's 4x4 grid, row by row, placed."""
        return self.stem(x).flatten(2).transpose(1, 2) + self.position

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """float [B, 1, 32, 32] -> [B, WIDTH]: what the head reads."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def source_info() -> dict:
    """What source.json says: the classes, the weight file, its training, its accuracy."""
    return json.loads(INFO.read_text(encoding="utf-8"))


def load_source() -> SourceModel:
    """The trained model, float32, in eval mode and frozen; the package ships it as float16."""
    from safetensors.torch import load

    info = source_info()
    payload = WEIGHTS.read_bytes()
    digest = hashlib.sha256(payload).hexdigest()
    expected = info["files"][WEIGHTS.name]["sha256"]
    if digest != expected:
        raise ValueError(f"{WEIGHTS.name} is damaged: expected sha256 {expected}, got {digest}; reinstall fastprompt")
    model = SourceModel(len(info["classes"]))
    model.load_state_dict({name: value.float() for name, value in load(payload).items()})
    model.class_names = [c["name"] for c in info["classes"]]
    model.class_characters = [c["characters"] for c in info["classes"]]
    return model.eval().requires_grad_(False)
