"""The leader's side of one pipeline call.

`leader` sets the hooks and says what goes where, `asking` takes a tensor from ask to submit; beside
them `opening` (a loop's first iteration), `denoising` (the calls of denoisers), `steps` (their
count), `loops` (of one call) and `entry` (of followers).
"""

from .leader import Leader

__all__ = ["Leader"]
