"""What a result depends on: every edit that can change it changes its key, and nothing else does."""

import ast
import random
import re
import shutil
import sys
import threading
from pathlib import Path
from types import CodeType

import jaxtyping
import pytest
import torch

from common import cache, fingerprint, paths
from common.cache import code_of
from common.fingerprint import Definition, FingerprintError, digest, reached_by, reached_by_code, syntax
from common.pipeline import prepare

TOY = {
    "__init__": '"""Package."""\n',
    "base": '''"""Base."""
import math
from math import floor as down

SCALE = 2  # a scale

class Shape:
    """A shape."""
    side: int = 3

    def area(self) -> float:
        """Its area."""
        return SCALE * self.side**2

def unused():
    return 5

math.pi
''',
    "user": '''"""User."""
from common.toy import base
from common.toy.base import Shape

def draw(x):
    print(x)

def helper(x: int) -> int:
    # a comment
    return x + base.down(1.5)

def make(n):
    """Make."""
    from common.toy.late import LATE
    return helper(n) * Shape().area() + LATE
''',
    "late": "LATE = 1\nEARLY = 2\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of three modules; a function that writes one of them anew and gives the digest of ``make``."""
    folder = tmp_path / "src" / "common" / "toy"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    for name, text in TOY.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(paths, "SOURCE", tmp_path / "src")

    def key(module="base", old="", new=""):
        assert old in TOY[module]
        (folder / f"{module}.py").write_text(TOY[module].replace(old, new))
        found = digest(fingerprint._closed([Definition("common.toy.user", "make")]))
        (folder / f"{module}.py").write_text(TOY[module])
        fingerprint._refresh()
        return found

    return key


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("base", "SCALE = 2", "SCALE = 3"),
        ("base", "self.side**2", "self.side**3"),
        ("base", "side: int = 3", "side: int = 4"),
        ("base", "floor as down", "ceil as down"),
        ("base", "math.pi\n", "math.e\n"),
        ("base", "class Shape:", "class Shape(dict):"),
        ("user", "return x +", "return x -"),
        ("user", "helper(n)", "helper(n + 1)"),
        ("late", "LATE = 1", "LATE = 7"),
    ],
)
def test_an_edit_that_can_change_the_result_gives_another_key(toy, module, old, new):
    assert toy(module, old, new) != toy()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("base", "# a scale", "# the scale of all"),
        ("base", '"""Its area."""', '"""The area of it."""'),
        ("base", '"""A shape."""\n    side', "side"),
        ("base", "SCALE = 2", "SCALE = (\n    2\n)"),
        ("base", "return 5", "return 6"),
        ("user", "print(x)", "print(x, x)"),
        ("user", "x: int) -> int", "x: float) -> float"),
        ("late", "EARLY = 2", "EARLY = 3"),
    ],
)
def test_other_edits_do_not(toy, module, old, new):
    assert toy(module, old, new) == toy()


def test_versions_of_what_computes_count_and_of_what_does_not_do_not(tmp_path, monkeypatch):
    lock = (paths.ROOT / "requirements.lock").read_text()
    assert [line.partition("==")[0] for line in fingerprint.locked_versions()] == list(fingerprint.COMPUTING)
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def key(text):
        (tmp_path / "requirements.lock").write_text(text)
        return digest([])

    version = next(line for line in lock.splitlines() if line.startswith("scipy=="))
    other = next(line for line in lock.splitlines() if line.startswith("jupyterlab=="))
    assert key(lock.replace(version, "scipy==0.0.1")) != key(lock)
    assert key(lock.replace(other, "jupyterlab==0.0.1")) == key(lock)


def test_what_has_no_name_is_refused():
    for function in (lambda: None, test_what_has_no_name_is_refused, prepare.main.__class__):
        with pytest.raises(FingerprintError, match="no function at the top of a module of common"):
            reached_by(function)


def test_old_code_is_not_kept_under_a_new_name(monkeypatch):
    """A kernel that was started before a module was edited runs the module as it was."""
    monkeypatch.setattr(fingerprint, "_BEGAN", 0.0)
    with pytest.raises(FingerprintError, match=r"\.py has been edited since this process began: start it"):
        reached_by(prepare.main)


def test_files_from_the_future_are_not_edited_ones(monkeypatch):
    """As after a clock was put back, or on a server whose clock is ahead."""
    monkeypatch.setattr(fingerprint, "_BEGAN", 0.0)
    monkeypatch.setattr(fingerprint.time, "time", lambda: 1.0)
    assert reached_by(prepare.main)


