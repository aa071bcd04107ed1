"""What a user's callback changes besides the latents, which followers cannot know of.

They go on with the conditioning, the settings and the model that they began with: another guidance
scale, other embeddings, an adapter or a processor taken out end speculation. The pipeline's own
changes between steps are no concern: followers run the same code.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .changes import Changes, holders_in, plain
from .hooks import Hooks
from .parts import denoisers_of

_OWN_COURSE = ("_interrupt", "_current_timestep")  # where the loop is, not what it computes
_ADAPTER = re.compile("adapter|lora|peft|scaling")  # names that its parts go by


class Watch:
    """Looks at the pipeline and at the denoisers' inputs before and after each callback."""

    def __init__(
        self,
        pipe: Any,
        hooks: Hooks,
        changed: Callable[[str], None],
        model_changed: Callable[[str], None],
    ) -> None:
        self.latents_edited = False  # by the callback since the last step
        self._edited_before = False  # ahead of the iteration before
        self._pipe, self._hooks = pipe, hooks
        self._changed, self._model_changed = changed, model_changed
        self._names = names_used(type(pipe)) - set(_OWN_COURSE)
        self._inputs: dict[str, weakref.ref[torch.Tensor]] = {}
        self._parts: Changes | None = None  # of what the loop steps with
        self._ended = False  # a change of the model has been told

    def begin_loop(self) -> None:
        """Another loop is to come."""
        self._edited_before = False

    def is_first_edit(self) -> bool:
        """At the beginning of an iteration: whether the latents were edited ahead of it, and not
        ahead of the one before.
        """
        before, self._edited_before = self._edited_before, self.latents_edited
        return self.latents_edited and not before

    def note_inputs(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Weakly: an input that lives on is the same one in the next step."""
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor):
                self._inputs[str(name)] = weakref.ref(value)

    def over(self, callback: Any) -> Any:
        """The callback, watched. One of diffusers' own classes stays an instance of its class."""
        if inspect.isroutine(callback) or not isinstance(callback, _callback_classes()):
            return lambda *args, **kwargs: self._called(callback, *args, **kwargs)
        cls, called = type(callback), self._called

        def __call__(own: Any, *args: Any, **kwargs: Any) -> Any:
            return called(functools.partial(cls.__call__, own), *args, **kwargs)

        twin: Any = object.__new__(type(cls.__name__, (cls,), {"__call__": __call__}))
        twin.__dict__ = callback.__dict__  # one state: what the callback counts, it counts itself
        return twin

    def _called(self, callback: Any, *args: Any, **kwargs: Any) -> Any:
        if self._ended:
            with self._hooks.aside():
                return callback(*args, **kwargs)
        if self._parts is None:
            scheduler = {"scheduler": self._pipe.scheduler}
            self._parts = Changes(holders_in(denoisers_of(self._pipe) | scheduler))
        given = next((a for a in (*args, *kwargs.values()) if type(a) is dict), {})
        latents = given.get("latents", args[-1] if args else None)
        tensors = {k: v for k, v in given.items() if k != "latents"}
        before, seen, parts = self._state(tensors), plain(latents), self._parts.look()
        with self._hooks.aside():
            result = callback(*args, **kwargs)
        after = result if isinstance(result, dict) else {}
        self.latents_edited = seen != plain(after.get("latents", latents))
        now = self._state({name: after.get(name, value) for name, value in tensors.items()})
        other = (name.strip("_") for name, value in now.items() if before.get(name) != value)
        changed, part = next(other, None), self._parts.changed(parts)
        if changed is not None:
            self._changed(_words(changed))
        if part is not None:
            self._ended = True
            self._model_changed(_words(part))
        return result

    def _state(self, tensors: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in vars(self._pipe).items() if k in self._names}
        state = {k: plain(v) for k, v in (own | tensors).items()}
        for name, alive in self._inputs.items():
            tensor = alive()
            if tensor is not None:
                state[f"the denoiser's input {name}"] = plain(tensor)
        return state


def _words(changed: str) -> str:
    named = f"an adapter ({changed})" if _ADAPTER.search(changed) else changed
    return f"the callback changed {named}"


def names_used(cls: type) -> frozenset[str]:
    """The names that a class's code reads or writes on anything: what else its instances hold,
    counters of a callback for one, cannot matter to it.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        for member in vars(base).values():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            while hasattr(member, "__wrapped__"):
                member = member.__wrapped__
            names.update(_names_in(getattr(member, "__code__", None)))
    return frozenset(names)


def _names_in(code: types.CodeType | None) -> set[str]:
    if code is None:
        return set()
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _callback_classes() -> tuple[type, ...]:
    module = sys.modules.get("diffusers.callbacks")
    names = ("PipelineCallback", "MultiPipelineCallbacks")
    return tuple(getattr(module, name) for name in names if hasattr(module, name))
