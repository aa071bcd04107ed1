"""What a replica is made of: denoisers of its own, and of the encoders no more than hooks need."""

from __future__ import annotations

import copy
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from fake_streams import Streams  # noqa: E402
from hosting import no_warnings, parallel  # noqa: E402

from parastep.diffusers import local  # noqa: E402
from parastep.diffusers.call import Call  # noqa: E402
from parastep.diffusers.forwards import Inputs  # noqa: E402
from parastep.diffusers.remote import members  # noqa: E402
from parastep.diffusers.remote.packing import pipeline_to_memory  # noqa: E402
from parastep.diffusers.replicas import going_along, replicate  # noqa: E402
from parastep.diffusers.teams import helpers  # noqa: E402
from parastep.processes.frames import Frame, Kind  # noqa: E402

HOME, THERE = torch.device("cuda", 0), torch.device("cuda", 1)
META = torch.device("meta")  # a replica's tensors can be told from the leader's there
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


class Quantised(torch.nn.Parameter):
    """As bitsandbytes' weights: torch's operations give plain tensors, and what they are scaled by
    goes along in copies of the whole alone.
    """

    scales: Any

    def __new__(cls, data: Any, scales: Any) -> Any:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.scales = scales
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.data.clone(), self.scales.clone())

    def to(self, device: Any) -> Any:
        return type(self)(self.data.to(device), self.scales.to(device))


class Stubborn(Quantised):
    def to(self, device: Any) -> Any:
        return self.data.to(device)


def with_weights(cls: Any) -> Any:
    """A pipeline with a layer of such weights, and what its layer keeps beside them."""
    pipe = tiny.CASES["sd"].build()
    layer = pipe.unet.time_embedding.linear_1
    layer.weight = cls(layer.weight.data, torch.ones(3))
    layer.state = SimpleNamespace(scale=torch.ones(2), nested=SimpleNamespace(code=torch.ones(4)))
    layer.table = torch.arange(5.0)
    return pipe


def test_weights_of_a_class_of_their_own_on_another_device() -> None:
    pipe = with_weights(Quantised)
    for device, where in ((META, "meta"), (torch.device("cpu", 1), "cpu")):
        replica = replicate(pipe, device)
        layer = replica.unet.time_embedding.linear_1
        assert type(layer.weight) is Quantised
        for tensor in (layer.weight, layer.weight.scales, layer.table, layer.state.nested.code):
            assert tensor.device.type == where
        assert layer.weight is not pipe.unet.time_embedding.linear_1.weight
        assert {p.device.type for p in replica.unet.parameters()} == {where}
    own = pipe.unet.time_embedding.linear_1
    assert own.weight.scales.device.type == own.state.scale.device.type == "cpu"
    with pytest.raises(RuntimeError, match="weights of class Stubborn do not move to meta"):
        replicate(with_weights(Stubborn), META)


def test_what_goes_along_is_told_to_other_processes() -> None:
    """A plain attribute that is where the weights are; not one that the user keeps elsewhere."""
    pipe = tiny.CASES["sd"].build()
    pipe.unet.conv_in.table, pipe.unet.conv_in.far = torch.ones(2), torch.ones(3, device=META)
    assert [tensor.shape for tensor in going_along(pipe)] == [(2,)]
    memory = pipeline_to_memory(pipe)
    with open(memory, "rb") as file:
        _, _, along = torch.load(f"/proc/self/fd/{file.fileno()}", weights_only=False)
    assert [tensor.shape for tensor in along] == [(2,)]


class OnHost(torch.Generator):
    """Of a device that is not there."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls)


def test_streams_of_ranks_on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane works on the leader's own, for both share memory; others have one for all calls."""
    streams = Streams(monkeypatch)
    seen: dict[int, Any] = {}

    class Looks:
        def __init__(self, replica: Any, rank: int, call: Any, device: torch.device) -> None:
            self.look = lambda: seen.update({rank: streams.current(device)})

        def run(self, arguments: Any, random: Any) -> None:
            self.look()

    monkeypatch.setattr(local, "Follower", Looks)
    monkeypatch.setattr(local, "cloned_global_generator", OnHost)
    monkeypatch.setattr(torch, "Generator", OnHost)
    for _ in range(2):
        before, call = dict(seen), Call(3, [HOME, HOME, THERE], lane=True)
        followers = local.LocalFollowers(
            call, dict.fromkeys(range(3)), ((), {}), lambda *ranks: None
        )
        followers.start()
        followers.start_lane()
        followers.gather(set())
        assert seen[0] is streams.default[HOME]
        assert seen[1] is not seen[0] and seen[2].device == THERE
        assert not before or before == seen


def test_a_helper_copies_beside_what_its_head_has_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of its own on the head's device too: behind the head's forward there would be
    nothing left to share. Both of its streams begin where the head asked.
    """
    streams = Streams(monkeypatch)
    seen: list[Any] = []

    def looks(*given: Any) -> Any:
        seen.append([streams.current(device) for device in (THERE, HOME)])
        return helpers.Served(None, "looked")

    monkeypatch.setattr(helpers, "evaluated", looks)
    monkeypatch.setattr(torch, "Generator", OnHost)
    helper = helpers.LocalHelper(tiny.CASES["sd"].build(), THERE, HOME, 1)
    helper.start("unet", Inputs((), {})).result(10)
    assert helper.close(10)
    [(there, home)] = seen
    assert (there.device, home.device) == (THERE, HOME)
    assert there is not streams.default[THERE] and home is not streams.default[HOME]
    [ready] = home.waited
    assert there.waited == [ready] and ready.stream is streams.default[HOME]


def test_a_member_of_a_context_group_keeps_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch)
    seen: list[threading.Thread] = []

    def answers(forwards: Any, modules: Any, device: torch.device) -> Any:
        seen.append(threading.current_thread())
        yield from ()

    monkeypatch.setattr(members, "answers", answers)
    head: Any = object.__new__(members.Head)
    head._jobs, head.peer = members.Jobs(), SimpleNamespace(send=lambda *told: None)
    for call in range(1, 4):
        head._jobs.put(Frame(Kind.END, call, b""))
        head.take_part(Frame(Kind.SERVE, call, b"null"), {}, THERE)
        time.sleep(0.05)  # it is idle a moment after it was through
    assert len(seen) == 3 and len(set(seen)) == 1
