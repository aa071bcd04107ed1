"""What the foreign parts of a denoiser keep from call to call: hooks, patched methods, processors,
parts of a user's own classes.

A denoiser that keeps something is no function of its inputs: evaluated ahead it says another thing,
and what its replicas share with it is spoilt. So where there is foreign code, the first evaluation
of a pipeline's first call is the leader's alone, and what that code can reach is compared before,
during and after it; followers start only then. After every later evaluation there is a shorter
look. A pipeline without foreign code pays one walk over its modules a call.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..messages import describe
from ..reach import package_of
from .changes import Changes, Seen
from .compiling import is_compiled
from .hooks import attributes_of
from .parts import denoisers_of, modules_of
from .reach import STRUCTURE, Footprint, Path, Reach, code_of, foreign_code, is_foreign
from .replicas import made_by_hooks
from .watch import names_used

_DATA = (int, str, float, type(None), tuple, list, dict, torch.Tensor, torch.nn.Module)
_MADE_OF = ("_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks")
# By which code gets at a module's weights.
_OF_WEIGHTS = frozenset(
    "weight bias data parameters named_parameters _parameters get_parameter state_dict".split()
)
_ABSENT = object()
Values = dict[Path, Any]


class Foreign(NamedTuple):
    """Something that hangs in a denoiser and is not of the host's libraries."""

    denoiser: str
    kind: str  # as a reason calls it
    thing: Any
    part: Any = None  # where it hangs

    def is_same(self, other: Foreign) -> bool:
        """Hooks of ours, which stand for it in a call, may know the function alone."""
        return self.part is other.part and self._code() is other._code()

    def _code(self) -> Any:
        bound = getattr(self.thing, "__self__", None) is self.part is not None
        return self.thing.__func__ if bound else self.thing


class State:
    """What is known of one parallel pipeline's denoisers, from call to call."""

    def __init__(self) -> None:
        self._found: list[Foreign] | None = None  # what was looked at; None where nothing was yet
        self._reason: str | None = None  # what it keeps
        self._last: Values | None = None  # what it reached then, where that is what had changed
        self._look: _Look | None = None  # of this call

    def known(self, pipe: Any) -> str | None:
        """Why this pipeline is to run serially from the start, by what earlier calls found.

        A call that changed nothing any more takes that back: what had changed was made once.
        """
        if self._reason is not None:
            look = _Look(pipe)
            now = look.values() if self._last is not None else None
            if not _are_same(look.found, self._found) or (now is not None and now == self._last):
                self._found = self._reason = None
            self._last = now
        return self._reason

    def begin(self, pipe: Any) -> bool:
        """A denoiser is about to be called first; whether followers may start before that."""
        look = _Look(pipe)
        if not look.found:
            self._found = None
            return True
        self._look, settled = look, _are_same(look.found, self._found)
        if settled:
            look.altered()
        else:
            look.begin()
        look.last = look.values()
        return settled

    @property
    def doubtful(self) -> bool:
        """Whether code of the user's own hangs in the denoisers of this call."""
        return self._look is not None

    def is_still(self) -> bool:
        """Whether what that code reaches is what it was when it was last looked at."""
        return self._look is None or self._look.is_still()

    def kept(self) -> str | None:
        """After an evaluation of the leader's: what makes its denoisers no function, or None."""
        look = self._look
        if look is None:
            return None
        reason = look.changed() or look.end() or look.altered()
        self._found = look.found
        if reason is not None:
            self._reason, self._last = reason, look.last if look.reached else None
            self._look = None
        return reason

    def close(self) -> None:
        """The call is over, one way or another."""
        if self._look is not None:
            self._look.remove()
        self._look = None


