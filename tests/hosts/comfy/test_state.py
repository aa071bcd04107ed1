"""What is hung into a model and keeps something: right and serial with the reason; what keeps
nothing stays parallel. The model is afterwards what it was before.
"""

from __future__ import annotations

import contextlib
import functools
import types

import graphs
import pytest
import torch
from inprocess import build, check_parallel, sample

pytestmark = pytest.mark.usefixtures("host")

CALLS = 3


def wrapped(function):
    """A change of a model: this function around its calls, (apply, given) -> output."""

    def change(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(function)
        return model

    return change


def forward(apply, given):
    return apply(given["input"], given["timestep"], **given["c"])


def scaled(output, count):
    return output * (1 + 0.02 * (count % 3))


# ---- functions that keep something ---------------------------------------------------------------


class UnderADecorator:
    def __init__(self):
        self.count = 0

    @torch.inference_mode()
    def __call__(self, apply, given):
        self.count += 1
        return scaled(forward(apply, given), self.count)


class InAMethod(UnderADecorator):
    def bump(self):
        self.count += 1

    def __call__(self, apply, given):
        self.bump()
        return scaled(forward(apply, given), self.count)


class InAnItem:
    def __init__(self):
        self.buffer = torch.zeros(2)

    def __call__(self, apply, given):
        self.buffer[0] += 1
        return scaled(forward(apply, given), float(self.buffer[0]))


class ByData(InAnItem):
    def __call__(self, apply, given):
        self.buffer.data[0] += 1
        return scaled(forward(apply, given), float(self.buffer[0]))


class ByAnotherName:
    def __init__(self):
        self.count = 0

    def __call__(this, apply, given):
        this.count += 1
        return scaled(forward(apply, given), this.count)


def in_a_helper():
    count = 0

    def bump():
        nonlocal count
        count += 1
        return count

    def function(apply, given):
        return scaled(forward(apply, given), bump())

    return function


def under_wraps():
    inner = in_a_helper()

    @functools.wraps(inner)
    def function(*args):
        return inner(*args)

    return function


def in_a_dict():
    kept = {}

    def function(apply, given):
        last = kept.get("last", 0.0)
        kept["last"] = out = forward(apply, given)
        return out + 0.02 * (last if getattr(last, "shape", None) == out.shape else 0.0)

    return function


def in_a_context():
    @contextlib.contextmanager
    def counting():
        while True:
            yield
            kept[0] += 1

    class Context:
        def __init__(self):
            self.depth = 0

        def __enter__(self):
            self.depth += 1

        def __exit__(self, *error):
            pass

    kept, context = [0], Context()

    def function(apply, given):
        with context:
            return scaled(forward(apply, given), context.depth)

    return function


def in_a_random_state():
    generator = torch.Generator().manual_seed(1)

    def function(apply, given):
        return forward(apply, given) * (1 + 0.01 * float(torch.rand(1, generator=generator)))

    return function


COUNTS = {"calls": 0}


def in_a_global():
    COUNTS["calls"] = 0

    def function(apply, given):
        COUNTS["calls"] += 1
        return scaled(forward(apply, given), COUNTS["calls"])

    return function


KEEPING = {
    "under a decorator": UnderADecorator,
    "in a method": InAMethod,
    "in an item": InAnItem,
    "by .data": ByData,
    "by another name": ByAnotherName,
    "in a helper": in_a_helper,
    "under wraps": under_wraps,
    "in a dict": in_a_dict,
    "in a context": in_a_context,
    "in a random state": in_a_random_state,
    "in a global": in_a_global,
    "a partial": lambda: functools.partial(InAnItem().__call__),
}


def in_the_options(model):
    """As guidance with momentum does."""

    def function(given):
        kept = given["model_options"].setdefault("momentum", {})
        kept["last"] = step = given["cond"] - given["uncond"] + 0.1 * kept.get("last", 0.0)
        return given["uncond"] + 2.0 * step

    model = model.clone()
    model.set_model_sampler_cfg_function(function)
    return model


def three(make, patched, devices=("cpu",) * 3, kind="flow", steps=10, sampler="euler", **given):
    """Latents, and reports where `patched`, of runs one after another with one changed model."""
    from parastep.comfy.node import of_model, patch

    model = make(build(kind))
    if patched:
        model = patch(model, list(devices), **given)
    runs = []
    for seed in range(CALLS):
        settings = {"sampler": sampler, "scheduler": "simple", "steps": steps, "seed": seed}
        found = sample(model, kind, **settings)
        runs.append((found, of_model(model).report if patched else None))
    return runs


def check_serial(make, words="", sampler="euler", **options):
    """Right in all runs, each of them serial with a reason."""
    runs = three(make, False, sampler=sampler), three(make, True, sampler=sampler, **options)
    for (own, _), (found, report) in zip(*runs):
        assert torch.equal(found, own)
        assert report.fallback and words in report.fallback, report
        assert sum(report.evaluations[1:]) == 0 and report.rounds == report.steps


@pytest.mark.parametrize("how", KEEPING)
@pytest.mark.parametrize("given", [{"tolerance": "rehearse"}, {}, {"devices": ["cpu"]}])
def test_what_keeps_something_runs_serially(how, given):
    check_serial(lambda model: wrapped(KEEPING[how]())(model), **given)


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
def test_what_is_kept_in_model_options(sampler):
    check_serial(in_the_options, "momentum", sampler)
    check_serial(in_the_options, "momentum", sampler, tolerance="rehearse")


def test_a_guider_that_counts():
    import comfy.samplers

    from parastep.comfy.node import of_model, patch

    class Counting(comfy.samplers.CFGGuider):
        kept = None

        def predict_noise(self, x, timestep, *given, **more):
            self.kept = [*(self.kept or ()), 1]
            return scaled(super().predict_noise(x, timestep, *given, **more), len(self.kept))

    def run(model):
        from tiny_pack import models

        guider = Counting(model)
        guider.set_conds(models.conditioning("flow", 1), models.conditioning("flow", 2))
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        sigmas = torch.linspace(1.0, 0.0, 11)
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)

    ours = patch(build("flow"), ["cpu"] * 3, tolerance="rehearse")
    assert torch.equal(run(build("flow")), run(ours))
    assert "kept" in of_model(ours).report.fallback


