"""Programs, denoisers and helpers that the tests of runs share. Scripts import it without torch."""

import importlib.util
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np

import parastep
from parastep.stacking import joined

RANKS = [1, 2, 4, 8]
DTYPES = ["float32", "float16", "float64"]
if importlib.util.find_spec("torch"):
    DTYPES += [f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64")]


def euler(steps=8, top=10.0):
    """Euler on noise levels from top to 0."""
    return parastep.Program.euler(np.linspace(top, 0.0, steps + 1))


def multistep(steps):
    """A solver that reads older outputs."""
    return parastep.Program.adams_bashforth(np.linspace(10.0, 0.0, steps + 1), 3)


def drawing(steps=8, c=0.3):
    """Euler that adds c of noise after every step but the last."""
    plain = euler(steps)
    noise = np.full(steps, c)
    noise[-1] = 0.0
    return parastep.Program(plain.a, plain.b, noise, plain.s, plain.g)


def smooth(x, step, rank):
    """An output that depends on all its arguments but rank, for any kind of tensor and dtype."""
    return x * 0.6 / (abs(x) + 1.0) + 0.01 * step


class Gaussian:
    """The exact noise prediction where the data are normal, mean 0.5 and variance 0.25."""

    def __init__(self, steps, top=10.0):
        self.sigma = np.linspace(top, 0.0, steps + 1)

    def __call__(self, x, step, rank):
        sigma = float(self.sigma[step])
        return (x - 0.5) * (sigma / (0.25 + sigma * sigma))


class Counted:
    """A denoiser of single steps that takes stacks too, and remembers what it was called with."""

    def __init__(self, inner):
        self.inner, self.calls, self.threads = inner, [], set()
        self.lock = threading.Lock()

    def __call__(self, x, step, rank):
        with self.lock:
            self.calls.append((step, rank))
            self.threads.add(threading.current_thread().name)
        if not isinstance(step, tuple):
            return self.inner(x, step, rank)
        assert len(step) > 1 and x.shape[0] % len(step) == 0
        items = x.shape[0] // len(step)
        parts = [x[k * items : (k + 1) * items] for k in range(len(step))]
        outputs = [self.inner(part, j, rank) for part, j in zip(parts, step, strict=True)]
        return joined(outputs)


def latents(shape=(2, 3, 4), dtype="float32", seed=0):
    """A NumPy array or, for names of torch dtypes ("torch.bfloat16"), a tensor; of scale 10."""
    x = 10.0 * np.random.default_rng(seed).standard_normal(shape)
    library, _, name = dtype.rpartition(".")
    if library:
        import torch

        return torch.from_numpy(x).to(getattr(torch, name))
    return x.astype(name)


def noise_of(steps, shape=(2, 3, 4), dtype="float32", seed=1):
    """Noise of every step, (steps, *shape), of scale 1."""
    z = latents((steps, *shape), dtype, seed)
    return z / 10.0 if dtype.startswith("torch") else (z / 10.0).astype(z.dtype)


def bits(x):
    """The memory of a tensor in C order: equal for equal bits, whatever they mean."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return np.asarray(x).tobytes()


def same(x, y):
    """Whether two tensors are of one kind, dtype and shape and equal in every bit."""
    return (
        type(x) is type(y)
        and str(x.dtype) == str(y.dtype)
        and tuple(x.shape) == tuple(y.shape)
        and bits(x) == bits(y)
    )


def sample(*args, **kwargs):
    """parastep.sample, where a follower left out is what the test is about: no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parastep.FollowerWarning)
        return parastep.sample(*args, **kwargs)


def exact(program, denoiser, x, **kwargs):
    """What one rank gives: every step evaluated, nothing guessed."""
    return parastep.sample(program, denoiser, x, ranks=1, tolerance=0.0, **kwargs)[0]


def lost(report):
    """The ranks that were left out."""
    return sorted(line.rank for line in report.failures)


def settle(seconds=20.0):
    """Waits until all followers' threads have left."""
    end = time.monotonic() + seconds
    while names := [t.name for t in threading.enumerate() if t.name.startswith("parastep-")]:
        assert time.monotonic() < end, names
        time.sleep(0.001)


def resident_bytes():
    """Memory that the process holds in RAM."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def tells_memory():
    """Whether resident_bytes shows leaks: a sanitizer keeps freed memory for a while."""
    try:
        with open("/proc/self/maps") as maps:
            return "libasan" not in maps.read()
    except OSError:
        return False


def run_script(code, *args, timeout=60):
    """Runs code in a Python of its own that finds this parastep; returns the finished process."""
    here = os.path.dirname(os.path.dirname(parastep.__file__))
    path = os.pathsep.join([here, os.path.dirname(__file__)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
