"""Denoisers that fail on one rank at one step."""

from cases import smooth

STEPS, RANKS = 5, 4


class Trouble(Exception):
    """What a denoiser of these tests raises."""


def raising(output):
    raise Trouble("it is broken")


def faulty_at(rank, step, fault):
    """smooth, but for one rank at one step; .happened tells whether that was ever called."""

    def denoiser(x, j, k):
        if (k, j) == (rank, step):
            denoiser.happened = True
            return fault(smooth(x, j, k))
        return smooth(x, j, k)

    denoiser.happened = False
    return denoiser


def evaluates(rank, step, steps=STEPS):
    """Whether a rank evaluates a step at tolerance 0: in the round that begins `rank` before it."""
    return step == 0 or (rank == 0 and step < steps) or 1 <= step - rank
