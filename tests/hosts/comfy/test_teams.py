"""Teams without ComfyUI: a stand-in for the host's split of CFG, guiders, faults, runs in pairs."""

from __future__ import annotations

import functools
import math
import threading
import time
from types import SimpleNamespace

import ksamplers
import pytest
import torch

import parastep
from parastep.comfy.conditions import ONE, nothing_to_share
from parastep.comfy.options import CLONES, POOL
from parastep.comfy.sampling import Host, Sampling
from parastep.comfy.sharing import EXACT, Sharing
from parastep.comfy.teams import HelperLost, Team
from parastep.options import Options
from parastep.tracing.kdiffusion import trace

HEAD, PARTNER, THIRD, FOURTH = (torch.device(f"cpu:{k}") for k in range(4))
PAIR = (HEAD, PARTNER)
TIME = torch.tensor([1.5, 1.5])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until = time.monotonic() + 5
    while [t for t in threading.enumerate() if t.name.startswith("parastep-")]:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)


class Model:
    """One device's: what it gives for a condition; counts its calls, and in which thread."""

    def __init__(self, scale=1.0):
        self.scale, self.calls, self.threads = scale, 0, set()
        self.meanwhile = lambda call: None

    def get_dtype(self):
        return torch.float32

    def __call__(self, x, t, cond):
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        made = self.meanwhile(self.calls - 1)
        s2 = (t**2).reshape(-1, 1, 1, 1)
        d = (x + cond["text"] * s2) / (1 + s2) * self.scale
        return d if made is None else made(d)


def split(model, conds, x, t, options):
    """As the host has it: all by the model, or dealt out to the devices that it is given."""
    pool, clones = options.get(POOL), options.get(CLONES)
    found = [(k, cond) for k, each in enumerate(conds) for cond in each or ()]
    level = float(t[0])
    found = [
        (k, c)
        for k, c in found
        if c.get("timestep_end", 0.0) <= level <= c.get("timestep_start", math.inf)
    ]
    outputs, counts = [torch.zeros_like(x) for _ in conds], [1e-37] * len(conds)

    def batch(device, share):
        own = model if clones is None else clones[device].model
        for patch in options.get("transformer_options", {}).get("patches", {}).get("attn1", []):
            assert device is None or patch.to(device).at == device, (device, patch.at)
        return [(k, own(x, t, cond)) for k, cond in share]

    if clones is None:
        made = batch(None, found)
    else:
        each = max(1, math.ceil(len(found) / len(clones)))
        devices = list(clones)[: math.ceil(len(found) / each)]
        shares = [found[n * each : (n + 1) * each] for n in range(len(devices))]
        made = []
        for device, share in zip(devices, shares):
            if pool is None:
                made += batch(device, share)
            else:
                pool.submit(device, batch, device, share)
        for device in devices if pool is not None else ():
            results, error = pool.get_result(device)
            if error is not None:
                raise error
            made += results
    for k, output in made:
        outputs[k] += output
        counts[k] += 1.0
    return [output / count for output, count in zip(outputs, counts)]


def text(value, **more):
    return {"text": value, **more}


BOTH = [[text(0.5)], [text(-0.3)]]
ONE_OF_TWO = [[text(0.5)], None]


class Run:
    """A team, and calls of it at other latents each."""

    def __init__(self, devices=PAIR, executor=split, **given):
        self.models = {device: Model() for device in devices}
        patchers = {d: SimpleNamespace(model=model) for d, model in self.models.items()}
        self.team = Team(patchers, "parastep-test", **given)
        self.executor, self.number = executor, 0

    def __call__(self, conds=BOTH, options=None):
        """(what the team gives, what one device gives)."""
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        x, options = torch.randn(2, 4, 4, 4, generator=generator), options or {}
        self.team.step = self.number - 1
        given = (self.models[HEAD], conds, x, TIME)
        made = self.team(self.executor, *given, options)
        assert CLONES not in options and POOL not in options
        return made, split(Model(), conds, x, TIME, {})

    def all(self, calls, conds=BOTH):
        for _ in range(calls):
            check(*self(conds))

    def end(self):
        self.team.end()
        return self.team.record()


