"""What it takes to run a copy of a diffusers scheduler outside its pipeline.

A clean copy, the calls of `step` that a pipeline's loop would make, and the noise levels of its
samples. Used by `program` and `noise`; torch is imported where it is needed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

# What `step` changes in a scheduler, with the value that `set_timesteps` leaves.
_STATE: dict[str, Any] = {
    "_init_size": None,
    "_step_index": None,
    "counter": 0,
    "cur_model_output": 0,
    "cur_sample": None,
    "derivatives": [],
    "dt": None,
    "ets": [],
    "last_noise": None,
    "last_sample": None,
    "lower_order_nums": 0,
    "mid_point_sigma": None,
    "noise_sampler": None,
    "prev_derivative": None,
    "sample": None,
}
_STATE_LISTS = ("model_outputs", "timestep_list")  # of fixed length, filled with None

_ALWAYS = ("model_output", "timestep", "sample")
_FROM_LOOP = ("old_pred_original_sample", "timestep_back", "prev_timestep")
_NEEDED = ("dmd_noisy_tensor",)  # has a default that `step` cannot work with
_NOT_CONSTANT = (*_ALWAYS, *_FROM_LOOP, "generator", "return_dict", "r_timestep")


class NotTraceableError(Exception):
    """Why a scheduler or sampler cannot be traced, in one sentence that the report gives; `step` is
    where it showed.
    """

    def __init__(self, reason: str, step: int = -1) -> None:
        super().__init__(reason)
        self.step = step


def fresh_copy(scheduler: Any, device: str | None = None) -> Any:
    """A copy of a scheduler as `set_timesteps` left it: same schedule and begin index, no history.

    Methods replaced on the instance (hooks on `step`) are not copied, so the copy runs the class's
    own. With `device` its tensors are moved there. A class of the user's own that keeps history
    under names unknown here must be copied right after `set_timesteps`.
    """
    fresh = object.__new__(type(scheduler))
    memo: dict[int, Any] = {id(scheduler): fresh}
    for name, value in vars(scheduler).items():
        if name in _STATE:
            fresh.__dict__[name] = copy.copy(_STATE[name])
        elif name in _STATE_LISTS:
            fresh.__dict__[name] = [None] * len(value)
        elif not (callable(value) and hasattr(type(scheduler), name)):
            fresh.__dict__[name] = _moved(copy.deepcopy(value, memo), device)
    if hasattr(fresh, "is_scale_input_called"):
        fresh.is_scale_input_called = True  # the host's loop does it, and `step` warns without
    return fresh


def name_of(scheduler: Any) -> str:
    return type(scheduler).__name__


def config_of(scheduler: Any, name: str) -> Any:
    """A value of the scheduler's config; None where it has no such entry, or no config."""
    return getattr(getattr(scheduler, "config", None), name, None)


def step_parameters(scheduler: Any) -> dict[str, inspect.Parameter]:
    """What the class's own `step` takes besides self; empty where it has none."""
    step = getattr(type(scheduler), "step", None)
    if step is None:
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(step).parameters
    return {k: v for k, v in parameters.items() if k != "self" and v.kind in named}


