"""A modular pipeline with every guider of diffusers: the host's bits, and who runs serially."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
modular = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_xl")
guiders = pytest.importorskip("diffusers.guiders")

import tiny  # noqa: E402
from hosting import caught, distance, no_warnings, parallel  # noqa: E402

STEPS, RANKS = 10, 3
NAMES = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
MIDDLE = "mid_block.attentions.0.transformer_blocks"


def guider(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(guiders, kind)(**options)


def skipping(kind: str, key: str, scale: str, **what: Any) -> Callable[[], Any]:
    """A guider that calls the model once more with a part of it taken out, by hooks for the time
    of that call.
    """

    def make() -> Any:
        config = diffusers.LayerSkipConfig(indices=[0], fqn=MIDDLE, **what)
        return getattr(guiders, kind)(guidance_scale=5.0, **{key: config, scale: 2.0})

    return make


def energy() -> Any:
    config = diffusers.hooks.SmoothedEnergyGuidanceConfig(indices=[0], fqn=MIDDLE)
    options = {"seg_guidance_scale": 2.0, "seg_guidance_config": config}
    return guiders.SmoothedEnergyGuidance(guidance_scale=5.0, **options)


SCORES = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
GUIDERS = {
    "classifier-free": guider("ClassifierFreeGuidance", guidance_scale=5.0),
    "rescaled": guider("ClassifierFreeGuidance", guidance_scale=5.0, guidance_rescale=0.7),
    "zero-star": guider("ClassifierFreeZeroStarGuidance", guidance_scale=5.0, zero_init_steps=2),
    "projected": guider("AdaptiveProjectedGuidance", guidance_scale=5.0),
    "tangential": guider("TangentialClassifierFreeGuidance", guidance_scale=5.0),
    "perturbed": skipping(
        "PerturbedAttentionGuidance",
        "perturbed_guidance_config",
        "perturbed_guidance_scale",
        **SCORES,
    ),
    "skip-layer": skipping("SkipLayerGuidance", "skip_layer_config", "skip_layer_guidance_scale"),
    "energy": energy,
    "projected with momentum": guider(
        "AdaptiveProjectedGuidance",
        guidance_scale=5.0,
        adaptive_projected_guidance_momentum=-0.5,
    ),
    "mixed": guider("AdaptiveProjectedMixGuidance"),
}
SERIAL = ("projected with momentum", "mixed")


def built(make: Callable[[], Any]) -> Any:
    parts = tiny.CASES["sdxl"].build().components
    pipe = modular.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: parts[name] for name in NAMES}, guider=make())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def result_of(pipe: Any) -> Any:
    size = {"height": 32, "width": 32, "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt="a red cat", **size, generator=generator, output="latents")


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(name: str) -> None:
    """Three calls each, rehearsed and as it comes."""
    try:
        alone = result_of(built(GUIDERS[name]))
    except (AttributeError, TypeError) as error:  # not in every version, nor with all options
        pytest.skip(f"this diffusers has no such guider: {error}")
    except ValueError as error:  # an early modular pipeline takes only what it has loaded itself
        if "ComponentSpec" not in str(error):
            raise
        pytest.skip(f"this diffusers' modular pipelines take no modules: {error}")
    for tolerance in (0.0, 0.02):
        together = parallel(built(GUIDERS[name]), RANKS, tolerance)
        for _ in range(3):
            if name in SERIAL:
                with caught() as texts:
                    assert torch.equal(result_of(together), alone)
                assert "averages over the outputs" in together.report.fallback and len(texts) == 1
                continue
            with no_warnings():
                result = result_of(together)
            assert together.report.evaluations[1] > 1
            if tolerance == 0.0:
                assert torch.equal(result, alone)
                assert together.report.evaluations == [STEPS, STEPS - 1, STEPS - 2]
            else:
                assert together.report.rounds < STEPS and distance(result, alone) < 0.02
