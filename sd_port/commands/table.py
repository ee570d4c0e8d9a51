"""The commands of sd-edit, by name."""

from sd_port.commands.bench import BenchCommand
from sd_port.commands.demo import Demo
from sd_port.commands.generate import Generate
from sd_port.commands.lora import LoraCommand
from sd_port.commands.models import Models
from sd_port.commands.replay import EDITS, Replay
from sd_port.experiments.command import ExperimentsCommand

COMMANDS = {
    "generate": Generate,
    **EDITS,
    "lora": LoraCommand,
    "replay": Replay,
    "bench": BenchCommand,
    "experiments": ExperimentsCommand,
    "demo": Demo,
    "models": Models,
}
