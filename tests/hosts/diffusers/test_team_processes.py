"""Teams whose helpers are workers of ours: the picture is the one it would have been, whatever a
worker does, and the next call works again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import faults  # noqa: E402
import tiny  # noqa: E402
from hosting import caught, children, distance, host, no_warnings, own, set_options  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers.forwards import is_finite  # noqa: E402
from parastep.diffusers.remote.bundles import Receiver, Sender  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # a worker imports torch and diffusers, which takes seconds

PAIR = ("cpu", "cpu")
STEPS = 6
CALLS, BATCH = "calls (bit for bit)", "batch (to rounding)"
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


def made(pipe: Any, devices: Any, tolerance: Any, **options: Any) -> Any:
    return parastep.parallelize(
        pipe, devices, tolerance=tolerance, max_stride=1, mode="processes", **options
    )


@pytest.fixture(scope="module")
def leading(folder: Path) -> Iterator[Any]:
    """One pair, the leader's, that cuts a batch; its helper carries out faults."""
    pipe = tiny.CASES["sd"].build()
    pipe.unet.mid_block.resnets[0] = faults.Faulty(pipe.unet.mid_block.resnets[0], folder)
    with made(pipe, [PAIR], 0.02) as together:
        yield together
    assert not children() & set(workers(together))


@pytest.fixture(scope="module")
def following(folder: Path) -> Iterator[Any]:
    """The leader alone, and a pair that follows it, whose calls are foretold."""
    pipe = tiny.CASES["wan"].build()
    pipe.transformer.blocks[0].ffn = faults.Faulty(pipe.transformer.blocks[0].ffn, folder)
    with made(pipe, ["cpu", PAIR], "rehearse") as together:
        yield together


def workers(together: Any) -> dict[int, int]:
    """Of workers by place, their process's number."""
    found = together._ranks._remote._workers.items()
    return {place: worker._process.pid for place, worker in sorted(found)}


def run(together: Any, name: str, **changes: Any) -> torch.Tensor:
    return tiny.run(together, tiny.CASES[name].kwargs(steps=STEPS, **changes))


def check_leading(together: Any) -> None:
    with no_warnings():
        result = run(together, "sd")
    assert distance(result, own("sd", STEPS).result) < CLOSE
    (team,) = together.report.teams
    assert (team.devices, team.split) == (["cpu", "cpu"], BATCH)
    assert STEPS - 2 <= team.shared <= STEPS and team.shared + team.whole == STEPS


def check_following(together: Any) -> None:
    with no_warnings():
        result = run(together, "wan")
    assert torch.equal(result, own("wan", STEPS).result)
    assert together.report.evaluations == [STEPS, STEPS - 1]
    alone, team = together.report.teams
    assert alone.devices == ["cpu"] and alone.split is None
    assert team.split == CALLS and team.missed == 0 and team.shared >= STEPS - 2


def test_the_leaders_pair(leading: Any) -> None:
    """Two calls with the same worker, which shows its bits in each: a part of it is foreign."""
    check_leading(leading)
    before = workers(leading)
    assert set(before.values()) <= children() and len(before) == 1
    check_leading(leading)
    assert leading.report.teams[0].whole == 1 and workers(leading) == before


@pytest.mark.parametrize(
    ("fault", "call"),
    [("raise", 3), ("nan", 4), ("dtype", 3), ("kill", 3), ("babble", 4), ("rubbish", 3)],
)
def test_the_leader_loses_its_helper(leading: Any, folder: Path, fault: str, call: int) -> None:
    check_leading(leading)
    faults.order(folder, fault, call, "helper")
    with caught() as texts:
        result = run(leading, "sd")
    assert faults.taken(folder) and distance(result, own("sd", STEPS).result) < CLOSE
    (line,) = leading.report.failures
    assert (line.rank, line.status) == (0, "HELPER_LOST") and len(texts) == 1, leading.report
    # It makes both shares of step 0, and it is known at once.
    assert line.step == call - 2 and "no output within" not in line.text
    if fault == "raise":
        assert line.text.endswith("RuntimeError: out of cheese")
    check_leading(leading)


