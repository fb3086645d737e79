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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import paths

#: The packages whose versions enter: those that compute.
COMPUTING = ("curvlinops-for-pytorch", "numpy", "scikit-learn", "scipy", "torch", "torchvision")
#: Parts of syntax trees that differ between versions of Python, or compute nothing.
_SILENT = {"ctx", "kind", "type_comment", "type_params", "type_ignores"}
#: Annotations of functions; those of a dataclass's fields are part of it.
_ANNOTATIONS = {(ast.arg, "annotation"), (ast.FunctionDef, "returns"), (ast.AsyncFunctionDef, "returns")}


class FingerprintError(ValueError):
    """Something whose source cannot be followed; the message names it."""


@dataclass(frozen=True, order=True)
class Definition:
    """A name that is bound at the top of a module of ``common``; an empty name for the statements that bind none."""

    module: str
    name: str


def _is_docstring(node: ast.AST) -> bool:
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


@lru_cache(maxsize=512)
def _parse(text: str) -> _Source:
    bindings: dict[str, list[ast.stmt]] = {}
    effects = []
    for statement in ast.parse(text).body:
        names = set(_bound(statement))
        for name in names:
            bindings.setdefault(name, []).append(statement)
        if not names and not _is_docstring(statement):
            effects.append(statement)
    return _Source(bindings, effects)


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


class _Reach:
    """The definitions that have been reached, and how to reach more."""

    def __init__(self) -> None:
        self.reached: set[Definition] = set()

    def follow(self, nodes: Iterable[ast.AST], source: _Source, module: str) -> None:
        """Reach all that a definition names, whose module (or notebook) has the given source."""
        for node in nodes:
            parts = list(_walk(node))
            local = [part for part in parts if isinstance(part, ast.Import | ast.ImportFrom)]
            chains = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
            for part in parts:
                if isinstance(part, ast.Attribute):
                    names = _dotted(part)
                    if names and id(part) not in chains:
                        self._name(names, local, source, module)
                elif isinstance(part, ast.Name) and id(part) not in chains:
                    self._name([part.id], local, source, module)
                elif isinstance(part, ast.Import | ast.ImportFrom):
                    for name in _bound(part):
                        for dotted in _imported(part, name):
                            self._packages(dotted)

    def _name(self, names: list[str], local: list[ast.stmt], source: _Source, module: str) -> None:
        for statement in [*local, *source.bindings.get(names[0], ())]:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for dotted in _imported(statement, names[0]):
                    self._dotted([*dotted.split("."), *names[1:]])
        if module and names[0] in source.bindings:
            self.definition(module, names[0])

    def _dotted(self, parts: list[str]) -> None:
        """Reach ``common.a.b.c``: the longest part of it that is a module, and in there what follows, or all."""
        for size in range(len(parts), 0, -1):
            module = ".".join(parts[:size])
            if module_file(module) is not None:
                break
        else:
            return
        self._packages(module)
        source = _load(module)
        if size < len(parts) and parts[size] in source.bindings:
            self.definition(module, parts[size])
        elif size == len(parts):  # the module itself is handed about: anything in it may be used
            for name in source.bindings:
                self.definition(module, name)

    def _packages(self, dotted: str) -> None:
        """Importing a module runs the statements of the packages that it lies in, and its own."""
        parts = dotted.split(".")
        for size in range(1, len(parts) + 1):
            module = ".".join(parts[:size])
            here = Definition(module, "")
            if here in self.reached or (source := _load(module)) is None:
                continue
            self.reached.add(here)
            self.follow(source.effects, source, module)

    def definition(self, module: str, name: str) -> None:
        """Reach what is bound to ``name`` at the top of a module."""
        here, source = Definition(module, name), _load(module)
        if here in self.reached or source is None:
            return
        self.reached.add(here)
        self._packages(module)
        statements = source.bindings[name]
        for statement in statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for dotted in _imported(statement, name):
                    self._dotted(dotted.split("."))
        self.follow([s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom)], source, module)


def _dotted(node: ast.AST) -> list[str]:
    """``["a", "b", "c"]`` of ``a.b.c``; empty if it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def reached_by(function: Callable) -> set[Definition]:
    """Definitions that a function at the top of a module of ``common`` reaches, itself among them.

    Raises
    ------
    FingerprintError
        If it is no such function: one inside of another, in a notebook, or a lambda has no name to find it by.
    """
    function = inspect.unwrap(function)
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    source = _load(module) if module.partition(".")[0] == "common" else None
    if source is None or name not in source.bindings:
        raise FingerprintError(f"{module}.{name} is no function at the top of a module of common")
    walk = _Reach()
    walk.definition(module, name)
    return walk.reached


def reached_by_code(text: str) -> set[Definition]:
    """Definitions that the code of a notebook reaches, all its cells one after the other."""
    source, walk = _parse(text), _Reach()
    walk.follow(ast.parse(text).body, source, "")
    return walk.reached


def digest(definitions: Iterable[Definition]) -> str:
    """SHA-256 over the syntax of definitions and the locked versions of the packages that compute."""
    sha = hashlib.sha256("\n".join(locked_versions()).encode())
    for definition in sorted(definitions):
        source = _load(definition.module)
        statements = source.bindings[definition.name] if definition.name else source.effects
        trees = [_origin(s, definition.name) or syntax(s) for s in statements]
        sha.update(f"{definition.module} {definition.name} {trees}\0".encode())
    return sha.hexdigest()


def fingerprint(function: Callable) -> str:
    """SHA-256 over all that the results of a function depend on besides its arguments.

    Raises
    ------
    FingerprintError
        As :func:`reached_by`.
    """
    return digest(reached_by(function))


def locked_versions() -> list[str]:
    """The lines of ``requirements.lock`` for the packages that compute."""
    lines = (paths.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return sorted(line for line in lines if re.split("[=<>]", line, maxsplit=1)[0] in COMPUTING)
