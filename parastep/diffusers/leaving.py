"""How a follower is taken out of its pipeline's loop: exceptions that no handler of its catches."""

from __future__ import annotations


class Leave(BaseException):
    """Takes a follower out of its pipeline's loop: the run is over.

    Not an Exception, so that no pipeline's own handler catches it.
    """


class GoBack(BaseException):
    """Takes a follower out of its loop to enter the call again: its next step lies behind it."""
