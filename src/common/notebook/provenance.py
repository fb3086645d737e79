"""What a notebook says of itself: its parameters, what the paper has instead, its name, and one hash over all of it.

Nothing here runs a notebook or imports what it imports: everything is read off the source with :mod:`ast`.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import paths
from common.fingerprint import digest, reached_by_code, syntax
from common.notebook.printed import path_of

#: Types a parameter may have; papermill and YAML can carry each of them.
PARAMETER_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
#: A line of the cell tagged ``parameters``.
_LINE = re.compile(r"(?P<name>\w+): (?P<type>\w+) = (?P<value>.+?)  # (?P<meaning>.+); paper: (?P<paper>.+)")


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value of the wrong type."""


class FormatError(ValueError):
    """A file that is no notebook."""


class IdentityError(ValueError):
    """A notebook that runs under the name of another one, or of none."""


@dataclass(frozen=True)
class Parameter:
    """A line of the cell tagged ``parameters``.

    Attributes
    ----------
    default
        Its value at the quick scale.
    paper
        What the paper has, as the comment says it: a literal such as ``1000``, ``1000 each`` for a list with as many
        entries as ours, or words.
    """

    name: str
    default: object
    meaning: str
    paper: str

    def differs(self, value: object) -> str:
        """Such as ``"epochs: 30 instead of 1000"``; empty if the paper has this value, or none that can be compared."""
        try:
            paper = ast.literal_eval(self.paper.removesuffix(" each"))
        except (ValueError, SyntaxError):
            return ""
        if self.paper.endswith(" each") and isinstance(value, list):
            same = set(value) == {paper}
        elif isinstance(value, list) != isinstance(paper, list):
            return ""
        else:
            same = value == paper
        return "" if same else f"{self.name}: {value} instead of {paper}{' each' * self.paper.endswith(' each')}"


def code_cells(content: Mapping, tag: str = "") -> list[str]:
    """Sources of the code cells of a notebook, as nbformat 4 has it, in order; those with a tag, or all."""
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if not tag or tag in c.get("metadata", {}).get("tags", [])]


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or not isinstance(metadata := cell.get("metadata", {}), dict):
        return False
    lines = [source] if isinstance(source := cell.get("source"), str) else source
    of_text = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    return of_text and isinstance(cell.get("cell_type"), str) and isinstance(metadata.get("tags", []), list)


def read_notebook(notebook: Path) -> dict:
    """A notebook as nbformat 4 has it.

    Raises
    ------
    FormatError
        With its name, if it is none.
    """
    name = "/".join(Path(notebook).parts[-2:])
    try:
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{name} is no notebook: {error}") from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(map(_is_cell, cells)):
        raise FormatError(f"{name} is no notebook: it does not consist of cells")
    return content


def committed_notebook(notebook: Path) -> dict | None:
    """The notebook as the last commit has it; None where that cannot be told."""
    if not Path(notebook).is_relative_to(paths.ROOT):
        return None
    name = f"HEAD:./{Path(notebook).relative_to(paths.ROOT).as_posix()}"
    try:
        shown = subprocess.run(["git", "show", name], cwd=paths.ROOT, capture_output=True, check=False)
        return json.loads(shown.stdout) if shown.returncode == 0 else None
    except (OSError, ValueError):
        return None


def parameters_of(content: Mapping, name: str = "the notebook") -> dict[str, Parameter]:
    """Parameters of a notebook by name, from the cell tagged ``parameters``.

    Raises
    ------
    ParameterError
        If there is not exactly one such cell, or a line of it is not
        ``name: type = literal  # meaning; paper: value``.
    """
    tagged = code_cells(content, "parameters")
    if len(tagged) != 1:
        raise ParameterError(f"{name}: {len(tagged)} cells are tagged `parameters`; exactly one must be")
    found = {}
    for line in filter(str.strip, tagged[0].splitlines()):
        parts = _LINE.fullmatch(line.strip())
        if parts is None:
            raise ParameterError(f"{name}: a line must read `name: type = value  # meaning; paper: value`: {line}")
        if parts["type"] not in PARAMETER_TYPES:
            raise ParameterError(f"{name}: {parts['name']}: type {parts['type']} is none of {list(PARAMETER_TYPES)}")
        try:
            value = ast.literal_eval(parts["value"])
        except (ValueError, SyntaxError):
            raise ParameterError(f"{name}: {parts['name']} is no plain value: {parts['value']}") from None
        value = _checked(parts["name"], value, PARAMETER_TYPES[parts["type"]])
        found[parts["name"]] = Parameter(parts["name"], value, parts["meaning"], parts["paper"])
    return found


