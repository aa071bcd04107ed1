"""The caches that diffusers ships for transformers, and cache-dit where that package is installed,
each with its best setting for some forwards.

A cache reuses blocks' outputs of the step before; forwards are counted in blocks that were really
computed, so that what a cache always computes counts. They run as users turn them on, with
`enable_cache` on a transformer; settings are chosen for every seed by its distance to
the sequential result, which nobody could do who does not have that already.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _rules import sequential

Found = tuple[torch.Tensor, float]  # what a run gave, and the forwards that it took
Cached = contextlib.AbstractContextManager[None]  # the transformer with a cache
MOST = 0.5  # forwards that a cache may take beyond those asked for
TRIES = 12  # of a threshold


class Caches:
    """Of one transformer, for one start: `f` is its guided denoiser, from `x`."""

    def __init__(self, network: Any, program: Any, f: Any, x: torch.Tensor) -> None:
        self._network, self._program, self._f, self._x = network, program, f, x

    def nearest(
        self, forwards: float, ratios: list[float], exact: torch.Tensor
    ) -> dict[str, Found]:
        """What each of them gives at so many forwards at most, nearest to the exact result.
        `ratios` are the model's own for MagCache, of another start.
        """
        tried = {
            "FirstBlockCache": self._with_thresholds(self._first_block, forwards),
            "MagCache": self._mag(ratios, forwards),
            "TaylorSeer": self._taylor(forwards),
            "cache-dit": self._cache_dit(forwards),
        }
        found = {}
        for name, runs in tried.items():
            fitting = [run for run in runs if run[1] <= forwards + MOST]
            if fitting:
                found[name] = min(fitting, key=lambda run: float((run[0] - exact).norm()))
        return found

    def ratios(self) -> list[float]:
        """How the residual's size changes from each step to the next, as MagCache is calibrated."""
        from diffusers import MagCacheConfig

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            config = MagCacheConfig(num_inference_steps=len(self._program), calibrate=True)
            self._run(self._by_diffusers(config))
        lines = [line for line in printed.getvalue().splitlines() if line.endswith("]")]
        return [float(ratio) for ratio in ast.literal_eval(lines[-1])]

    # ---- settings --------------------------------------------------------------------------------

    def _first_block(self, threshold: float) -> Cached:
        from diffusers import FirstBlockCacheConfig

        return self._by_diffusers(FirstBlockCacheConfig(threshold=threshold))

    def _mag(self, ratios: list[float], forwards: float) -> Iterator[Found]:
        from diffusers import MagCacheConfig

        steps = len(self._program)
        for most in (2, 3, 5, 8):
            for retention in (0.1, 0.2):

                def cached(threshold: float, most: int = most, kept: float = retention) -> Cached:
                    config = MagCacheConfig(
                        threshold=threshold,
                        max_skip_steps=most,
                        retention_ratio=kept,
                        num_inference_steps=steps,
                        mag_ratios=ratios,
                    )
                    return self._by_diffusers(config)

                yield from self._with_thresholds(cached, forwards)

    def _taylor(self, forwards: float) -> Iterator[Found]:
        from diffusers import TaylorSeerCacheConfig

        steps = len(self._program)
        for interval in range(2, 9):
            for warmup in range(2, steps):
                computed = warmup + (steps - warmup) // interval
                for order in (1, 2) if abs(computed - forwards) <= 1 else ():
                    config = TaylorSeerCacheConfig(
                        cache_interval=interval,
                        disable_cache_before_step=warmup,
                        max_order=order,
                        taylor_factors_dtype=torch.float32,
                        use_lite_mode=True,
                    )
                    yield self._run(self._by_diffusers(config))

    def _cache_dit(self, forwards: float) -> Iterator[Found]:
        """Its dual block cache, a calibrator of outputs to come beside it or not."""
        if importlib.util.find_spec("cache_dit") is None:
            return
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        for order, warmup in itertools.product((0, 1, 2), (2, 4, 8)):
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)

            @contextlib.contextmanager
            def cached(
                threshold: float, warmup: int = warmup, calibrator: Any = order and calibrator
            ) -> Iterator[None]:
                config = cache_dit.DBCacheConfig(
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    residual_diff_threshold=threshold,
                    max_warmup_steps=warmup,
                    num_inference_steps=len(self._program),
                    enable_separate_cfg=False,
                )
                given = {"cache_config": config, "calibrator_config": calibrator or None}
                with _kept(self._network):
                    cache_dit.enable_cache(self._network, **given)
                    yield
                    cache_dit.disable_cache(self._network)

            yield from self._with_thresholds(cached, forwards)

    def _with_thresholds(self, cached: Callable[[float], Cached], forwards: float) -> list[Found]:
        """Runs with thresholds between 0 and 2 that come nearer and nearer to the forwards."""
        low, high, found = 0.0, 2.0, []
        for _ in range(TRIES):
            middle = (low + high) / 2
            found.append(self._run(cached(middle)))
            if found[-1][1] > forwards + MOST:
                low = middle
            else:
                high = middle
        return found

    # ---- a run -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _by_diffusers(self, config: Any) -> Iterator[None]:
        self._network.enable_cache(config)
        try:
            with self._network.cache_context("both"):
                yield
        finally:
            self._network.disable_cache()

    def _run(self, cached: Cached) -> Found:
        computed = [0]
        blocks = [
            block
            for part in self._network.children()
            if isinstance(part, torch.nn.ModuleList)
            for block in part
        ]

        def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                computed[0] += 1
                return forward(*args, **kwargs)

            vars(run)["__signature__"] = inspect.signature(forward)  # which cache-dit looks at
            return run

        for block in blocks:
            vars(block)["forward"] = counted(block.forward)
        try:
            with cached:
                result, _ = sequential(self._program, self._f, self._x)
        finally:
            for block in blocks:
                vars(block).pop("forward", None)
        return result, computed[0] / len(blocks)


@contextlib.contextmanager
def _kept(network: torch.nn.Module) -> Iterator[None]:
    """Its modules are afterwards as they were: cache-dit leaves some of its own."""
    before = [(part, dict(vars(part)), dict(part._modules)) for part in network.modules()]
    try:
        yield
    finally:
        for part, attributes, children in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._modules.clear()
            part._modules.update(children)
