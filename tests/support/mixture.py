"""Runs over data at a few points, where trajectories bend and part; in closed form."""

import threading

import numpy as np

from parastep import Program


class Mixture:
    """The exact noise prediction for data at a few points, so that trajectories bend and part."""

    def __init__(self, sigmas, dtype="float64", seed=3, modes=4, size=24):
        random = np.random.default_rng(seed)
        self.at = random.standard_normal((modes, size))
        self.sigmas, self.dtype, self.spread = sigmas, dtype, 0.3
        self.calls = []
        self.lock = threading.Lock()

    def __call__(self, x, step, rank):
        with self.lock:
            self.calls.append((step, rank))
        x = np.asarray(x, np.float64)
        variance = self.sigmas[step] ** 2 + self.spread**2
        apart = x[:, None, :] - self.at
        weight = -(apart**2).sum(-1) / (2 * variance)
        weight = np.exp(weight - weight.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        score = (weight[..., None] * apart).sum(1) / variance
        return (score * self.sigmas[step]).astype(self.dtype)


def karras(steps, least=0.03, most=20.0):
    """Noise levels of arXiv 2206.00364, equation 5, and 0."""
    ramp = np.linspace(most ** (1 / 7), least ** (1 / 7), steps) ** 7
    return np.append(ramp, 0.0)


def setting(steps, dtype="float64", seed=0, items=2):
    sigmas = karras(steps)
    x = (sigmas[0] * np.random.default_rng(seed).standard_normal((items, 24))).astype(dtype)
    return Program.euler(sigmas), Mixture(sigmas, dtype), x


def distance(found, wanted):
    return float(np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2)))
