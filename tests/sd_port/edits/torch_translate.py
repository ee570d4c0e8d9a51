"""Image to image in torch on diffusers' UNet: the DDIM step of Song et al. 2021, eq. (12), and loops written out."""

import torch


def predictor(unet, null, text, guidance):
    """eps(x, k) with classifier-free guidance; contexts (1, tokens, features)."""

    def eps(x, k):
        contexts = torch.cat([null, text])
        without, with_text = unet(torch.cat([x, x]), k, encoder_hidden_states=contexts).sample.chunk(2)
        return without + guidance * (with_text - without)

    return eps


def step(alphas_cumprod, x, eps, k, s, eta):
    """Mean and standard deviation of the step from timestep k to s, up (eta = 0) or down."""
    a, b = alphas_cumprod[k], alphas_cumprod[s]
    sigma = eta * (((1 - b) / (1 - a)) * (1 - a / b)) ** 0.5 if eta else 0.0
    return b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b - sigma**2) ** 0.5 * eps, sigma


@torch.no_grad()
def translated(kind, alphas_cumprod, source_eps, target_eps, x, ks, up_noise, down_noise):
    """x, which stands at ks[0], after the way up along ks and back; up_noise and down_noise are (steps, *x)."""
    path = [x]
    for i in range(len(ks) - 1):
        if kind == "ddib":
            path.append(step(alphas_cumprod, path[-1], source_eps(path[-1], ks[i]), ks[i], ks[i + 1], 0)[0])
        else:
            ratio = alphas_cumprod[ks[i + 1]] / alphas_cumprod[ks[i]]
            path.append(ratio**0.5 * path[-1] + (1 - ratio) ** 0.5 * up_noise[i])
    x = path[-1]
    eta = 1 if kind in ("sdedit", "cycle") else 0
    for n, i in enumerate(reversed(range(len(ks) - 1))):
        k, s = ks[i + 1], ks[i]
        w = down_noise[n]
        if kind == "cycle":
            mean, sigma = step(alphas_cumprod, path[i + 1], source_eps(path[i + 1], k), k, s, eta)
            w = (path[i] - mean) / sigma
        mean, sigma = step(alphas_cumprod, x, target_eps(x, k), k, s, eta)
        x = mean + sigma * w
    return x
