"""What a result depends on, read off the source: the definitions that a function or a notebook reaches.

A *definition* is a statement at the top of a module that binds a name: a function, a class, a constant. It reaches
another one if it names it, or takes it as an attribute of an imported module; what it reaches reaches further. Only
modules of ``common`` are followed; of other packages the locked versions count. Statements at the top of a reached
module that bind no name, such as a switch of torch, count too.

Definitions enter as syntax trees, without comments, docstrings, formatting and the annotations of functions: nothing
becomes out of date by them.
What could be missed is what no name leads to, a function found by a string, say; a test runs all that is kept and
watches that nothing runs that is not counted.
"""

import ast
import hashlib
import inspect
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import paths

#: When this process began, or soon after.
_BEGAN = time.time()
#: The packages whose versions enter: those that compute.
COMPUTING = ("curvlinops-for-pytorch", "numpy", "scikit-learn", "scipy", "torch", "torchvision")
#: Parts of syntax trees that differ between versions of Python, or compute nothing.
_SILENT = {"ctx", "kind", "type_comment", "type_params", "type_ignores"}
#: Annotations of functions; those of a dataclass's fields are part of it.
_ANNOTATIONS = {(ast.arg, "annotation"), (ast.FunctionDef, "returns"), (ast.AsyncFunctionDef, "returns")}


#: Python 3.11 cannot parse in two threads at once, and networks are trained in several.
_PARSING = threading.Lock()


class FingerprintError(ValueError):
    """Something whose source cannot be followed; the message names it."""


