"""What a notebook depends on: its parameters, its code, the modules it reaches, and one hash over all of it.

Nothing here runs a notebook or imports what it imports: everything is read off the source with :mod:`ast`.
"""

import ast
import hashlib
import json
from pathlib import Path

from common import paths

#: Types a parameter may have; papermill and YAML can carry each of them.
PARAMETER_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value of the wrong type."""


def code_cells(notebook: Path) -> list[dict]:
    """Code cells of a notebook, as nbformat 4 dictionaries, in order."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def _source(cell: dict) -> str:
    return "".join(cell["source"])


def parameter_defaults(notebook: Path) -> dict[str, object]:
    """Parameters of a notebook and their default (quick) values, from the cell tagged ``parameters``.

    Raises
    ------
    ParameterError
        If there is not exactly one such cell, or a line of it is not ``name: type = literal``.
    """
    tagged = [c for c in code_cells(notebook) if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook}: {len(tagged)} cells are tagged `parameters`; exactly one must be")
    defaults = {}
    for node in ast.parse(_source(tagged[0])).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            raise ParameterError(f"{notebook}: a parameter line must read `name: type = value`: {ast.unparse(node)}")
        kind = ast.unparse(node.annotation).partition("[")[0]
        if kind not in PARAMETER_TYPES:
            raise ParameterError(f"{notebook}: {node.target.id}: type {kind} is none of {list(PARAMETER_TYPES)}")
        defaults[node.target.id] = _checked(node.target.id, ast.literal_eval(node.value), PARAMETER_TYPES[kind])
    return defaults


def _checked(name: str, value: object, kind: type) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ParameterError(f"parameter {name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def resolve_parameters(notebook: Path, overrides: dict[str, object]) -> dict[str, object]:
    """Defaults of a notebook with ``overrides`` laid over them, names and types checked.

    Raises
    ------
    ParameterError
        Names the parameter that does not fit and lists those that exist.
    """
    parameters = parameter_defaults(notebook)
    for name, value in overrides.items():
        if name not in parameters:
            listing = ", ".join(f"{n}: {type(v).__name__}" for n, v in parameters.items())
            raise ParameterError(f"{Path(notebook).stem} has no parameter {name!r}; it has {listing}")
        parameters[name] = _checked(name, value, type(parameters[name]))
    return parameters


def _imports(code: str) -> set[str]:
    """Dotted names of the modules of ``common`` that a piece of code may import."""
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    # Importing a module imports the packages it lies in.
    packages = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 1)}
    return {name for name in names | packages if name.split(".")[0] == "common"}


def _module_file(name: str) -> Path | None:
    base = paths.SOURCE / Path(*name.split("."))
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.exists()), None)


def reached_modules(notebook: Path) -> list[Path]:
    """Files of ``src/common`` that the notebook imports, directly or through others, sorted."""
    waiting = set().union(*(_imports(_source(cell)) for cell in code_cells(notebook)))
    seen: set[Path] = set()
    while waiting:
        file = _module_file(waiting.pop())
        if file is not None and file not in seen:
            seen.add(file)
            waiting |= _imports(file.read_text(encoding="utf-8"))
    return sorted(seen)


def source_hash(notebook: Path, parameters: dict[str, object]) -> str:
    """SHA-256 over the notebook's code cells, the modules it reaches and its parameters.

    Markdown, outputs and file times do not enter: what cannot change the result does not change the hash.
    """
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update(_source(cell).encode() + b"\0")
    for file in reached_modules(notebook):
        digest.update(file.relative_to(paths.SOURCE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(json.dumps(parameters, sort_keys=True).encode())
    return digest.hexdigest()