def constant_arguments(step_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `step` is given at every step alike; tensors of one value become numbers.

    Raises:
        NotTraceableError: one is a larger tensor (LTX's timesteps per token).
    """
    constant = {}
    for name, value in (step_kwargs or {}).items():
        if name in _NOT_CONSTANT or value is None:
            continue
        if hasattr(value, "detach"):
            if value.numel() != 1:
                raise NotTraceableError(f"step is given a whole tensor as {name!r}")
            value = value.item()
        constant[name] = value
    return constant


def loop_timesteps(ready: Any, timesteps: torch.Tensor | Sequence[Any] | None) -> torch.Tensor:
    """The loop's timesteps (N,) on the CPU; by default the scheduler's own from its begin index.

    Raises:
        NotTraceableError: there are none, or they are not one number a step.
    """
    import torch

    own = getattr(ready, "timesteps", None)
    if timesteps is None:
        if own is None:
            raise NotTraceableError(f"{name_of(ready)} has no timesteps before set_timesteps")
        timesteps = own[getattr(ready, "_begin_index", None) or 0 :]
    if isinstance(timesteps, torch.Tensor):
        loop = timesteps.detach().cpu()
    elif len(timesteps) and isinstance(timesteps[0], torch.Tensor):
        loop = torch.stack([t.detach().cpu() for t in timesteps])
    else:
        dtype = own.dtype if isinstance(own, torch.Tensor) else torch.float64
        loop = torch.tensor(np.asarray(timesteps), dtype=dtype)
    if loop.dim() != 1 or not len(loop):
        shape = tuple(loop.shape)
        raise NotTraceableError(f"timesteps of shape {shape} are not one number a step")
    return loop


class Stepper:
    """Calls a scheduler's `step` in order, the way the pipelines' loops do.

    It supplies what a loop supplies: the timestep, and for the few schedulers that ask for them the
    timesteps beside it and the previous call's predicted sample.

    Raises:
        NotTraceableError: `step` needs what only a pipeline knows, fails, or returns something
            other than a sample of the same shape.
    """

    def __init__(
        self,
        scheduler: Any,
        timesteps: torch.Tensor,
        step_kwargs: Mapping[str, Any] | None,
        generator: Any = None,
        also_outputs: Sequence[str] = (),
    ) -> None:
        self.name, self._also_outputs = name_of(scheduler), also_outputs
        self._step: Any = getattr(scheduler, "step", None)
        self._timesteps = timesteps
        self._batched = self.name == "DDPMWuerstchenScheduler"  # it reads timestep.size(0)
        self._learned = str(config_of(scheduler, "variance_type")).startswith("learned")
        self._predicted: Any = None
        self._index = 0
        accepted = step_parameters(scheduler)
        self._from_loop = [name for name in _FROM_LOOP if name in accepted]
        constant = constant_arguments(step_kwargs)
        self._constant = {k: v for k, v in constant.items() if k in accepted}
        self._check(accepted)
        if generator is not None and "generator" in accepted:
            self._constant["generator"] = generator
        if "return_dict" in accepted:
            self._constant["return_dict"] = False

    def _check(self, accepted: Mapping[str, inspect.Parameter]) -> None:
        if self._step is None:
            raise NotTraceableError(f"{self.name} has no step method")
        for name in _ALWAYS:
            if name not in accepted:
                raise NotTraceableError(f"{self.name}.step takes no {name!r}")
        if "LongTensor" in str(accepted["sample"].annotation):
            raise NotTraceableError(f"{self.name} samples discrete tokens, not a latent")
        supplied = {*_ALWAYS, *_FROM_LOOP, *self._constant, *self._also_outputs}
        for name, parameter in accepted.items():
            needed = parameter.default is parameter.empty or name in _NEEDED
            if needed and name not in supplied:
                why = f"{self.name}.step needs {name!r}, which only its pipeline knows"
                raise NotTraceableError(why)

    def __call__(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next step's new sample, for a model output and a sample of one shape."""
        j, self._index = self._index, self._index + 1
        times = self._timesteps
        from_loop = {
            "old_pred_original_sample": self._predicted,
            "timestep_back": times[j - 1] if j > 0 else None,
            "prev_timestep": times[j + 1] if j + 1 < len(times) else None,
        }
        timestep = times[j].expand(sample.shape[0]) if self._batched else times[j]
        try:
            result = self._step(
                model_output=output,
                timestep=timestep,
                sample=sample,
                **{name: from_loop[name] for name in self._from_loop},
                **dict.fromkeys(self._also_outputs, output),
                **self._constant,
            )
            returned = result if isinstance(result, tuple) else result.to_tuple()
        except Exception as error:
            raise NotTraceableError(self._why_not(j, error), j) from error
        self._predicted = returned[1] if len(returned) > 1 else None
        if returned[0].shape != sample.shape or not returned[0].is_floating_point():
            raise NotTraceableError(f"{self.name}.step returns something else than a sample", j)
        return returned[0]

    def _why_not(self, j: int, error: Exception) -> str:
        if self._learned:
            return f"{self.name} reads a learned variance from further channels of the model output"
        what = str(error).strip().split("\n")[0][:160]
        return f"{self.name}.step raised {type(error).__name__} at step {j}: {what}"


@dataclass(frozen=True)
class Levels:
    """The noise level of each sample x_j = alpha x0 + s eps, and what the model predicts of it.

    Attributes:
        alpha, s: (N,); 0 and 1 where the scheduler does not tell.
        p, q: (N,), the model's clean sample is p x_j + q m_j; not finite where not known.
        kind: the prediction type in diffusers' words; '' where the scheduler does not say.
    """

    alpha: Array
    s: Array
    p: Array
    q: Array
    kind: str

    def of_clean_samples(self) -> Levels:
        """The same, where the loop makes a clean sample of what the model predicts."""
        return Levels(self.alpha, self.s, 0 * self.s, 1 + 0 * self.s, "sample")

    @property
    def slope(self) -> Array:
        """dm/dx (N,) with the predicted clean sample held, or its noise where m is the sample."""
        with np.errstate(all="ignore"):
            return 1 / self.alpha if self.kind == "sample" else -self.p / self.q


def levels_of(ready: Any, timesteps: torch.Tensor) -> Levels:
    """Levels from `add_noise` or `scale_noise` on ones and zeros, else from its own table."""
    import torch

    kind = _prediction(ready)
    begin = _begin_index(ready, timesteps)
    scheduler = copy.copy(ready)
    rows: list[list[float]] = []
    for j, t in enumerate(timesteps):
        if begin is not None:  # by index, as timesteps may repeat
            scheduler._begin_index, scheduler._step_index = begin + j, None
        try:
            rows.append(_noised(scheduler, t, (begin or 0) + j, kind))
        except Exception:  # whatever a scheduler raises, only guesses get worse for it
            rows.append([np.nan, np.nan])
    alpha, s = np.array(rows, dtype=np.float64).T
    if config_of(ready, "invert_sigmas"):
        alpha, s = s, alpha  # this table counts sigma from the data's end
    norm = np.hypot(alpha, s)
    unknown = np.full_like(s, np.nan)
    with np.errstate(all="ignore"):
        p, q = {
            "epsilon": (1 / alpha, -s / alpha),
            "v_prediction": (alpha / norm**2, -s / norm),
            "sample": (0 * s, 1 + 0 * s),
            "flow_prediction": (1 + 0 * s, -s),
            "trigflow": (alpha, -np.sqrt(1 - alpha**2)),
        }.get(kind, (unknown, unknown))
    if hasattr(ready, "precondition_outputs"):  # EDM scales the model's input and output itself
        sigma = torch.from_numpy(s.copy())
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        p = ready.precondition_outputs(one, zero, sigma).numpy()
        q = ready.precondition_outputs(zero, one, sigma).numpy()
    return Levels(np.nan_to_num(alpha, nan=0.0), np.nan_to_num(s, nan=1.0), p, q, kind)


def _noised(scheduler: Any, t: torch.Tensor, index: int, kind: str) -> list[float]:
    """[alpha, s] at one timestep."""
    import torch

    clean, noise = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1, 1).unbind()
    if hasattr(scheduler, "add_noise"):
        pair = scheduler.add_noise(clean, noise, t.expand(2))
    elif hasattr(scheduler, "scale_noise"):
        pair = scheduler.scale_noise(clean, t.expand(2), noise)
    elif hasattr(scheduler, "alphas_cumprod"):
        squared = scheduler.alphas_cumprod[t]
        pair = torch.stack([squared, 1 - squared]).sqrt()
    elif hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[index]
        pair = torch.stack([1 - sigma if kind == "flow_prediction" else sigma**0, sigma])
    elif kind == "trigflow":
        pair = torch.stack([t.cos(), t.sin() * config_of(scheduler, "sigma_data")])
    else:  # IPNDM, where alpha and beta are the two scales themselves
        pair = torch.stack([scheduler.alphas[index], scheduler.betas[index]])
    alpha, s = pair.flatten().tolist()
    return [alpha, s]


def _prediction(ready: Any) -> str:
    kind = config_of(ready, "prediction_type")
    if kind is None and (hasattr(ready, "scale_noise") or "EulerAncestralRF" in name_of(ready)):
        return "flow_prediction"  # the flow schedulers have no such setting
    return {"original_sample": "sample", None: ""}.get(kind, str(kind))


def _begin_index(ready: Any, timesteps: torch.Tensor) -> int | None:
    """The step index that the loop starts at, or None where the scheduler keeps none."""
    if getattr(ready, "_begin_index", None) is not None:
        return int(ready._begin_index)
    if not hasattr(ready, "_begin_index") or not hasattr(ready, "index_for_timestep"):
        return None
    try:
        return int(ready.index_for_timestep(timesteps[0]))
    except Exception:  # a timestep of the loop's own making
        return None


def _moved(value: Any, device: str | None) -> Any:
    """`value` with the tensors in it, or in lists and dicts in it, on `device`."""
    if device is None:
        return value
    if hasattr(value, "detach"):
        return value.detach().to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    return value
