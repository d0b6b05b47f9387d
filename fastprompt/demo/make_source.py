"""Makes the source model: python -m fastprompt.demo.make_source (15 minutes on two cores).

First the convolutional stem learns alone, with batch normalisation, which is then folded into its
weights: a transformer from scratch would need hours. Then four blocks that change nothing yet are
put behind it and everything learns together. Last it learns to read characters that are bent,
coarse, or framed by noise. Without that any border makes it see something else altogether, and
then the border decides what is read, not the picture inside. What it ships with are the letters
of `glyphs.is_kept`. Accuracy is measured on four fonts that were never trained on, and written to
source.json as measured.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from . import glyphs, source

SEED = 0
BATCH = 128
STEM_STEPS, STEM_LR = 4500, 3e-3
FULL_STEPS, FULL_LR = 3000, 1e-3
FRAMED_SEED, FRAMED_STEPS, FRAMED_LR = 7, 900, 5e-4
WEIGHT_DECAY = 0.05


class StemClassifier(nn.Module):
    """The stem with batch normalisation, and the head that the full model will have."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, stride in source.STEM:
            layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.stem = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(source.WIDTH)
        self.head = nn.Linear(source.WIDTH, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1, 32, 32] from 0 to 1, as the source model reads it."""
    return (images - source.MEAN) / source.STD


def framed(clean: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images of the last part: uint8 [B, 40, 40] -> float32 [B, 1, 32, 32]."""
    return glyphs.surround(glyphs.augment(glyphs.bend(clean, generator), generator), generator)


def train(model, bank, labels, weights, steps, lr, generator, title, draw=glyphs.augment, clip=1.0):
    """AdamW with a one-cycle schedule on freshly augmented glyphs, drawn by their weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    progress = tqdm(range(steps), desc=title, mininterval=5)
    for step in progress:
        pick = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        logits = model(normalise(draw(bank[pick], generator)))
        loss = F.cross_entropy(logits, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def behind_stem(trained: StemClassifier, num_classes: int) -> source.SourceModel:
    """A full model that computes what the trained stem computes: its blocks add nothing yet."""
    model = source.SourceModel(num_classes)
    layers: list[Any] = list(trained.stem)
    for i in range(len(source.STEM)):  # (convolution, norm, ReLU) there, (convolution, ReLU) here
        fused = fuse_conv_bn_eval(layers[3 * i], layers[3 * i + 1])
        model.stem[2 * i].load_state_dict(fused.state_dict())
    model.norm.load_state_dict(trained.norm.state_dict())
    model.head.load_state_dict(trained.head.state_dict())
    for name, value in model.blocks.named_parameters():
        if "proj" in name or "fc2" in name:
            nn.init.zeros_(value)
    return model


def keep(model: source.SourceModel, classes: list[tuple[int, ...]]) -> tuple[source.SourceModel, list[tuple[int, ...]]]:
    """The model with only the rows of its head whose classes `glyphs.is_kept`, and those classes."""
    rows = [i for i, codes in enumerate(classes) if glyphs.is_kept(codes)]
    state = model.state_dict()
    state |= {name: state[name][rows] for name in ("head.weight", "head.bias")}
    kept = source.SourceModel(len(rows))
    kept.load_state_dict(state)
    return kept.eval(), [classes[i] for i in rows]


def rounded(model: source.SourceModel) -> dict[str, torch.Tensor]:
    """The weights as they are shipped, in float16."""
    return {name: value.half().contiguous() for name, value in model.state_dict().items()}


@torch.no_grad()
def held_out_accuracy(model, classes, repeats=3):
    """Top-1 and top-5 in percent on the held-out fonts, each glyph augmented `repeats` times."""
    bank, labels = glyphs.glyph_bank(classes, glyphs.HELD_OUT_FONTS)
    bank, labels = bank.repeat(repeats, 1, 1), labels.repeat(repeats)
    images = normalise(glyphs.augment(bank, torch.Generator().manual_seed(SEED + 1)))
    best = torch.cat([model(part).topk(5).indices for part in images.split(256)])
    hits = best == labels[:, None]
    return {
        "images": len(labels),
        "top1": round(100 * hits[:, 0].double().mean().item(), 2),
        "top5": round(100 * hits.any(1).double().mean().item(), 2),
    }


def main():
    from safetensors.torch import save

    parser = argparse.ArgumentParser(prog="python -m fastprompt.demo.make_source")
    parser.add_argument("--out", type=Path, default=source.WEIGHTS.parent, help="where to write")
    parser.add_argument("--steps", type=float, default=1.0, help="fraction of the steps to take")
    options = parser.parse_args()

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classes = glyphs.classes()
    bank, labels = glyphs.glyph_bank(classes, glyphs.TRAIN_FONTS)
    weights = 1.0 / labels.bincount().double()[labels]
    print(f"{len(classes)} classes, {len(labels)} glyphs in {len(glyphs.TRAIN_FONTS)} fonts")

    stem_steps, full_steps, framed_steps = (round(steps * options.steps) for steps in (STEM_STEPS, FULL_STEPS, FRAMED_STEPS))
    stem = StemClassifier(len(classes))
    stem = train(stem, bank, labels, weights, stem_steps, STEM_LR, generator, "stem")
    print("stem, held-out fonts:", held_out_accuracy(stem, classes))
    model = behind_stem(stem, len(classes))
    model = train(model, bank, labels, weights, full_steps, FULL_LR, generator, "stem and blocks")
    print("stem and blocks, held-out fonts:", held_out_accuracy(model, classes))
    model.load_state_dict(rounded(model))  # the last part may also start from weights in a file
    model = train(
        model, bank, labels, weights, framed_steps, FRAMED_LR,
        torch.Generator().manual_seed(FRAMED_SEED), "framed", framed, math.inf,
    )  # fmt: skip

    model, classes = keep(model, classes)
    weights_half = rounded(model)
    payload = save(weights_half)
    model.load_state_dict(weights_half)  # what is measured is what is shipped
    accuracy = held_out_accuracy(model, classes)
    print("held-out fonts:", accuracy)
    info = {
        "files": {
            source.WEIGHTS.name: {
                "bytes": len(payload),
                "sha256": hashlib.sha256(payload).hexdigest(),
                "dtype": "float16",
                "parameters": sum(value.numel() for value in weights_half.values()),
            }
        },
        "held_out_accuracy": accuracy | {"fonts": list(glyphs.HELD_OUT_FONTS)},
        "training": {
            "seed": SEED,
            "batch": BATCH,
            "stem_steps": stem_steps,
            "full_steps": full_steps,
            "framed_steps": framed_steps,
            "fonts": list(glyphs.TRAIN_FONTS),
        },
        "classes": [{"name": glyphs.class_name(codes), "characters": "".join(map(chr, codes))} for codes in classes],
    }
    (options.out / source.WEIGHTS.name).write_bytes(payload)
    text = json.dumps(info, ensure_ascii=False, indent=1) + "\n"
    (options.out / source.INFO.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
