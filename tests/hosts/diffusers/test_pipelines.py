"""Every pipeline in parallel: the host's own bits at tolerance 0, full windows without a limit,
forwards where the report says, and nothing left behind.
"""

from __future__ import annotations

import math
import pathlib
import runpy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    distance,
    frozen,
    host,
    no_warnings,
    own,
    parallel,
    rounds_without_limit,
)

MAIN = ("svd", "cogvideox_ddim", "cogvideox_dpm", "audioldm2", "sd3", "flux", "latte", "sd", "sdxl")
SERIAL = {
    "kandinsky_ddpm": "variance of the noise",
    "deepfloyd_if": "variance of the noise",
    "skyreels_df_turns": "step in turn",
}
SERIAL = {name: reason for name, reason in SERIAL.items() if name in tiny.CASES}
PARALLEL = [name for name in tiny.CASES if name not in SERIAL]
STEPS = {
    name: case.steps * 3 // 4 for name, case in (tiny.CASES | tiny.MORE).items()
}  # 9 that really run
VARYING = ("sd3_slg",)  # more denoiser calls in some iterations than in others


def call(name: str, ranks: int, tolerance: float, **kwargs: Any) -> tuple[torch.Tensor, Any, Any]:
    """The result of a parallel call, its report, and the generator it drew from."""
    case, pipe = tiny.case_of(name), parallel(host(name), ranks, tolerance)
    given = case.kwargs(**kwargs)
    result = tiny.run(pipe, given)
    pipe.close()
    return result, pipe.report, given["generator"]


def check_exact(name: str, ranks: int, steps: int) -> None:
    alone = own(name, steps)
    before = attributes(host(name))
    with no_warnings(), tiny.count_forwards(*tiny.denoisers(host(name))) as count:
        result, report, generator = call(name, ranks, 0.0, steps=steps)
    n = alone.steps
    assert torch.equal(result, alone.result) and result.dtype == alone.result.dtype
    assert torch.equal(generator.get_state(), alone.generator)
    assert frozen(host(name).scheduler) == alone.scheduler
    assert attributes(host(name)) == before
    # Followers evaluated ahead of every step although nothing of theirs was to be used.
    assert report.steps == report.rounds == n
    assert report.evaluations == [max(n - rank, 1) for rank in range(ranks)]
    assert report.fallback is None and not report.failures and report.answered == 0
    assert all(map(math.isfinite, report.drift[2:])) == (ranks > 1)
    assert count.own == alone.forwards
    if name not in VARYING:
        assert count.everywhere == alone.forwards // n * sum(report.evaluations)


def check_no_limit(name: str, ranks: int, steps: int) -> None:
    alone = own(name, steps)
    with no_warnings(), tiny.count_forwards(*tiny.denoisers(host(name))) as count:
        result, report, generator = call(name, ranks, math.inf, steps=steps)
    n = alone.steps
    assert report.steps == n and report.rounds == rounds_without_limit(n, ranks)
    assert sum(report.evaluations) == n + (ranks - 1)  # step 0 on every rank, any other on one
    assert report.accepted[0] == 1 and set(report.accepted[1:-1]) <= {ranks}
    assert sum(report.accepted) == n and report.answered == n - report.rounds
    if name not in VARYING:
        per_step = alone.forwards // n
        assert count.own == per_step * report.evaluations[0]
        assert count.everywhere == per_step * sum(report.evaluations)
    assert torch.equal(generator.get_state(), alone.generator)
    assert result.isfinite().all() and distance(result, alone.result) < 0.8


@pytest.mark.parametrize("name", [*PARALLEL, *tiny.MORE])
def test_exact(name: str) -> None:
    check_exact(name, 4, STEPS[name])


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("name", MAIN)
def test_exact_on_other_numbers_of_ranks(name: str, ranks: int) -> None:
    check_exact(name, ranks, STEPS[name])


@pytest.mark.parametrize("name", PARALLEL)
def test_no_limit(name: str) -> None:
    check_no_limit(name, 4, STEPS[name])


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", MAIN)
def test_no_limit_on_other_numbers_of_ranks(name: str, ranks: int) -> None:
    check_no_limit(name, ranks, STEPS[name])