def check(made, wanted):
    assert len(made) == len(wanted) and all(map(torch.equal, made, wanted))


# ---- calls ---------------------------------------------------------------------------------------


def test_a_pair_shares_each_call_but_the_first():
    run = Run()
    run.all(6)
    record = run.end()
    assert (record.shared, record.whole, record.missed) == (5, 1, 0)
    assert record.split == "conditions (to rounding)" and record.unsplit is None
    assert record.devices == ["cpu:0", "cpu:1"]
    head, partner = run.models[HEAD], run.models[PARTNER]
    assert head.calls == partner.calls == 2 + 5  # both of the first call, and one of each
    assert head.threads == {threading.current_thread().name}
    assert partner.threads == {"parastep-test-helper1"}
    assert [share.step for share in record.served] == list(range(6))
    assert all(share.device == 1 and share.begin <= share.end for share in record.served)


def test_both_work_at_the_same_time():
    """Each waits for the other in the middle of its share."""
    run, meet = Run(), threading.Barrier(2)

    def together(call):
        if call >= 2:
            meet.wait(20)

    for model in run.models.values():
        model.meanwhile = together
    run.all(4)
    assert run.end().shared == 3 and not run.team.losses


def test_guidance_that_goes_off_and_on():
    run = Run()
    for conds in (BOTH, BOTH, ONE_OF_TWO, ONE_OF_TWO, BOTH):
        check(*run(conds))
    record = run.end()
    assert (record.shared, record.whole) == (2, 3)
    assert run.models[PARTNER].calls == 2 + 2


def test_one_condition_is_whole():
    run = Run()
    run.all(3, ONE_OF_TWO)
    record = run.end()
    assert record.split is None and "one condition" in record.unsplit and record.whole == 3
    assert run.models[PARTNER].calls == 0


def test_three_conditions_on_two_and_three_devices():
    conds = [[text(0.5), text(0.1)], [text(-0.3)]]
    for devices in (PAIR, (HEAD, PARTNER, THIRD)):
        run = Run(devices)
        run.all(4, conds)
        assert run.end().shared == 3
        assert all(model.calls > 3 for model in run.models.values())


def test_conditions_of_another_time_do_not_count():
    late = text(0.1, timestep_start=1.0)
    run = Run()
    run.all(3, [[text(0.5), late], None])
    assert run.end().shared == 0
    run = Run()
    run.all(3, [[text(0.5), text(0.1, timestep_start=2.0)], None])
    assert run.end().shared == 2


class Patch:
    """With weights on one device, which `to` moves."""

    def __init__(self):
        self.at = HEAD

    def to(self, device):
        self.at = device
        return self


def test_patches_with_weights_have_a_copy_on_each_device():
    patch, run = Patch(), Run()
    options = {"transformer_options": {"patches": {"attn1": [patch]}}}
    for _ in range(4):
        check(*run(options=options))
    assert run.end().shared == 3 and patch.at == HEAD
    assert options["transformer_options"]["patches"]["attn1"] == [patch]


def test_a_patch_that_cannot_be_copied_is_not_shared():
    patch, run = Patch(), Run()
    patch.lock = threading.Lock()
    for _ in range(3):
        check(*run(options={"transformer_options": {"patches": {"attn1": [patch]}}}))
    assert "cannot be copied" in run.end().unsplit and run.models[PARTNER].calls == 0


def test_what_is_known_before_shares_nothing():
    run = Run(unsplit=EXACT)
    run.all(3)
    assert run.end().unsplit == EXACT and run.models[PARTNER].calls == 0
    run = Run()
    run.team.held = True
    run.all(2)
    assert run.models[PARTNER].calls == 0
    run.team.held = False
    run.all(2)
    assert run.end().shared == 1