@dataclass(frozen=True, order=True)
class Definition:
    """A name that is bound at the top of a module of ``common``; an empty name for the statements that bind none."""

    module: str
    name: str


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _fields(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Parts of a syntax tree that compute."""
    for name in node._fields:
        if name not in _SILENT and (type(node), name) not in _ANNOTATIONS:
            value = getattr(node, name, None)
            if isinstance(value, list):
                value = [item for item in value if not _is_docstring(item)]
            if value is not None and value != []:
                yield name, value


def syntax(node: ast.AST | list | object) -> str:
    """A syntax tree in one line, the same for all supported versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(syntax, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    return f"{type(node).__name__}({','.join(f'{name}={syntax(value)}' for name, value in _fields(node))})"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """A syntax tree and all that is in it and computes."""
    yield node
    for _, value in _fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _walk(item)


def _is_main(node: ast.stmt) -> bool:
    """Whether a statement is the part of a module that runs only as a command."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@dataclass(frozen=True)
class _Source:
    """A module or a notebook: statements by the names that they bind, and those that bind none."""

    bindings: dict[str, list[ast.stmt]]
    effects: list[ast.stmt]


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement binds where it stands; what is inside of functions and classes stays inside."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
        return
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _bound(child)
    targets = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    yield from (name.id for name in targets)


def _statements(text: str) -> list[ast.stmt]:
    with _PARSING:
        return ast.parse(text).body


@lru_cache(maxsize=512)
def _parse(text: str) -> _Source:
    bindings: dict[str, list[ast.stmt]] = {}
    effects = []
    for statement in _statements(text):
        names = set(_bound(statement))
        for name in names:
            bindings.setdefault(name, []).append(statement)
        if not (names or _is_docstring(statement) or _is_main(statement)):
            effects.append(statement)
    return _Source(bindings, effects)


@lru_cache(maxsize=4096)
def module_file(name: str) -> Path | None:
    """File of a module of ``common``, None if there is none of that name."""
    base = paths.SOURCE / Path(*name.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _load(module: str) -> _Source | None:
    file = module_file(module)
    return None if file is None else _parse(file.read_text(encoding="utf-8"))


def _origin(statement: ast.stmt, name: str) -> list[str]:
    """What an import binds to ``name``: dotted names of modules or of what is in them; empty if it is no import."""
    if isinstance(statement, ast.Import):
        bound = [(alias.asname or alias.name.partition(".")[0], alias) for alias in statement.names]
        return [alias.name if alias.asname else name for to, alias in bound if to == name]
    if isinstance(statement, ast.ImportFrom):
        if statement.level or any(alias.name == "*" for alias in statement.names):
            raise FingerprintError(f"an import that cannot be followed: {ast.unparse(statement)}")
        return [f"{statement.module}.{a.name}" for a in statement.names if (a.asname or a.name) == name]
    return []


def _imported(statement: ast.stmt, name: str) -> list[str]:
    """Of what an import binds to ``name`` the part below ``common``."""
    return [dotted for dotted in _origin(statement, name) if dotted.partition(".")[0] == "common"]


def _packages(dotted: str) -> set[Definition]:
    """Importing ``common.a.b`` runs the statements that bind no name of that module and of the packages it lies in."""
    parts = dotted.split(".")
    modules = (".".join(parts[:size]) for size in range(1, len(parts) + 1))
    return {Definition(module, "") for module in modules if module_file(module) is not None}


def _at(parts: list[str]) -> set[Definition]:
    """What ``common.a.b.c`` stands for: the longest part of it that is a module, and in there what follows, or all."""
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        if module_file(module) is not None:
            break
    else:
        return set()
    source, found = _load(module), _packages(module)
    if size == len(parts):  # the module itself is handed about: anything in it may be used
        return found | {Definition(module, name) for name in source.bindings}
    return found | {Definition(module, parts[size])} if parts[size] in source.bindings else found


def _named(nodes: Iterable[ast.AST], source: _Source, module: str) -> set[Definition]:
    """What statements name, of a module or (without a name) of a notebook with the given source."""
    found: set[Definition] = set()
    for node in nodes:
        parts = list(_walk(node))
        local = [part for part in parts if isinstance(part, ast.Import | ast.ImportFrom)]
        chains = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
        for part in parts:
            if isinstance(part, ast.Import | ast.ImportFrom):
                for name in _bound(part):
                    found = found.union(*map(_packages, _imported(part, name)))
                continue
            names = _dotted(part) if id(part) not in chains else []
            if not names:
                continue
            for statement in [*local, *source.bindings.get(names[0], ())]:
                for dotted in _imported(statement, names[0]):
                    found |= _at([*dotted.split("."), *names[1:]])
            if module and names[0] in source.bindings:
                found.add(Definition(module, names[0]))
    return found


#: What definitions reach in one step, and their syntax, as long as no file of the source changes.
_steps: dict[Definition, set[Definition]] = {}
_texts: dict[Definition, str] = {}
_stamp: list[object] = []


def _refresh() -> None:
    """Forget what was read if a file of the source has changed."""
    files = sorted(paths.SOURCE.glob("common/**/*.py"))
    stamp = [paths.SOURCE, *((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)]
    if stamp != _stamp:
        _steps.clear()
        _texts.clear()
        module_file.cache_clear()
        _stamp[:] = stamp


def _step(here: Definition) -> set[Definition]:
    """What a definition reaches in one step."""
    if here not in _steps:
        source, found = _load(here.module), _packages(here.module)
        statements = source.bindings[here.name] if here.name else source.effects
        for statement in statements:
            for dotted in _imported(statement, here.name):
                if module_file(dotted) is None:  # of a module counts what is taken from it, where that is named
                    found |= _at(dotted.split("."))
        kept = [s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom)]
        _steps[here] = found | _named(kept, source, here.module)
    return _steps[here]


def _closed(start: Iterable[Definition]) -> set[Definition]:
    """Definitions, and all that they reach in any number of steps."""
    reached, waiting = set(), set(start)
    while waiting:
        here = waiting.pop()
        reached.add(here)
        waiting |= _step(here) - reached
    return reached


def _dotted(node: ast.AST) -> list[str]:
    """``["a", "b", "c"]`` of ``a.b.c``; empty if it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def reached_by(function: Callable) -> set[Definition]:
    """Definitions that a function or class at the top of a module of ``common`` reaches, itself among them.

    Raises
    ------
    FingerprintError
        If it is no such function: one inside of another, in a notebook, or a lambda has no name to find it by; or if
        what it reaches has been edited since this process began, which runs the code as it was.
    """
    function = inspect.unwrap(function)
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    source = _load(module) if module.partition(".")[0] == "common" else None
    if source is None or name not in source.bindings:
        raise FingerprintError(f"{module}.{name} is no function at the top of a module of common")
    _refresh()
    reached = _closed([Definition(module, name)])
    for file in {module_file(definition.module) for definition in reached}:
        if _BEGAN < file.stat().st_mtime <= time.time():  # one from the future was there before a clock was set
            raise FingerprintError(f"{file.name} has been edited since this process began: start it (the kernel) anew")
    return reached


def reached_by_code(text: str) -> set[Definition]:
    """Definitions that the code of a notebook reaches, all its cells one after the other."""
    _refresh()
    return _closed(_named(_statements(text), _parse(text), ""))


def _text(here: Definition) -> str:
    """A definition as it is hashed: its place, and its syntax or what it imports."""
    if here not in _texts:
        source = _load(here.module)
        statements = source.bindings[here.name] if here.name else source.effects
        trees = [_origin(s, here.name) or syntax(s) for s in statements]
        _texts[here] = f"{here.module} {here.name} {trees}\0"
    return _texts[here]


def digest(definitions: Iterable[Definition]) -> str:
    """SHA-256 over the syntax of definitions and the locked versions of the packages that compute."""
    sha = hashlib.sha256("\n".join(locked_versions()).encode())
    _refresh()
    for definition in sorted(definitions):
        sha.update(_text(definition).encode())
    return sha.hexdigest()


def locked_versions() -> list[str]:
    """The lines of ``requirements.lock`` for the packages that compute."""
    lines = (paths.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return sorted(line for line in lines if re.split("[=<>]", line, maxsplit=1)[0] in COMPUTING)
