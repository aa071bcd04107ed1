"""What a replica is made of: denoisers of its own, and of the encoders no more than hooks need."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import no_warnings, parallel  # noqa: E402

CALLS = 3


def computed(module: Any) -> list[str]:
    """Attributes that are results of a computation with gradients, which nobody can deep-copy."""
    parts = module.named_modules()
    found = ((path, name, v) for path, part in parts for name, v in vars(part).items())
    return [f"{p}.{n}" for p, n, v in found if isinstance(v, torch.Tensor) and not v.is_leaf]


def check_parallel(pipe: Any, case: Any, wanted: torch.Tensor, **options: Any) -> None:
    """Several calls on the same replicas, each with the host's own bits."""
    with no_warnings(), parallel(pipe, 3, **options) as together:
        made = []
        for _ in range(CALLS):
            assert torch.equal(tiny.run(together, case.kwargs(decode=True)), wanted)
            assert together.report.fallback is None and together.report.failures == []
            assert min(together.report.evaluations) > 1
            made.append(dict(together._ranks._replicas))
        assert all(made[0][rank] is later[rank] for later in made for rank in later)


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_a_vae_with_weights_computed_at_every_use(mode: str) -> None:
    """weight_norm, in Stable Audio's VAE as it is loaded."""
    case = tiny.CASES["stable_audio"]
    pipe = case.build()
    assert computed(pipe.vae)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(pipe.vae)
    check_parallel(pipe, case, tiny.run(case.build(), case.kwargs(decode=True)), mode=mode)


def test_a_denoiser_with_weights_computed_at_every_use() -> None:
    case = tiny.CASES["sd"]
    pipe, alone = case.build(), case.build()
    for each in (pipe, alone):
        torch.nn.utils.weight_norm(each.unet.conv_in)
    assert computed(pipe.unet)
    check_parallel(pipe, case, tiny.run(alone, case.kwargs(decode=True)))


def test_hooks_on_a_replica_are_not_on_the_pipeline() -> None:
    """Encoders of a replica are objects of their own, of the same tensors, whatever they hold."""
    case = tiny.CASES["sd"]
    pipe = case.build()
    with parallel(pipe, 2) as together:
        tiny.run(together, case.kwargs())
        [replica] = together._ranks._replicas.values()
        ours, theirs = (dict(p.text_encoder.named_modules()) for p in (pipe, replica))
        assert ours.keys() == theirs.keys()
        assert not {id(part) for part in ours.values()} & {id(part) for part in theirs.values()}
        weights = zip(pipe.text_encoder.parameters(), replica.text_encoder.parameters())
        assert all(a is b for a, b in weights)
        replica.text_encoder.register_forward_hook(lambda *given: None)
        assert not pipe.text_encoder._forward_hooks
