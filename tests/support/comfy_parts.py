"""What the tests hang into ComfyUI's models: conditions, a LoRA, a ControlNet, patches."""

from __future__ import annotations

import copy

import torch


def copied(given):
    return {name: copy.deepcopy(value) for name, value in given.items()}


def text(kind, seed=1, **more):
    from tiny_pack import models

    ((tokens, options),) = models.conditioning(kind, seed)
    return [[tokens, {**options, **more}]]


def with_lora(model):
    model = model.clone()
    name, weight = next(
        (name, weight)
        for name, weight in model.model.state_dict().items()
        if name.startswith("diffusion_model") and weight.ndim == 4
    )
    model.add_patches({name: ("diff", (torch.full_like(weight, 0.05),))}, 1.0)
    return model


def control():
    """A ControlNet of one layer, in the host's own class, which keeps its hint between calls."""
    from comfy.controlnet import ControlBase

    class Tiny(ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, *more):
            if self.cond_hint is None or self.cond_hint.shape[2:] != x_noisy.shape[2:]:
                self.cond_hint = None
                size = tuple(x_noisy.shape[2:])
                self.cond_hint = torch.nn.functional.interpolate(self.cond_hint_original, size)
            out = torch.tanh(x_noisy.mean(1, keepdim=True)) * self.cond_hint * self.strength
            return {
                "input": [],
                "middle": [out.expand(-1, 64, -1, -1)[..., ::2, ::2]],
                "output": [],
            }

        def copy(self):
            own = Tiny()
            self.copy_to(own)
            return own

    made = Tiny()
    made.set_cond_hint(torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)), 0.3)
    return made


class Hypernetwork:
    """Patches keys and values of attention, as the host's hypernetworks do, with its own weights
    on one device.
    """

    def __init__(self):
        self.layers, self.device = {}, "cpu"

    def layer(self, width):
        if width not in self.layers:
            generator = torch.Generator().manual_seed(width)
            self.layers[width] = 0.05 * torch.randn(width, width, generator=generator)
        return self.layers[width]

    def __call__(self, q, k, v, extra_options):
        layer = self.layer(k.shape[-1])
        return q, k + k @ layer, v + v @ layer

    def to(self, to):
        if isinstance(to, torch.device):  # or a dtype
            self.device = to
        return self


class Replacement(Hypernetwork):
    """Takes the place of an attention, as IP-adapters do."""

    def __call__(self, q, k, v, extra_options):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out + out @ self.layer(out.shape[-1])
