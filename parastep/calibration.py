"""`calibrate`: the tolerance at which a model of one's own reaches a PSNR, measured on a few runs.

Strided answers are estimated, not verified, and how far an error of the latent grows is the model's
own. So a few sequential runs are recorded, each is run again at several tolerances, and the largest
one that holds the target is kept, with what each would have cost. Saved as JSON it can be shared.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .report import Report
from .sampling import sample
from .tolerance import SCALE, Tolerance, number_of

# From loose to tight, three a decade; between two neighbours the search goes on by bisection.
GRID = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
WORST_BELOW = 7.0  # dB that a single run may lie below the target


class Cost(NamedTuple):
    """What a tolerance costs: dB of the mean squared error over runs, with one standard error of
    that mean added, since other runs are to hold it too; of the worst run; and the mean number of
    rounds.
    """

    tolerance: float
    psnr: float
    worst: float
    rounds: float


@dataclass
class Calibration:
    """`tolerance` reaches `target` dB; `table` is what others cost, from loose to tight.

    `parallelize(pipe, tolerance=calibration)` uses it; `reached` is False where no
    tolerance did, and `tolerance` then is 0, the exact mode.
    """

    tolerance: float
    target: float
    reached: bool
    table: list[Cost]
    ranks: int
    steps: int
    model: str
    version: str
    scale: int = SCALE  # of the tolerances, see parastep.tolerance

    def __float__(self) -> float:
        return self.tolerance

    def save(self, path: str | pathlib.Path) -> None:
        """As a small JSON file."""
        plain = asdict(self) | {"table": [cost._asdict() for cost in self.table]}
        pathlib.Path(path).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Calibration:
        """Raises InvalidError where the file does not hold a calibration, or one whose tolerances
        meant something else.
        """
        try:
            plain = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            scale = plain.pop("scale", 1)  # which files did not name at first
            if isinstance(scale, int) and scale > SCALE:  # it may hold anything
                raise _core.InvalidError(_of_another_scale(path, plain.get("version"), scale))
            table = [Cost(**{k: float(v) for k, v in cost.items()}) for cost in plain.pop("table")]
            found = cls(table=table, **plain)
            found.tolerance = number_of(float(found.tolerance))
        except _core.Error:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _core.InvalidError(f"{path}: not a calibration of parastep: {error}") from error
        if scale != SCALE:
            raise _core.InvalidError(_of_another_scale(path, found.version, scale))
        return found

    def __str__(self) -> str:
        lines = [f"{'tolerance':>10}  {'PSNR':>6}  {'worst':>6}  {'rounds':>6}"]
        for cost in sorted(self.table, reverse=True):
            mark = "  <" if cost.tolerance == self.tolerance else ""
            figures = f"{cost.psnr:6.1f}  {cost.worst:6.1f}  {cost.rounds:6.1f}"
            lines.append(f"{cost.tolerance:10.3g}  {figures}{mark}")
        if not self.reached:
            lines.append(f"none reached {self.target:g} dB: tolerance 0, the exact mode, is left")
        return "\n".join(lines)


def _of_another_scale(path: str | pathlib.Path, version: Any, scale: int) -> str:
    later = scale > SCALE
    return (
        f"{path}: made by {'a later' if later else 'an earlier'} parastep, {version}, whose "
        f"tolerances mean something else (scale {scale}, here {SCALE}): "
        + ("update parastep, or calibrate again" if later else "calibrate again")
    )


def psnr_of(squared: Sequence[float], peak: float) -> float:
    """dB of the mean squared error and its standard error against peak to peak `peak`; infinite
    where they are 0.
    """
    mean = float(np.mean(squared))
    if len(squared) > 1:
        mean += float(np.std(squared, ddof=1)) / math.sqrt(len(squared))
    return 10 * math.log10(peak**2 / mean) if mean > 0 else math.inf


def calibrate(
    pipe_or_program: Any,
    calls: Sequence[Any] | Callable[[int], Any],
    denoiser: Callable[..., Any] | None = None,
    *,
    target: float = 45.0,
    runs: int = 4,
    peak: float = 2.0,
    decode: Callable[[Any], Any] | None = None,
    refine: int = 2,
    **options: Any,
) -> Calibration:
    """The largest tolerance whose results lie within `target` dB of the sequential ones.

    It stands for runs like those it was given. How far an error grows differs from start to start:
    on the demo's sound model 25 times or more in one of thirty, where half of them stay below 3.
    More runs find more of those.

    Args:
        pipe_or_program: a diffusers pipeline, or a Program for `sample`.
        calls: for a pipeline the keyword arguments of each run, for a program its first latents;
            or a function of the run's number, 0 to `runs` - 1, that gives them. Generators in the
            arguments are read once: a function makes new ones for every run, which is what is
            needed.
        denoiser: as for `sample`, where a program is given.
        target: dB to hold over all runs together, of their mean squared error and one standard
            error of it; a single run may lie 7 dB lower.
        peak: peak to peak of what is compared: 2 for latents or pictures in -1 to 1.
        decode: makes an array of a result, where comparing the result itself is not what is wanted;
            by default a pipeline's first output, or the latents.
        refine: bisections between the two tolerances of the grid that enclose the target.
        options: of `parallelize` or `sample`, `devices` or `ranks` above all.

    Raises:
        InvalidError: arguments that do not fit.
    """
    if isinstance(pipe_or_program, _core.Program):
        if denoiser is None:
            raise _core.InvalidError("denoiser: a program needs one, as sample does")
        run, name = _sampling(pipe_or_program, denoiser, options), type(denoiser).__name__
    else:
        if denoiser is not None:
            raise _core.InvalidError("denoiser: a pipeline has its own")
        run, name = _calling(pipe_or_program, options), type(pipe_or_program).__name__
    if not math.isfinite(target) or not peak > 0 or refine < 0:
        raise _core.InvalidError("target must be finite, peak above 0, refine 0 or more")
    count = runs if callable(calls) else len(calls)
    if count < 1:
        raise _core.InvalidError("calls: at least one run is needed")
    give = calls if callable(calls) else calls.__getitem__
    exact = [_array(run(give(k), 0.0, True)[0], decode) for k in range(count)]
    last = Report()

    def cost_of(tolerance: float) -> Cost:
        nonlocal last
        squared, rounds = [], []
        for k in range(count):
            result, last = run(give(k), tolerance, False)
            squared.append(float(np.mean((_array(result, decode) - exact[k]) ** 2)))
            rounds.append(last.rounds)
        worst = psnr_of([max(squared)], peak)
        return Cost(tolerance, psnr_of(squared, peak), worst, float(np.mean(rounds)))

    table, best = _search(cost_of, target, refine)
    return Calibration(
        tolerance=best.tolerance if best is not None else 0.0,
        target=target,
        reached=best is not None,
        table=sorted(table, reverse=True),
        ranks=last.ranks,
        steps=last.steps,
        model=name,
        version=str(_core.build_info()["version"]),
    )


def _search(
    cost_of: Callable[[float], Cost], target: float, refine: int
) -> tuple[list[Cost], Cost | None]:
    """Down the grid until a tolerance holds the target, then between it and the one before."""

    def holds(cost: Cost) -> bool:
        return cost.psnr >= target and cost.worst >= target - WORST_BELOW

    table: list[Cost] = []
    for tolerance in GRID:
        table.append(cost_of(tolerance))
        if holds(table[-1]):
            break
    else:
        return table, None
    best, above = table[-1], table[-2] if len(table) > 1 else None
    for _ in range(refine if above is not None else 0):
        assert above is not None
        middle = cost_of(float(f"{math.sqrt(best.tolerance * above.tolerance):.2g}"))
        table.append(middle)
        best, above = (middle, above) if holds(middle) else (best, middle)
    return table, best


_Run = Callable[[Any, Tolerance, bool], tuple[Any, Report]]


def _calling(pipe: Any, options: dict[str, Any]) -> _Run:
    from .diffusers.pipeline import parallelize

    def run(call: Any, tolerance: Tolerance, alone: bool) -> tuple[Any, Report]:
        if alone:
            return pipe(**call), Report()
        with parallelize(pipe, tolerance=tolerance, **options) as parallel:
            return parallel(**call), parallel.report or Report()

    return run


def _sampling(program: Any, denoiser: Callable[..., Any], options: dict[str, Any]) -> _Run:
    def run(x: Any, tolerance: Tolerance, alone: bool) -> tuple[Any, Report]:
        if alone:
            given = {k: v for k, v in options.items() if k == "noise"}
            return sample(program, denoiser, x, ranks=1, tolerance=0.0, **given)
        return sample(program, denoiser, x, tolerance=tolerance, **options)

    return run


def _array(result: Any, decode: Callable[[Any], Any] | None) -> Any:
    """A result as float64: what `decode` makes of it, else a pipeline's first output."""
    if decode is not None:
        result = decode(result)
    elif hasattr(result, "to_tuple"):
        result = result.to_tuple()[0]
    elif isinstance(result, tuple):
        result = result[0]
    if hasattr(result, "detach"):
        result = result.detach().cpu().double().numpy()
    return np.asarray(result, dtype=np.float64)