@pytest.mark.parametrize("name", SERIAL)
@pytest.mark.parametrize("tolerance", [0.0, math.inf])
def test_what_cannot_be_carried_runs_serially_and_says_so(name: str, tolerance: float) -> None:
    alone, before = own(name), attributes(host(name))
    with caught() as texts, tiny.count_forwards(*tiny.denoisers(host(name))) as count:
        result, report, generator = call(name, 4, tolerance)
    assert torch.equal(result, alone.result)
    assert torch.equal(generator.get_state(), alone.generator)
    assert frozen(host(name).scheduler) == alone.scheduler
    assert attributes(host(name)) == before
    assert SERIAL[name] in report.fallback
    assert len(texts) == 1 and report.fallback in texts[0]
    assert report.rounds == report.steps == alone.steps and not report.failures
    assert report.evaluations == [alone.steps, 1, 1, 1]
    assert count.everywhere == alone.forwards // alone.steps * (alone.steps + 3)


def test_audioldm2_of_200_steps() -> None:
    alone = own("audioldm2", 200)
    result, report, _ = call("audioldm2", 2, 0.0, steps=200)
    assert torch.equal(result, alone.result) and report.evaluations == [200, 199]
    result, report, _ = call("audioldm2", 8, math.inf, steps=200)
    assert report.rounds == 26 and distance(result, alone.result) < 0.1


@pytest.mark.parametrize("name", ["svd", "sd", "sdxl_img2img", "audioldm2_text", "sd_ip_adapter"])
def test_followers_neither_encode_nor_decode(name: str) -> None:
    pipe = host(name)
    names = ("vae", "text_encoder", "text_encoder_2", "image_encoder", "language_model", "vocoder")
    found = (getattr(pipe, part, None) for part in names)
    parts = [part for part in found if part is not None]
    parts += [pipe.vae.encoder, pipe.vae.decoder]
    alone = own(name, 4, True)
    with no_warnings(), tiny.count_forwards(*parts) as count:
        result, report, _ = call(name, 3, 0.0, steps=4, decode=True)
    assert torch.equal(result, alone.result) and result.std() > 0
    assert count.own > 0 and count.everywhere == count.own
    assert report.evaluations[0] == report.rounds == own(name, 4).steps


@pytest.mark.parametrize("name", ["cogvideox_ddim", "flux", "sd", "audioldm2"])
def test_tolerance_between(name: str) -> None:
    """Fewer rounds than steps, and as near to the sequential result as the tolerance says."""
    alone = own(name, 40)
    result, report, _ = call(name, 4, 0.02, steps=40)
    assert rounds_without_limit(40, 4) <= report.rounds < 40
    assert distance(result, alone.result) < 0.02
    finite = [drift for drift in report.drift if math.isfinite(drift)]
    assert 0 < max(finite) and sum(report.accepted) == 40


def test_the_page_has_a_line_for_every_pipeline() -> None:
    """That of docs/diffusers.md, which table.py writes."""
    folder = pathlib.Path(__file__).parent
    table = runpy.run_path(str(folder / "table.py"))
    assert table["named"](table["PAGE"].read_text()) >= set(tiny.CASES | tiny.MORE | tiny.SEVERAL)


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("warmup", [1, 5])
def test_published_rule(name: str, warmup: int) -> None:
    alone = own(name)
    pipe = parallel(host(name), 4, policy="paper", warmup=warmup)
    result = tiny.run(pipe, tiny.CASES[name].kwargs())
    n = alone.steps
    assert pipe.report.rounds == warmup + math.ceil((n - warmup) / 4)
    assert pipe.report.accepted[:warmup] == [1] * warmup
    assert 0 < distance(result, alone.result) < 0.5


def test_leader_with_several_threads() -> None:
    """Followers take one thread of torch each; the leader's bits depend on its own number."""
    pipe = host("sd")
    torch.set_num_threads(2)
    try:
        alone = tiny.run(pipe, tiny.CASES["sd"].kwargs(steps=3))
        result = tiny.run(parallel(pipe, 2), tiny.CASES["sd"].kwargs(steps=3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(result, alone)
