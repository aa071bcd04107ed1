"""Several steps in one call of the denoiser: `slots` of `sample`, and who evaluates in a round."""

import threading

import numpy as np
import pytest
from cases import (
    Counted,
    drawing,
    euler,
    exact,
    latents,
    lost,
    noise_of,
    run_script,
    same,
    settle,
    smooth,
)
from mixture import Mixture, distance, setting

import parastep
from parastep import _core

try:
    import torch
except ImportError:
    torch = None

DTYPES = ["float32", "float16", "float64"]
if torch is not None:
    DTYPES += ["torch.float32", "torch.bfloat16"]
SLOTS = [("batch", 4), ("batch", 1), (2, 1), (3, 2), ((1, 3), 2), ([2, 1, 4], 3)]


# ---- the result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slots", "ranks"), SLOTS)
def test_tolerance_0_is_exact(slots, ranks, dtype):
    program, x, denoiser = euler(9), latents(dtype=dtype), Counted(smooth)
    found, report = parastep.sample(
        program, denoiser, x, ranks=ranks, slots=slots, tolerance="rehearse"
    )
    assert same(found, exact(program, smooth, x))
    assert report.rounds == 9 and report.failures == [] and report.unbatched is None
    assert report.forwards == len(denoiser.calls)
    # What answers the sampler is never part of a batch.
    assert {(step, 0) for step in range(9)} <= set(denoiser.calls)


@pytest.mark.parametrize("max_stride", [1, None])
@pytest.mark.parametrize("tolerance", [0.02, 0.3])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_device_is_as_good_as_ranks(ranks, tolerance, max_stride):
    """The same rounds and, up to rounding, the same result; a round is one call."""
    program, mixture, x = setting(60)
    options = {"ranks": ranks, "tolerance": tolerance, "max_stride": max_stride}
    wanted, apart = parastep.sample(program, mixture, x, **options)
    denoiser = Counted(mixture)
    found, report = parastep.sample(program, denoiser, x, slots="batch", **options)
    assert denoiser.threads == {threading.current_thread().name}
    assert report.rounds == apart.rounds and report.accepted == apart.accepted
    assert report.interpolated == apart.interpolated
    assert distance(found, wanted) < 1e-9
    assert report.forwards == len(denoiser.calls) == report.rounds + 1  # one to try the batch
    assert apart.forwards == sum(apart.evaluations) > report.forwards
    assert max(len(step) for step, _ in denoiser.calls if isinstance(step, tuple)) == ranks
    assert f"{report.forwards} forwards" in str(report) and report.ranks == 1
    assert f"{report.forwards} forwards" in report._repr_html_()


@pytest.mark.parametrize("max_stride", [1, None])
def test_ranks_with_slots(max_stride):
    program, mixture, x = setting(60)
    options = {"tolerance": 0.1, "max_stride": max_stride}
    wanted, apart = parastep.sample(program, mixture, x, ranks=6, **options)
    denoiser = Counted(mixture)
    found, report = parastep.sample(program, denoiser, x, ranks=2, slots=[2, 4], **options)
    assert report.rounds == apart.rounds and distance(found, wanted) < 1e-9
    sizes = {rank: set() for rank in (0, 1)}
    for step, rank in denoiser.calls[2:]:
        sizes[rank].add(len(step) if isinstance(step, tuple) else 1)
    assert max(sizes[0]) == 2 and max(sizes[1]) == 4
    assert report.forwards == len(denoiser.calls)