def test_a_model_that_is_no_function_any_more_is_not_shared():
    reasons = iter([None, None, "the function changes", None, None])
    run = Run(altered=lambda: next(reasons))
    run.all(5)
    record = run.end()
    assert record.shared == 1 and run.models[PARTNER].calls == 3


def test_a_host_that_shares_nothing_out():
    def deaf(model, conds, x, t, options):
        return split(model, conds, x, t, {})

    run = Run(executor=deaf)
    run.all(3)
    assert run.end().unsplit == "the host shares nothing out"


def test_a_split_that_raises_is_not_tried_again():
    def broken(model, conds, x, t, options):
        if POOL in options:
            raise KeyError("sample_sigmas")
        return split(model, conds, x, t, options)

    run = Run(executor=broken)
    run.all(3)
    (lost,) = run.team.losses
    assert lost.why == "the host's split raises KeyError: 'sample_sigmas'" == run.end().unsplit


def test_what_the_whole_raises_is_raised():
    run = Run()
    run.all(2)

    def broken(call):
        raise ValueError("mine")

    run.models[HEAD].meanwhile = broken
    with pytest.raises(ValueError, match="mine"):
        run()
    run.end()


# ---- faults --------------------------------------------------------------------------------------


def raises(d):
    raise RuntimeError("CUDA error: no more")


def nan(d):
    return d * math.nan


def short(d):
    return d[:1, :, :2]


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "fault, words",
    [
        (raises, "CUDA error"),
        (nan, "NaN"),
        (short, "raises"),
        (lambda d: d * 1.01, "does not compute"),
    ],
)
def test_a_helper_with_a_fault_is_lost(fault, words, at):
    """One that computes something else is known by its first call."""
    run = Run()
    if "compute" in words:
        at = 0
    run.models[PARTNER].meanwhile = lambda call: fault if call >= at else None
    for _ in range(8):
        check(*run())
    record = run.end()
    (lost,) = run.team.losses
    assert lost.device == PARTNER and lost.step == max(0, at - 1)
    assert words in lost.why or at < 2
    assert record.whole + record.shared == 8 and record.shared == max(0, at - 2)


def test_a_helper_that_hangs_is_lost_at_half_the_deadline():
    let_go, run = threading.Event(), Run(deadline=0.4)
    run.models[PARTNER].meanwhile = lambda call: let_go.wait(20) and None if call == 4 else None
    run.all(6)
    let_go.set()
    (lost,) = run.team.losses
    assert lost.why == "no output within 0.2 s" and lost.step == 3
    assert not run.team.busy
    run.end()


def test_one_of_two_helpers_is_lost():
    run = Run((HEAD, PARTNER, THIRD))
    run.models[PARTNER].meanwhile = lambda call: raises if call == 4 else None
    run.all(8, [[text(0.5), text(0.1)], [text(-0.3)]])
    record = run.end()
    assert [lost.device for lost in run.team.losses] == [PARTNER]
    assert run.models[THIRD].calls > 6 and record.shared + record.whole == 8


def test_who_had_better_leave_or_raise():
    for given, kind in (
        ({"leaves": lambda: True}, HelperLost),
        ({"raises": True}, parastep.LostError),
    ):
        run = Run(**given)
        run.models[PARTNER].meanwhile = lambda call: raises if call == 3 else None
        run.all(2)
        with pytest.raises(kind, match=r"its helper on cpu:1 was lost: .*CUDA error"):
            run()
        run.end()


class Cancelled(BaseException):
    pass


def test_cancelling_that_a_helper_sees_is_no_fault():
    run = Run(interrupt=Cancelled)

    def cancelled(d):
        raise Cancelled

    run.models[PARTNER].meanwhile = lambda call: cancelled if call == 3 else None
    run.all(2)
    with pytest.raises(Cancelled):
        run()
    assert not run.team.losses
    run.end()


