"""Hooks: attributes set on a pipeline's instances for the length of a call.

Leader and followers set them on the denoisers' calls, the scheduler's `step`, the encoders'
methods. No class is touched, and nothing here knows of rounds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from .replicas import encoders_of

_ENCODER_METHODS = ("encode", "get_text_features", "get_image_features")


class Hooks:
    """Attributes replaced on instances, put back in reverse order."""

    def __init__(self) -> None:
        self._placed: list[tuple[Any, str, Any, bool, Any]] = []
        self._classes: list[tuple[Any, type, type]] = []

    def place(self, obj: Any, name: str, value: Any) -> None:
        own = vars(obj)
        self._placed.append((obj, name, value, name in own, own.get(name)))
        own[name] = value

    def wrap(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(original, *args, **kwargs)` in place of the method; its signature stays."""
        original = getattr(obj, name)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        self.place(obj, name, replaced)

    def wrap_call(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(run, *args, **kwargs)` in place of a call of the module, forward hooks and all.

        `forward` has it too, for who calls that directly; not where the module is compiled in
        place, since the compiled code would trace into it.
        """
        running = False

        def outermost(original: Any, *args: Any, **kwargs: Any) -> Any:
            if running:
                return original(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal running
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
                    self.wrap(module, method, hook_of((name, method)))

    def wrap_method(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(instance, original, *args, **kwargs)` as a bound method, as pipelines inspect it.

        A deep copy of obj takes the hook along, bound to the copy; `original` is then the copy's.
        """
        method = getattr(obj, name)
        if getattr(method, "__self__", None) is not obj:  # a function of the user's own, set on obj
            self.wrap(obj, name, functools.partial(hook, obj))
            return
        function = method.__func__

        @functools.wraps(function)
        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            return hook(self, types.MethodType(function, self), *args, **kwargs)

        self.place(obj, name, types.MethodType(replaced, obj))

    def wrap_property(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(read)` in place of a property of this instance, whose class is a twin meanwhile."""
        cls = type(obj)
        read = getattr(cls, name).__get__
        value = property(lambda self: hook(functools.partial(read, self)))
        obj.__class__ = twin = type(cls.__name__, (cls,), {name: value})
        self._classes.append((obj, twin, cls))

    def restore(self) -> None:
        """A value that is no longer ours (another library wrapped it meanwhile) is left alone."""
        while self._classes:
            obj, twin, cls = self._classes.pop()
            if type(obj) is twin:
                obj.__class__ = cls
        while self._placed:
            obj, name, value, had, old = self._placed.pop()
            own = vars(obj)
            if own.get(name) is value:
                if had:
                    own[name] = old
                else:
                    del own[name]


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None
