"""A small training loop for reprogrammed models. The modules are plain `nn.Module`s: any other loop does as well."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from tqdm import tqdm

from fastprompt import checkpoint
from fastprompt.checkpoint import CheckpointError
from fastprompt.data import DeviceDataset
from fastprompt.functional.checks import bad
from fastprompt.nn import Refresh
from fastprompt.reprogram import Reprogrammed

Data = tuple[Tensor, Tensor] | DeviceDataset | Iterable[tuple[Tensor, Tensor]]


def fit(
    module: Reprogrammed, train: Data, validation: Data | None = None, *, epochs: int, lr: float = 0.01,
    optimizer: Callable[[list[nn.Parameter], float], Optimizer] = torch.optim.Adam,
    schedule: str = "cosine", batch_size: int = 256, amp: torch.dtype | None = None, seed: int = 0,
    folder: str | Path | None = None, resume: bool = False, progress: bool = True,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains what is trainable of a reprogrammed model with cross-entropy.

    Args:
        module: moved to its device by the caller; batches are moved to it.
        train, validation: a pair of tensors (x, y) that stay where they are, a `fastprompt.data.DeviceDataset` on the model's
            device (with its own batch size and order), or an iterable of such batches (a DataLoader). y int64 [B], from 0
            to the number of classes - 1.
        epochs: in all; with `resume` those already trained count.
        lr: the peak learning rate.
        optimizer: called with (parameters, lr).
        schedule: "cosine" to 0 over all steps, "multistep" (x 0.1 after 50 % and 72 % of the epochs, as ILM-VP and BLM
            do), or "constant".
        batch_size: for tensor pairs.
        amp: autocast dtype, torch.bfloat16 or torch.float16 (with loss scaling), or None.
        seed: the global seed is set from it at the start of every epoch, so an interrupted run resumes exactly.
        folder: where `best` (by validation accuracy, else training loss) and `last` checkpoints are written.
        resume: go on from `folder/last` if it is there.
        progress: show a bar.

    A label map with a `refresh_every` is counted and matched again in a pass of its own over `train`: before the first
    step, and then before every n-th epoch or step, as it says (`fastprompt.nn.Refresh`). With `online=True` only the first
    refresh makes a pass; after that the training steps themselves are counted.

    Returns:
        One row an epoch: epoch, lr, loss, accuracy, seconds, and validation accuracy if asked for.

    Raises:
        ValueError: labels outside the classes, an unknown schedule, no data.
        FloatingPointError: the loss is not finite; checkpoints of earlier epochs are kept.
    """
    if schedule not in ("cosine", "multistep", "constant"):
        raise ValueError(f"schedule: expected cosine, multistep or constant, got {schedule!r}")
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    module.check_frozen()
    parameters = module.trainable_parameters()
    optimize = optimizer(parameters, lr) if parameters else None
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    labels: Any = module.outputs
    due = Refresh.of(getattr(labels, "refresh_every", None))
    online = due is not None and due.online
    rows: list[dict[str, float]] = []
    taken = 0  # training steps
    if resume and folder is not None and (Path(folder) / "last").exists():
        rows, taken = _restore(Path(folder) / "last", module, optimize, scaler)

    def match() -> None:
        if taken and online:
            labels.refresh()
        else:
            refresh(module, train, batch_size=batch_size, amp=amp)
        if online:
            labels.reset_counts()

    best = _best(rows)
    bar = tqdm(total=epochs, initial=len(rows), disable=not progress, unit="epoch")
    for epoch in range(len(rows), epochs):
        start = time.perf_counter()
        _seed(seed, epoch)
        if isinstance(train, DeviceDataset):
            train.set_epoch(epoch)
        if due is not None and (epoch == 0 or (due.every_epochs and epoch % due.every_epochs == 0)):
            match()
        module.train()
        loss_sum = torch.zeros((), device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        seen, steps = 0, _count(train, batch_size)
        for step, (x, y) in enumerate(_batches(train, batch_size, device, module, shuffle=_generator(seed, epoch))):
            rate = lr * _factor(schedule, epoch, epochs, step, steps)
            if due is not None and due.every_steps and taken and taken % due.every_steps == 0:
                match()
                module.train()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                if online:
                    source = module.source_logits(x)
                    labels.count(source.detach(), y)
                    logits = labels(source)
                else:
                    logits = module(x)
            loss = nn.functional.cross_entropy(logits.float(), y)
            if optimize is not None:
                for group in optimize.param_groups:
                    group["lr"] = rate
                optimize.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimize)
                scaler.update()
            loss_sum += loss.detach() * len(y)
            right += (logits.argmax(-1) == y).sum()
            seen += len(y)
            taken += 1
        if not seen:
            raise ValueError("train: expected at least one sample, got none")
        row = {"epoch": epoch + 1, "lr": rate, "loss": float(loss_sum) / seen, "accuracy": int(right) / seen}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"loss: expected a finite number, got {row['loss']} in epoch {epoch + 1}; lower lr")
        if validation is not None:
            row["validation"] = evaluate(module, validation, batch_size=batch_size, amp=amp)
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        if folder is not None:
            if _best(rows) > best:
                module.save_pretrained(Path(folder) / "best")
            _store(Path(folder) / "last", module, optimize, scaler, rows, taken, labels.counts if online else None)
        best = _best(rows)
        bar.update()
        bar.set_postfix({key: f"{row[key]:.3f}" for key in ("loss", "accuracy", "validation") if key in row})
    bar.close()
    return rows


