"""What to change: rules over what a profile has seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastprompt.nn import perturbation
from fastprompt.profiling.page import short
from fastprompt.profiling.results import DATA, FROZEN, MAPPING, Part, Profile
from fastprompt.profiling.trace import SYNC, Span

if TYPE_CHECKING:
    from fastprompt.profiling.session import Session


@dataclass
class Evidence:
    """What the rules of `advise` look at, besides the numbers.

    images: (module, shape, dtype, bytes) of floating point images that a prompt on images was given from the host.
    folds: (head, sources, classes, share of the step's FLOPs in columns of the head that nobody reads).
    trainable: elements of the frozen model that ask for a gradient. dtype, amp: of the frozen model.
    in_samples: why a prompt's rows are in every sample. recorded: autograd records what no backward reads.
    waits: which operators wait for the GPU.
    """

    profile: Profile
    images: list[tuple[str, tuple[int, ...], torch.dtype, int]] = field(default_factory=list)
    folds: list[tuple[str, int, int, float]] = field(default_factory=list)
    trainable: int = 0
    dtype: torch.dtype | None = None
    amp: torch.dtype | None = None
    in_samples: list[str] = field(default_factory=list)
    recorded: bool = False
    waits: dict[str, int] = field(default_factory=dict)


def evidence_of(result: Profile, session: Session, spans: list[Span]) -> Evidence:
    found = Evidence(result)
    from_host = session.device.type == "cpu" or any(s.on_gpu and "HtoD" in s.name for s in spans)
    seen: set[int] = set()
    for call in session.calls:
        owner, raw = call.owner, call.raw
        parameters = list(call.model.parameters())
        found.amp = found.amp or call.amp
        if id(call.model) in seen:
            continue
        seen.add(id(call.model))
        found.dtype = found.dtype or next((p.dtype for p in parameters if p.is_floating_point()), None)
        own = {id(p) for p in call.attached.parameters()} if call.attached is not None else set()
        found.trainable += sum(p.numel() for p in parameters if p.requires_grad and id(p) not in own)
        found.recorded |= call.grad and not session.backward and result.kind == "inference"
        if call.attached is not None and call.attached.reason:
            found.in_samples.append(call.attached.reason)
        if owner is None:
            continue
        if isinstance(owner.inputs, perturbation.InputPrompt) and from_host and raw.is_floating_point() and raw.dim() == 4:
            found.images.append((type(owner.inputs).__name__, tuple(raw.shape), raw.dtype, raw.nbytes))
        outputs: Any = owner.outputs
        if owner.head is None and getattr(outputs, "foldable", False) and id(outputs) in session.ranges.mapped:
            heads = {n: m for n, m in call.model.named_modules() if type(m) is nn.Linear and m.out_features == outputs.num_source}
            for name, head in list(heads.items())[-1:]:
                unread = 2 * (result.samples or 0) * head.in_features * (outputs.num_source - outputs.num_classes)
                unread *= 2 if result.kind == "training" else 1
                found.folds.append((name, outputs.num_source, outputs.num_classes, unread / max(result.flops, 1)))
    operators = {s.id: s.name for s in spans if s.id and "::" in s.name}
    waits = Counter(operators.get(s.link, "") for s in spans if SYNC.match(s.name))
    found.waits = {name: count for name, count in waits.items() if name}
    return found


def advise(e: Evidence) -> list[str]:
    """What to change, a sentence for each rule that what was seen speaks for."""
    p, said = e.profile, []
    gpu = p.device.startswith("cuda")
    data = p.parts.get(DATA, Part()).forward
    if data > 0.2 * p.step:
        said.append(
            f"The data, and what else comes before the model is called, take {100 * data / p.step:.0f} % of a step ({data:.2f} "
            f"of {p.step:.2f} ms): more loader workers, pinned memory, or data that stay where the model is."
        )
    for name, shape, dtype, size in e.images:
        if size >= 1 << 20:
            narrow = size // dtype.itemsize
            said.append(
                f"{shape[-1]}-pixel {short(dtype)} images come from the host: {size / 1e6:.1f} MB a batch; pass uint8 to "
                f"{name}, which converts in its own pass: {narrow / 1e6:.1f} MB."
            )
    if gpu and e.dtype == torch.float32 and e.amp is None:
        said.append("The frozen model computes in float32 on a GPU: model.to(torch.bfloat16), or autocast (amp= of fit).")
    for head, sources, classes, unread in e.folds:
        worth = p.share(MAPPING) + unread * p.share(FROZEN)
        if worth >= 0.01:
            said.append(
                f"The labels are mapped behind the head {head!r} by a map that is linear: pass head={head!r} to Reprogrammed, "
                f"for {classes} columns in place of {sources} (mapping and unread columns: up to {100 * worth:.0f} % of a step)."
            )
    if e.trainable:
        said.append(
            f"Gradients of the frozen model are computed: {e.trainable:,} of its elements have requires_grad=True; "
            "model.requires_grad_(False), or attach with freeze=True."
        )
    for reason in dict.fromkeys(e.in_samples):
        said.append(f"A prompt's rows are in every sample, because {reason}")
    if e.recorded:
        said.append("Autograd records the forward pass, and no backward reads it: run inference under torch.no_grad().")
    for op in p.operations:
        if op.path.startswith("plain PyTorch") and "asks for it" not in op.why:
            said.append(f"{op.name} runs in plain PyTorch, because {op.why}: {op.milliseconds:.2f} ms a step.")
    if p.syncs:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(e.waits.items(), key=lambda each: -each[1])[:3])
        said.append(f"The host waits for the GPU {p.syncs:.0f} times a step{': ' + names if names else ''}; keep values there.")
    if p.busy is not None and p.busy < 0.7 and data < 0.2 * p.step:
        said.append(
            f"The GPU works {100 * p.busy:.0f} % of a step and waits for the host else ({p.launches or 0:.0f} launches): a "
            "larger batch, torch.compile, or a CUDA graph."
        )
    return said
