"""SDE-Drag in torch on diffusers' UNet, step by step as published (arXiv 2311.01410 and its code)."""

import math

import jax.random as jr
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler


def sde_drag(unet, alphas_cumprod, contexts, x, mask, source, target, normals, *, total, t0, alpha, beta, r, step):
    """The latent after all operations: x (1, channels, height, width), contexts (2, tokens, features) null and text.

    source, target: (points, 2) in latent pixels. normals: for every operation the noise of the way up (steps, *x), and
    that of the patches (points, *x). Timesteps are diffusers' for `total` steps, as in the authors' code, in which a
    step ends 1000 // total below where it starts; where the next one is nearer, it ends there.
    """
    steps = int(t0 * total)
    ks = timesteps(total)[-steps - 1 :][::-1]  # the picture stands at the first

    def eps(x, k, i):
        guidance = 1 + 2 * i / (steps - 1)
        null, text = unet(torch.cat([x, x]), k, encoder_hidden_states=contexts).sample.chunk(2)
        return null + guidance * (text - null)

    def mean_and_std(x, eps, k, s):
        a, b = alphas_cumprod[k], alphas_cumprod[s]
        sigma = ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        return b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps, sigma

    with torch.no_grad():
        for (here, there), (up_noise, patch_noise) in zip(operations(source, target, step), normals, strict=True):
            path, recorded = [x], []
            for i in range(steps):
                ratio = alphas_cumprod[ks[i + 1]] / alphas_cumprod[ks[i]]
                y = ratio**0.5 * path[-1] + (1 - ratio) ** 0.5 * up_noise[i]
                mean, sigma = mean_and_std(y, eps(y, ks[i + 1], i + 1), ks[i + 1], ks[i])
                recorded.append((path[-1] - mean) / sigma)
                path.append(y)
            x = pasted(path[-1], here, there, patch_noise, alpha, beta, r)
            for i in reversed(range(steps)):
                mean, sigma = mean_and_std(x, eps(x, ks[i + 1], i + 1), ks[i + 1], ks[i])
                x = mean + sigma * recorded[i]
                x = torch.where(mask > 0, x, path[i])
    return x


def timesteps(total):
    """Decreasing, as the authors have them."""
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="linspace")
    scheduler.set_timesteps(total)
    return scheduler.timesteps.tolist()


def operations(source, target, step):
    """Where patches are and where they go to, for each operation."""
    way = target - source
    length = np.linalg.norm(way, axis=1).max()
    count = 1
    if length > step:
        count = math.trunc(length / step)
        if abs(length / count - step) > abs(length / (count + 1) - step):
            count += 1
    for i in range(count):
        yield source + np.trunc(i / count * way).astype(int), source + np.trunc((i + 1) / count * way).astype(int)


def pasted(x, source, target, noise, alpha, beta, r):
    """Eq. (12), patch after patch, each with noise of its own."""
    x, (height, width) = x.clone(), x.shape[-2:]
    for (sx, sy), (tx, ty), z in zip(source.tolist(), target.tolist(), noise, strict=True):
        left, right = min(r, sx, tx), min(r, width - 1 - sx, width - 1 - tx)
        up, down = min(r, sy, ty), min(r, height - 1 - sy, height - 1 - ty)
        here = np.s_[..., sy - up : sy + down, sx - left : sx + right]
        there = np.s_[..., ty - up : ty + down, tx - left : tx + right]
        patch = x[here].clone()
        x[here] = beta * patch + (1 - beta**2) ** 0.5 * z[here]
        x[there] = alpha * patch
    return x


def normals(key, operation: int, steps: int, points: int, shape: tuple[int, ...]):
    """The noise of the way up, and of each patch, as `sd_port.edits.operation.operate` draws it for one picture."""

    def drawn(key, shape):
        return torch.from_numpy(np.array(jr.normal(key, shape, "float32"))).movedim(-1, -3)

    edit_key, patch_key = jr.split(jr.fold_in(key, operation))
    path_key, _ = jr.split(edit_key)
    (row_key,) = jr.split(patch_key, 1)
    return drawn(path_key, (steps, *shape)), torch.stack([drawn(jr.fold_in(row_key, i), shape) for i in range(points)])
