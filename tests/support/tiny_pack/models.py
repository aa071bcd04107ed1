"""Small models for the tests: three one-layer networks, the trained models of the demo, and real
model classes of ComfyUI with random weights. Imports the host.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import torch

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """How to make a model, and what goes in."""

    make: Callable[[], Any]  # a comfy.model_base.BaseModel, its weights not set
    latent: tuple[int, ...]  # of one item
    width: int = 16  # of the text
    pooled: int | None = None
    text: dict[str, Any] = field(default_factory=dict)  # more that its conditioning has


class TinyNet(torch.nn.Module):
    """One hidden layer of convolution, with the noise level and the text added to it."""

    def __init__(self, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.into = operations.Conv2d(4, 16, 3, padding=1, dtype=dtype, device=device)
        self.time = operations.Linear(1, 16, dtype=dtype, device=device)
        self.text = operations.Linear(16, 16, dtype=dtype, device=device)
        self.out = operations.Conv2d(16, 4, 3, padding=1, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        control: Any = None,
        transformer_options: Any = None,
        **more: Any,
    ) -> torch.Tensor:
        told = self.time(timesteps.reshape(-1, 1).to(x.dtype) / 1000) + self.text(context).mean(1)
        return self.out(torch.nn.functional.silu(self.into(x) + told[..., None, None]))


class TinyBase(comfy.model_base.BaseModel):
    def extra_conds(self, **given: Any) -> dict[str, Any]:
        return {"c_crossattn": comfy.conds.CONDRegular(given["cross_attn"])}


class TinyConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 1.0


def _net(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        config = _ready(TinyConfig({}))
        model_type = getattr(comfy.model_base.ModelType, kind)
        return TinyBase(config, model_type, device=DEVICE, unet_model=TinyNet)

    return make


def _ready(config: Any) -> Any:
    config.set_inference_dtype(torch.float32, None)
    return config


def _real(name: str, weights: Any = None, **unet: Any) -> Callable[[], Any]:
    """`name` is a class of comfy.supported_models; `unet` the sizes of its network.

    `weights` are those outside of the network, if a class has such.
    """

    def make() -> Any:
        config = _ready(getattr(comfy.supported_models, name)(unet))
        config.unet_config.update(unet)  # over the full-size extras of the class
        return config.get_model(dict(weights or {}), device=DEVICE)  # which empties it

    return make


def _sized(params: Any, **sizes: Any) -> dict[str, Any]:
    """The sizes that this version's dataclass of parameters has, what they leave out off."""
    fields = {f.name: f for f in dataclasses.fields(params)}
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    return {**dict.fromkeys(required), **{k: v for k, v in sizes.items() if k in fields}}


def _flux() -> Any:
    from comfy.ldm.flux.model import FluxParams

    sizes = _sized(FluxParams, **_FLUX, theta=10000, patch_size=2, txt_ids_dims=[])
    return _real("Flux", image_model="flux", **sizes)()


def _hunyuan_video() -> Any:
    from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

    sizes = _sized(HunyuanVideoParams, **_FLUX, theta=256, patch_size=[1, 2, 2])
    return _real("HunyuanVideo", image_model="hunyuan_video", **sizes)()


_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "qkv_bias": True,
    "guidance_embed": True,
}


def _seconds() -> dict[str, torch.Tensor]:
    """The embedders of Stable Audio's durations."""
    generator, made = torch.Generator().manual_seed(3), {}
    for name in ("seconds_start", "seconds_total"):
        prefix = f"conditioner.conditioners.{name}.embedder.embedding."
        made[prefix + "0.weights"] = torch.randn(128, generator=generator)
        made[prefix + "1.weight"] = torch.randn(768, 257, generator=generator) / 16
        made[prefix + "1.bias"] = torch.zeros(768)
    return made


class DemoNet(torch.nn.Module):
    """A trained model of `parastep.demo`, a network of diffusers', as ComfyUI calls its own."""

    def __init__(
        self, name: str, dtype: Any = None, device: Any = None, operations: Any = None
    ) -> None:
        super().__init__()
        from parastep import demo

        self.dtype = dtype
        self.demo = demo.load(name)
        pipe = self.demo.load()
        self.network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        pooled = () if y is None else (y,)
        return self.demo.forward(self.network, x, timesteps, context, *pooled)


class DemoBase(TinyBase):
    def extra_conds(self, **given: Any) -> dict[str, Any]:
        made = super().extra_conds(**given)
        if given.get("pooled_output") is not None:
            made["y"] = comfy.conds.CONDRegular(given["pooled_output"])
        return made


class DemoLatent(comfy.latent_formats.LatentFormat):
    scale_factor = 1.0

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels


def _demo(name: str, kind: str, channels: int, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = _ready(TinyConfig({}))
        config.latent_format = DemoLatent(channels)
        config.sampling_settings = settings
        model_type = getattr(comfy.model_base.ModelType, kind)
        net = functools.partial(DemoNet, name)
        return DemoBase(config, model_type, device=DEVICE, unet_model=net)

    return make


DEMOS = {"demo": "image", "demo_video": "video", "demo_sound": "sound"}


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "context_dim": 16,
    "legacy": False,
}