@torch.no_grad()
def refresh(module: Reprogrammed, data: Data, *, batch_size: int = 256, amp: torch.dtype | None = None) -> None:
    """Counts f's predictions on the prompted data and matches the label map again (FLM, ILM: Chen et al. 2023).

    Where torch.distributed is initialised each rank counts its own data, and all ranks get the map of all of it.
    """
    labels: Any = module.outputs
    module.eval()
    labels.reset_counts()
    device = next(module.parameters()).device
    for x, y in _batches(data, batch_size, device, module):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            labels.count(module.source_logits(x), y)
    labels.refresh()


@torch.no_grad()
def evaluate(module: Reprogrammed, data: Data, *, batch_size: int = 256, amp: torch.dtype | None = None) -> float:
    """The share of samples whose largest target logit is the right one."""
    module.eval()
    device = next(module.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    for x, y in _batches(data, batch_size, device, module):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            right += (module(x).argmax(-1) == y).sum()
        seen += len(y)
    if isinstance(data, DeviceDataset) and dist.is_available() and dist.is_initialized():
        both = torch.stack([right, right.new_tensor(seen)])  # of every rank's share
        dist.all_reduce(both)
        right, seen = both[0], int(both[1])
    if not seen:
        raise ValueError("data: expected at least one sample, got none")
    return int(right) / seen


def _batches(
    data: Data, batch_size: int, device: torch.device, module: Reprogrammed, shuffle: torch.Generator | None = None
) -> Iterator[tuple[Any, Tensor]]:
    classes = getattr(module.outputs, "num_classes", None)
    if isinstance(data, DeviceDataset):
        if data.images.device != device:
            raise bad("data", f"a DeviceDataset on {device}, where the model is", f"one on {data.images.device}")
        _check_labels(data.targets, classes)
        yield from data.in_order() if shuffle is None else data
        return
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)):
        for x, y in data:  # type: ignore[misc]
            _check_labels(y, classes)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        return
    x, y = data
    if len(x) != len(y):
        raise ValueError(f"data: expected as many labels as samples, got {len(y)} and {len(x)}")
    _check_labels(y, classes)
    order = None if shuffle is None else torch.randperm(len(x), generator=shuffle).to(x.device)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        bx, by = (x[part], y[part]) if order is None else (x[order[part]], y[order[part]])
        yield bx.to(device, non_blocking=True), by.to(device, non_blocking=True)


def _check_labels(y: Tensor, classes: int | None) -> None:
    if y.dtype != torch.int64 or y.dim() != 1:
        raise ValueError(f"labels: expected int64 [B], got {y.dtype} {list(y.shape)}")
    if classes is not None and len(y):
        low, high = (int(bound) for bound in y.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: expected values from 0 to {classes - 1}, got {low} to {high}")


def _count(data: Data, batch_size: int) -> int | None:
    if isinstance(data, tuple) and isinstance(data[0], Tensor):
        return -(-len(data[0]) // batch_size)
    return len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]


def _factor(schedule: str, epoch: int, epochs: int, step: int, steps: int | None) -> float:
    """The learning rate as a share of its peak; a loader without a length moves once an epoch."""
    done = epoch + (step / steps if steps else 0.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done / epochs))
    if schedule == "multistep":
        return 0.1 ** ((epoch >= int(0.5 * epochs)) + (epoch >= int(0.72 * epochs)))
    return 1.0


def _seed(seed: int, epoch: int) -> None:
    torch.manual_seed(seed * 1_000_003 + epoch)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _best(rows: list[dict[str, float]]) -> float:
    return max((row.get("validation", -row["loss"]) for row in rows), default=-math.inf)


def _store(
    folder: Path, module: Reprogrammed, optimize: Optimizer | None, scaler: torch.amp.GradScaler,
    rows: list[dict[str, float]], taken: int, counts: Tensor | None,
) -> None:  # fmt: skip
    """The reprogrammed model with all that training needs to go on: tensors as tensors, numbers as JSON."""
    tensors = dict(module.state_dict())
    groups: list[dict[str, Any]] = []
    numbers: dict[str, dict[str, Any]] = {}
    if optimize is not None:
        state = optimize.state_dict()
        groups = json.loads(json.dumps(state["param_groups"]))
        for place, entries in state["state"].items():
            numbers[str(place)] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
            tensors |= {f"optimizer.{place}.{key}": v for key, v in entries.items() if isinstance(v, Tensor)}
    if counts is not None:
        tensors["training.counts"] = counts
    training = {"rows": rows, "steps": taken, "groups": groups, "numbers": numbers, "scaler": scaler.state_dict()}
    checkpoint.save(folder, tensors, module.config() | {"training": training})


def _restore(
    folder: Path, module: Reprogrammed, optimize: Optimizer | None, scaler: torch.amp.GradScaler
) -> tuple[list[dict[str, float]], int]:
    tensors, config = checkpoint.load(folder, allowed={"format", "inputs", "outputs", "head", "training"})
    training = config.get("training")
    if training is None:
        raise CheckpointError(f"{folder}: expected a checkpoint of `fit`, got one without training state")
    if json.loads(json.dumps(module.config())) != {
        name: config[name] for name in ("inputs", "outputs", "head") if name in config
    }:
        raise CheckpointError(f"{folder}: expected the modules that are being trained, got {config}")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("optimizer.", "training."))}
    checkpoint.check_match(own, module.state_dict())
    module.load_state_dict(own)
    if optimize is not None:
        state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in training["numbers"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".", 2)
                state.setdefault(int(place), {})[key] = tensor
        optimize.load_state_dict({"state": state, "param_groups": training["groups"]})
    if training["scaler"]:
        scaler.load_state_dict(training["scaler"])
    if "training.counts" in tensors:
        labels: Any = module.outputs
        labels.reset_counts()
        labels.counts.copy_(tensors["training.counts"])
    rows: list[dict[str, float]] = training["rows"]
    return rows, training.get("steps", len(rows))  # a checkpoint of 0.1 has no steps: then nothing counts them
