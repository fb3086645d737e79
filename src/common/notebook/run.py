"""One run of a notebook: its parameters, data, numbers, figures and claims, and the record that keeps them."""

import difflib
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import jsonschema
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image as ImageView
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from common import cache, paths
from common.data import DataSource
from common.notebook import plotting
from common.notebook.claims import (
    NOT_REPRODUCED,
    PAPER_IN_ERROR,
    REPRODUCED,
    UNDECIDED,
    UNTESTED,
    Claim,
    Criterion,
    Table,
    table_of_measurements,
    table_of_verdicts,
)
from common.notebook.intervals import Exact
from common.notebook.papers import PAPERS
from common.notebook.provenance import (
    PARAMETER_TYPES,
    Parameter,
    ParameterError,
    check_identity,
    committed_notebook,
    parameters_of,
    read_notebook,
    resolve_parameters,
    source_hash,
)
from common.paths import read_json, replacing

#: Size of an image in bytes from which its colours are reduced.
LARGE = 300_000


def record_schema() -> dict:
    """The JSON schema that every record obeys."""
    return json.loads(resources.files("common.notebook").joinpath("record.schema.json").read_text(encoding="utf-8"))


def _plain(name: str, value: object) -> object:
    """``value`` as JSON types; a number that is not finite is refused by name."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: a record holds finite numbers only; say in words what happened")
    return value


def check_names(parameters: Mapping[str, Parameter], namespace: Mapping[str, object], committed: Mapping) -> None:
    """Refuse a name that looks like a misspelt parameter.

    Parameters
    ----------
    parameters
        Of the notebook as it is saved.
    namespace
        ``globals()`` of the notebook.
    committed
        Parameters of the notebook as the last commit has it; empty where that cannot be told.

    Raises
    ------
    ParameterError
        In one line: of a parameter that is not set; of one that the committed notebook does not have while it has one
        that is gone; of a plain value in the namespace whose name is nearly that of a parameter; of a line
        ``name: type = value`` that was run and is not saved.
    """
    gone = [name for name in committed if name not in parameters]
    for name in parameters:
        if committed and name not in committed and gone:
            raise ParameterError(f"the committed notebook has no parameter {name!r}; did you mean {_like(name, gone)}?")
    kinds = tuple(PARAMETER_TYPES.values())
    plain = [n for n, v in namespace.items() if isinstance(v, kinds) and not n.startswith("_") and n not in parameters]
    for name in parameters:
        if name not in namespace:
            near = difflib.get_close_matches(name, plain, 1, 0.7)
            hint = f"; did you mean it by {near[0]!r}?" if near else "; run the cell tagged `parameters`"
            raise ParameterError(f"the parameter {name!r} is not set{hint}")
    spelt = {name.lower(): name for name in parameters}
    for name in plain:
        near = difflib.get_close_matches(name.lower(), spelt, 1, 0.85)
        if near and len(name) > 3:
            raise ParameterError(f"there is no parameter {name!r}; did you mean {spelt[near[0]]!r}?")
    for name in namespace.get("__annotations__", {}):
        if name not in parameters:
            raise ParameterError(
                f"the saved notebook has no parameter {name!r}, but {', '.join(parameters)}: save it, or, if a line "
                "was renamed or taken out, start the kernel anew"
            )


def _like(name: str, names: Sequence[str]) -> str:
    return repr((difflib.get_close_matches(name, names, 1, 0.0) or names)[0])


def _what_would_decide(half_width: float, margin: float) -> str:
    """How much sharper a measurement must be, in words; the error falls as the root of the number of runs."""
    if margin <= 0 or half_width >= 30 * margin:
        return "The value lies on the bound: no number of runs in reach decides."
    times = half_width / margin
    return f"An interval {times:.2g} times narrower decides: about {times**2:.2g} times as many runs."


class Run:
    """What a notebook measures, kept until :meth:`finish` writes it down.

    Parameters
    ----------
    ident
        ``"<paper>/<notebook>"``, as in the file's path below ``notebooks/``.
    namespace
        ``globals()`` of the notebook, in which the parameters are looked up.
    title
        What the notebook shows, in a few words.
    figures, tables
        Numbers of the paper's figures and tables that it regenerates.

    Attributes
    ----------
    parameters : dict
        The parameters' values, names and types checked against the cell tagged ``parameters``.
    numbers : dict
        Everything a reader of the figure may want as a number; small arrays too.

    Raises
    ------
    ParameterError
        If a parameter has the wrong type, or a name looks like a misspelt one.
    IdentityError
        If there is no such notebook, or another one has its name.

    Notes
    -----
    The environment says where the run belongs: ``HESSIAN_OUT``, the folder of figures and record, and with it
    ``HESSIAN_SCALE``. Where it is not set the folder is ``build/interactive/<paper>``, and the scale ``quick``, or
    ``custom`` once a parameter differs from the default that the last commit has.
    """

    def __init__(
        self, ident: str, namespace: Mapping[str, object], *, title: str, figures: Sequence[str] = (),
        tables: Sequence[str] = (),
    ):  # fmt: skip
        self.id = ident
        self.paper, _, self.name = ident.partition("/")
        if self.paper not in PAPERS:
            raise ValueError(f"unknown paper {self.paper!r}; known are {', '.join(PAPERS)}")
        check_identity(ident)
        notebook = paths.notebook_path(ident)
        self._described = parameters_of(read_notebook(notebook), ident)
        before = committed_notebook(notebook)
        committed = parameters_of(before, ident) if before else {}
        check_names(self._described, namespace, committed)
        self.parameters = resolve_parameters(notebook, {name: namespace[name] for name in self._described})
        defaults = {name: parameter.default for name, parameter in (committed or self._described).items()}
        self.scale = "quick" if self.parameters == defaults else "custom"
        self.out = paths.BUILD / "interactive" / self.paper
        if out := os.environ.get("HESSIAN_OUT"):
            self.scale, self.out = os.environ.get("HESSIAN_SCALE") or self.scale, Path(out)
        self.title = title
        self.numbers: dict[str, object] = {}
        self._source = source_hash(notebook, self.parameters)
        self._paper = {"key": self.paper, "figures": list(figures), "tables": list(tables)}
        self._data: list[DataSource] = []
        self._claims: list[Claim] = []
        self._figures: list[str] = []
        plotting.use_style()

    def uses(self, source: DataSource) -> None:
        """Note a data set; a stand-in is announced, drawn on every figure, and leaves the claims untested."""
        self._data.append(source)
        if source.stand_in:
            print(f"STAND-IN DATA for {source.name}: {source.origin}")

    def unlike_paper(self, *names: str) -> str:
        """Which of some parameters (of all, if none is named) differ from the paper's values, in one phrase.

        The paper's value stands in the comment of the parameter's line; one that is no plain value is not compared.

        Returns
        -------
        str
            Such as ``"epochs: 30 instead of 1000"``, to pass as ``untested`` to the claims that need the paper's
            size; empty if nothing differs.

        Raises
        ------
        KeyError
            If there is no such parameter.
        """
        return ", ".join(self._differing(names or tuple(self._described)))

    def _differing(self, names: Sequence[str]) -> list[str]:
        return [words for n in names if (words := self._described[n].differs(self.parameters[n]))]

    def small_print(self) -> str:
        """The line under every figure: paper, data, scale, and what is unlike the paper."""
        data = "; ".join(f"{s.name}{' (STAND-IN: ' + s.origin + ')' if s.stand_in else ''}" for s in self._data)
        unlike = self.unlike_paper()
        return f"{self.id} · scale {self.scale} · data: {data}" + f" · unlike the paper: {unlike}" * bool(unlike)

    def save(self, fig: Figure, label: str) -> None:
        """Write ``fig`` as ``<notebook>_<label>.png``, small print added, and show that file in the notebook.

        A file above ``LARGE`` bytes is reduced to a palette of 256 colours: heat maps of noise compress badly.
        """
        name = f"{self.name}_{label}.png"
        plotting.add_small_print(fig, self.small_print())
        pixels = io.BytesIO()
        fig.savefig(pixels, format="png")
        plt.close(fig)
        with replacing(self.out / name) as path, Image.open(pixels) as image:
            shown = image.convert("RGB")
            if pixels.getbuffer().nbytes > LARGE:
                shown = plotting.with_few_colors(shown)
            shown.save(path, format="png", optimize=True)
        self._figures.append(name)
        display(ImageView(filename=str(self.out / name), width=96 * fig.get_figwidth()))

    def claim(
        self, ident: str, statement: str, estimate: tuple[float, tuple[float, float]], *, source: str,
        expected: float | str, criterion: Criterion, note: str = "", untested: str = "",
        derived: float | None = None,
    ) -> None:  # fmt: skip
        """Hold a sentence of the paper against a measurement.

        Parameters
        ----------
        ident, statement
            A short name; the sentence.
        estimate
            What was measured and its uncertainty, (value, (low, high)), as :mod:`common.notebook.intervals` gives them.
        source
            Figure and equation of the paper.
        expected
            What the paper says, a number or words.
        criterion
            What the interval must satisfy.
        note
            Whatever the verdict: what was seen and what it means. A claim that is committed as ``not reproduced``,
            ``paper in error`` or ``undecided`` must have one.
        untested
            A reason why this run cannot decide, such as a scale too small; empty if it can.
        derived
            What a derivation says instead of the paper's formula. If the criterion is violated and the interval holds
            this value, the verdict is ``paper in error``.

        Raises
        ------
        ValueError
            If the measurement lies outside its interval; if the interval has width zero and the estimate is not
            :class:`~common.notebook.intervals.Exact`; if ``ident`` is taken.
        """
        measured, low, high = (float(x) for x in (estimate[0], *estimate[1]))
        if not low <= measured <= high:
            raise ValueError(f"claim {ident}: {measured} is outside its own interval [{low}, {high}]")
        if low == high and not isinstance(estimate, Exact):
            raise ValueError(f"claim {ident}: an interval of width zero is for what is exact; {measured} has no error")
        if any(c.id == ident for c in self._claims):
            raise ValueError(f"claim {ident} is made twice")
        stand_ins = [s.name for s in self._data if s.stand_in]
        if stand_ins:
            untested = untested or f"{', '.join(stand_ins)} is replaced by stand-in data"
        holds, violated = criterion.holds(low, high), criterion.violated(low, high)
        reason = ""
        if untested:
            verdict = UNTESTED
            here = "would hold" if holds else "would not hold" if violated else "would not be decided"
            if not untested.startswith(tuple(f"{name}: " for name in self.parameters)):  # d is not D
                untested = untested[0].upper() + untested[1:]
            reason = f"{untested}; here the criterion {here}."
        elif holds:
            verdict = REPRODUCED
        elif violated:
            verdict = NOT_REPRODUCED
            if derived is not None:
                met = low <= derived <= high
                verdict = PAPER_IN_ERROR if met else NOT_REPRODUCED
                reason = f"Derived instead: {derived:.6g}, {'inside' if met else 'outside'} the interval."
        else:
            verdict = UNDECIDED
            reason = _what_would_decide(max(high - measured, measured - low), criterion.margin(measured))
        self._claims.append(
            Claim(
                ident,
                statement,
                source,
                expected,
                measured,
                (low, high),
                criterion.text,
                verdict,
                f"{note} {reason}".strip(),
            )
        )

    def record(self) -> dict:
        """The run as the JSON object of ``record.schema.json``."""
        return {
            "schema": 1,
            "id": self.id,
            "title": self.title,
            "paper": self._paper,
            "scale": self.scale,
            "parameters": self.parameters,
            "reduced": self._differing(tuple(self._described)),
            "data": [asdict(s) for s in self._data],
            "claims": [_plain(c.id, {**asdict(c), "interval": list(c.interval)}) for c in self._claims],
            "numbers": _plain("numbers", self.numbers),
            "figures": self._figures,
            "source": self._source,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
            },
        }

    def measurements(self) -> Table:
        """What was measured so far, with intervals; numbers whose last digits differ between processors."""
        return table_of_measurements(self._claims)

    def finish(self) -> Table:
        """Write the record, the last act of a run, and return the table of claims.

        It holds words that every processor prints: statement, source, criterion, verdict, and beside it the verdict of
        the committed record at the paper's scale, or else at the laptop's.
        """
        record = self.record()
        jsonschema.validate(record, record_schema())
        with replacing(self.out / f"{self.name}.json") as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with replacing(self.out / "spared.json") as path:
            path.write_text(json.dumps({"seconds": round(cache.spared_seconds(), 1)}) + "\n", encoding="utf-8")
        return table_of_verdicts(self._claims, self.scale, self._committed_verdicts())

    def _committed_verdicts(self) -> tuple[str, dict[str, str]] | None:
        for scale in ("paper", "laptop"):
            file = paths.FIGURES / scale / f"{self.id}.json"
            if file.is_file():
                claims = read_json(file)["claims"]
                return scale, {claim["id"]: claim["verdict"] for claim in claims}
        return None
