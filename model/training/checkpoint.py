"""What a training run leaves on disk so that another goes on from it, and its log."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import BadInput
from ...runtime.files import atomic_write, output_errors
from ..libraries import torch

__all__ = ["Checkpoint"]

Module = Any


class Checkpoint:
    """One file, replaced whole: step, trained weights, average, optimizers. Frozen weights are not in it."""

    def __init__(self, store: Path, name: str, accelerator: Any, trainable: Mapping[str, list[str]]) -> None:
        self.file = store / f"{name}.checkpoint"
        self.metrics = store / f"{name}.jsonl"
        self._accelerator = accelerator
        self._trainable = {network: set(keys) for network, keys in trainable.items()}

    def load(
        self, networks: Mapping[str, Module], average: Module | None, optimizers: Mapping[str, Any]
    ) -> int:
        """The step an earlier run came to, 0 where there was none. Raises BadInput for another file."""
        with output_errors(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self.metrics.unlink(missing_ok=True)
            return 0
        th = torch()
        try:
            kept = th.load(io.BytesIO(self.file.read_bytes()), map_location="cpu", weights_only=True)
            step = int(kept["step"])
            for name, network in networks.items():
                self._bare(network).load_state_dict(kept["networks"][name], strict=False)
                optimizers[name].load_state_dict(kept["optimizers"][name])
            if average is not None:
                self._bare(average).load_state_dict(kept["average"], strict=False)
        except (RuntimeError, KeyError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise BadInput(
                f"{self.file} is no checkpoint of this training ({str(error).splitlines()[0][:160]})",
                expected="what an interrupted run wrote",
                fix="delete it to begin anew",
            ) from None
        self._cut(step)
        return step

    def save(
        self, step: int, networks: Mapping[str, Module], average: Module | None, optimizers: Mapping[str, Any]
    ) -> None:
        """Gathered from all processes, written by the first. Raises OutputError where it cannot be written."""
        state: dict[str, Any] = {
            "step": step,
            "networks": {name: self._trained(name, network) for name, network in networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        }
        if average is not None:
            state["average"] = self._trained("student", average)
        if self._accelerator.is_main_process:
            buffer = io.BytesIO()
            torch().save(state, buffer)
            atomic_write(self.file, buffer.getvalue())
        self._accelerator.wait_for_everyone()

    def last_losses(self) -> dict[str, float]:
        """What the log's last line says of losses and norms; empty where there is none."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        said: dict[str, float] = json.loads(lines[-1]) if lines else {}
        return {key: value for key, value in said.items() if "." in key}

    def write_line(self, line: Mapping[str, Any]) -> None:
        """One more line of the log."""
        with output_errors(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _trained(self, name: str, network: Module) -> dict[str, Any]:
        whole = self._accelerator.get_state_dict(network)
        return {key: tensor for key, tensor in whole.items() if key in self._trainable[name]}

    def _bare(self, network: Module) -> Module:
        return self._accelerator.unwrap_model(network)

    def _cut(self, step: int) -> None:
        """Lines beyond the checkpoint belong to a run that was killed after it; they come again."""
        if self.metrics.exists():
            lines = [
                line for line in self.metrics.read_text().splitlines() if json.loads(line)["step"] <= step
            ]
            atomic_write(self.metrics, "".join(f"{line}\n" for line in lines).encode())
