"""Followers as threads of this process: their context, and what of them outlives a run."""

from .context import HostContext, finish_work, start_thread
from .kept import Task

__all__ = ["HostContext", "Task", "finish_work", "start_thread"]