def _checked(name: str, value: object, kind: type) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ParameterError(f"parameter {name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def parameter_defaults(notebook: Path) -> dict[str, object]:
    """Default (quick) values of a notebook's parameters.

    Raises
    ------
    ParameterError
        As :func:`parameters_of`.
    """
    found = parameters_of(read_notebook(notebook), Path(notebook).stem)
    return {name: parameter.default for name, parameter in found.items()}


def resolve_parameters(notebook: Path, overrides: Mapping[str, object]) -> dict[str, object]:
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


def _code(content: Mapping) -> str:
    """The code of all cells, one after the other; lines that speak to IPython are left out."""
    lines = "\n".join(code_cells(content)).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _calls(content: Mapping, function: str) -> list[list[object]]:
    """Arguments by position of the calls of a function in a notebook; None for what is no literal."""
    calls = [node for node in ast.walk(ast.parse(_code(content))) if isinstance(node, ast.Call)]
    named = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == function]
    return [[a.value if isinstance(a, ast.Constant) else None for a in call.args] for call in named]


def declared_ident(content: Mapping) -> str | None:
    """The identifier that a notebook gives to ``Run``; None if it does not."""
    found = [arguments[0] for arguments in _calls(content, "Run") if arguments]
    return found[0] if found and isinstance(found[0], str) else None


def check_identity(ident: str) -> None:
    """Refuse a notebook that is not there, or whose identifier is that of another one.

    Which of several is running is known where the environment names the folder of the results: who runs it there has
    refused the others.

    Raises
    ------
    IdentityError
        In one line, with what is to be done.
    """
    notebook = paths.notebook_path(ident)
    if not notebook.exists():
        raise IdentityError(
            f"there is no notebook {ident}.ipynb: if this one was copied or renamed, write its own path below "
            "notebooks/ in the first argument of Run"
        )
    for other in () if os.environ.get("HESSIAN_OUT") else paths.NOTEBOOKS.rglob("*.ipynb"):
        if other == notebook or ".ipynb_checkpoints" in other.parts or ident.encode() not in other.read_bytes():
            continue
        declared = None
        with contextlib.suppress(ValueError, SyntaxError):  # it cannot run at all
            declared = declared_ident(read_notebook(other))
        if declared == ident:
            name = other.relative_to(paths.NOTEBOOKS).as_posix()
            raise IdentityError(
                f"{name} runs under the name of {ident}: write its own, {name.removesuffix('.ipynb')}, in the first "
                "argument of its Run"
            )


def source_hash(notebook: Path, parameters: Mapping[str, object]) -> str:
    """SHA-256 over a notebook's code, the definitions that it reaches, its printed tables and its parameters.

    Markdown, outputs, comments, formatting and file times do not enter: what cannot change the result does not change
    the hash.
    """
    content = read_notebook(notebook)
    code = _code(content)
    sha = hashlib.sha256(digest(reached_by_code(code)).encode())
    sha.update(syntax(ast.parse(code)).encode())
    for arguments in _calls(content, "printed"):
        if len(arguments) == 2 and all(isinstance(a, str) for a in arguments):
            table = path_of(*arguments)
            sha.update(table.read_bytes() if table.is_file() else b"")
    sha.update(json.dumps(parameters, sort_keys=True).encode())
    return sha.hexdigest()
