"""A data set that lies where the model is, so that nothing has to be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastprompt.functional import Rows
from fastprompt.functional.checks import bad, check_labels

__all__ = ["DeviceDataset", "Rows"]


class DeviceDataset:
    """All images of a set on one device, as they are: uint8 is a quarter of float's memory (CIFAR-10: 154 MB).

    An iteration is one epoch of batches (Rows, targets). `Rows` only says which images a batch is: the input prompts of
    `fastprompt.nn` read them out of the set inside their own launch, and `Reprogrammed` and `fit` take them as they are. For
    any other module `Rows.gather()` makes the batch.

    The order of an epoch depends on (seed, epoch) alone, on every device. Each iteration is the next epoch; `set_epoch` says
    which, as `fit` does, so that an interrupted run goes on exactly.

    Where torch.distributed is initialised each rank has its share of the same order, equally many samples on each: some of
    the first come again at the end (with drop_last: the last are left out).

    Args:
        images: [N, C, h, w] or [N, h, w, C] (the prompt's data_format), or series [N, L]; uint8 or floating point; a tensor
            or a NumPy array. Not copied where it is on the device already.
        targets: int64 [N].
        batch_size: on each rank.
        shuffle: a new order every epoch.
        drop_last: leave out a last batch that is not full.
        seed: of the orders.
        device: where all of it goes. Default: where `images` is.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """

    def __init__(
        self, images: Any, targets: Any, *, batch_size: int = 256, shuffle: bool = True, drop_last: bool = False, seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        images, targets = torch.as_tensor(images), torch.as_tensor(targets)
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images: expected uint8 or a floating point dtype, got {images.dtype}")
        if images.dim() < 2:
            raise bad("images", "[N, C, h, w], [N, h, w, C] or [N, L]", list(images.shape))
        check_labels("targets", targets, len(images))
        if batch_size < 1:
            raise bad("batch_size", "at least 1", batch_size)
        self.images = images.to(device)
        self.targets = targets.to(self.images.device)
        self.batch_size, self.shuffle, self.drop_last, self.seed = batch_size, shuffle, drop_last, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        _, world = _rank()
        samples = len(self.images) // world if self.drop_last else -(-len(self.images) // world)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Rows, Tensor]]:
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        self.epoch += 1
        rank, world = _rank()
        if len(order) % world and not self.drop_last:
            order = order[torch.arange(-(-len(order) // world) * world) % len(order)]
        return self._batches(order[rank : len(order) // world * world : world], len(self))

    def in_order(self) -> Iterator[tuple[Rows, Tensor]]:
        """Every sample once, in the order of the set; of several ranks each has every n-th, and none is padded or left out."""
        rank, world = _rank()
        order = torch.arange(rank, len(self.images), world)
        return self._batches(order, -(-len(order) // self.batch_size))

    def _batches(self, order: Tensor, count: int) -> Iterator[tuple[Rows, Tensor]]:
        order = order.to(self.images.device)
        targets = self.targets[order]  # once an epoch; a batch is two views
        for start in range(0, count * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield Rows(self.images, order[part]), targets[part]

    def __repr__(self) -> str:
        shape, dtype = list(self.images.shape), str(self.images.dtype).removeprefix("torch.")
        return f"DeviceDataset({shape} {dtype} on {self.images.device}, batch_size={self.batch_size}, batches={len(self)})"


def _rank() -> tuple[int, int]:
    """(Rank, number of ranks)."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
