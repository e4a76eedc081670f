"""The processes that train together, as accelerate counts them; one alone without it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..libraries import library, torch

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1

    @classmethod
    def found(cls) -> Processes:
        """Those that `accelerate launch` or torchrun started, if any did."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        # without a GPU it takes every process for the only one, unless told so
        state = library("accelerate").PartialState(cpu=not torch().cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all the others."""
        if self.world > 1:
            library("accelerate").PartialState().wait_for_everyone()