def test_a_helper_that_hangs_is_ended(leading: Any, folder: Path) -> None:
    """All of it, stopped: no answer, no goodbye."""
    check_leading(leading)
    (pid,) = workers(leading).values()
    set_options(leading, deadline=4.0)
    faults.order(folder, "stop", 3, "helper")
    try:
        with caught() as texts:
            result = run(leading, "sd")
    finally:
        set_options(leading, deadline=None)
    assert distance(result, own("sd", STEPS).result) < CLOSE and len(texts) == 1
    assert "no output within 2 s" in leading.report.failures[0].text
    assert pid not in children()
    check_leading(leading)


def test_a_helper_killed_in_its_trial(leading: Any, folder: Path) -> None:
    """Nothing is learnt of what can be cut from that: the next call shares again."""
    with torch.no_grad():  # a version more: the model goes over again
        leading.pipe.unet.conv_out.bias += 0
    faults.order(folder, "kill", 1, "helper")
    with caught():
        result = run(leading, "sd")
    assert faults.taken(folder) and distance(result, own("sd", STEPS).result) < CLOSE
    assert [line.status for line in leading.report.failures] == ["HELPER_LOST"]
    check_leading(leading)


def test_a_helper_killed_between_calls(leading: Any) -> None:
    check_leading(leading)
    (pid,) = workers(leading).values()
    os.kill(pid, signal.SIGKILL)
    while leading._ranks._remote._workers[1].alive():
        time.sleep(0.01)
    check_leading(leading)
    assert pid not in children() | set(workers(leading).values())


def test_what_cannot_be_compared_is_not_shared(leading: Any) -> None:
    check_leading(leading)
    with no_warnings():
        result = run(leading, "sd", cross_attention_kwargs={"unused": lambda: None})
    assert torch.equal(result, own("sd", STEPS).result)
    (team,) = leading.report.teams
    assert team.split is None and "cannot be compared" in team.unsplit and team.whole == STEPS
    check_leading(leading)


def test_the_leader_is_interrupted(leading: Any, folder: Path) -> None:
    """Ctrl-C while it waits for a helper that hangs."""
    check_leading(leading)
    faults.order(folder, "hang", 3, "helper")

    def press() -> None:
        while not faults.taken(folder):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    key = threading.Thread(target=press)
    key.start()
    with pytest.raises(KeyboardInterrupt):
        run(leading, "sd")
    key.join()
    check_leading(leading)


@pytest.mark.parametrize(("fault", "call"), [("raise", 4), ("kill", 5)])
def test_a_follower_loses_its_helper(following: Any, folder: Path, fault: str, call: int) -> None:
    """It goes on alone, the only one that evaluates ahead."""
    check_following(following)
    before = workers(following)
    faults.order(folder, fault, call, "helper")
    with caught() as texts:
        result = run(following, "wan")
    assert faults.taken(folder) and torch.equal(result, own("wan", STEPS).result)
    (line,) = following.report.failures
    assert (line.rank, line.status) == (1, "HELPER_LOST") and len(texts) == 1
    assert following.report.evaluations == [STEPS, STEPS - 1]
    check_following(following)
    assert workers(following)[1] == before[1]
    assert (workers(following)[2] == before[2]) == (fault == "raise")


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_head_is_lost(following: Any, folder: Path, fault: str) -> None:
    """Its helper stays for the next one."""
    check_following(following)
    before = workers(following)
    faults.order(folder, fault, 4, "head")
    with caught():
        result = run(following, "wan")
    assert faults.taken(folder) and torch.equal(result, own("wan", STEPS).result)
    assert [line.rank for line in following.report.failures] == [1]
    check_following(following)
    assert workers(following)[2] == before[2]


def test_exact_shares_calls_with_the_leaders_helpers_alone() -> None:
    mine = children()
    with made(host("wan"), [PAIR, PAIR], 0) as together, no_warnings():
        for _ in range(2):
            assert torch.equal(run(together, "wan"), own("wan", STEPS).result)
        assert together.report.teams[0].split == CALLS
        assert together.report.teams[0].shared == STEPS
        assert len(children() - mine) == 1
    assert children() == mine


