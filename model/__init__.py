"""Intake: checkpoints, hub names and any torch module become a Model. torch is imported only when one is loaded."""

from .load import load
from .model import Context, Example, Model, Part, Pass, TokenizerFiles

__all__ = ["Context", "Example", "Model", "Part", "Pass", "TokenizerFiles", "load"]
