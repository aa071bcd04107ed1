"""`plan` against the core itself: shares, rounds, exchange; and what it says to bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import threading

import numpy as np
import pytest

import parastep
from parastep import _core, cli
from parastep.planning import plan as planning
from parastep.planning import quantities, rounds
from parastep.report import TeamRecord

STEPS = 40


def sampled(ranks, steps=STEPS, tolerance=0.02, **options):
    """The report of a run whose drift is no straight line: data of two narrow clusters."""
    angle = np.linspace(1.5, 0.05, steps + 1)
    alpha, s = np.cos(angle), np.sin(angle)
    program = parastep.Program.ddim(alpha, s)

    def denoiser(x, step, rank):
        variance = s[step] ** 2 + (0.3 * alpha[step]) ** 2
        clean = np.tanh(x * alpha[step] / variance)
        clean = clean + (x - alpha[step] * clean) * 0.09 * alpha[step] / variance
        return (x - alpha[step] * clean) / s[step]

    x = np.random.default_rng(0).standard_normal((1, 4096))
    options |= {"ranks": ranks, "tolerance": tolerance, "max_stride": 1}
    return parastep.sample(program, denoiser, x, **options)[1]


# ---- the core's own arithmetic -------------------------------------------------------------------


def handed_out(slots, steps):
    """Evaluations of each rank in each round of the core, everything accepted."""
    x = np.ones((1, 4))
    program = parastep.Program.euler(np.linspace(1, 0, steps + 1))
    leader = _core.Leader(
        program, x, ranks=len(slots), slots=slots, tolerance=math.inf, max_stride=1
    )

    def serve(follower):
        while (work := follower.next()) is not None:
            follower.submit([0.1 * point for _, point in work])

    threads = [
        threading.Thread(target=serve, args=(leader.follower(rank),))
        for rank in range(1, len(slots))
    ]
    for thread in threads:
        thread.start()
    for step in range(steps):
        if not leader.ask(step, x, leader.output()):
            if work := leader.work():
                leader.fill([0.1 * point for _, point in work])
            leader.submit(0.1 * x)
        x = leader.advance()
    leader.finish()
    for thread in threads:
        thread.join(20)
    report = leader.report()
    found = [[0] * len(slots) for _ in range(report["rounds"])]
    for rank, _, number, *_ in report["timeline"]:
        found[number][rank] += 1
    return found


@pytest.mark.parametrize("slots", [(1, 1, 1), (2, 1, 3), (1, 4), (3, 3, 1, 2)])
@pytest.mark.parametrize("steps", [2, 9, 23])
def test_steps_are_handed_out_as_the_core_does(slots, steps):
    found = handed_out(slots, steps)
    windows = rounds.default_profile().windows(steps, sum(slots), math.inf)
    assert len(windows) == len(found)
    for window, counts in list(zip(windows, found))[1:]:
        assert planning.assign(slots, window) == counts


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rounds_at_both_ends(ranks):
    profile = rounds.default_profile()
    assert rounds.rounds_of(profile, ranks, 0.0) == [1] * 50
    free = rounds.rounds_of(profile, ranks, math.inf)
    assert len(free) == 1 + math.ceil(49 / ranks) and sum(free) == 50
    found = [len(rounds.rounds_of(profile, ranks, t)) for t in (0, 1e-4, 1e-3, 1e-2, 0.1, 1)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("recorded", [(8, 0.02), (4, math.inf), (8, 0.1)])
def test_one_run_tells_the_rounds_of_others(recorded):
    """At half and twice the steps too: within a twentieth on the whole, two rounds anywhere."""
    profile = rounds.Profile.of(sampled(recorded[0], tolerance=recorded[1]))
    off, cut_short = [], 0
    for steps in (STEPS // 2, STEPS, 2 * STEPS):
        for ranks in (2, 4, 8):
            for tolerance in (0.005, 0.02, 0.1):
                measured = sampled(ranks, steps, tolerance).rounds
                told = len(rounds.rounds_of(profile.at(steps), ranks, tolerance))
                assert abs(told - measured) <= 2, (steps, ranks, tolerance)
                off.append(abs(told - measured) / measured)
                cut_short += measured > 2 + math.ceil((steps - 1) / ranks)
    assert sum(off) / len(off) < 0.05
    assert cut_short > 9  # there was something to be foretold


@pytest.mark.parametrize(
    ("steps", "ranks", "warmup"), [(20, 3, 5), (9, 8, 1), (6, 2, 8), (7, 1, 2)]
)
def test_the_published_rule_is_counted_as_it_runs(steps, ranks, warmup):
    report = sampled(ranks, steps, policy="paper", warmup=warmup)
    (found,) = parastep.plan(
        steps, latents=8, forward=1, ranks=ranks, policy="paper", warmup=warmup
    )
    assert found.rounds == report.rounds and found.forwards_seconds == report.rounds
    assert found.bytes_sent * 4096 == report.bytes_sent


def test_bytes_are_those_of_the_core():
    report = sampled(4, tolerance=math.inf)
    (found,) = parastep.plan(
        STEPS, latents=4096 * 8, forward=1, ranks=4, tolerance=math.inf, profile=report
    )
    assert found.rounds == report.rounds and found.bytes_sent == report.bytes_sent


def strided(ranks, rounds, tolerance=0.04, steps=STEPS):
    found = dataclasses.replace(sampled(ranks, tolerance=tolerance), interpolated=20)
    return dataclasses.replace(found, steps=steps, rounds=rounds)


def test_a_strided_run_tells_of_strided_ones():
    given = {"profile": strided(4, 11), "latents": 1, "forward": 1, "ranks": (1, 2, 4, 8)}
    found = [plan.rounds for plan in parastep.plan(STEPS, **given)]
    assert found[2] == 11 and found == sorted(found, reverse=True) and found[0] > 14
    longer = [plan.rounds for plan in parastep.plan(4 * STEPS, **given)]
    assert all(a < b < 2 * a for a, b in zip(found, longer))
    assert max(plan.rounds for plan in parastep.plan(8, **given)) == 8  # one for each step
    closer = [plan.rounds for plan in parastep.plan(STEPS, **given, tolerance=0.005)]
    assert all(a < b < 2 * a for a, b in zip(found, closer))
    assert parastep.plan(STEPS, **given, tolerance=0)[2].rounds == STEPS


def test_several_strided_runs_tell_more():
    """Of a model whose rounds hardly depend on ranks, and much on the tolerance."""
    told = [strided(2, 20), strided(8, 18), strided(2, 34, tolerance=0.005)]
    plans = {
        (tolerance, count): parastep.plan(
            STEPS, profile=told[:count], ranks=8, tolerance=tolerance, latents=1, forward=1
        )[0].rounds
        for tolerance in (0.02, 0.005)
        for count in (1, 2, 3)
    }
    assert plans[0.02, 1] < plans[0.02, 2] and abs(plans[0.02, 3] - 18) <= 2
    assert abs(plans[0.005, 3] - 30) <= 5 and plans[0.005, 1] < plans[0.005, 3]


def test_the_demo_model_in_strides():
    """From one run: on other ranks, at another tolerance, in other steps and of another seed."""
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("parastep.demo.image").MODEL
    torch.set_num_threads(1)
    pipe = image.load()

    def run(ranks, tolerance=0.02, steps=50, seed=0):
        program = parastep.trace(image.make_scheduler(), steps)
        denoiser = image.denoiser([seed], steps, pipe=pipe)
        x = image.noise(1, seed) * pipe.scheduler.init_noise_sigma
        return parastep.sample(program, denoiser, x, ranks=ranks, tolerance=tolerance)[1]

    profile = run(4)
    assert profile.interpolated
    for ranks, tolerance, steps, seed in ((1, 0.02, 50, 1), (8, 0.08, 50, 2), (2, 0.02, 28, 3)):
        measured = run(ranks, tolerance, steps, seed).rounds
        (told,) = parastep.plan(steps, profile=profile, ranks=ranks, tolerance=tolerance)
        assert abs(told.rounds - measured) <= max(2, 0.25 * measured), (ranks, tolerance, steps)


# ---- seconds -------------------------------------------------------------------------------------


def test_exchange_and_the_link_that_just_pays():
    given = {"latents": "2MB", "forward": "10ms", "latency": 0, "overhead": "1ms"}
    given |= {"tolerance": math.inf}
    (fast,) = parastep.plan(50, ranks=4, link="100GbE", **given)
    full = fast.rounds - 2  # the first round has one step, and the last one here too
    assert fast.exchange_seconds == pytest.approx((4 + 4 * full) * 2e6 / 12.5e9)
    assert fast.forwards_seconds == pytest.approx(fast.rounds * 0.01)
    assert fast.sequential_seconds == pytest.approx(50 * 0.011)
    assert fast.seconds == pytest.approx(
        fast.forwards_seconds + fast.exchange_seconds + fast.overhead_seconds
    )
    (even,) = parastep.plan(50, ranks=4, link=fast.breakeven, **given)
    assert even.speedup == pytest.approx(1)
    (late,) = parastep.plan(50, ranks=4, link="1GbE", **(given | {"latency": 1}))
    assert late.breakeven == math.inf and late.speedup < 1
    (alone,) = parastep.plan(50, ranks=1, **given)
    assert (alone.breakeven, alone.exchange_seconds) == (0, 0)
    assert alone.speedup == pytest.approx(1)


def test_a_report_tells_what_is_not_given():
    report = sampled(4, tolerance=math.inf)
    own = sorted(r.end - r.begin for r in report.timeline if r.rank == 0)
    (found,) = parastep.plan(STEPS, profile=report, ranks=4, link="nvlink", tolerance=math.inf)
    middle = len(own) // 2
    assert own[middle - 1] * found.rounds <= found.forwards_seconds <= own[middle] * found.rounds
    assert found.bytes_sent == report.bytes_sent and found.overhead_seconds > 0
    (given,) = parastep.plan(STEPS, profile=report, ranks=4, forward=2, latents=4, overhead=0)
    assert given.sequential_seconds == 2 * STEPS and given.overhead_seconds == 0
    assert given.bytes_sent < found.bytes_sent


def test_unequal_ranks_get_unequal_shares():
    given = {"latents": 1, "forward": 1, "link": "nvlink", "tolerance": math.inf}
    (found,) = parastep.plan(201, speeds=[1, 1, 0.5], **given)
    assert found.slots == (2, 2, 1)
    assert found.forwards_seconds == pytest.approx(2 * 201 / 5, rel=0.05)
    (slow,) = parastep.plan(201, speeds=[1, 1e-3], **given)
    assert slow.slots[1] == 0 and slow.speedup == pytest.approx(1)  # of no use: it is left idle
    (equal,) = parastep.plan(201, speeds=[2, 2], **given)
    assert equal.forwards_seconds == parastep.plan(201, ranks=2, **given)[0].forwards_seconds
    (fast,) = parastep.plan(201, speeds=[1, 3], **given)
    assert fast.slots == (1, 3)


def test_devices_of_a_rank_share_its_forwards():
    given = {"latents": "1MB", "forward": "1s", "overhead": "1ms", "ranks": (1, 2, 4)}
    whole = parastep.plan(50, **given)
    shared = parastep.plan(50, split=2, efficiency=0.8, **given)
    for one, pair in zip(whole, shared):
        assert (one.devices, pair.devices) == (one.ranks, 2 * one.ranks)
        assert pair.rounds == one.rounds and pair.memory == one.memory
        assert pair.forwards_seconds == pytest.approx(one.forwards_seconds / 1.6)
        assert pair.exchange_seconds == one.exchange_seconds
        assert pair.sequential_seconds == one.sequential_seconds  # on one device
    assert parastep.plan(50, split=3, **given)[0].forwards_seconds == pytest.approx(50 / 2.7)
    unequal = {**given, "speeds": [1, 0.5], "split": 2, "efficiency": 1}
    (found,) = parastep.plan(50, **unequal)
    (alone,) = parastep.plan(50, **(unequal | {"split": 1}))
    assert found.devices == 4 and found.forwards_seconds == alone.forwards_seconds / 2


def test_exact_leaves_all_but_the_leader_idle():
    given = {"latents": "1MB", "forward": 1, "tolerance": "exact", "efficiency": 0.9}
    for split, gain in ((1, 1.0), (2, 1.8)):
        for found in parastep.plan(50, split=split, **given):
            assert (found.rounds, found.bytes_sent, found.exchange_seconds) == (50, 0, 0)
            assert found.speedup == pytest.approx(gain)


def test_a_run_that_shared_its_forwards_does_not_tell_one_devices():
    report = sampled(4, tolerance=math.inf)
    team = TeamRecord(["cpu", "cpu"], "batch (to rounding)", None, 5, 0, 1)
    idle = team._replace(split=None, shared=0)
    parastep.plan(STEPS, profile=dataclasses.replace(report, teams=[idle]))
    shared = dataclasses.replace(report, teams=[team])
    with pytest.raises(parastep.InvalidError, match="2 devices shared the forwards"):
        parastep.plan(STEPS, profile=shared, split=2)
    (found,) = parastep.plan(STEPS, profile=shared, forward=1, ranks=4, split=2)
    assert found.sequential_seconds > STEPS


def test_memory_is_a_replica_and_its_latents():
    small, large = (
        parastep.plan(50, latents="1MB", forward=1, ranks=2, weights=w)[0].memory
        for w in ("0", "10GiB")
    )
    assert large - small == 10 * 2**30 and 2e6 < small < 20e6


# ---- what users write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("2.2MB", 2.2e6), ("3 MiB", 3 * 2**20), ("7", 7), (5, 5), ("1e3kB", 1e6), ("9B", 9)],
)
def test_bytes(text, value):
    assert quantities.bytes_in(text, "latents") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"), [("600ms", 0.6), ("1.5 s", 1.5), ("20us", 2e-5), (3, 3), ("0.5", 0.5)]
)
def test_seconds(text, value):
    assert quantities.seconds_in(text, "forward") == pytest.approx(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": "two"}, "latents: 'two'"),
        ({"latents": -1}, "latents: -1"),
        ({"forward": "600 minutes"}, "forward: '600 minutes'"),
        ({"forward": 0}, "forward"),
        ({"forward": None}, "report as profile"),
        ({"steps": 0}, "steps"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [2, 300]}, "ranks"),
        ({"link": "smoke"}, "link: 'smoke': one of nvlink"),
        ({"link": 0}, "link"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"policy": "hope"}, "policy"),
        ({"warmup": 0}, "warmup"),
        ({"speeds": []}, "speeds"),
        ({"speeds": [1, 0]}, "speeds"),
        ({"profile": parastep.Report()}, "profile"),
        ({"split": 0}, "split: 0"),
        ({"split": 1.5}, "split: 1.5"),
        ({"split": 2, "efficiency": 0}, "efficiency: 0"),
        ({"split": 2, "efficiency": 1.1}, "efficiency: 1.1"),
        ({"split": 2, "efficiency": math.nan}, "efficiency: nan"),
    ],
)
def test_what_makes_no_sense_is_refused(change, words):
    given = {"steps": 20, "latents": "1MB", "forward": "1s"} | change
    with pytest.raises(parastep.InvalidError, match=words):
        parastep.plan(**given)


def test_reports_that_tell_no_drift_are_refused():
    for report in (
        sampled(4, tolerance=0),
        sampled(4, policy="paper"),
        sampled(1),
        dataclasses.replace(sampled(4, tolerance=math.inf), interpolated=3),
    ):
        with pytest.raises(parastep.InvalidError, match="profile"):
            parastep.plan(profile=report)


def test_tables():
    found = parastep.plan(50, latents="1MB", forward="1s", ranks=(2, 16))
    lines = str(found).splitlines()
    assert len(lines) == 3 and lines[0].split()[:2] == ["ranks", "rounds"]
    assert lines[2].split()[:2] == ["16", str(found[1].rounds)]
    assert f"{found[1].speedup:.2f}x" in lines[2]
    page = found._repr_html_()
    assert page.count("<tr>") == 3 and f"<td>{found[0].rounds}</td>" in page
    pairs = parastep.plan(50, latents="1MB", forward="1s", ranks=(1, 8), split=2)
    lines = str(pairs).splitlines()
    assert lines[0].split()[:3] == ["ranks", "devices", "rounds"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "2"], ["8", "16"]]
    assert "<th>devices</th>" in pairs._repr_html_() and "<td>16</td>" in pairs._repr_html_()
    assert "2 (1:2)" in str(parastep.plan(50, latents="1MB", forward="1s", speeds=[1, 2]))


def test_command_line(tmp_path, capsys):
    given = ["--steps", "50", "--latents", "2.2MB", "--forward", "600ms", "--link", "25GbE"]
    assert cli.main(["plan", *given, "--ranks", "8,16,32"]) == 0
    out = capsys.readouterr().out
    expected = parastep.plan(50, latents="2.2MB", forward=0.6, ranks=(8, 16, 32), link="25GbE")
    assert str(expected) in out and "stand-in" in out
    assert cli.main(["plan", *given, "--paper", "5", "--ranks", "8"]) == 0
    assert " 11 " in capsys.readouterr().out
    file = tmp_path / "report.json"
    report = sampled(4)
    file.write_text(json.dumps(report.to_dict()))
    assert cli.main(["plan", "--profile", str(file), "--steps", "50"]) == 0
    out = capsys.readouterr().out
    assert str(parastep.plan(50, profile=report)) in out and "stand-in" not in out
    assert cli.main(["plan", *given, "--speeds", "1,0.5"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *given, "--ranks", "4", "--split", "2", "--efficiency", ".8"]) == 0
    known = {"latents": "2.2MB", "forward": 0.6, "link": "25GbE", "ranks": 4}
    assert str(parastep.plan(50, split=2, efficiency=0.8, **known)) in capsys.readouterr().out
    for wrong in (["--latents", "x"], ["--profile", "missing.json"], ["--speeds", "a"], []):
        assert cli.main(["plan", *wrong]) == 2
        assert "parastep plan: " in capsys.readouterr().err
    file.write_text("{}")
    assert cli.main(["plan", "--profile", str(file)]) == 2
    assert "not the dict of a report" in capsys.readouterr().err
