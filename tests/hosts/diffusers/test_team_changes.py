"""What a loop, or a denoiser, does that a helper would not see: a pair at tolerance 0 has the
host's bits, whatever it is, and says why it shares less.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
import written  # noqa: E402
from hosting import caught, host, no_warnings  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers.forwards import Inputs, is_same  # noqa: E402

STEPS = 8
ambient: contextvars.ContextVar[float] = contextvars.ContextVar("ambient", default=1.0)


class Net(written.Net):
    """Conditioned by a vector, with an attribute and a part that a loop may change."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.inner = 1.0, torch.nn.Identity()
        self.plain = collections.UserDict(by=1.0)

    def forward(self, x: torch.Tensor, t: Any, c: Any, more: Any = None) -> torch.Tensor:
        if isinstance(more, collections.OrderedDict):
            c = c * more["by"]
        return self.inner(super().forward(x, t)) * self.gain * self.plain["by"] + c * ambient.get()


def nothing(pipe: Any, step: int, x: Any) -> Any:
    return contextlib.nullcontext()


FIRST, SECOND = torch.full((1, 4, 1, 1), 0.02), torch.full((1, 4, 1, 1), -0.03)


def pipeline(
    around: Callable[[Any, int, torch.Tensor], Any] = lambda pipe, step, x: (
        contextlib.nullcontext()
    ),
    net: Any = None,
    given: Callable[[int], Any] = lambda step: None,
    second: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Any:
    """Two calls a step, the second one within `around`, with `given(step)` as its last argument."""

    def loop(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = written.begin(pipe, steps, generator, (1, 4, 8, 8))
        for step, t in enumerate(pipe.scheduler.timesteps):
            a = pipe.denoiser(x, t, FIRST)
            with around(pipe, step, x):
                b = pipe.denoiser(second(x), t, SECOND, given(step))
            x = pipe.scheduler.step(b + 2 * (a - b), t, x).prev_sample
        return x

    return written.written(loop, net or Net())


def run(pipe: Any, seed: int = 0) -> torch.Tensor:
    result: torch.Tensor = pipe(STEPS, torch.Generator().manual_seed(seed))
    return result


def check(make: Callable[[], Any], calls: int = 3) -> Any:
    """The reports of a pair at tolerance 0, whose results are those of a pipe that has none."""
    alone, pipe, reports = make(), make(), []
    with parastep.parallelize(pipe, [("cpu", "cpu")], tolerance=0) as together, caught():
        for seed in range(calls):
            assert torch.equal(run(together, seed), run(alone, seed))
            reports.append(together.report)
    assert torch.equal(run(pipe), run(alone))
    return reports


# ---- between two calls ---------------------------------------------------------------------------


@contextlib.contextmanager
def attribute(pipe: Any, step: int, x: Any) -> Any:
    pipe.denoiser.gain = 0.9
    yield
    pipe.denoiser.gain = 1.0


@contextlib.contextmanager
def plain_object(pipe: Any, step: int, x: Any) -> Any:
    pipe.denoiser.plain["by"] = 0.9
    yield
    pipe.denoiser.plain["by"] = 1.0


@contextlib.contextmanager
def hook(pipe: Any, step: int, x: Any) -> Any:
    handle = pipe.denoiser.inner.register_forward_hook(lambda part, args, out: out * 0.9)
    yield
    handle.remove()


@contextlib.contextmanager
def part(pipe: Any, step: int, x: Any) -> Any:
    own, pipe.denoiser.inner = pipe.denoiser.inner, torch.nn.Tanh()
    yield
    pipe.denoiser.inner = own


@contextlib.contextmanager
def weight(pipe: Any, step: int, x: Any) -> Any:
    pipe.denoiser.weight.mul_(0.9)
    yield
    pipe.denoiser.weight.div_(0.9)


@contextlib.contextmanager
def context_variable(pipe: Any, step: int, x: Any) -> Any:
    token = ambient.set(0.9)
    yield
    ambient.reset(token)


def autocast(pipe: Any, step: int, x: Any) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def latents(pipe: Any, step: int, x: torch.Tensor) -> Any:
    x.data.mul_(1.01)  # past versions
    yield


CHANGES = [attribute, plain_object, hook, part, weight, context_variable, autocast, latents]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_loop_that_changes_something_for_its_second_call(change: Any, late: bool) -> None:
    def around(pipe: Any, step: int, x: Any) -> Any:
        return change(pipe, step, x) if step >= 4 or not late else contextlib.nullcontext()

    reports = check(lambda: pipeline(around))
    assert all(team.shared <= 5 for report in reports for team in report.teams)


def test_nothing_changes() -> None:
    """A denoiser of one's own is looked at in the first step, and shows its bits in each call."""
    reports = check(pipeline)
    assert [report.teams[0].shared for report in reports] == [STEPS - 2, STEPS - 1, STEPS - 1]


def test_an_adapter_that_is_off_for_one_branch() -> None:
    """As diffusers' own methods switch it, from the middle of the run on."""
    case = tiny.CASES["sd_lora"]
    results = []
    for with_team in (False, True):
        pipe = case.build()
        unet, calls = pipe.unet, [0]

        def switch(module: Any, args: Any, calls: Any = calls, unet: Any = unet) -> None:
            calls[0] += 1
            if calls[0] == 3:
                unet.disable_adapters()

        unet.conv_in.register_forward_pre_hook(switch)
        together = parastep.parallelize(pipe, [("cpu", "cpu")], tolerance=0) if with_team else pipe
        with caught():
            results.append(tiny.run(together, case.kwargs(steps=5)))
    assert torch.equal(*results)


# ---- arguments -----------------------------------------------------------------------------------


def test_arguments_that_nobody_can_compare() -> None:
    """An object that the loop edits, of which a helper would be told too late."""
    settings = collections.OrderedDict(by=1.0)

    def given(step: int) -> Any:
        settings["by"] = 1.0 + step / 10
        return settings

    reports = check(lambda: pipeline(given=given))
    assert all(report.teams[0].shared == 0 for report in reports)
    assert "cannot be compared (argument 4)" in reports[-1].teams[0].unsplit


def test_another_layout_in_memory() -> None:
    """It may round in another way."""
    check(lambda: pipeline(second=lambda x: x.contiguous(memory_format=torch.channels_last)))


def test_bits_are_compared() -> None:
    zeros = torch.zeros(2)
    assert is_same(zeros, zeros.clone()) and not is_same(zeros, -zeros)
    assert is_same(zeros * torch.nan, zeros * torch.nan) and not is_same(0.0, -0.0)
    assert not is_same(torch.ones(2, 2), torch.ones(2, 2).t().contiguous().t())
    assert Inputs((zeros, {"a": object()}), {}).opaque == "argument 2.a"
    assert Inputs((zeros, {"a": [1, None, "b"]}), {"c": torch.float16}).opaque is None


# ---- denoisers -----------------------------------------------------------------------------------


class Writes(Net):
    """To its input, from a noise level on; or to a list that it is given."""

    def __init__(self, below: float = 1e9, only_second: bool = False) -> None:
        super().__init__()
        self.below, self.only_second = below, only_second

    def forward(self, x: torch.Tensor, t: Any, c: Any, more: Any = None) -> torch.Tensor:
        if float(t) < self.below and (float(c.flatten()[0]) < 0 or not self.only_second):
            x.mul_(0.99)
        return super().forward(x, t, c)


class Collects(Net):
    def forward(self, x: torch.Tensor, t: Any, c: Any, more: Any = None) -> torch.Tensor:
        if more is not None:
            c = c + 0.01 * len(more)
            more.append(x.mean())
        return super().forward(x, t, c)


class Draws(Net):
    """From the global generator, from a noise level on."""

    def forward(self, x: torch.Tensor, t: Any, c: Any, more: Any = None) -> torch.Tensor:
        output = super().forward(x, t, c)
        return output + 0.01 * torch.randn(1) if float(t) < 500 else output


class Returns(Net):
    """What it was given."""

    def forward(self, x: torch.Tensor, t: Any, c: Any, more: Any = None) -> torch.Tensor:
        return x.mul(1.0) if float(t) > 2000 else x


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("below", [1e9, 500.0])
@pytest.mark.parametrize("only_second", [False, True])
def test_a_denoiser_that_writes_to_its_input(
    below: float, only_second: bool, inference: bool
) -> None:
    with torch.inference_mode(inference):
        check(lambda: pipeline(net=Writes(below, only_second)))


def test_a_denoiser_that_writes_to_a_list() -> None:
    def make() -> Any:
        collected: list[Any] = []
        return pipeline(net=Collects(), given=lambda step: collected)

    check(make)


def test_a_denoiser_that_draws_late() -> None:
    results = []
    for with_team in (False, True):
        pipe = pipeline(net=Draws())
        together = parastep.parallelize(pipe, [("cpu", "cpu")], tolerance=0) if with_team else pipe
        with torch.random.fork_rng(devices=[]), caught():
            torch.manual_seed(3)
            results.append((run(together), run(together, 1), torch.get_rng_state()))
    assert all(map(torch.equal, *results))


def test_a_denoiser_that_gives_back_its_input() -> None:
    check(lambda: pipeline(net=Returns()))


# ---- between calls of the pipeline ---------------------------------------------------------------


class Setting:
    by = 1.0


def test_what_a_hook_reads_is_changed_between_two_calls() -> None:
    """The replica has a copy of it."""
    results = []
    for with_team in (False, True):
        pipe = pipeline()
        pipe.denoiser.deep = [[Setting()]]
        pipe.denoiser.register_forward_hook(lambda m, args, out: out * m.deep[0][0].by)
        together = parastep.parallelize(pipe, [("cpu", "cpu")], tolerance=0) if with_team else pipe
        found = []
        for by in (1.0, 0.9, 0.8):
            pipe.denoiser.deep[0][0].by = by
            with caught():
                found.append(run(together))
        results.append(found)
    assert all(map(torch.equal, *results))


# ---- batches -------------------------------------------------------------------------------------


def test_prompts_of_other_lengths() -> None:
    """A verdict is one on calls of one kind: what may be cut by its first axis may be as long."""
    pipe, case = host("flux"), tiny.CASES["flux"]
    with parastep.parallelize(pipe, [("cpu", "cpu")]) as together, no_warnings():
        for count in (2, 3, 2):
            given = case.kwargs(steps=4, num_images_per_prompt=2)
            words = given["prompt_embeds"].shape[1]
            given["prompt_embeds"] = given["prompt_embeds"][:, : count if words > count else words]
            tiny.run(together, given)
            assert together.report.failures == []


class Couples(torch.nn.Module):
    """Items that know of each other, by less than what batches of steps may differ by."""

    def forward(self, x: torch.Tensor, t: Any, c: Any) -> torch.Tensor:
        return torch.tanh(x) + c + 5e-3 * x.mean()


def test_items_that_know_of_each_other_a_little() -> None:
    def loop(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = written.begin(pipe, steps, generator, (1, 4, 8, 8))
        both = torch.cat([FIRST, SECOND])
        for t in pipe.scheduler.timesteps:
            a, b = pipe.denoiser(torch.cat([x, x * 0.5]), t, both).chunk(2)
            x = pipe.scheduler.step(b + 2 * (a - b), t, x).prev_sample
        return x

    def make() -> Any:
        return written.written(loop, Couples())

    wanted, options = run(make()), {"tolerance": math.inf, "max_stride": 1}
    with parastep.parallelize(make(), [("cpu", "cpu")], **options) as together, caught():
        assert torch.equal(run(together), wanted)
        assert "cannot be cut" in together.report.teams[0].unsplit
