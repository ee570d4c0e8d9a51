"""LPIPS in torch with random weights, and the files that torchvision's AlexNet and the package lpips come in."""

from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import torch

CHANNELS = (64, 192, 384, 256, 256)


@cache
def alexnet() -> torch.nn.Sequential:
    """The convolutions of torchvision's AlexNet, by their numbers there."""
    torch.manual_seed(0)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    layers = conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2)
    layers += conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()
    return torch.nn.Sequential(*layers, conv(256, 256, 3, padding=1), relu(), pool(3, 2)).eval()


@cache
def heads() -> dict[str, torch.Tensor]:
    """As the package lpips saves them: 1 x 1 convolutions without a bias, after a dropout; none is negative."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, channels, 1, 1) for channels in CHANNELS]
    return OrderedDict(
        (f"lin{i}.model.1.weight", torch.rand(shape, generator=generator)) for i, shape in enumerate(shapes)
    )


def state() -> dict[str, torch.Tensor]:
    features = {f"features.{name}": value for name, value in alexnet().state_dict().items()}
    return OrderedDict(features | {"classifier.6.bias": torch.zeros(1000)})


@torch.no_grad()
def published(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The forward pass of lpips.LPIPS(net="alex", version="0.1")."""
    shift, scale = (
        torch.tensor(values).reshape(1, 3, 1, 1) for values in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    x, y = (((torch.from_numpy(image).movedim(-1, 1) * 2 - 1) - shift) / scale for image in (a, b))
    total, seen = torch.zeros(len(a)), 0
    for layer in alexnet():
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            unit = [part / (torch.sqrt((part**2).sum(dim=1, keepdim=True)) + 1e-10) for part in (x, y)]
            squared = torch.nn.functional.conv2d((unit[0] - unit[1]) ** 2, heads()[f"lin{seen}.model.1.weight"])
            total, seen = total + squared.mean(dim=(1, 2, 3)), seen + 1
    return total.numpy()


def write_weights(folder: Path) -> tuple[Path, Path]:
    """AlexNet in torch's zip format, and the heads in the older one, as lpips's file is."""
    torch.save(state(), folder / "alexnet.pth")
    torch.save(heads(), folder / "alex.pth", _use_new_zipfile_serialization=False)
    return folder / "alexnet.pth", folder / "alex.pth"