def test_a_module_that_is_handed_about_counts_whole():
    names = {d.name for d in reached_by_code("from common.notebook import intervals\nf(intervals)\n")}
    assert {"mean_interval", "bootstrap", "log_log_slope"} <= names
    one = {d.name for d in reached_by_code("from common.notebook import intervals\nintervals.exact(1)\n")}
    assert "exact" in one and "bootstrap" not in one


# Every kind of result that is kept


#: Notebooks that together keep results of every kind, and the sizes at which they are prepared here.
KEEPING = {
    "dong_quantifying/fig02_03_training": {"d": 8, "C": 6, "steps": 10, "seeds": 1},
    "li_adaptive/fig01_06_coupling": {"epochs": 1, "samples": 64, "keep": [0, 1], "repeats": 1, "exponent_blocks": 0},
    "li_adaptive/fig01_landscape": {
        "lenet_epochs": 1, "lenet_samples": 64, "lenet_keep": [0, 1], "vgg_epochs": 1, "vgg_samples": 64,
        "vgg_keep": [0, 1], "iterations": 4, "starts": 1, "edges": 1,
        "lenet_steps": [0, 1], "lenet_networks": 1, "vgg_networks": 1, "lenet_trainings": 1, "lenet_active": 2,
        "lenet_hessian_samples": 1, "vgg_hessian_samples": 2,
    },
    "li_adaptive/fig03_normalization": {
        "layers": [6], "networks": 1, "few_networks": 1, "steps": 4, "small_steps": 22, "samples": 64,
        "hessian_samples": 4, "iterations": 4,
    },
    "wu_dissecting/fig02_kronecker": {
        "epochs": 1, "samples": 128, "hessian_samples": 64, "deeper_epochs": 1, "deeper_samples": 128,
        "full_samples": [32, 32], "shown": 8,
    },
    "wu_dissecting/fig07_08_convnets": {"members": 2, "samples": [32, 32], "hessian_samples": [8, 8]},
    "wu_dissecting/fig19_20_trajectory": {"members": 2, "epochs": 1, "samples": 64, "hessian_samples": 32},
    "wu_dissecting/table06_07_autocorrelation": {
        "networks": ["F-20^2 MNIST"], "epochs": [1], "samples": [64], "members": [2], "large_samples": [32],
        "large_members": [2],
    },
    "wu_dissecting/table08_output_eigenspace": {"samples": [64, 64, 64], "members": 1},
    "wu_dissecting/table10_pac_bayes": {
        "networks": ["T-20^2_10"], "members": 1, "samples": 256, "sgd_epochs": 1, "epochs": 2, "hessian_samples": 64,
        "draws": 1000,
    },
}  # fmt: skip
#: Modules that hand results on and make none.
NEUTRAL = {"common.cache", "common.fingerprint", "common.paths"}