def test_noise():
    program, x, z = drawing(20), latents(dtype="float64"), noise_of(20, dtype="float64")
    options = {"ranks": 3, "tolerance": 0.5, "noise": z}
    wanted, apart = parastep.sample(program, smooth, x, **options)
    found, report = parastep.sample(program, Counted(smooth), x, slots="batch", **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert report.accepted == apart.accepted and report.rounds < 20


def test_the_array_api_is_enough():
    """Tensors of any library that follows it; here a thin one over NumPy."""

    class Array:
        def __init__(self, data):
            self.data = np.asarray(data)
            self.shape, self.dtype = self.data.shape, self.data.dtype

        def __dlpack__(self, **kwargs):
            return self.data.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.data.__dlpack_device__()

        def __array_namespace__(self):
            class Space:
                concat = staticmethod(lambda parts: Array(np.concatenate([p.data for p in parts])))

            return Space

    from parastep.stacking import joined

    first, second = Array(np.ones((1, 2))), Array(np.zeros((1, 2)))
    assert joined([first, second]).data.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(parastep.UnsupportedError, match="list"):
        joined([[1.0], [2.0]])


# ---- what cannot be batched ----------------------------------------------------------------------


def mixes(x, step, rank):
    """Items of a batch see each other."""
    m = np.concatenate([Mixture(LEVELS)(part[None], 3, rank) for part in x])
    return m - 0.1 * m.mean(0)


def knows_one_time(x, step, rank):
    return plain(x, step[0] if isinstance(step, tuple) else step, rank)


def takes_no_stack(x, step, rank):
    return plain(x, int(step), rank)


def loses_items(x, step, rank):
    return plain(x, 3, rank)[:1] if isinstance(step, tuple) else plain(x, step, rank)


def returns_nothing(x, step, rank):
    return None if isinstance(step, tuple) else plain(x, step, rank)


def spoils(x, step, rank):
    return x * np.nan if isinstance(step, tuple) else plain(x, step, rank)


LEVELS = setting(40)[1].sigmas
plain = Mixture(LEVELS)


@pytest.mark.parametrize(
    ("denoiser", "reason"),
    [
        (mixes, "differs from that alone"),
        (knows_one_time, "differs from that alone"),
        (takes_no_stack, "a batch raises TypeError"),
        (loses_items, "a batch raises"),
        (returns_nothing, "a batch raises ShapeError"),
        (spoils, "differs from that alone"),
    ],
)
@pytest.mark.parametrize(("slots", "ranks"), [("batch", 4), ([1, 3], 2)])
def test_what_takes_no_batch_is_evaluated_one_by_one(denoiser, reason, slots, ranks):
    program, _, x = setting(40)
    alone = 1 if slots == "batch" else ranks
    wanted, apart = parastep.sample(program, denoiser, x, ranks=alone)
    with pytest.warns(parastep.SerialWarning, match=reason):
        found, report = parastep.sample(program, denoiser, x, ranks=ranks, slots=slots)
    assert same(found, wanted) and reason in report.unbatched
    assert report.accepted == apart.accepted
    assert reason in report._repr_html_()
    assert parastep.Report.from_dict(report.to_dict()).unbatched == report.unbatched


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"slots": "all"}, parastep.InvalidError, "slots: 'all'"),
        ({"slots": 0}, parastep.InvalidError, "slots"),
        ({"slots": [1, 2]}, parastep.InvalidError, "slots: 2 numbers for 4 ranks"),
        ({"slots": "batch", "ranks": 17}, parastep.InvalidError, "slots: 17"),
        ({"slots": 2.5}, TypeError, "float"),
        ({"slots": "batch", "x": latents((5,))}, parastep.ShapeError, "first dimension"),
        ({"slots": 2, "tolerance": -1}, parastep.InvalidError, "tolerance"),
    ],
)
def test_what_does_not_fit(options, error, text):
    """Said before anything is evaluated."""
    denoiser = Counted(smooth)
    x = options.pop("x", latents())
    with pytest.raises(error, match=text):
        parastep.sample(euler(6), denoiser, x, **options)
    assert not denoiser.calls


# ---- faults --------------------------------------------------------------------------------------


def test_a_rank_that_raises_in_a_batch_costs_speed_alone():
    program, mixture, x = setting(50)
    wanted = exact(program, mixture, x)
    good = Counted(mixture)

    def denoiser(x, step, rank):
        if rank == 1 and isinstance(step, tuple) and step[0] > 10:
            raise RuntimeError("out of order")
        return good(x, step, rank)

    with pytest.warns(parastep.FollowerWarning, match="out of order"):
        found, report = parastep.sample(program, denoiser, x, ranks=3, slots=2, tolerance=0.01)
    assert lost(report) == [1] and distance(found, wanted) < 0.05
    settle()


