"""Forward hooks that a pipeline sets on parts of an encoder, for the length of its own call.

Some read hidden states so. A follower's encoders do not run: what the leader's parts said while the
pipeline listened goes along with the output, and is said to the hooks that the follower's pipeline
has set on the same parts. Hooks that were there before the call are the user's, and heard once.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Heard = tuple[str, Any, Any, Any]  # a part's path, the args and kwargs of its call, its output


class Listening:
    """Made when a call begins, on either side: hooks are numbered in the order they are set."""

    def __init__(self) -> None:
        self._since = RemovableHandle.next_id

    @contextlib.contextmanager
    def recorded(self, module: torch.nn.Module) -> Iterator[list[Heard]]:
        """Within, what parts that are listened to say in this thread is appended to the list."""
        heard: list[Heard] = []
        thread = threading.get_ident()

        def record(path: str, part: Any, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                heard.append((path, args, kwargs, output))

        with contextlib.ExitStack() as leaving:
            for path, part in module.named_modules():
                if any(number >= self._since for number in part._forward_hooks):
                    hook = functools.partial(record, path)
                    handle = part.register_forward_hook(hook, with_kwargs=True, prepend=True)
                    leaving.callback(handle.remove)
            yield heard

    def say(self, module: torch.nn.Module, heard: Iterable[Heard]) -> None:
        """To the hooks on the same parts of this module."""
        for path, args, kwargs, output in heard:
            part = module.get_submodule(path)
            for number, hook in list(part._forward_hooks.items()):
                if number >= self._since:
                    named = (kwargs,) if number in part._forward_hooks_with_kwargs else ()
                    changed = hook(part, args, *named, output)
                    output = output if changed is None else changed