class Watch:
    """Notes for each function whose results are kept what runs while it makes one."""

    def __init__(self):
        self.ran: dict[str, set[tuple[str, str]]] = {}
        self.counts: dict[str, set[Definition]] = {}
        self._source = str(paths.SOURCE)
        self._here = threading.local()
        self._places: dict[CodeType, tuple[str, str] | None] = {}

    def _place(self, code):
        if code not in self._places:
            parts = ()
            if code.co_filename.startswith(self._source):
                parts = Path(code.co_filename).relative_to(self._source).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            self._places[code] = (module, code.co_qualname.partition(".")[0]) if parts else None
        return self._places[code]

    def __call__(self, frame, event, argument):
        """Called where a function begins; what it returns, where it ends."""
        if (place := self._place(frame.f_code)) is None:
            return None
        making = self._here.__dict__.setdefault("making", [])
        back = frame.f_back
        while back is not None and self._place(back.f_code) is None:  # checks of types stand between
            back = back.f_back
        asked = back is not None and self._place(back.f_code) == ("common.cache", "cached")
        asked = asked and place[0] not in NEUTRAL
        if asked:
            making.append(".".join(place))
        for kind in making:
            self.ran.setdefault(kind, set()).add(place)
        if not asked:
            return None
        frame.f_trace_lines = False

        def ended(frame, event, argument):
            if event == "return":
                making.pop()
            return ended

        return ended

    def code_of(self, make, arguments):
        """Stands for that of the cache, notes what it finds, and is not watched, which would take a minute."""
        watching = sys.gettrace()
        sys.settrace(None)
        try:
            kind, found = f"common.{cache.name_of(make)}", code_of(make, arguments)
        finally:
            sys.settrace(watching)
        self.counts[kind] = found | self.counts.get(kind, set())
        return found


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Of each function whose results are kept what ran and what counts."""
    patch, watch = pytest.MonkeyPatch(), Watch()
    own = tmp_path_factory.mktemp("cache")
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (own / "data").symlink_to(paths.CACHE / "data")  # decoded images
    patch.setattr(paths, "CACHE", own)
    patch.setattr(cache, "code_of", watch.code_of)
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # checks of types would be watched too, for a minute
    before = sys.gettrace()
    sys.settrace(watch)
    threading.settrace(watch)
    try:
        for ident, sizes in KEEPING.items():
            prepare.run_cells(ident, sizes)
    finally:
        sys.settrace(before)
        threading.settrace(None)
        jaxtyping.config.update("jaxtyping_disable", checked)
        patch.undo()
    made = {folder.name for folder in own.iterdir() if folder.name != "data"}
    assert {kind.removeprefix("common.") for kind in watch.ran} == made
    return {kind: (ran, watch.counts[kind]) for kind, ran in watch.ran.items()}


def test_all_that_runs_in_the_making_of_a_result_counts(kinds):
    """So no edit of code that ran can leave the key as it was."""
    asked = [text for file in paths.SOURCE.glob("common/*/*.py") for text in [file.read_text()] if "cached(" in text]
    names = {name for text in asked for name in re.findall(r"\bcached\(\s*(\w+)[,)]", text)}
    elsewhere = {"train_stage" if torch.cuda.is_available() else "train_stage_on_gpu"}
    assert {kind.rpartition(".")[2] for kind in kinds} == names - elsewhere, "a kind that is not watched here"
    for kind, (ran, reached) in kinds.items():
        modules = {d.module for d in reached} | NEUTRAL
        missed = {
            place
            for place in ran
            if Definition(*place) not in reached and place[0] not in NEUTRAL and not place[1].startswith("<")
        }
        assert missed == set(), f"{kind} runs what does not count"
        assert {module for module, _ in ran} <= modules


def changed(statement):
    """A definition that computes something else, and one that says something else."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        body = [*statement.body, ast.parse("changed = 1").body[0]]
        other = type(statement)(**{**vars(statement), "body": body})
    else:
        other = ast.If(ast.Constant(True), [statement], [])
    return ast.unparse(ast.fix_missing_locations(other))


def test_an_edit_of_any_module_changes_the_keys_that_it_can_reach_and_its_words_do_not(kinds, tmp_path, monkeypatch):
    source = tmp_path / "src"
    shutil.copytree(paths.SOURCE / "common", source / "common", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "SOURCE", source)
    rng = random.Random(0)
    before = {kind: digest(reached) for kind, (_, reached) in kinds.items()}
    tried = set()
    for module in sorted({d.module for _, reached in kinds.values() for d in reached if d.name}):
        file = fingerprint.module_file(module)
        text = file.read_text()
        names = {kind: {d.name for d in reached if d.module == module} for kind, (_, reached) in kinds.items()}
        counted = set().union(*names.values())
        chosen = [
            s
            for s in ast.parse(text).body
            if {*fingerprint._bound(s)} & counted and not isinstance(s, ast.Import | ast.ImportFrom)
        ]
        for statement in rng.sample(chosen, min(2, len(chosen))):
            lines = text.splitlines()
            first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]) - 1
            above, own, below = lines[:first], lines[first : statement.end_lineno], lines[statement.end_lineno :]
            reaching = {kind for kind in kinds if {*fingerprint._bound(statement)} & names[kind]}
            file.write_text("\n".join(["# other words", *above, "", "", "# of this too", *own, "", *below]))
            for kind in reaching:
                assert digest(kinds[kind][1]) == before[kind], f"{kind}: words of {module}, line {first + 1}"
            file.write_text("\n".join([*above, changed(statement), *below]))
            for kind in reaching:
                assert digest(kinds[kind][1]) != before[kind], f"{kind}: {module}, line {first + 1}"
            file.write_text(text)
            tried.add(module)
    assert len(tried) >= 15


def test_syntax_holds_what_computes_and_nothing_else():
    text = 'def f(x, *, y: int = 1) -> str:\n    """Words."""\n    return -x  # more\n'
    assert syntax(ast.parse(text)) == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')],kwonlyargs=[arg(arg='y')],"
        "kw_defaults=[Constant(value=1)]),body=[Return(value=UnaryOp(op=USub(),operand=Name(id='x')))])])"
    )