def test_what_is_kept_in_modules():
    """By a forward that was put into one, and by a hook."""

    def counting_forward(model):
        net = model.model.diffusion_model.out
        stock = type(net).forward

        def own(self, x):
            self.count = getattr(self, "count", 0) + 1
            return scaled(stock(self, x), self.count)

        net.forward = types.MethodType(own, net)
        return model

    def counting_hook(model):
        kept = [0]

        def hook(module, given, output):
            kept[0] += 1
            return scaled(output, kept[0])

        model.model.diffusion_model.out.register_forward_hook(hook)
        return model

    for make in (counting_forward, counting_hook):
        check_serial(make)
        check_serial(make, tolerance="rehearse")


def test_a_part_that_replays_a_graph():
    def make(model):
        graphs.replay(model.model.diffusion_model.out)
        return model

    check_serial(make, "out replays a CUDA graph")


def test_what_is_only_kept_during_a_call():
    """As HyperTile does between a patch before attention and one after it; here in a list."""

    def make(model):
        place, net = [], model.model.diffusion_model
        net.into.register_forward_hook(lambda *given: place.append(1.02))
        net.out.register_forward_hook(lambda module, given, out: out * place.pop())
        return model

    check_serial(make, "put back")


def test_what_begins_to_keep_later_stops_speculation():
    """Not seen in the first evaluation: the run says so, and the next ones are serial."""
    from parastep.comfy.node import of_model, patch

    kept = {}

    def function(apply, given):
        out = forward(apply, given)
        if float(given["timestep"][0]) < 0.7:
            kept["last"] = out
        return out

    model = patch(wrapped(function)(build("flow")), ["cpu"] * 3, tolerance="rehearse")
    for _ in range(CALLS):
        sample(model, "flow", scheduler="simple", steps=10)
        report = of_model(model).report
        assert "kept" in report.fallback
    assert sum(report.evaluations[1:]) == 0


def test_what_is_made_once_is_parallel_from_the_next_run_on():
    made = {}

    def function(apply, given):
        if "factor" not in made:
            made["factor"] = 1.02
        return forward(apply, given) * made["factor"]

    runs = three(wrapped(function), True, tolerance="rehearse")
    assert "made" in runs[0][1].fallback
    for _, report in runs[1:]:
        check_parallel(report)


# ---- attributes that are swapped for the time of a call ------------------------------------------


def swapping(model):
    """As cache packs do: a forward of theirs while the model runs."""
    net = model.model.diffusion_model

    def function(apply, given):
        stock = net.out
        net.out = torch.nn.Sequential(stock, torch.nn.Tanh())
        try:
            return forward(apply, given)
        finally:
            net.out = stock

    return wrapped(function)(model)


def compiled(model):
    """The host's wrapper that swaps a compiled model in, without a compiler."""
    torch_compile = pytest.importorskip("comfy_api.torch_helpers.torch_compile")
    model = model.clone()
    torch_compile.set_torch_compile_wrapper(model, backend="eager")
    return model