KINDS: dict[str, Kind] = {
    "eps": Kind(_net("EPS"), (4, 8, 8)),
    "v": Kind(_net("V_PREDICTION"), (4, 8, 8)),
    "flow": Kind(_net("FLOW"), (4, 8, 8)),
    "demo": Kind(_demo("image", "EPS", 12), (12, 16, 16), width=32),
    "demo_video": Kind(_demo("video", "V_PREDICTION", 40, zsnr=True), (40, 12, 12), width=32),
    "demo_sound": Kind(_demo("sound", "FLOW", 1, shift=1.0), (1, 64, 64), width=32),
    "sd15": Kind(
        _real("SD15", use_linear_in_transformer=False, adm_in_channels=None, **_UNET), (4, 8, 8)
    ),
    "sdxl": Kind(
        _real(
            "SDXL",
            use_linear_in_transformer=True,
            adm_in_channels=16 + 6 * 256,
            num_classes="sequential",
            num_heads=-1,
            num_head_channels=8,
            **_UNET,
        ),
        (4, 8, 8),
        pooled=16,
    ),
    "sd3": Kind(
        _real(
            "SD3",
            in_channels=16,
            pos_embed_scaling_factor=None,
            pos_embed_max_size=16,
            num_patches=256,
            input_size=None,
            adm_in_channels=16,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": 16, "out_features": 64},
            },
            context_size=16,
            depth=1,
        ),
        (16, 8, 8),
        pooled=16,
    ),
    "flux": Kind(_flux, (16, 8, 8), pooled=16),
    "wan": Kind(
        _real(
            "WAN21_T2V",
            image_model="wan2.1",
            model_type="t2v",
            dim=32,
            ffn_dim=64,
            freq_dim=32,
            text_dim=16,
            num_heads=2,
            num_layers=1,
        ),
        (16, 2, 8, 8),
    ),
    "ltxv": Kind(
        _real(
            "LTXV",
            image_model="ltxv",
            cross_attention_dim=64,
            attention_head_dim=32,
            num_attention_heads=2,
            caption_channels=16,
            num_layers=1,
        ),
        (128, 2, 4, 4),
        text={"attention_mask": torch.ones(1, 4, dtype=torch.int64)},
    ),
    "hunyuan_video": Kind(_hunyuan_video, (16, 2, 8, 8), pooled=16),
    "stable_audio": Kind(
        _real(
            "StableAudio",
            _seconds(),
            audio_model="dit1.0",
            embed_dim=32,
            cond_token_dim=768,
            project_cond_tokens=True,
            global_cond_dim=2 * 768,
            depth=1,
            num_heads=1,
        ),
        (64, 16),
        width=768,
    ),
    "ace": Kind(
        _real(
            "ACEStep",
            audio_model="ace",
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            mlp_ratio=2.0,
            speaker_embedding_dim=512,
            text_embedding_dim=16,
            ssl_encoder_depths=[1],
            ssl_names=["mert"],
            ssl_latent_dims=[16],
            lyric_encoder_vocab_size=32,
            lyric_hidden_size=1024,
        ),
        (8, 16, 16),
        text={"conditioning_lyrics": torch.arange(8).reshape(1, 8)},
    ),
}


def build(kind: str, seed: int = 0, slow_ms: float = 0.0, item_ms: float = 0.0) -> Any:
    """A ModelPatcher that the host can clone for other devices; a forward waits `slow_ms` first,
    and `item_ms` for each item of its batch.
    """
    model = KINDS[kind].make()
    if kind not in DEMOS:
        fill(model.diffusion_model, seed)
    model.eval()
    if slow_ms or item_ms:

        def wait(module: Any, args: Any, *_: Any) -> None:
            time.sleep((slow_ms + item_ms * len(args[0])) / 1000)

        model.diffusion_model.register_forward_pre_hook(wait)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=DEVICE, offload_device=DEVICE)
    patcher.cached_patcher_init = (build_again, (kind, seed, slow_ms, item_ms))
    return patcher


def build_again(
    kind: str, seed: int, slow_ms: float, item_ms: float, disable_dynamic: bool = False
) -> Any:
    """What the host calls for a clone on another device."""
    return build(kind, seed, slow_ms, item_ms)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights of the usual size; those of norms are 1, biases small.

    All that a file of weights has is set, buffers among it: constructors leave that empty. Other
    buffers are what a constructor computes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            if value.ndim > 1:
                size = 1 / max(value[0].numel(), 1) ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * size)
            elif name.endswith(("weight", "scale", "gamma")):
                value.fill_(1.0)
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)


def conditioning(kind: str, seed: int, tokens: int = 4) -> list[Any]:
    """Random text; of a demo model that of class `seed`, and no class for a seed of -1."""
    if kind in DEMOS:
        from parastep import demo

        model = demo.load(DEMOS[kind])
        rows = (model.rows(table, [max(seed, 0)])[seed < 0] for table in model.prompts)
        prompt, pooled = [*rows, None][:2]
        return [[prompt, {"pooled_output": pooled}]]
    generator = torch.Generator().manual_seed(1000 + seed)
    text = torch.randn(1, tokens, KINDS[kind].width, generator=generator)
    pooled = None
    if KINDS[kind].pooled is not None:
        pooled = torch.randn(1, KINDS[kind].pooled, generator=generator)
    return [[text, {"pooled_output": pooled, **KINDS[kind].text}]]
