"""From a model to a bundle for a device: lowering, the gate, and the flow that runs them."""

from .gate import PartQuality
from .recipe import Exported, export_bundle

__all__ = ["Exported", "PartQuality", "export_bundle"]
