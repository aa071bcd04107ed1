"""The caches that diffusers ships for transformers, and cache-dit where that package is installed,
each with its best setting for some forwards.

A cache reuses blocks' outputs of the step before; forwards are counted in blocks that were really
computed, so that what a cache always computes counts. They run as users turn them on, with
`enable_cache`; settings are chosen for every seed by its distance to the sequential result, which
nobody could do who does not have that already.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _rules import nearest, sequential

Found = tuple[torch.Tensor, float]  # what a run gave, and the forwards that it took
Cached = contextlib.AbstractContextManager[None]  # the transformer with a cache
MOST = 0.5  # forwards that a cache may take beyond those asked for
THRESHOLDS, TRIES = (0.005, 2.0), 10  # where they are looked for, and how often at most


class Caches:
    """Of one transformer, for one start: `f` is its guided denoiser, from `x`. `ratios` are the
    model's own for MagCache, of another start.
    """

    def __init__(
        self, network: Any, program: Any, f: Any, x: torch.Tensor, ratios: Any = None
    ) -> None:
        self._network, self._program, self._f, self._x = network, program, f, x
        self._ratios, self._known = ratios, dict[Any, Found]()

    def nearest(self, forwards: float, exact: torch.Tensor) -> dict[str, Found]:
        """What each of them gives at so many forwards at most, nearest to the exact result."""
        tried = {}
        if hasattr(self._network, "enable_cache"):
            tried["FirstBlockCache"] = self._with_thresholds(forwards, self._first_block)
            tried["MagCache"] = self._each(forwards, self._mag, (2, 3, 5, 8), (0.1, 0.2))
            tried["TaylorSeer"] = self._taylors(forwards)
        if importlib.util.find_spec("cache_dit") is not None:
            given = forwards, self._dual_block, (2, 4), (2, 4, -1), ((1, 0), (2, 0), (1, 1))
            tried["cache-dit, DBCache"] = self._each(*given, (0,))
            tried["cache-dit, DBCache and TaylorSeer"] = self._each(*given, (1, 2))
        found = {}
        for name, runs in tried.items():
            fitting = [run for run in runs if run[1] <= forwards + MOST]
            if fitting:
                found[name] = nearest(fitting, exact)
        return found

    def ratios(self) -> list[float]:
        """How the residual's size changes from each step to the next, as MagCache is calibrated."""
        from diffusers import MagCacheConfig

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            config = MagCacheConfig(num_inference_steps=len(self._program), calibrate=True)
            self._counted(self._by_diffusers(config))
        lines = [line for line in printed.getvalue().splitlines() if line.endswith("]")]
        return [float(ratio) for ratio in ast.literal_eval(lines[-1])]

    # ---- settings --------------------------------------------------------------------------------

    def _first_block(self, threshold: float) -> Cached:
        from diffusers import FirstBlockCacheConfig

        return self._by_diffusers(FirstBlockCacheConfig(threshold=threshold))

    def _mag(self, threshold: float, most: int, retention: float) -> Cached:
        from diffusers import MagCacheConfig

        config = MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            retention_ratio=retention,
            num_inference_steps=len(self._program),
            mag_ratios=self._ratios,
        )
        return self._by_diffusers(config)

    def _taylor(self, interval: int, warmup: int, order: int) -> Cached:
        from diffusers import TaylorSeerCacheConfig

        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
        return self._by_diffusers(config)

    @contextlib.contextmanager
    def _dual_block(
        self, threshold: float, warmup: int, most: int, blocks: tuple[int, int], order: int
    ) -> Iterator[None]:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=blocks[0],
            Bn_compute_blocks=blocks[1],
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            max_continuous_cached_steps=most,
            num_inference_steps=len(self._program),
            enable_separate_cfg=False,
        )
        taylor = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=order,
            enable_encoder_calibrator=blocks[1] > 0,  # without such blocks nothing reads its text
        )
        network: Any = self._network
        if type(network).__name__ == "SD3Transformer2DModel":  # which it knows in its pipeline only
            network = cache_dit.BlockAdapter(
                transformer=network,
                blocks=network.transformer_blocks,
                forward_pattern=cache_dit.ForwardPattern.Pattern_1,
            )
        with _kept(self._network):
            cache_dit.enable_cache(
                network, cache_config=config, calibrator_config=taylor if order else None
            )
            yield
            cache_dit.disable_cache(network)

    def _taylors(self, forwards: float) -> list[Found]:
        """With every interval and warm-up that takes about so many forwards."""
        steps = len(self._program)
        return [
            self._run(self._taylor, interval, warmup, order)
            for interval in range(2, 9)
            for warmup in range(2, steps)
            for order in (1, 2)
            if abs(warmup + (steps - warmup) // interval - forwards) <= 1
        ]

    def _each(self, forwards: float, cached: Callable[..., Cached], *values: Any) -> list[Found]:
        """With thresholds, for every combination of the other settings' values."""
        settings = itertools.product(*values)
        return [run for each in settings for run in self._with_thresholds(forwards, cached, *each)]

    def _with_thresholds(
        self, forwards: float, cached: Callable[..., Cached], *setting: Any
    ) -> list[Found]:
        """Runs with thresholds that come nearer and nearer to the forwards, until about there."""
        low, high = THRESHOLDS
        found = [self._run(cached, high, *setting)]
        if found[0][1] > forwards + MOST:  # so few this setting never takes
            return found
        while abs(found[-1][1] - forwards) > MOST and len(found) < TRIES:
            middle = math.sqrt(low * high)
            found.append(self._run(cached, middle, *setting))
            if found[-1][1] > forwards:
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

    def _run(self, cached: Callable[..., Cached], *setting: Any) -> Found:
        """Kept, since searches for other forwards begin with the same settings."""
        key = cached.__name__, *setting
        if key not in self._known:
            self._known[key] = self._counted(cached(*setting))
        return self._known[key]

    def _counted(self, cached: Cached) -> Found:
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
