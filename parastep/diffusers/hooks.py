"""Hooks: attributes set on a pipeline's instances for the length of a call.

Leader and followers set them on the denoisers' calls, the scheduler's `step`, the encoders'
methods. No class is touched, and nothing here knows of rounds. Other pipelines may hold the same
instances: a hook serves its own call alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .compiling import is_compiled_in_place
from .parts import encoders_of

_ENCODER_METHODS = ("encode", "get_text_features", "get_image_features")


@dataclass(eq=False)
class _Placed:
    """What stands in an instance's attribute; `old` is what it stands on, if it `had` any."""

    obj: Any
    name: str
    value: Any
    had: bool
    old: Any


_lock = threading.Lock()
# By all calls in progress, for each attribute of an instance, later ones above earlier ones.
_placed: dict[tuple[int, str], list[_Placed]] = {}


def attributes_of(obj: Any) -> dict[str, Any]:
    """An instance's own attributes as they are without hooks of ours."""
    own = dict(vars(obj))
    with _lock:
        for name in vars(obj):
            stack = _placed.get((id(obj), name))
            if stack and stack[0].had:
                own[name] = stack[0].old
            elif stack:
                del own[name]
    return own


class Hooks:
    """Hooks of one call, which is that of the thread that makes this.

    Whoever else gets to one, another thread, this one from within a user's callback, or a copy
    that outlives the call, gets the original. Calls may overlap and end in any order.
    """

    def __init__(self) -> None:
        self._thread, self._serving = threading.get_ident(), True
        self._placed: list[_Placed] = []
        self._classes: list[tuple[Any, type, type]] = []

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within, this thread is not in the call either: a callback may run other pipelines."""
        self._serving = False
        try:
            yield
        finally:
            self._serving = True

    def _serves(self) -> bool:
        return self._serving and threading.get_ident() == self._thread

    def place(self, obj: Any, name: str, value: Any) -> None:
        own = vars(obj)
        with _lock:
            placed = _Placed(obj, name, value, name in own, own.get(name))
            self._placed.append(placed)
            _placed.setdefault((id(obj), name), []).append(placed)
            own[name] = value

    def wrap(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(instance, original, *args, **kwargs)` as a bound method, as pipelines inspect it.

        A deep copy of obj takes the hook along, bound to the copy; `original` is then the copy's.
        """
        method = getattr(obj, name)
        if not isinstance(method, types.MethodType) or method.__self__ is not obj:
            self._wrap_function(obj, name, method, hook)
            return
        function = method.__func__

        @functools.wraps(function)
        def replaced(instance: Any, *args: Any, **kwargs: Any) -> Any:
            original = types.MethodType(function, instance)
            if not self._serves():
                return original(*args, **kwargs)
            return hook(instance, original, *args, **kwargs)

        self.place(obj, name, types.MethodType(replaced, obj))

    def _wrap_function(self, obj: Any, name: str, function: Any, hook: Callable[..., Any]) -> None:
        """Where the user, or torch.compile, has set a function on obj, which knows no instance."""

        @functools.wraps(function)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if not self._serves():
                return function(*args, **kwargs)
            return hook(obj, function, *args, **kwargs)

        self.place(obj, name, replaced)

    def wrap_call(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(run, *args, **kwargs)` in place of a call of the module, forward hooks and all.

        `forward` has it too, for who calls that directly; not where the module is compiled in
        place, since the compiled code would trace into it.
        """
        running = False  # in this thread; a batch may have another one run it

        def outermost(instance: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
            if running or instance is not module:
                return original(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal running
                if not self._serves():
                    return original(*args, **kwargs)
                running = True
                try:
                    return original(*args, **kwargs)
                finally:
                    running = False

            return hook(run, *args, **kwargs)

        if is_compiled_in_place(module):
            self.wrap(module, "_compiled_call_impl", outermost)
        else:
            self.wrap(module, "_call_impl", outermost)
            self.wrap(module, "forward", outermost)

    def wrap_encoders(self, pipe: Any, hook_of: Callable[[tuple[str, str]], Any]) -> None:
        """`hook_of((name, method))` in place of all that the pipeline calls of its encoders."""
        for name, module in encoders_of(pipe).items():
            self.wrap_call(module, hook_of((name, "forward")))
            for method in _ENCODER_METHODS:
                if hasattr(module, method):
                    hook = hook_of((name, method))
                    self.wrap(module, method, functools.partial(_without_instance, hook))

    def wrap_property(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(read)` in place of a property of this instance, whose class is a twin meanwhile."""
        cls = type(obj)
        read = getattr(cls, name).__get__
        value = property(lambda self: hook(functools.partial(read, self)))
        obj.__class__ = twin = type(cls.__name__, (cls,), {name: value})
        self._classes.append((obj, twin, cls))

    def restore(self) -> None:
        """A value that is no longer ours (another library wrapped it meanwhile) is left alone."""
        self._serving = False
        while self._classes:
            obj, twin, cls = self._classes.pop()
            if type(obj) is twin:
                obj.__class__ = cls
        with _lock:
            while self._placed:
                _take_out(self._placed.pop())


def _without_instance(hook: Callable[..., Any], _: Any, *args: Any, **kwargs: Any) -> Any:
    return hook(*args, **kwargs)


def _take_out(gone: _Placed) -> None:
    """From an attribute, or from beneath the one that another call has placed over it."""
    key = id(gone.obj), gone.name
    stack = _placed[key]
    at = stack.index(gone)
    above = stack[at + 1] if at + 1 < len(stack) else None
    del stack[at]
    if not stack:
        del _placed[key]
    if above is not None and above.old is gone.value:
        above.had, above.old = gone.had, gone.old
        return
    own = vars(gone.obj)
    if own.get(gone.name) is gone.value:
        if gone.had:
            own[gone.name] = gone.old
        else:
            del own[gone.name]


def _begin_without() -> None:
    """A forked child has the instances with the hooks of calls that are the parent's."""
    global _lock
    _lock = threading.Lock()
    for stack in list(_placed.values()):
        while stack:
            _take_out(stack[-1])


os.register_at_fork(after_in_child=_begin_without)
