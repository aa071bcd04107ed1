"""What saves memory: offload, device maps, quantised weights. In parallel, or serial with a reason.

Kinds of quantised weights whose package is not there are skipped; `make test-quantised` has them
all. A device "cpu:0" is another one than "cpu" to torch, so that weights are moved there.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

import tiny  # noqa: E402
from hosting import caught, distance, no_warnings, own  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers import offload, replicas  # noqa: E402
from parastep.diffusers.memory import weights_of  # noqa: E402

STEPS = 6
PLACES = {
    "threads": {"devices": ["cpu"] * 3},
    "others": {"devices": ["cpu", "cpu:0", "cpu:1"]},
    "processes": {"devices": ["cpu"] * 3, "mode": "processes"},
}


def check(pipe: Any, case: tiny.Case, alone: Any, **where: Any) -> None:
    """Three calls each: rehearsed the host's bits, balanced a close picture, always the same."""
    for tolerance in ("rehearse", "balanced"):
        with parastep.parallelize(pipe, tolerance=tolerance, max_stride=1, **where) as together:
            results = []
            for _ in range(3):
                with no_warnings():
                    results.append(tiny.run(together, case.kwargs(steps=STEPS)))
                assert together.report.evaluations[1] > 1 and not together.report.failures
            if tolerance == "rehearse":
                assert together.report.evaluations == [STEPS, STEPS - 1, STEPS - 2]
                assert all(torch.equal(result, alone) for result in results)
            else:
                assert distance(results[0], alone) < 0.05
                assert all(torch.equal(result, results[0]) for result in results)


# ---- where weights are ---------------------------------------------------------------------------


def with_model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def with_device_map(pipe: Any) -> None:
    for name in ("unet", "transformer", "text_encoder"):
        if getattr(pipe, name, None) is not None:
            accelerate.dispatch_model(getattr(pipe, name), {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    ("name", "save", "place"),
    [
        ("sd", with_model_offload, "threads"),
        ("flux", with_model_offload, "others"),
        ("sd", with_model_offload, "processes"),
        ("flux", with_device_map, "threads"),
        ("sd", with_device_map, "others"),
        ("flux", with_device_map, "processes"),
    ],
)
def test_weights_that_stay_during_the_loop(name: str, save: Any, place: str) -> None:
    case = tiny.CASES[name]
    pipe = case.build()
    save(pipe)
    check(pipe, case, own(name, STEPS).result, **PLACES[place])
    denoiser = pipe.unet if name == "sd" else pipe.transformer
    assert denoiser._hf_hook is not None and denoiser.forward is not denoiser._old_forward


def test_replicas_are_made_once_of_weights_that_come_and_go(monkeypatch: Any) -> None:
    """Each call finds them at other addresses; one that was written to makes replicas anew."""
    moved = accelerate.hooks.CpuOffload.init_hook

    def elsewhere(self: Any, module: Any) -> Any:
        for weight in module.parameters():
            weight.data = weight.data.clone()
        for part in module.modules():
            for key, buffer in part._buffers.items():
                part._buffers[key] = None if buffer is None else buffer.clone()
        return moved(self, module)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", elsewhere)
    made = []
    replicate = replicas.replicate
    monkeypatch.setattr(
        "parastep.diffusers.ranks.replicate",
        lambda *args, **kwargs: made.append(args) or replicate(*args, **kwargs),
    )
    case = tiny.CASES["sd"]
    pipe = case.build()
    pipe.unet.register_buffer("extra", torch.zeros(3))
    with_model_offload(pipe)
    together = parastep.parallelize(pipe, ["cpu"] * 3, tolerance="rehearse")
    address = pipe.unet.conv_in.weight.data_ptr()
    for _ in range(3):
        assert torch.equal(tiny.run(together, case.kwargs(steps=STEPS)), own("sd", STEPS).result)
    assert pipe.unet.conv_in.weight.data_ptr() != address and len(made) == 2
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    alone = tiny.run(pipe, case.kwargs(steps=STEPS))
    assert torch.equal(tiny.run(together, case.kwargs(steps=STEPS)), alone) and len(made) == 4
    pipe.unet.extra += 1
    tiny.run(together, case.kwargs(steps=STEPS))
    assert len(made) == 6


def test_followers_hold_weights_that_the_leader_moves() -> None:
    case = tiny.CASES["sd"]
    pipe = case.build()
    with_model_offload(pipe)
    replica = replicas.replicate(pipe, torch.device("cpu"))
    assert replica.unet.conv_in.weight.data_ptr() != pipe.unet.conv_in.weight.data_ptr()
    for module in (replica.unet, replica.text_encoder, replica.vae):
        assert not any(set(vars(module)) & {"_hf_hook", "_old_forward", "forward"})
    assert not replica._all_hooks and len(pipe._all_hooks) > 1


def test_a_forward_of_the_users_stays_beneath_the_hooks() -> None:
    """In the replicas, which nobody needs: a look at such code sees the weights being moved."""
    case = tiny.CASES["sd"]
    pipe = case.build()
    plain = type(pipe.unet).forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (plain(self, *args, **kwargs)[0] * 0.5,)

    pipe.unet.forward = halved.__get__(pipe.unet)
    alone = tiny.run(pipe, case.kwargs(steps=STEPS))
    assert not torch.equal(alone, own("sd", STEPS).result)
    with_model_offload(pipe)
    replica = replicas.replicate(pipe, torch.device("cpu"))
    assert replica.unet.forward.__func__ is halved and replica.unet.forward.__self__ is replica.unet
    together = parastep.parallelize(pipe, ["cpu"] * 3)
    with caught() as texts:
        assert torch.equal(tiny.run(together, case.kwargs(steps=STEPS)), alone)
    assert "changes its weights while it runs" in together.report.fallback and len(texts) == 1


def test_denoisers_that_take_turns_have_no_lane() -> None:
    """Wan 2.2 has two, of which one leaves the device when the other one comes."""
    case = tiny.CASES["wan22"]
    pipe = case.build()
    assert not offload.take_turns(pipe)
    with_model_offload(pipe)
    assert offload.take_turns(pipe)
    check(pipe, case, own("wan22", STEPS).result, devices=["cpu"] * 3)
    with parastep.parallelize(pipe, ["cpu"]) as together, caught() as texts:
        tiny.run(together, case.kwargs(steps=STEPS))
    assert "take turns" in together.report.fallback and len(texts) == 1


def sequential(pipe: Any) -> None:
    weights = dict(pipe.unet.state_dict())
    accelerate.hooks.attach_align_device_hook(pipe.unet, "cpu", offload=True, weights_map=weights)


def spread(pipe: Any) -> None:
    for part, device in ((pipe.unet.conv_in, "cpu"), (pipe.unet.conv_out, "cpu:0")):
        accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook(device))