class _Look:
    """At the foreign parts of a pipeline's denoisers, in one call of it."""

    def __init__(self, pipe: Any) -> None:
        self.found = foreign_in(pipe)
        self.last: Values | None = None
        self._footprint: Footprint | None = None  # of the last look, if that was a shorter one
        self.reached = False  # what had changed was in reach of the foreign code
        self._denoisers = denoisers_of(pipe)
        modules = [part for module in self._denoisers.values() for part in module.modules()]
        own = [pipe, getattr(pipe, "guider", None), *modules]
        self._parts = {id(part): part for part in own if part is not None}
        self._apart = {id(m): m for m in modules_of(pipe).values() if id(m) not in self._parts}
        self._packages = {package_of(code_of(foreign.thing)) for foreign in self.found}
        self._thread = threading.get_ident()
        self._hooks: list[Any] = []
        self._before: Values = {}
        self._during: list[Values] = []
        self._begun = False
        self._unread: str | None = None  # why it cannot be looked at
        self._structure: Changes | None = None  # of the denoisers
        self._seen: Seen | None = None  # of that, at the first such look

    def values(self) -> Values:
        """The shorter look: what foreign code reaches."""
        self._footprint = Footprint()
        return self._read(lambda reach: None, whole=False)

    def names(self) -> set[str]:
        """Names that what was hung in works with; not those of parts of a user's own classes."""
        reach = Reach(self._parts, self._apart, self._packages, whole=True)
        try:
            for number, foreign in enumerate(self.found):
                if foreign.thing is not foreign.part:
                    reach.walk(foreign.thing, (number,))
        except Exception:  # objects of a user's own may do anything when they are read
            return set(_OF_WEIGHTS)
        return reach.names

    def _whole(self) -> Values:
        """And all that a denoiser's parts have."""
        self._footprint = None
        return self._read(self._walk_parts, whole=True)

    def _read(self, further: Callable[[Reach], None], whole: bool) -> Values:
        reach = Reach(self._parts, self._apart, self._packages, whole, self._footprint)
        try:
            for number, foreign in enumerate(self.found):
                reach.walk(foreign.thing, (number,))
                reach.walk(foreign.part, ((number,), "part"))
            further(reach)
        except Exception as error:  # objects of a user's own may do anything when they are read
            self._unread = f"what hangs in its denoisers cannot be read: {describe(error)}"
            self._footprint = None
            return {(-1,): object()}
        if self._footprint is not None:
            self._footprint.close()
        return reach.values

    def _walk_parts(self, reach: Reach) -> None:
        for name, module in self._denoisers.items():
            for path, part in module.named_modules():
                used = frozenset() if is_foreign(type(part)) else names_used(type(part))
                hidden = (used - reach.names - STRUCTURE) | made_by_hooks(part)
                for key, value in list(vars(part).items()):
                    if key not in hidden or callable(value):
                        reach.walk(value, ((name, path), key))

    # ---- the first evaluation --------------------------------------------------------------------

    def begin(self) -> None:
        self._begun = True
        for name, module in self._denoisers.items():
            if not is_compiled(module):
                self._place(name, module)
        self._before = self._whole()

    def _place(self, name: str, module: torch.nn.Module) -> None:
        """A look from within: at everything when the first of its leaves is called, and at the
        weights of a part with foreign hooks when these have run.
        """
        seen: list[bool] = []

        def from_within(part: torch.nn.Module, given: Any) -> None:
            if threading.get_ident() == self._thread and not seen:
                seen.append(True)
                self._during.append(self._whole())

        def at_weights(root: Path, part: torch.nn.Module, given: Any) -> None:
            if threading.get_ident() == self._thread:
                reach = Reach({}, {}, set(), whole=True)
                for key in ("_parameters", "_buffers"):
                    reach.walk(vars(part)[key], (root, key))
                self._during.append(reach.values)

        for path, part in module.named_modules():
            if any(foreign_code(h) is not None for h in part._forward_pre_hooks.values()):
                look = functools.partial(at_weights, (name, path))
                self._hooks.append(part.register_forward_pre_hook(look))
            if not part._modules:
                self._hooks.append(part.register_forward_pre_hook(from_within))

    def end(self) -> str | None:
        """After the first evaluation; None in later ones."""
        if not self._begun:
            return None
        after, self._begun = self._whole(), False
        self.remove()
        changed = self._difference(self._before, after)
        if changed is not None:
            return self._kept_words(*changed)
        for during in self._during:
            changed = self._difference(self._before, {**self._before, **during})
            if changed is not None:
                return self._words("changes while it runs", changed[0])
        return None

    def remove(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def is_still(self) -> bool:
        if self._footprint is not None and self._footprint.is_fresh():
            return True
        return self.last is not None and self.values() == self.last

    # ---- later ones ------------------------------------------------------------------------------

    def changed(self) -> str | None:
        """What foreign code reaches and what is another than at the last look."""
        if self._footprint is not None and self._footprint.is_fresh():
            return None
        before, self.last = self.last or {}, self.values()
        changed = self._difference(before, self.last)
        if changed is None:
            return None
        self.reached = True
        self.remove()
        return self._kept_words(*changed)

    def altered(self) -> str | None:
        """Weights, parts and hooks that are others than at the last such look: foreign code may
        begin with that in mid-run.
        """
        if self._structure is None or self._seen is None:
            self._structure = Changes(_structure_of(self._denoisers))
            self._seen = self._structure.look()
            return None
        name = self._structure.changed(self._seen)
        return None if name is None else f"{name} was changed while the denoiser ran"

    # ---- words -----------------------------------------------------------------------------------

    def _difference(self, before: Values, after: Values) -> tuple[Path, Any, Any] | None:
        """The change that says most: a number rather than another object."""
        if before == after:
            return None
        paths = dict.fromkeys((*before, *after))
        found = [(p, before.get(p, _ABSENT), after.get(p, _ABSENT)) for p in paths]
        found = [(p, a, b) for p, a, b in found if a is _ABSENT or b is _ABSENT or a != b]
        return min(found, key=lambda one: not _are_numbers(*one[1:]), default=None)

    def _kept_words(self, path: Path, before: Any, after: Any) -> str:
        if "_parameters" in _names_of(path):
            return self._words("changes its weights while it runs", path)
        counts = _are_numbers(before, after)
        return self._words("counts its calls" if counts else "keeps what it computed", path)

    def _words(self, verb: str, path: Path) -> str:
        """As "unet has a hook that counts its calls (n of hook in script.py)"."""
        if self._unread is not None:
            return self._unread
        root, *names = _names_of(path)
        silent = ("", "self", "part", *STRUCTURE)
        told = [n for n in names if isinstance(n, str) and n not in silent]
        if isinstance(root, int):
            denoiser, kind, thing, _ = self.found[root]
            who, where = f"{denoiser} has {kind} that", _place_of(thing)
        else:
            who, where = root[0], root[1] or root[0]
        return f"{who} {verb} ({' of '.join([*reversed(told[-2:]), where])})"


def _names_of(path: Path) -> list[Any]:
    """[the root, the names from there on]"""
    names: list[Any] = []
    while len(path) == 2 and isinstance(path[0], tuple):
        path, name = path
        names.append(name)
    return [path[0] if len(path) == 1 else path, *reversed(names)]


def _are_numbers(before: Any, after: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in (before, after))


def _place_of(thing: Any) -> str:
    named = code_of(thing)
    try:
        file = f" in {os.path.basename(inspect.getfile(named))}"
    except (TypeError, OSError):  # typed into an interpreter
        file = ""
    return f"{named.__name__}{file}"


# ---- what there is -------------------------------------------------------------------------------


def foreign_in(pipe: Any) -> list[Foreign]:
    """All that hangs in a pipeline's denoisers, and its guider, and is no code of the host's."""
    found: list[Foreign] = []
    classes: dict[type, None] = {}
    for name, module in denoisers_of(pipe).items():
        for part in module.modules():
            cls = type(part)
            if is_foreign(cls):
                found.append(Foreign(name, f"a part, {cls.__name__},", part))
            found += (Foreign(name, kind, thing, part) for kind, thing in _hung_in(part))
            classes[cls] = classes[type(vars(part).get("processor"))] = None
    bases = dict.fromkeys(base for cls in classes for base in cls.__mro__ if not is_foreign(base))
    for owner in (torch.nn.functional, *bases):
        found += (Foreign("the denoiser", kind, thing) for kind, thing in _patched(owner))
    guider = getattr(pipe, "guider", None)
    if guider is not None and is_foreign(type(guider)):
        found.append(Foreign("the pipeline", "a guider", guider))
    return found


def may_write_weights(pipe: Any) -> bool:
    """Whether code that was hung into its denoisers works with weights at all. What writes to them
    from some step on would be seen too late if other ranks, which get there first, shared them.
    """
    return bool(_Look(pipe).names() & _OF_WEIGHTS)


def _structure_of(denoisers: dict[str, torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    for name, module in denoisers.items():
        for path, part in module.named_modules():
            own, named = vars(part), f"{name}.{path}".rstrip(".")
            yield from ((named, own[key]) for key in _MADE_OF if key in own)


def _hung_in(part: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    own = attributes_of(part)
    for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()):
        thing = foreign_code(hook)
        if thing is not None:
            yield "a hook", thing
    for key in [key for key in own if key not in STRUCTURE]:
        if isinstance(own[key], _DATA):
            continue
        thing = foreign_code(own[key])
        if thing is not None and not _is_own_method(part, key, thing):
            yield ("a processor" if key == "processor" else f"a patched {key}"), thing


def _is_own_method(part: torch.nn.Module, name: str, thing: Any) -> bool:
    """Whether it is what the part's class says, which a hook of ours stands for in a call."""
    return getattr(thing, "__func__", thing) is getattr(type(part), name, None)


def _patched(owner: Any) -> Iterator[tuple[str, Any]]:
    """Functions of one of the host's classes, or modules, that somebody replaced."""
    for name, member in vars(owner).items():
        if isinstance(member, types.FunctionType) and foreign_code(member) is not None:
            yield f"a patched {name}", member


def _are_same(a: list[Foreign], b: list[Foreign] | None) -> bool:
    """The very same things in the same places."""
    if b is None or len(a) != len(b):
        return False
    return all(one.is_same(other) for one, other in zip(a, b))


def averages(pipe: Any) -> str | None:
    """Whether the pipeline's own loop averages over the outputs of earlier steps, by the names in
    its code: what it keeps there nobody else can see.
    """
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    if code is None or not getattr(pipe, "do_classifier_free_guidance", True):
        return None
    own = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    found = [name for name in own if "momentum" in name]
    return f"its loop averages over the outputs of earlier steps ({found[0]})" if found else None
