"""One run of a notebook: its parameters, data, numbers, figures and claims, and the record that keeps them."""

import html
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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

from common import paths
from common.data import DataSource
from common.notebook import plotting
from common.notebook.provenance import parameter_defaults, resolve_parameters, source_hash
from common.paths import replacing

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
PAPER_IN_ERROR = "paper in error"
UNTESTED = "untested"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, PAPER_IN_ERROR, UNTESTED)

#: Size of an image in bytes from which its colours are reduced.
LARGE = 300_000

PAPERS = {
    "dong_quantifying": "Dong, Zhang, Yao, Sun (2025), Towards Quantifying the Hessian Structure of Neural Networks",
    "liao_eigenspectra": "Liao, Mahoney (2021), Hessian Eigenspectra of More Realistic Nonlinear Models",
    "wu_dissecting": "Wu, Zhu, Wu, Wang, Ge (2022), Dissecting Hessian: Understanding Common Structure of Hessian "
    "in Neural Networks",
    "li_adaptive": "Li, Neural Network as Complex Adaptive System and Its Emergent Benign Loss Landscape",
}


@dataclass(frozen=True)
class Criterion:
    """A condition on the interval of a measurement, with the words that state it."""

    text: str
    holds: Callable[[float, float], bool]


def below(bound: float) -> Criterion:
    """The whole interval lies below ``bound``."""
    return Criterion(f"upper end below {bound:g}", lambda low, high: high < bound)


def above(bound: float) -> Criterion:
    """The whole interval lies above ``bound``."""
    return Criterion(f"lower end above {bound:g}", lambda low, high: low > bound)


def inside(lower: float, upper: float) -> Criterion:
    """The whole interval lies between two bounds."""
    return Criterion(f"interval within [{lower:g}, {upper:g}]", lambda low, high: lower <= low and high <= upper)


def meets(value: float, tolerance: float = 0.0) -> Criterion:
    """The interval reaches into ``value`` plus or minus ``tolerance``."""
    text = f"interval meets {value:.6g}" + (f" ± {tolerance:g}" if tolerance else "")
    return Criterion(text, lambda low, high: low <= value + tolerance and high >= value - tolerance)


def exactly(value: float) -> Criterion:
    """Every measured value equals ``value``, with no tolerance."""
    return Criterion(f"exactly {value:g}", lambda low, high: low == value == high)


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper turned into a measurement; fields as in ``record.schema.json``."""

    id: str
    statement: str
    source: str
    expected: float | str
    measured: float
    interval: tuple[float, float]
    criterion: str
    verdict: str
    note: str


def rounded(value: float | str, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, as the tables of claims print it."""
    return value if isinstance(value, str) else f"{value:.{digits}g}"


class ClaimsTable:
    """The claims of a run as a table, for the last cell of a notebook."""

    def __init__(self, claims: Sequence[Claim]):
        self.rows = [("claim", "expected", "measured", "interval", "criterion", "verdict")]
        for c in claims:
            interval = f"[{rounded(c.interval[0], 2)}, {rounded(c.interval[1], 2)}]"
            self.rows.append((c.id, rounded(c.expected), rounded(c.measured, 2), interval, c.criterion, c.verdict))

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return "\n".join(
            "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in self.rows
        )

    def _repr_html_(self) -> str:
        def line(row: Sequence[str], tag: str) -> str:
            cells = (f'<{tag} style="text-align:left">{html.escape(x)}</{tag}>' for x in row)
            return f"<tr>{''.join(cells)}</tr>"

        return f"<table>{line(self.rows[0], 'th')}{''.join(line(row, 'td') for row in self.rows[1:])}</table>"


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


