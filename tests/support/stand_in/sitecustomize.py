"""Lets ComfyUI start where torchvision and torchaudio are missing: both are empty modules then.

Python imports this by itself where the folder is on its path, as the tests' servers have it. Nodes
that need one of the two fail in use; no sampler does.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class _Empty(types.ModuleType):
    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


_missing = {
    name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None
}
if _missing:
    sys.meta_path.insert(0, _Finder(_missing))
