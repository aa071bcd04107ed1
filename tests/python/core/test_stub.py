"""The extension is what its stub says, its exceptions fit, and importing it starts nothing."""

import ast
import inspect
import pathlib

import pytest
from cases import run_script

import parastep
from parastep import _core

# ---- the stub ------------------------------------------------------------------------------------


def stub():
    path = pathlib.Path(parastep.__file__).with_name("_core.pyi")
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }


def public(names):
    """Without what every class has."""
    return {name for name in names if not name.startswith("__") or "dlpack" in name}


def test_the_stub_names_what_the_module_has():
    assert set(stub()) == {name for name in dir(_core) if not name.startswith("__")}


@pytest.mark.parametrize("name", [name for name, kind in vars(_core).items() if type(kind) is type])
def test_the_stub_names_what_a_class_has(name):
    kind, node = getattr(_core, name), stub()[name]
    if issubclass(kind, Exception):
        assert [base.id for base in node.bases] == [base.__name__ for base in kind.__bases__]
    else:
        declared = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        assert public(declared) == public(vars(kind))


def parameters_of(node):
    """Names of the parameters of a function in the stub, and their defaults."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    found = zip([*plain, *args.kwonlyargs], [*defaults, *args.kw_defaults])
    return {
        arg.arg: inspect.Parameter.empty if value is None else ast.literal_eval(value)
        for arg, value in found
        if arg.arg not in ("self", "cls")
    }


def functions():
    for name, node in stub().items():
        if isinstance(node, ast.FunctionDef):
            yield name, getattr(_core, name), node
        elif not issubclass(getattr(_core, name), Exception):
            for part in node.body:
                made = part.name == "__new__"
                has = getattr(_core, name) if made else getattr(getattr(_core, name), part.name)
                if callable(has) and part.name != "__len__":
                    yield f"{name}.{part.name}", has, part


@pytest.mark.parametrize("name", [name for name, _, _ in functions()])
def test_the_stub_has_the_signatures(name):
    has, node = next(parts[1:] for parts in functions() if parts[0] == name)
    found = {
        key: parameter.default
        for key, parameter in inspect.signature(has).parameters.items()
        if key != "self"
    }
    assert found == parameters_of(node)
    assert inspect.getdoc(has)


def test_the_package_is_typed():
    assert pathlib.Path(parastep.__file__).with_name("py.typed").exists()


# ---- the module ----------------------------------------------------------------------------------


def test_exceptions_are_the_fitting_built_ins():
    pairs = {
        "ShapeError": ValueError,
        "InvalidError": ValueError,
        "DeviceError": ValueError,
        "DtypeError": TypeError,
        "DeadlineError": TimeoutError,
        "LostError": ConnectionError,
        "OutOfMemoryError": MemoryError,
        "UnsupportedError": NotImplementedError,
        "StateError": RuntimeError,
        "InterruptedRunError": InterruptedError,
        "NotFiniteError": ArithmeticError,
    }
    for name, kind in pairs.items():
        error = getattr(parastep, name)
        assert issubclass(error, kind) and issubclass(error, parastep.Error)
        assert error.__module__ == "parastep"
        assert str(error("some words")) == "some words"


def test_build_info():
    info = parastep.build_info()
    assert info["version"] == parastep.__version__
    assert info["backends"]["cpu"] == "found"
    assert "threads" in info["transports"]


def test_import_starts_nothing_and_needs_numpy_alone():
    script = """
        import sys, threading
        import parastep
        assert threading.active_count() == 1
        assert not {"torch", "diffusers", "matplotlib"} & set(sys.modules)
        import numpy as np
        program = parastep.Program.euler(np.linspace(1, 0, 5))
        x, report = parastep.sample(program, lambda x, step, rank: x, np.ones(3), ranks=3)
        assert "torch" not in sys.modules
    """
    done = run_script(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_clock_is_monotonic():
    times = [_core.now_ns() for _ in range(100)]
    assert times == sorted(times) and times[0] < _core.now_ns() + 1
