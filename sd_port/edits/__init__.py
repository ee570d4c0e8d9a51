"""Edits of images: each a few lines on `theory.editing`, as ODE, SDE and Cycle-SDE where the paper has it."""

from sd_port.edits.canvas import EditResult
from sd_port.edits.drag import Drag, drag, drag_many
from sd_port.edits.drag_config import PRESETS, DragConfig

__all__ = ["PRESETS", "Drag", "DragConfig", "EditResult", "drag", "drag_many"]
