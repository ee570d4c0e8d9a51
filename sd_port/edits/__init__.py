"""Edits of images: each a few lines on `theory.editing`, as ODE, SDE and Cycle-SDE where the paper has it."""

from sd_port.edit_configs import PRESETS, DragConfig
from sd_port.edits.drag import Drag, drag, drag_many
from sd_port.images import EditResult

__all__ = ["PRESETS", "Drag", "DragConfig", "EditResult", "drag", "drag_many"]