def test_what_the_leaders_batch_raises_is_raised():
    program, mixture, x = setting(50)
    good = Counted(mixture)

    def denoiser(x, step, rank):
        if isinstance(step, tuple) and 20 in step:
            raise KeyError("mine")
        return good(x, step, rank)

    with pytest.raises(KeyError, match="mine"):
        parastep.sample(program, denoiser, x, ranks=4, slots="batch", max_stride=1)
    found, report = parastep.sample(program, good, x, ranks=4, slots="batch", max_stride=1)
    wanted = parastep.sample(program, mixture, x, ranks=4, max_stride=1)[0]
    assert distance(found, wanted) < 1e-9 and report.failures == []


def test_interrupt():
    """Ctrl-C in a batch, with and without other ranks; the next run is as good as any."""
    script = """
        import os, signal, time
        import numpy as np, parastep
        from cases import Counted, euler, latents, settle, smooth

        program, x, good = euler(40), latents(dtype="float64"), Counted(smooth)
        for options in ({"ranks": 4, "slots": "batch"}, {"ranks": 2, "slots": [1, 3]}):
            def denoiser(x, step, rank):
                if isinstance(step, tuple) and step[-1] > 10:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.2)
                return good(x, step, rank)
            try:
                parastep.sample(program, denoiser, x, **options)
                print("no interrupt")
            except KeyboardInterrupt:
                print("interrupted")
            settle()
            found, report = parastep.sample(program, good, x, **options)
            print(report.failures, np.isfinite(found).all())
        """
    run = run_script(script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:4] == ["interrupted", "[] True"] * 2


# ---- who evaluates in a round --------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_everybody_is_told_the_same_company(ranks):
    """Of each round: its number, its followers, whether the leader evaluates; all of them agree."""
    steps, seen = 8, []
    program, x = euler(steps), latents()
    leader = _core.Leader(program, x, ranks=ranks, tolerance=0.0)

    def follow(follower):
        while (work := follower.next()) is not None:
            seen.append(follower.company)
            follower.submit([smooth(point, step, 1) for step, point in work])

    threads = [
        threading.Thread(target=follow, args=(leader.follower(rank),)) for rank in range(1, ranks)
    ]
    for thread in threads:
        thread.start()
    own = []
    for step in range(steps):
        assert leader.ask(step, x, leader.output()) is False
        own.append(leader.company)
        leader.submit(smooth(x, step, 0))
        x = leader.advance()
    with pytest.raises(parastep.StateError):
        _ = leader.company
    leader.finish()
    for thread in threads:
        thread.join(20)
    expected = [(k + 1, min(ranks - 1, steps - 1 - k) if k else ranks - 1, True) for k in range(8)]
    assert own == expected
    assert sorted(seen) == sorted(each for each in expected for _ in range(each[1]))


def test_company_of_a_lane():
    """What lies ahead is evaluated without the leader."""
    program, mixture, x = setting(50)
    leader, seen = _core.Leader(program, x, ranks=2, lane=True, tolerance=0.1), []

    def follow(follower):
        while (work := follower.next()) is not None:
            seen.append((follower.rank, *follower.company))
            follower.submit([mixture(point, step, follower.rank) for step, point in work])

    threads = [threading.Thread(target=follow, args=(leader.follower(rank),)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for step in range(50):
        if not leader.ask(step, x, leader.output()):
            leader.submit(mixture(x, step, 0))
        x = leader.advance()
    leader.finish()
    for thread in threads:
        thread.join(20)
    rounds = {}
    for rank, number, followers, exact_ in seen:
        rounds.setdefault((number, followers, exact_), set()).add(rank)
    assert all(len(ranks) == followers for (_, followers, _), ranks in rounds.items())
    assert len({number for number, _, _ in rounds}) == len(rounds)
    assert any(not exact_ and followers == 2 for _, followers, exact_ in rounds)
