"""What a run tells of itself: as data, in a line, as a figure and in a notebook."""

from .record import HELPER_LOST, Evaluation, Failure, Record, Share, TeamRecord
from .report import Report

__all__ = ["HELPER_LOST", "Evaluation", "Failure", "Record", "Report", "Share", "TeamRecord"]