def in_fp8(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def in_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")


@pytest.mark.parametrize(
    ("save", "why"),
    [
        (sequential, "unet has hooks of accelerate that move weights within its forward"),
        (spread, "unet is spread over cpu, cpu:0"),
        (in_fp8, "unet has hooks of diffusers that cannot be copied"),
        (in_groups, "unet has hooks of diffusers that cannot be copied"),
    ],
)
def test_weights_that_move_within_a_forward(save: Any, why: str) -> None:
    case = tiny.CASES["sd"]
    pipe = case.build()
    save(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = tiny.run(pipe, case.kwargs(steps=STEPS))
    together = parastep.parallelize(pipe, ["cpu"] * 3)
    for _ in range(3):
        with caught() as texts:
            assert torch.equal(tiny.run(together, case.kwargs(steps=STEPS)), alone)
        assert why in together.report.fallback
    assert texts or save is sequential


# ---- quantised weights ---------------------------------------------------------------------------


def replaced(module: Any, make: Callable[[Any], Any]) -> None:
    """Every linear layer of a module, by what `make` makes of it."""
    for name, part in list(module.named_children()):
        if isinstance(part, torch.nn.Linear):
            setattr(module, name, make(part))
        else:
            replaced(part, make)


def by_torchao(config: str) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        package = importlib.import_module("torchao.quantization")
        package.quantize_(model, getattr(package, config)())

    return quantise


def by_bitsandbytes(layer: str, weight: str, **options: Any) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        nn = importlib.import_module("bitsandbytes").nn
        of_layer = {"compute_dtype": torch.float32} if layer == "Linear4bit" else {"threshold": 6.0}
        if layer == "Linear8bitLt":
            of_layer["has_fp16_weights"] = False

        def make(old: Any) -> Any:
            new = getattr(nn, layer)(
                old.in_features, old.out_features, bias=old.bias is not None, **of_layer
            )
            own = old.weight.data.clone()
            new.weight = getattr(nn, weight)(own, requires_grad=False, **options)
            new.bias = old.bias
            return new.to("cpu")

        replaced(model, make)

    return quantise


def by_quanto(freeze: bool) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        quanto = importlib.import_module("optimum.quanto")
        quanto.quantize(model, weights=quanto.qint8)
        if freeze:
            quanto.freeze(model)

    return quantise


def by_gguf(model: Any) -> None:
    gguf = importlib.import_module("gguf")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    def make(old: Any) -> Any:
        if old.in_features % 32:  # not a whole number of blocks
            return old
        new = utils.GGUFLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=torch.float32,
        )
        blocks = gguf.quants.quantize(old.weight.detach().numpy(), kind)
        new.weight = utils.GGUFParameter(torch.from_numpy(blocks), quant_type=kind)
        new.bias = old.bias
        return new

    replaced(model, make)


KINDS = {
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao fp8": by_torchao("Float8WeightOnlyConfig"),
    "torchao int8 throughout": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8": by_bitsandbytes("Linear8bitLt", "Int8Params", has_fp16_weights=False),
    "bitsandbytes 4": by_bitsandbytes("Linear4bit", "Params4bit", quant_type="nf4"),
    "quanto": by_quanto(True),
    "quanto as it comes": by_quanto(False),
    "gguf": by_gguf,
}


@pytest.mark.parametrize(
    ("kind", "place", "used_before"),
    [(kind, place, False) for kind in KINDS for place in PLACES]
    + [(kind, place, True) for kind in KINDS for place in PLACES if "bitsandbytes" in kind],
)
@pytest.mark.filterwarnings("ignore")
def test_quantised(kind: str, place: str, used_before: bool) -> None:
    """Those of bitsandbytes change in their first forward, before replicas are made or after."""
    package = "optimum.quanto" if kind.startswith("quanto") else kind.split()[0]
    pytest.importorskip(package)
    case = tiny.CASES["flux"]

    def build() -> Any:
        pipe = case.build()
        KINDS[kind](pipe.transformer.requires_grad_(False))
        return pipe

    pipe = build()
    alone = tiny.run(pipe if used_before else build(), case.kwargs(steps=STEPS))
    assert not torch.equal(alone, own("flux", STEPS).result)
    if kind != "quanto as it comes":  # which quantises in each forward
        assert weights_of(pipe) < 0.6 * weights_of(case.build())
    check(pipe, case, alone, **PLACES[place])