def casting(model):
    """As hooks do that keep weights in fewer bits: they are cast for the time of a layer's call."""
    net = model.model.diffusion_model.out

    def cast(module, given):
        module.stored = module.weight.data
        module.weight.data = module.weight.data.to(torch.bfloat16).float()

    def put_back(module, given, output):
        module.weight.data = module.stored
        del module.stored

    net.register_forward_pre_hook(cast)
    net.register_forward_hook(put_back)
    return model


@pytest.mark.parametrize("make", [swapping, compiled, casting])
def test_swapped_attributes(make):
    check_serial(make, "put back", tolerance="rehearse")
    check_serial(make, "put back")
    for _, report in three(make, True, devices=["cpu"], steps=30):  # with nobody else there
        assert report.fallback is None and report.rounds < report.steps


def state_of(model):
    """Everything that a model's modules have, by identity."""
    found = {}
    for path, module in model.model.named_modules():
        for name, value in vars(module).items():
            if name == "latent_shapes":  # which the host sets in each run
                continue
            items = value.items() if isinstance(value, dict) else [("", value)]
            found |= {(path, name, key): id(item) for key, item in items}
    return found


class Failing:
    """A hook that raises at noise levels from one on, as others would evaluate them too."""

    below, error = -1.0, RuntimeError("out of memory")

    def __call__(self, module, given):
        if float(given[0].max()) < self.below:
            raise self.error


@pytest.mark.parametrize("make", [swapping, compiled, wrapped(forward)])
def test_the_model_is_what_it_was(make):
    """After runs that end, that fail and that are cancelled, in the first evaluation and later; and
    what was not looked at to its end is not taken for clean.
    """
    from comfy.model_management import InterruptProcessingException

    from parastep.comfy.node import of_model, patch

    model, hook = build("flow"), Failing()
    model.model.diffusion_model.time.register_forward_pre_hook(hook)
    sample(model, "flow")  # so that the host has loaded it
    ours = patch(make(model), ["cpu"] * 3, tolerance="rehearse")
    before = state_of(model)
    for below in (2.0, 0.6, -1.0, 0.6, -1.0):
        for error in (RuntimeError("out of memory"), InterruptProcessingException()):
            hook.below, hook.error = below, error
            with contextlib.suppress(RuntimeError, InterruptProcessingException):
                sample(ours, "flow", scheduler="simple", steps=10)
            assert state_of(model) == before
            assert not torch.nn.modules.module._global_forward_pre_hooks
    report = of_model(ours).report
    if make in (swapping, compiled):
        assert "put back" in report.fallback
    else:
        check_parallel(report)


# ---- what keeps nothing --------------------------------------------------------------------------


def free_u(model):
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)[0]


def rescaled(model):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG.patch(RescaleCFG(), model, 0.7)[0]


def with_guidance(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0)[0]


def compiled_in_place(model):
    model.model.diffusion_model.out.compile(backend="eager")
    return model


def compiled_as_an_object(model):
    model = model.clone()
    module = torch.compile(model.get_model_object("diffusion_model"), backend="eager")
    model.add_object_patch("diffusion_model", module)
    return model


class Adapter:
    """An object with weights in place of attention's output."""

    def __init__(self):
        self.scale = torch.linspace(0.9, 1.1, 3)

    @torch.inference_mode()
    def __call__(self, apply, given):
        return forward(apply, given) * self.scale.mean()


HARMLESS = {
    "nothing": (lambda model: model, "sd15"),
    "a wrapper": (wrapped(forward), "sd15"),
    "an object": (lambda model: wrapped(Adapter())(model), "sd15"),
    "FreeU": (free_u, "sd15"),
    "RescaleCFG": (rescaled, "sd15"),
    "PAG": (with_guidance, "sd15"),
    "compiled in place": (compiled_in_place, "flow"),
    "compiled as an object": (compiled_as_an_object, "sd15"),
}


@pytest.mark.parametrize("how", HARMLESS)
def test_what_keeps_nothing_is_parallel_from_the_first_run_on(how):
    make, kind = HARMLESS[how]
    runs = three(make, True, kind=kind, tolerance="rehearse")
    for (own, _), (found, report) in zip(three(make, False, kind=kind), runs):
        assert torch.equal(found, own)
        check_parallel(report)


def test_only_the_first_run_looks(monkeypatch):
    """Later ones evaluate nothing alone; a stock model is never looked at."""
    from parastep.comfy import state as look
    from parastep.comfy.node import patch

    looked, first = [], look.Look.first
    monkeypatch.setattr(
        look.Look, "first", lambda self, *given: looked.append(1) or first(self, *given)
    )
    stock = patch(build("sd15"), ["cpu"] * 3)
    ours = patch(wrapped(forward)(build("sd15")), ["cpu"] * 3)
    for _ in range(CALLS):
        sample(stock, "sd15")
    assert not looked
    for _ in range(CALLS):
        sample(ours, "sd15")
    assert len(looked) == 1
