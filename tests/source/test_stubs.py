"""dsline/_core.pyi names what the compiled module has, with the same parameters."""

import ast
import inspect
from pathlib import Path

import pytest

import dsline
from dsline import _core

# The tree's stub is compared, not the installed copy: they are the same unless the build forgot to install it.
ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse((ROOT / "dsline" / "_core.pyi").read_text())
# Keepers of buffers that no call returns.
INTERNAL = {
    *(
        "ArrayHold",
        "ArrayLayout",
        "BatchRows",
        "Field",
        "Lease",
        "LoanHold",
        "OutOfBand",
        "PickledParts",
        "Window",
    ),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_public(name):
    return not name.startswith("_")


def declared(body):
    """Names that a stub's module or class body gives values to."""
    names = {}
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            names.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return names


CLASSES = {name: node for name, node in declared(STUB.body).items() if isinstance(node, ast.ClassDef)}


def own(value):
    """Whether a name of the module is its own and not one that it imported."""
    module = getattr(value, "__module__", None)
    return not inspect.ismodule(value) and module in (None, _core.__name__)


def test_the_installed_stub_is_that_of_the_tree():
    package = Path(dsline.__file__).parent
    assert (package / "_core.pyi").read_text() == (ROOT / "dsline" / "_core.pyi").read_text()
    assert (package / "py.typed").is_file()


def test_the_stub_names_every_class_and_function():
    callables = {
        name for name, value in vars(_core).items() if is_public(name) and callable(value) and own(value)
    }
    missing = callables - set(declared(STUB.body)) - INTERNAL
    assert not missing


def test_the_module_has_every_name_of_the_stub():
    absent = {name for name in declared(STUB.body) if is_public(name) and not hasattr(_core, name)}
    assert not absent


@pytest.mark.parametrize("name", CLASSES)
def test_the_members_of_a_class_agree(name):
    if name.startswith("_") and not hasattr(_core, name):
        return
    there = {member for member in vars(getattr(_core, name)) if is_public(member)}
    assert {member for member in declared(CLASSES[name].body) if is_public(member)} == there


def signatures():
    for name, node in declared(STUB.body).items():
        if isinstance(node, FUNCTIONS):
            yield pytest.param(name, node, id=name)
    for name, node in CLASSES.items():
        for member, method in declared(node.body).items():
            if isinstance(method, FUNCTIONS) and is_public(member) and not method.decorator_list:
                yield pytest.param(f"{name}.{member}", method, id=f"{name}.{member}")


@pytest.mark.parametrize(("name", "node"), list(signatures()))
def test_the_parameters_of_a_function_agree(name, node):
    value = _core
    for part in name.split("."):
        value = getattr(value, part)
    arguments = node.args
    wanted = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    parameters = inspect.signature(value).parameters.values()
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert [parameter.name for parameter in parameters if parameter.kind not in star] == wanted
    keyword_only = [
        parameter.name for parameter in parameters if parameter.kind == inspect.Parameter.KEYWORD_ONLY
    ]
    assert keyword_only == [argument.arg for argument in arguments.kwonlyargs]
