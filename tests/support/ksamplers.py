"""Sampler functions in the form of k-diffusion's, written from their formulas, for tests without
the host. `test_sampling` of its room compares them to the host's own where there is a checkout.
"""

from __future__ import annotations

import torch


def _one(x, sigma):
    return sigma * x.new_ones([x.shape[0]])


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra = extra_args or {}
    for i in range(len(sigmas) - 1):
        denoised = model(x, _one(x, sigmas[i]), **extra)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra = extra_args or {}
    for i in range(len(sigmas) - 1):
        d = (x - model(x, _one(x, sigmas[i]), **extra)) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            ahead = x + d * dt
            d2 = (ahead - model(ahead, _one(x, sigmas[i + 1]), **extra)) / sigmas[i + 1]
            x = x + (d + d2) / 2 * dt
    return x


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra, old = extra_args or {}, None
    for i in range(len(sigmas) - 1):
        denoised = model(x, _one(x, sigmas[i]), **extra)
        q = sigmas[i + 1] / sigmas[i]
        used = denoised
        if old is not None and sigmas[i + 1] != 0:
            r = (sigmas[i - 1] / sigmas[i]).log() / (sigmas[i] / sigmas[i + 1]).log()
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x, old = q * x + (1 - q) * used, denoised
    return x


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None
):
    """For variance-exploding schedules; the host draws the same noise from a seeded generator."""
    extra = extra_args or {}
    if noise_sampler is None:
        generator = torch.Generator().manual_seed(extra["seed"] + 1)

        def noise_sampler(*_):
            return torch.randn(x.size(), dtype=x.dtype, generator=generator)

    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        denoised = model(x, _one(x, s), **extra)
        up = min(t, (t**2 * (s**2 - t**2) / s**2) ** 0.5)
        down = (t**2 - up**2) ** 0.5
        if down == 0:
            x = denoised
        else:
            x = x + (x - denoised) / s * (down - s) + noise_sampler(s, t) * up
    return x


def sample_adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Halves its steps where the model's output is large: its levels depend on the latents."""
    extra, sigma, end = extra_args or {}, sigmas[0], sigmas[-1] + 0.05
    while sigma > end:
        d = (x - model(x, _one(x, sigma), **extra)) / sigma
        down = torch.maximum(sigma * (0.5 if d.abs().mean() > 0.05 else 0.7), end)
        x, sigma = x + d * (down - sigma), down
    return x


def _after_guidance(extra, function):
    """Arguments with a function after guidance, as the CFG++ samplers have one."""
    options = dict(extra.get("model_options", {}))
    before = options.get("sampler_post_cfg_function", [])
    options |= {"sampler_post_cfg_function": [*before, function]}
    return {**extra, "model_options": {**options, "disable_cfg1_optimization": True}}


def sample_euler_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """For variance-exploding schedules."""
    unguided = None

    def function(args):
        nonlocal unguided
        unguided = args["uncond_denoised"]
        return args["denoised"]

    extra = _after_guidance(extra_args or {}, function)
    for i in range(len(sigmas) - 1):
        denoised = model(x, _one(x, sigmas[i]), **extra)
        x = denoised + (x - unguided) / sigmas[i] * sigmas[i + 1]
    return x


def sample_changing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Has a function after guidance that changes what the model returns."""
    extra = _after_guidance(extra_args or {}, lambda args: 0.99 * args["denoised"])
    return sample_euler(model, x, sigmas, extra, callback, disable)


SAMPLERS = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler_ancestral": sample_euler_ancestral,
    "euler_cfg_pp": sample_euler_cfg_pp,
}