def test_nobody_waits_when_the_run_is_over():
    let_go, run = threading.Event(), Run()
    run.models[PARTNER].meanwhile = lambda call: let_go.wait(20) and None if call == 2 else None
    run.all(1)
    threading.Timer(0.1, run.team.end).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the run is over"):
        run()
    assert time.monotonic() - began < 10
    let_go.set()


# ---- what there is to share ----------------------------------------------------------------------


def guider(cfg=7.0, **conds):
    conds = conds or {"positive": [text(1)], "negative": [text(2)]}
    return SimpleNamespace(cfg=cfg, conds=conds)


LEVELS = torch.linspace(10, 0, 11)


@pytest.mark.parametrize(
    "guider, options, shares",
    [
        (guider(), {}, True),
        (guider(1.0), {}, False),
        (guider(1.0), {"disable_cfg1_optimization": True}, True),
        (guider(1.0, positive=[text(1), text(2)], negative=[text(3)]), {}, True),  # areas
        (guider(7.0, positive=[text(1)]), {}, False),
        (SimpleNamespace(conds={"positive": [text(1)]}), {}, False),
        (SimpleNamespace(conds={"positive": [text(1)], "negative": [text(1)]}), {}, True),
        (guider(), {"sampler_calc_cond_batch_function": print}, False),
    ],
)
def test_whether_a_guider_has_several_conditions_a_step(guider, options, shares):
    assert (nothing_to_share(guider, options, LEVELS) is None) == shares


def test_most_of_the_steps_count():
    for end, shares in ((2.0, True), (8.0, False)):
        early = guider(7.0, positive=[text(1)], negative=[text(2, timestep_end=end)])
        assert (nothing_to_share(early, {}, LEVELS) is None) == shares
    turns = [text(1, timestep_end=5.0), text(2, timestep_start=4.5)]
    assert nothing_to_share(guider(1.0, positive=turns), {}, LEVELS) == ONE


# ---- runs ----------------------------------------------------------------------------------------

SIGMAS = torch.cat([torch.linspace(2.6, -3.5, 16).exp(), torch.zeros(1)])
ARGUMENTS = {"model_options": {}, "seed": 3}


class Guided:
    """What a sampler calls as its model, on one device or with a team; has what `Sharing` reads."""

    inner_model = None
    conds = {"positive": BOTH[0], "negative": BOTH[1]}

    def __init__(self, model, team=None):
        self.model, self.team = model, team

    def __call__(self, x, sigma, model_options=None, seed=None, **more):
        given = (self.model, BOTH, x, sigma)
        good, bad = split(*given, {}) if self.team is None else self.team(split, *given, {})
        return bad + 3.0 * (good - bad)


class Shares(Host):
    def __init__(self, sharing):
        self.sharing = sharing

    shares = property(lambda self: self.sharing.leader is not None)
    at = property(lambda self: self.sharing.at)
    leave = property(lambda self: self.sharing.leave)
    end = property(lambda self: self.sharing.end)

    def busy(self):
        return self.sharing.busy


def in_teams(function, ranks, fault=None, **options):
    """(result, report) of a run; `fault(device, model)` may break a device's model."""
    models = {device: Model() for devices in ranks for device in devices}
    for device, model in models.items():
        if fault is not None:
            fault(device, model)
    patchers = {device: SimpleNamespace(model=model) for device, model in models.items()}
    given = Options(**{"tolerance": 0.02, **options})
    sharing = Sharing(Guided(None), patchers.__getitem__, given, Cancelled)
    lead = sharing.lead(ranks[0], False, lambda: None)
    teams = [sharing.follow(devices) for devices in ranks[1:]]
    sharing.number(teams)
    leader = Guided(models[ranks[0][0]], lead)
    lanes = []
    for devices, team in zip(ranks[1:], teams):
        own = Guided(models[devices[0]], team)
        lanes.append(lambda x, s, own=own: own(x, s))
    run = Sampling(leader, lanes, given, Shares(sharing))
    sigmas = SIGMAS.clone()
    rows = functools.partial(trace, function, Guided(Model()), sigmas, ARGUMENTS, {})
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 4, 4, generator=generator) * SIGMAS[0]
    result = run.run(function, x, sigmas, dict(ARGUMENTS), {}, rows, disable=True)
    report = run.report
    sharing.tell(report, ranks, "one condition", run.began)
    return result, report