def test_workers_help_or_follow_as_the_call_needs() -> None:
    """The same three processes: pairs where the call is guided, else ranks."""
    mine = children()
    with made(host("sd"), ["cpu"] * 4, 0.02, split="auto") as together, no_warnings():
        there = []
        for guidance in (7.5, 1.0, 7.5):
            run(together, "sd", guidance_scale=guidance)
            report = together.report
            there.append((report.ranks, len(report.teams), workers(together)))
            assert report.fallback is None and min(report.evaluations) >= 3
            assert all(team.split == BATCH for team in report.teams)
        before = there[0][2]
        assert there == [(2, 2, before), (4, 0, before), (2, 2, before)] and len(before) == 3
    assert children() == mine


# ---- what goes over ------------------------------------------------------------------------------


def over(sender: Sender, receiver: Receiver, value: Any) -> tuple[Any, int]:
    data = sender.pack(value)
    return receiver.unpack(bytearray(data)), len(data)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5),
        torch.randn(4, 3, 5).permute(2, 0, 1),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 1).expand(3, 4),
        torch.tensor(7),
        torch.tensor(7).expand(1),
        torch.zeros(0, 3),
        torch.randn(6, 100).bfloat16()[1:3],
        torch.randn(3) > 0,
        torch.randn(5, dtype=torch.complex64).conj(),
        torch.nn.Parameter(torch.randn(4)),
    ],
)
def test_tensors_are_the_same_there(tensor: torch.Tensor) -> None:
    """Bits, dtypes, and strides where memory is dense, which kernels go by."""
    found, _ = over(Sender(), Receiver(torch.device("cpu")), {"x": (tensor, 3, "name")})
    (there, *others), wanted = found["x"], tensor.detach()
    assert torch.equal(there, wanted) and there.dtype == wanted.dtype and others == [3, "name"]
    strides = zip(there.shape, there.stride(), wanted.clone().stride())
    assert all(ours == theirs for size, ours, theirs in strides if size > 1)


def test_what_went_over_does_not_travel_again() -> None:
    sender, receiver = Sender(), Receiver(torch.device("cpu"))
    words, latents = torch.randn(2, 77, 64), 4 * 64 * 64 * 4
    for step in range(12):
        given = torch.randn(1, 4, 64, 64), words[1:]
        found, size = over(sender, receiver, given)
        assert all(map(torch.equal, found, given))
        assert size - latents < 1000 or step == 0
        assert len(receiver._known) <= 6  # the newest latents, and the words
    words[1, 0, 0] = 5.0
    found, size = over(sender, receiver, (words[1:],))
    assert torch.equal(found[0], words[1:]) and size > words[1:].nbytes
    found[0].zero_()
    with pytest.raises(RuntimeError, match="writes to its own inputs"):
        over(sender, receiver, (words[1:],))


def test_other_memory_at_the_same_place_is_other() -> None:
    """A tensor that is gone, and one whose writer leaves no trace in its version."""
    sender, receiver = Sender(), Receiver(torch.device("cpu"))
    numbers = torch.zeros(500).numpy()
    for value in range(4):
        numbers[:] = value
        found, _ = over(sender, receiver, torch.from_numpy(numbers))
        assert found.eq(value).all()
        found, _ = over(sender, receiver, torch.full((500,), float(value)))
        assert found.eq(value).all()


def test_what_cannot_be_sent_leaves_no_trace() -> None:
    sender, receiver = Sender(), Receiver(torch.device("cpu"))
    words = torch.randn(400)
    with pytest.raises(Exception, match="pickle"):
        sender.pack((words, lambda: None))
    assert torch.equal(over(sender, receiver, words)[0], words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_inf_are_found_wherever_they_are(dtype: torch.dtype) -> None:
    edge = torch.finfo(dtype).max
    fine = torch.tensor([[0.0, edge], [-edge, 1.0]], dtype=dtype)
    assert is_finite((fine, torch.tensor(3), torch.zeros(0)))
    for at in range(4):
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = fine.clone()
            broken.view(-1)[at] = value
            assert not is_finite([fine, {"x": broken}])
