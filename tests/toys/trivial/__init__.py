"""Experiments of a moment, on which processes side by side and their interruption are tested."""