class Run:
    """What a notebook measures, kept until :meth:`finish` writes it down.

    Parameters
    ----------
    ident
        ``"<paper>/<notebook>"``, as in the file's path below ``notebooks/``.
    namespace
        The notebook's ``globals()``; the values of the parameters are taken from it.
    title
        One line saying what the figure shows.
    figures, tables
        Numbers of the paper's figures and tables that this notebook regenerates.

    Attributes
    ----------
    parameters : dict
        The parameters' values, names and types checked against the cell tagged ``parameters``.
    numbers : dict
        Everything a reader of the figure may want as a number; small arrays too.

    Raises
    ------
    ParameterError
        If a parameter has the wrong type.

    Notes
    -----
    The environment says where the run belongs: ``HESSIAN_SCALE`` (``quick`` if unset, ``custom`` once a
    parameter differs from its default) and ``HESSIAN_OUT``, the folder of figures and record
    (``build/interactive/<paper>`` if unset).
    """

    def __init__(
        self, ident: str, namespace: Mapping[str, object], *, title: str, figures: Sequence[str] = (),
        tables: Sequence[str] = (),
    ):  # fmt: skip
        self.id = ident
        self.paper, _, self.name = ident.partition("/")
        if self.paper not in PAPERS:
            raise ValueError(f"unknown paper {self.paper!r}; known are {', '.join(PAPERS)}")
        notebook = paths.notebook_path(ident)
        defaults = parameter_defaults(notebook)
        self.parameters = resolve_parameters(notebook, {n: namespace[n] for n in defaults if n in namespace})
        self.scale = os.environ.get("HESSIAN_SCALE") or ("quick" if self.parameters == defaults else "custom")
        self.out = Path(os.environ.get("HESSIAN_OUT") or paths.BUILD / "interactive" / self.paper)
        self.title = title
        self.numbers: dict[str, object] = {}
        self._source = source_hash(notebook, self.parameters)
        self._paper = {"key": self.paper, "figures": list(figures), "tables": list(tables)}
        self._reduced: list[str] = []
        self._data: list[DataSource] = []
        self._claims: list[Claim] = []
        self._figures: list[str] = []
        plotting.use_style()

    def uses(self, source: DataSource) -> None:
        """Note a data set; a stand-in is announced, drawn on every figure, and leaves the claims untested."""
        self._data.append(source)
        if source.stand_in:
            print(f"STAND-IN DATA for {source.name}: {source.origin}")

    def paper_values(self, **values: object) -> str:
        """Hold parameters against the paper's values, note which differ, and say so in one phrase.

        Returns
        -------
        str
            Such as ``"epochs: 30 instead of 1000"``, to pass as ``untested`` to the claims that need the paper's
            size; empty if nothing differs.
        """
        differing = [f"{n}: {self.parameters[n]} instead of {v}" for n, v in values.items() if self.parameters[n] != v]
        self._reduced.extend(differing)
        return ", ".join(differing)

    def small_print(self) -> str:
        """The line under every figure: paper, data, scale, and what was reduced."""
        data = "; ".join(f"{s.name}{' (STAND-IN: ' + s.origin + ')' if s.stand_in else ''}" for s in self._data)
        reduced = " · unlike the paper: " + ", ".join(self._reduced) if self._reduced else ""
        return f"{self.id} · scale {self.scale} · data: {data}{reduced}"

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
                shown = shown.quantize(256, dither=Image.Dither.NONE)
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
            Required wherever the verdict is not ``reproduced``: an explanation, in words.
        untested
            A reason why this run cannot decide, such as a scale too small; empty if it can.
        derived
            What a derivation says instead of the paper's formula. If the criterion fails and the interval holds
            this value, the verdict is ``paper in error``.

        Raises
        ------
        ValueError
            If the measurement lies outside its interval, or ``ident`` is taken.
        """
        measured, low, high = (float(x) for x in (estimate[0], *estimate[1]))
        if not low <= measured <= high:
            raise ValueError(f"claim {ident}: {measured} is outside its own interval [{low}, {high}]")
        if any(c.id == ident for c in self._claims):
            raise ValueError(f"claim {ident} is made twice")
        stand_ins = [s.name for s in self._data if s.stand_in]
        if stand_ins:
            untested = untested or f"{', '.join(stand_ins)} is replaced by stand-in data"
        holds = criterion.holds(low, high)
        if untested:
            verdict = UNTESTED
            here = "would hold" if holds else "would not hold"
            note = f"{untested[0].upper()}{untested[1:]}; here the criterion {here}. {note}"
        elif holds:
            verdict = REPRODUCED
        else:
            verdict = NOT_REPRODUCED
            if derived is not None:
                met = low <= derived <= high
                verdict = PAPER_IN_ERROR if met else NOT_REPRODUCED
                note = f"{note} Derived instead: {derived:.6g}, {'inside' if met else 'outside'} the interval."
        note = note.strip() or f"The criterion ({criterion.text}) does not hold." * (verdict != REPRODUCED)
        self._claims.append(
            Claim(ident, statement, source, expected, measured, (low, high), criterion.text, verdict, note)
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
            "reduced": self._reduced,
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

    def finish(self) -> ClaimsTable:
        """Write the record, the last act of a run, and return the table of claims."""
        record = self.record()
        jsonschema.validate(record, record_schema())
        with replacing(self.out / f"{self.name}.json") as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return ClaimsTable(self._claims)
