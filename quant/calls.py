"""At which calls of a plan inputs are kept to calibrate on."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["STEPS", "TIMESTEPS", "chosen_calls"]

TIMESTEPS = ("uniform", "normal", "steps")

STEPS = 16
"""Network calls of a plan that timesteps = "steps" takes: students have 8 steps at most, of one call or two."""

MEAN, DEVIATION = 0.4, 0.4
"""Of PTQ4DM's time, in units of the whole: section 4.2 and the authors' scripts."""


def chosen_calls(timesteps: str, calls: int, batches: int, most: int) -> list[list[int]]:
    """Which of the plan's calls each batch of trajectories keeps, in order.

    calls    of the plan
    most     in all; fewer where the distribution cannot be had otherwise: a batch gives each call once at most
    """
    ends = np.arange(1, calls) - 0.5
    if timesteps == "normal":
        # 1 at the first call, where all is noise; edges half way between calls, both ends taking what lies beyond
        edges = (1 - ends / (calls - 1) - MEAN) / DEVIATION if calls > 1 else ends
        below = 1 - np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    else:
        below = (ends + 0.5) / calls
    share = np.diff([0.0, *below, 1.0])
    most = batches * calls if timesteps == "steps" else most
    total = max(1, min(most, math.floor(batches / share.max() + 1e-9)))
    counts = np.diff(np.floor(total * np.array([0.0, *below, 1.0]) + 0.5)).astype(int)
    kept: list[list[int]] = [[] for _ in range(batches)]
    turn = 0
    for call, count in enumerate(counts.tolist()):
        for _ in range(min(count, batches)):
            kept[turn % batches].append(call)
            turn += 1
    return kept
