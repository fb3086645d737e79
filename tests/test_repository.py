"""What is committed holds together: notebooks, scales, records, figures, gallery, citation."""

import ast
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml

from common import paths
from common.notebook.papers import ARXIV, PAPERS, link
from common.notebook.provenance import parameter_defaults, resolve_parameters
from common.notebook.run import record_schema
from common.pipeline import gallery
from common.pipeline.errata import load_errata
from common.pipeline.execute import SCALES, scale_parameters, task
from common.pipeline.refresh import QUICK

NOTEBOOKS = paths.notebook_ids()
FILES = [file for scale in gallery.SCALES for file in paths.FIGURES.glob(f"{scale}/*/[!.]*.json")]
RECORDS = sorted(file.relative_to(paths.FIGURES).with_suffix("").as_posix() for file in FILES)
each_notebook = pytest.mark.parametrize("ident", NOTEBOOKS)
each_record = pytest.mark.parametrize("name", RECORDS)


def load(file):
    return json.loads(file.read_text(encoding="utf-8"))


def cells(ident, kind):
    return [cell for cell in load(paths.notebook_path(ident))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tagged(ident, tag):
    return [cell for cell in cells(ident, "code") if tag in cell["metadata"].get("tags", [])]


def outputs(ident):
    return [output for cell in cells(ident, "code") for output in cell["outputs"]]


def citation(paper):
    """Surnames, year (or None) and title of a paper as PAPERS cites it."""
    names, year, title = re.fullmatch(r"(\w+(?:, \w+)*)(?: \((\d{4})\))?, (\w+ .+)", PAPERS[paper]).groups()
    return names.split(", "), year and int(year), title


# Notebooks


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_notebook_belongs_to_a_paper_and_cites_it(ident):
    paper, first = ident.partition("/")[0], load(paths.notebook_path(ident))["cells"][0]
    assert first["cell_type"] == "markdown"
    names, _, title = citation(paper)
    text = " ".join(source(first).replace("*", "").split()).lower()
    assert source(first).startswith("# ")
    assert title.lower() in text
    assert names[0].lower() in text
    assert link(paper) in source(first)


@each_notebook
def test_notebook_reads_as_an_argument(ident):
    """Claim, reading, criteria, parameters; words after each figure; the numbers, and last the verdicts."""
    everything = load(paths.notebook_path(ident))["cells"]
    first = [source(cell) for cell in everything[:3]]
    for text, word in zip(first, ("**Claim", "**Reading", "**Criteria"), strict=True):
        assert word in text
    assert "parameters" in everything[3]["metadata"].get("tags", [])
    for cell, following in pairwise(everything):
        if re.search(r"^\s*run\.save\(", source(cell), re.M):
            assert following["cell_type"] == "markdown", f"what is to be seen?\n{source(cell)}"
            assert len(source(following)) > 80
    assert [source(cell).strip() for cell in everything[-2:]] == ["run.measurements()", "run.finish()"]


@each_notebook
def test_notebook_is_short(ident):
    assert len(load(paths.notebook_path(ident))["cells"]) <= 30
    for cell in cells(ident, "code"):
        code = [line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= 25 or cell in tagged(ident, "parameters"), f"an algorithm in a notebook?\n{source(cell)}"
        assert "fmt: skip" not in source(cell)


@each_notebook
def test_what_is_prepared_needs_neither_the_run_nor_what_draws(ident):
    for cell in tagged(ident, "prepare"):
        names = {node.id for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Name)}
        assert not names & {"run", "plt", "tqdm", "display"}
        assert "common.notebook.run" not in source(cell) and "matplotlib" not in source(cell)


@each_notebook
def test_parameters_say_what_they_mean_and_what_the_paper_has(ident):
    (cell,) = tagged(ident, "parameters")
    silent = [line for line in source(cell).splitlines() if not re.fullmatch(r"\w+: \w+ = .+  # .+; paper: .+", line)]
    assert silent == []
    assert len(parameter_defaults(paths.notebook_path(ident))) == len(source(cell).splitlines())


@each_notebook
def test_notebook_runs_as_itself(ident):
    calls = [n for cell in cells(ident, "code") for n in ast.walk(ast.parse(source(cell))) if isinstance(n, ast.Call)]
    (run,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Run")
    assert ast.literal_eval(run.args[0]) == ident


@each_notebook
def test_last_cell_is_the_checked_table_of_claims(ident):
    last = load(paths.notebook_path(ident))["cells"][-1]
    assert tagged(ident, "nbval-check-output") == [last]
    assert any("verdict" in "".join(output.get("data", {}).get("text/plain", "")) for output in last["outputs"])


@each_notebook
def test_committed_outputs_are_complete_and_clean(ident):
    assert load(paths.notebook_path(ident))["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["execution_count"] for cell in cells(ident, "code") if source(cell).strip())
    assert any("image/png" in output.get("data", {}) for output in outputs(ident)), "no figure among the outputs"
    unclean = [o for o in outputs(ident) if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert unclean == []


@each_notebook
def test_notebook_holds_no_warning_and_no_absolute_path(ident):
    content = load(paths.notebook_path(ident))
    for output in (output for cell in content["cells"] for output in cell.get("outputs", [])):
        assert "Warning:" not in json.dumps(output)
        output.get("data", {}).pop("image/png", None)  # base64 has slashes of its own
    found = re.findall(r"(?<![\w.:/~])/(?:home|root|Users|tmp|work|opt|usr|var|mnt)/[^\"\s]*", json.dumps(content))
    assert found == []


# Scales


def test_scales_that_are_described_are_those_that_exist():
    assert {file.stem for file in paths.SCALES.glob("*.yaml")} == set(SCALES) - {"quick"}


@pytest.mark.parametrize("scale", SCALES)
def test_scale_fits_the_notebooks(scale):
    for ident, overrides in scale_parameters(scale).items():
        resolve_parameters(paths.notebook_path(ident), overrides)


# Records and figures


@each_notebook
def test_notebook_has_its_laptop_record(ident):
    assert f"laptop/{ident}" in RECORDS


@each_notebook
def test_notebook_has_its_quick_record(ident):
    assert (QUICK / f"{ident}.json").exists(), f"run python -m common.pipeline.refresh {ident}"


@each_record
def test_record_obeys_the_schema_and_lies_where_it_says(name):
    record = load(paths.FIGURES / f"{name}.json")
    jsonschema.validate(record, record_schema())
    assert f"{record['scale']}/{record['id']}" == name
    assert record["paper"]["key"] == record["id"].partition("/")[0]
    assert record["id"] in NOTEBOOKS, "a record of a notebook that is gone"


#: What :meth:`common.notebook.run.Run.claim` adds to a note by itself.
ADDED = re.compile(r"Derived instead: .* the interval\.|An interval .* as many runs\.|The value lies on .* decides\.")


@each_record
def test_whatever_is_not_reproduced_has_a_note_that_means_something(name):
    claims = load(paths.FIGURES / f"{name}.json")["claims"]
    explained = {
        c["id"]: ADDED.sub("", c["note"]).strip() for c in claims if c["verdict"] not in ("reproduced", "untested")
    }
    assert [ident for ident, note in explained.items() if len(note) < 20] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_every_error_of_a_paper_stands_in_its_errata(paper):
    records = [r for r in gallery.counted(gallery.load_records()) if r["paper"]["key"] == paper]
    wrong = {
        f"{r['id'].partition('/')[2]}/{c['id']}"
        for r in records
        for c in r["claims"]
        if c["verdict"] == "paper in error"
    }
    assert wrong <= {claim for entry in load_errata(paper) for claim in entry["claims"]}


def numbers_in(value):
    """All numbers in what a record keeps."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, int | float):
        yield value


@each_record
def test_of_every_error_the_numbers_have_what_is_printed_derived_and_measured(name):
    record = load(paths.FIGURES / f"{name}.json")
    kept = list(numbers_in(record["numbers"]))
    for claim in record["claims"]:
        if claim["verdict"] == "paper in error":
            derived = float(re.search(r"Derived instead: (\S+), inside", claim["note"])[1])  # six digits
            printed = [claim["expected"]] if isinstance(claim["expected"], int | float) else []
            sides = [*printed, derived, claim["measured"]]
            missed = [x for x in sides if not any(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-12) for y in kept)]
            assert missed == [], claim["id"]


@each_record
def test_images_of_a_record_are_there_and_small(name):
    file = paths.FIGURES / f"{name}.json"
    sizes = {image: (file.parent / image).stat().st_size for image in load(file)["figures"]}
    assert {image: size for image, size in sizes.items() if size >= 500_000} == {}
    assert all(image.startswith(f"{file.stem}_") for image in sizes)


def test_no_image_without_a_record():
    named = {file.parent / image for file in FILES for image in load(file)["figures"]}
    present = {file for scale in gallery.SCALES for file in paths.FIGURES.glob(f"{scale}/**/*.png")}
    assert present - named == set()


def test_a_record_of_earlier_code_says_so():
    """In the gallery; a change of code is followed by a run of what it reaches, or by this confession."""
    text = (paths.FIGURES / "README.md").read_text(encoding="utf-8")
    confessed = set(re.findall(r"Made by earlier code\*\*: `\./run_all\.sh --only (\S+)`", text))
    for ident in NOTEBOOKS:
        current = task(ident, "laptop", scale_parameters("laptop").get(ident, {}))
        record = load(paths.FIGURES / "laptop" / f"{ident}.json")
        fresh = record["source"] == current.source
        parameters = resolve_parameters(paths.notebook_path(ident), current.overrides)
        assert not fresh or record["parameters"] == parameters
        mend = f"run ./run_all.sh --only {ident}, or python -m common.pipeline.gallery"
        assert fresh == (ident not in confessed), mend


def test_gallery_is_up_to_date():
    assert gallery.stale_files() == [], "run python -m common.pipeline.gallery"


# The tree


def test_no_paper_imports_another_and_common_rooms_know_none():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def committed():
    """Files that are tracked, or will be with the next commit."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [file for file in map(paths.ROOT.joinpath, filter(None, done.stdout.split("\0"))) if file.is_file()]


def test_nothing_large_is_committed(committed):
    assert {str(file): file.stat().st_size for file in committed if file.stat().st_size > 2_000_000} == {}


def test_a_checkout_has_the_same_line_ends_everywhere(committed):
    """Also where git is set up to write other ones."""
    git = ["git", "-c", "core.autocrlf=true", "archive", "HEAD", "run_all.sh", "Snakefile", "notebooks", "src"]
    done = subprocess.run(git, cwd=paths.ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = [m.name for m in tar if m.isfile() and b"\r\n" in tar.extractfile(m).read()]
    assert found == []


def test_no_data_cache_or_result_of_a_run_is_committed(committed):
    names = [file.relative_to(paths.ROOT) for file in committed]
    suffixes = {".pt", ".pth", ".npy", ".npz", ".gz", ".zip", ".whl", ".pyc", ".lock"}
    wrong = [
        name
        for name in names
        if name.parts[0] in ("data", "build", ".venv", ".snakemake")
        or name.parts[:2] in (("figures", "quick"), ("figures", "custom"))
        or (name.suffix in suffixes and name.name != "requirements.lock")
        or (name.parts[0] == "figures" and name.name.startswith("."))  # half-written
    ]
    assert wrong == []


def test_no_path_of_this_machine_is_committed(committed):
    places = {str(paths.ROOT), os.path.realpath(Path.home())} - {"/"}
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(place)}(?![\w-])" for place in places))
    found = []
    for file in committed:
        text = b"" if file.suffix in (".png", ".gz") else file.read_bytes()
        lines = text.decode(errors="replace").splitlines()
        found += [f"{file.name}:{n}: {line[:100]}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


def test_citation_names_the_project_and_the_papers():
    cff = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    assert cff["cff-version"] == "1.2.0"
    assert (cff["version"], cff["license"]) == (project["version"], project["license"])
    assert cff["title"].startswith(project["name"])
    cited = [([a["family-names"] for a in r["authors"]], r.get("year"), r["title"]) for r in cff["references"]]
    assert cited == [citation(paper) for paper in PAPERS]
    numbers = [[i["value"] for i in r.get("identifiers", []) if i["type"] == "other"] for r in cff["references"]]
    assert numbers == [[f"arXiv:{ARXIV[paper]}"] if paper in ARXIV else [] for paper in PAPERS]
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(link(paper) in readme for paper in ARXIV)


@pytest.mark.parametrize("name", [".ci/run", ".github/workflows/test.yml"])
def test_continuous_integration_calls_the_front_door(name):
    assert "./run_all.sh test" in (paths.ROOT / name).read_text()
    assert name != ".ci/run" or os.access(paths.ROOT / name, os.X_OK)