PAIRS = [(HEAD, PARTNER), (THIRD, FOURTH)]


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
@pytest.mark.parametrize("ranks", [PAIRS[:1], PAIRS])
def test_rounds_and_result_are_those_without_partners(name, ranks):
    function = ksamplers.SAMPLERS[name]
    alone, plain = in_teams(function, [team[:1] for team in ranks])
    result, report = in_teams(function, ranks)
    assert torch.equal(result, alone) and not report.failures
    assert (report.rounds, report.evaluations) == (plain.rounds, plain.evaluations)
    assert [team.unsplit for team in plain.teams] == ["one condition"] * len(plain.teams)
    for team, count in zip(report.teams, report.evaluations):
        assert team.shared == count - 1 and team.whole == 1, report
    assert len(report.teams) == report.ranks
    served = [share for team in report.teams for share in team.served]
    assert all(0 <= share.begin <= share.end <= report.seconds for share in served)
    assert {share.step for share in served} <= set(range(report.steps))


def test_rehearsed_the_leader_evaluates_whole():
    function = ksamplers.sample_euler
    alone, _ = in_teams(function, [(HEAD,)], tolerance=0.0)
    result, report = in_teams(function, PAIRS, tolerance="rehearse")
    assert torch.equal(result, alone)
    assert report.teams[0].unsplit == EXACT and report.teams[1].shared > 10


def broken(where, at):
    def fault(device, model):
        if device == where:
            model.meanwhile = lambda call: raises if call >= at else None

    return fault


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_partner_that_raises_costs_speed_only(at):
    function = ksamplers.sample_euler
    alone, plain = in_teams(function, [(HEAD,), (THIRD,)])
    result, report = in_teams(function, PAIRS, broken(PARTNER, at))
    assert torch.equal(result, alone) and report.rounds == plain.rounds
    (failure,) = report.failures
    assert (failure.rank, failure.status) == (0, "HELPER_LOST") and "cpu:1" in failure.text
    assert "1 helper lost" in str(report) and report.teams[1].shared > 2
    result, report = in_teams(function, PAIRS, broken(FOURTH, at))
    assert (result - alone).norm() < 0.02 * alone.norm()
    left, lost = report.failures
    assert left.rank == lost.rank == 1 and lost.status == "HELPER_LOST"
    assert "its helper on cpu:3 was lost" in left.text and report.fallback is None


def test_without_a_partner_left_both_go_on_whole():
    """The leader is no faster than a follower that lost its own."""

    def fault(device, model):
        if device in (PARTNER, FOURTH):
            at = 2 if device == PARTNER else 6
            model.meanwhile = lambda call: raises if call >= at else None

    alone, plain = in_teams(ksamplers.sample_euler, [(HEAD,), (THIRD,)])
    result, report = in_teams(ksamplers.sample_euler, PAIRS, fault)
    assert torch.equal(result, alone) and report.evaluations == plain.evaluations
    assert {f.rank for f in report.failures} == {0, 1} and report.ranks == 2


def test_cancelling_ends_all_helpers():
    def fault(device, model):
        def cancelled(d):
            raise Cancelled

        if device == PARTNER:
            model.meanwhile = lambda call: cancelled if call >= 4 else None

    Shares.interrupt, before = Cancelled, Shares.interrupt
    try:
        with pytest.raises(Cancelled):
            in_teams(ksamplers.sample_euler, PAIRS, fault)
    finally:
        Shares.interrupt = before
