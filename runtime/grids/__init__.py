"""Ways to lay out a sampler's times: one grid, one function.

A grid is called with (steps, process, grid) and returns [steps] falling process times, noisiest first; `make_times`
appends where the sample ends. Options are keyword-only, for functools.partial: partial(karras, rho=5.0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..manifest import GridSpec
from ..process import Array, Process
from .distilled import distilled, lcm_times, pcm
from .even import (
    leading,
    leading_open,
    linspace,
    linspace_levels,
    linspace_open,
    quadratic,
    sgm_uniform,
    shifted,
    trailing,
)
from .levels import at_resolution, resolution_shift
from .noise import AYS, arctan, ays, beta, exponential, karras, linear_quadratic, log_snr_even

Grid = Callable[[int, Process, GridSpec], Array]

GRIDS: dict[str, Grid] = {
    # even in t
    "trailing": trailing,
    "leading": leading,
    "leading_open": leading_open,
    "linspace": linspace,
    "linspace_levels": linspace_levels,
    "linspace_open": linspace_open,
    "sgm_uniform": sgm_uniform,
    "quadratic": quadratic,
    "shifted": shifted,
    # over noise levels
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "logsnr": log_snr_even,
    "lu": log_snr_even,
    "arctan": arctan,
    "linear_quadratic": linear_quadratic,
    "ays_sd15": partial(ays, knots=AYS["sd15"]),
    "ays_sdxl": partial(ays, knots=AYS["sdxl"]),
    "ays_svd": partial(ays, knots=AYS["svd"]),
    # of distilled models
    "lcm": lcm_times,
    "tcd": lcm_times,
    "pcm": pcm,
    # Sauer et al. 2023, section 4 <arXiv:2311.17042>
    "turbo": partial(distilled, name="turbo", only=(1, 2, 3, 4)),
    # Lin, Wang and Yang 2024 <arXiv:2402.13929>
    "lightning": partial(distilled, name="lightning", only=(1, 2, 4, 8)),
    # Ren et al. 2024 <arXiv:2404.13686>; its model card runs the one-step U-Net at timestep 800
    "hyper": partial(distilled, name="hyper", only=(1, 2, 4, 8, 12, 16), single=800.0),
    # Yin et al. 2024 <arXiv:2405.14867>: 999, 749, 499, 249, and the one-step SDXL at 399
    "dmd2": partial(distilled, name="dmd2", only=(1, 2, 3, 4), single=399.0),
}
"""Every grid by the name users know it by."""

__all__ = [
    "AYS",
    "GRIDS",
    "Grid",
    "arctan",
    "at_resolution",
    "ays",
    "beta",
    "distilled",
    "exponential",
    "karras",
]
__all__ += ["lcm_times", "leading", "leading_open", "linear_quadratic", "linspace", "linspace_levels"]
__all__ += ["linspace_open", "log_snr_even", "pcm", "quadratic", "resolution_shift", "sgm_uniform", "shifted"]
__all__ += ["trailing"]
