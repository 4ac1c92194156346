"""Several processes at one stage, as `torchrun` or `accelerate launch` start them; one process is a group of its own.

They divide units of work: examples, layers, texts, the examples of a batch. docs/scale.md: how far the results agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among those that work on a stage together.

    Attributes:
        rank: its number, from 0; the first one writes what the stage makes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on: every `size`-th."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, mine: T) -> list[T]:
        """What every process gives, by rank; it travels pickled, so it had better be small."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found  # type: ignore[return-value]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in place, on the CPU."""
        tensor = tensor.cpu()
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def device(self, device: str) -> str:
        """This process's own GPU where the stage is asked to run on `cuda`."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and device == "cuda" else device


@contextmanager
def joined() -> Iterator[Group]:
    """The group that the launcher's variables describe, for the time of the context; one that is there stays."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield Group(dist.get_rank(), size)
        return
    # Between GPUs only the gradients of a fine-tuning travel; all else does on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
