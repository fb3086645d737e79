"""run_all.sh from outside, in a small clone with notebooks of its own: what runs when, what survives being killed."""

import contextlib
import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from toys import NAMES, PAPER, PARAMETERS, ROOT, SLURM, TOY, Clone, finish, personal_settings, write_notebook

from common.pipeline import publish as summary
from common.pipeline import workflow
from common.pipeline.execute import Cost, Task


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which every toy has run once, two at once, and its output."""
    clone = Clone(tmp_path_factory.mktemp("front door") / "a {clone} [1] of 'ü'")  # odd on purpose
    clone.add_toys()
    clone.first_output = clone.run("--scale", "quick", "--jobs", "2")
    clone.first_figures = clone.figures()
    return clone


@pytest.fixture
def restored(clone, tmp_path):
    """The clone, put back afterwards as it was."""
    shutil.copytree(clone.root, tmp_path / "before")
    yield clone
    shutil.rmtree(clone.root)
    shutil.move(tmp_path / "before", clone.root)


def test_everything_runs_and_is_published(clone):
    output = clone.first_output
    assert clone.ran(output) == {"alpha", "beta", "gamma"}
    assert clone.first_figures.keys() == {f"{n}{end}" for n in NAMES for end in (".json", "_a.png")}
    for position in (1, 2, 3):
        assert len(re.findall(rf"^\[{position}/3\] {PAPER}/\w+ done in \d+ s: 1 reproduced$", output, re.M)) == 1
    for name in NAMES:
        assert re.search(rf"^{PAPER}/{name} +1 +0 +0 +0 +0 +\d+ +\d\d+ +no committed record$", output, re.M)
        record = json.loads(clone.first_figures[f"{name}.json"])
        assert (record["id"], record["scale"]) == (f"{PAPER}/{name}", "quick")
        assert clone.result(name).name == record["source"][:16]
        assert record["environment"]["threads"] == 1


def test_second_run_does_nothing(clone):
    before = clone.files("build", "figures", "notebooks", "src/common")
    output = clone.run("--scale", "quick")
    assert "all 3 notebooks are up to date" in output
    assert clone.files("build", "figures", "notebooks", "src/common") == before


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("notebooks/dong_quantifying/gamma.ipynb", '\\"a\\"', '\\"b\\"', {"gamma"}),
        ("notebooks/dong_quantifying/gamma.ipynb", "finish(", "finish( ", set()),
        ("notebooks/dong_quantifying/gamma.ipynb", "# A toy", "# Another toy", set()),
        ("notebooks/dong_quantifying/alpha.ipynb", "n: int = 3", "n: int = 4", {"alpha"}),
        ("src/common/toy_base.py", "VALUE = 1", "VALUE = 2", {"alpha", "beta"}),
        ("src/common/toy_user.py", "return VALUE", "return VALUE + 1", {"alpha"}),
        ("src/common/toy_user.py", "One", "Just one", set()),
        ("src/common/notebook/run.py", "indent=1", "indent=2", {"alpha"}),
        ("src/common/notebook/run.py", "One run of a notebook", "A run of a notebook", set()),
        ("src/common/paths.py", "chmod(0o644)", "chmod(0o640)", {"alpha", "beta", "gamma"}),
        ("src/common/paths.py", "Where things are", "Where all things are", set()),
        ("src/common/pipeline/gallery.py", '"""', '"""  ', set()),
    ],
)
def test_a_change_reruns_what_it_reaches(restored, file, old, new, expected):
    text = (restored.root / file).read_text()
    assert old in text
    (restored.root / file).write_text(text.replace(old, new, 1))
    before = restored.files("build", "figures")
    assert restored.would_run() == expected
    assert restored.files("build", "figures") == before


def test_touching_a_file_reruns_nothing(restored):
    for file in restored.files("notebooks", "src/common"):
        os.utime(restored.root / file)
    assert restored.would_run() == set()


def test_only_what_changed_runs_and_failures_stop_nothing(restored):
    clone, old = restored, restored.result("gamma")
    clone.replace(clone.notebook("gamma"), '\\"a\\"', '\\"b\\"')
    raising = "def f(C):\n    raise ValueError(f'C = {C}\\nis wrong')\nf(0)"
    write_notebook(clone.notebook("raises"), [PARAMETERS, raising])
    write_notebook(clone.notebook("full"), [PARAMETERS, "with open('/dev/full', 'w') as f:\n    f.write('x')"])
    write_notebook(clone.notebook("forgets"), [PARAMETERS, "n"])
    write_notebook(clone.notebook("dies"), [PARAMETERS, "import os\nos._exit(9)"])
    write_notebook(clone.notebook("typo"), [PARAMETERS, "print(n"])
    for name, content in {"damaged": b"{", "foreign": b"\xff", "empty": b"", "other": b"[]"}.items():
        clone.notebook(name).write_bytes(content)
    clone.notebook("folder").mkdir()
    output = clone.run("--scale", "quick", code=1)
    assert clone.ran(output) == {"gamma", "raises", "full", "forgets", "dies"}
    assert re.search(rf"{PAPER}/gamma done", output)
    assert "verdicts" not in output

    failures = re.findall(rf"^FAILED {PAPER}/(\w+): (.*)$", output, re.M)
    assert output.splitlines()[-len(failures) :] == [f"FAILED {PAPER}/{name}: {text}" for name, text in failures]
    failures = dict(failures)
    nothing = {"damaged", "foreign", "empty", "other"}
    assert failures.keys() == {"raises", "full", "forgets", "dies", "typo", "folder", *nothing}
    assert failures["raises"].startswith("ValueError: C = 0 (log: build/quick/")
    assert "no space left on the disk" in failures["full"]
    assert "without a record" in failures["forgets"]
    assert "the kernel died" in failures["dies"]
    assert failures["typo"].startswith("SyntaxError")
    assert "Is a directory" in failures["folder"]
    assert [n for n in nothing if not failures[n].startswith(f"{PAPER}/{n}.ipynb is no notebook: ")] == []
    log = clone.root / re.search(r"\(log: (.*)\)", failures["raises"])[1]
    assert "in f(C)" in log.read_text()
    executed = nbformat.read(log.with_suffix(".executed.ipynb"), 4)
    assert any(output.output_type == "error" for cell in executed.cells[1:] for output in cell.get("outputs", []))

    assert "gamma_a.png" not in clone.figures()
    assert clone.figures()["gamma_b.png"]
    assert clone.result("gamma") != old
    assert {n: c for n, c in clone.figures().items() if "gamma" not in n} == {
        n: c for n, c in clone.first_figures.items() if "gamma" not in n
    }


def test_one_failing_notebook_by_itself(clone, tmp_path):
    """What Snakemake calls: exactly one line on the standard error."""
    command = [sys.executable, "-m", "common.pipeline.execute", f"{PAPER}/nowhere", "--scale=quick", "--out", tmp_path]
    environment = clone.environment | {"PYTHONPATH": str(clone.root / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{PAPER}/nowhere failed: there is no notebook notebooks/{PAPER}/nowhere.ipynb\n"


def test_wrong_parameters_are_named_and_the_rest_runs(restored):
    clone, before = restored, restored.files("build/quick", "figures/quick")
    laptop = clone.root / "scales" / "laptop.yaml"
    parameters = {"alpha": "{nn: 4}", "beta": "{n: many}", "gamma": "{n: 5, noise: 1}", "delta": "{n: 1}"}
    laptop.write_text("".join(f"{PAPER}/{name}: {values}\n" for name, values in parameters.items()))
    output = clone.run(code=1)  # laptop is the default
    assert clone.ran(output) == {"gamma"}
    assert f"FAILED {PAPER}/alpha: alpha has no parameter 'nn'; it has n: int, noise: float" in output
    assert f"FAILED {PAPER}/beta: parameter n must be int, got 'many' (str)" in output
    assert f"FAILED {PAPER}/delta: there is no notebook notebooks/{PAPER}/delta.ipynb" in output
    record = json.loads(clone.figures("laptop")["gamma.json"])
    assert record["scale"] == "laptop"
    assert record["parameters"] == {"n": 5, "noise": 1.0}
    assert "gamma" in (clone.root / "figures" / "README.md").read_text()
    assert clone.files("build/quick", "figures/quick") == before

    for text, reason in {
        f"{PAPER}/alpha: 5": "must map parameters to values, got 5",
        "- alpha": "must map notebooks to their parameters",
        "a: [": "is not valid YAML",
        "a: \udcff": "is not valid YAML",
    }.items():
        laptop.write_bytes(text.encode(errors="surrogateescape"))
        output = clone.run(code=2)
        assert re.fullmatch(rf"run_all\.sh: scales/laptop\.yaml.*{re.escape(reason)}.*\n", output)


def test_records_are_held_against_the_committed_ones(clone):
    file = clone.root / "figures" / "quick" / PAPER / "beta.json"
    record = json.loads(file.read_text())
    true = record["numbers"]["x"][0]
    record["numbers"]["x"][0] = true * 1.001
    file.write_text(json.dumps(record))
    clone.git("init")
    clone.git("add", "figures/quick")
    clone.git("commit", "-m", "Records")
    record["numbers"]["x"][0] = true * 2
    file.write_text(json.dumps(record))  # not committed: not what is asked
    output = clone.run("--scale", "quick")
    assert re.search(rf"^{PAPER}/beta .* same verdicts; numbers within 0\.001$", output, re.M)
    assert re.search(rf"^{PAPER}/alpha .* identical$", output, re.M)
    assert clone.figures()["beta.json"] == clone.first_figures["beta.json"]
    shutil.rmtree(clone.root / ".git")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid):
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def marked(mark):
    """The processes that have this word in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes() and alive(process.name):
                found.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
    return found


@needs_proc
def test_nothing_outlives_a_killed_command(bare, tmp_path):
    """The tests and a refresh, each with a kernel at work; of what run_all.sh runs, see the next test."""
    write_notebook(bare.notebook("alpha"), TOY)
    for folder in ("tests", "notebooks"):
        (bare.root / folder).mkdir(exist_ok=True)
        shutil.copy(ROOT / folder / "conftest.py", bare.root / folder)
    refresh = [sys.executable, "-m", "common.pipeline.refresh", "alpha"]
    commands = [["bash", bare.root / "run_all.sh", "test", "notebooks"], refresh]
    processes = []
    for number, command in enumerate(commands):
        variables = {"TOY_WAIT": "start", "TOY_PID": str(tmp_path / str(number)), "TOY_MARK": str(tmp_path)}
        environment = bare.environment | variables | {"PYTHONPATH": str(bare.root / "src")}
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        processes.append(subprocess.Popen(command, cwd=bare.root, env=environment, **quiet))
    try:
        wait_for(lambda: all((tmp_path / str(number)).exists() for number in range(len(commands))))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    wait_for(lambda: not marked(str(tmp_path)), 15)


@needs_proc
def test_killed_at_any_moment_it_goes_on(clone, tmp_path):
    shutil.rmtree(clone.root / "build" / "quick" / PAPER / "alpha")
    shutil.rmtree(clone.root / "figures")
    for where, victim in [
        ("middle", "front door"), ("start", "snakemake"), ("start", "execute"), ("start", "kernel"),
        ("start", "Ctrl-C"),
    ]:  # fmt: skip
        pid = tmp_path / f"{where} {victim}"
        arguments = ("--scale", "quick", "--only", "alpha")
        process = clone.start(*arguments, before=["nohup"], TOY_WAIT=where, TOY_PID=str(pid))
        try:
            wait_for(lambda pid=pid: pid.exists() and pid.read_text())
            front_door, kernel = process.pid, int(pid.read_text())
            (snakemake,) = children(front_door)
            (execute,) = children(snakemake)
            assert kernel in children(execute)
            os.killpg(front_door, signal.SIGHUP)
            if victim == "Ctrl-C":
                os.killpg(front_door, signal.SIGINT)
            else:
                processes = {"front door": front_door, "snakemake": snakemake, "execute": execute, "kernel": kernel}
                os.kill(processes[victim], signal.SIGKILL)
            output = finish(process, 30)
            wait_for(lambda pids=(snakemake, execute, kernel): not any(map(alive, pids)), 20)
        finally:
            process.kill()

        expected = {"front door": -signal.SIGKILL, "Ctrl-C": 130}.get(victim, 1)
        assert process.returncode == expected, output
        if victim == "kernel":
            assert f"FAILED {PAPER}/alpha: the kernel died: killed, or out of memory (log: build/" in output
        if victim in ("snakemake", "execute"):
            assert f"FAILED {PAPER}/alpha: it was killed (log: build/" in output
        if victim == "Ctrl-C":
            assert "interrupted with 1 of 1 notebooks to go" in output
        assert not list(clone.root.rglob("alpha/*/alpha.json"))
        assert not list(clone.root.rglob("alpha/*/timing.json"))
        assert not (clone.root / "figures").exists()
        if where == "middle":
            assert (clone.result("alpha") / "alpha_a.png").read_bytes() == clone.first_figures["alpha_a.png"]

    output = clone.run("--scale", "quick", "--jobs", "1", **personal_settings(tmp_path / "mine"))
    assert clone.ran(output) == {"alpha"}
    # Bit for bit what it was when it ran beside another, and for somebody who has set up nothing.
    assert {n: c for n, c in clone.figures().items() if "alpha" in n} == {
        n: c for n, c in clone.first_figures.items() if "alpha" in n
    }
    assert "FAILED" not in output
    assert not [file for file in clone.files("build", "figures") if file.name.startswith(".")]


def test_what_follows_the_dashes_goes_to_snakemake(clone):
    before = clone.figures()
    output = clone.run("--scale", "quick", "--only", "*/bet?", "--", "--forceall")
    assert clone.ran(output) == {"beta"}
    assert "[1/1]" in output
    assert clone.figures() == before
    output = clone.run("--scale", "quick", "--", "--no-such-option", code=1)
    assert re.search(r"^FAILED Snakemake: .*--no-such-option.* \(log: build/quick/snakemake\.log\)$", output, re.M)


def test_two_at_once_wait_for_each_other(clone):
    import filelock

    with filelock.FileLock(clone.root / "build" / "lock"):
        process = clone.start("--scale", "quick", "--only", "gamma")
        line = process.stdout.readline()
    assert "another one is at work in this clone; waiting" in line
    finish(process)
    assert process.returncode == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_named_and_loses_nothing(clone):
    figures = clone.root / "figures"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(figures)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        filler = figures / "filler"
        filler.write_bytes(bytes(4 * 2**20 - 16384))
        output = clone.run("--scale", "quick", code=1)
        assert re.search(r"^run_all\.sh: no space left on the disk \(.*\)$", output, re.M)
        assert not [f for f in clone.figures() if f.endswith(".json")]
        filler.unlink()
        assert "up to date" in clone.run("--scale", "quick")
        assert {"alpha.json", "beta.json", "gamma.json"} <= clone.figures().keys()
    finally:
        subprocess.run(["umount", "-l", str(figures)], check=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A clone in which nothing ever runs."""
    clone = Clone(tmp_path_factory.mktemp("bare") / "clone")
    write_notebook(clone.notebook("alpha"), [PARAMETERS])
    return clone


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sclae", "quick"], "unknown option '--sclae'; see ./run_all.sh --help"),
        (["tests"], "unknown option 'tests'; see ./run_all.sh --help"),
        (["--scale", "huge"], "unknown scale 'huge'; there are quick, laptop and paper"),
        (["--scale"], "--scale needs a value; see ./run_all.sh --help"),
        (["--jobs", "0"], "--jobs must be a whole number from 1 up, got '0'"),
        (["--jobs", "two"], "--jobs must be a whole number from 1 up, got 'two'"),
        (["--only", ""], "--only needs a value; see ./run_all.sh --help"),
        (["--only", "fig99"], "no notebook matches 'fig99'"),
        (["--only", "fig99", "--dry-run"], "no notebook matches 'fig99'"),
    ],
)
def test_wrong_options_are_one_line(bare, arguments, line):
    assert bare.run(*arguments, code=2) == f"run_all.sh: {line}\n"
    assert not (bare.root / "figures").exists()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@functools.cache
def help_of(*script):
    command, environment = [sys.executable, *script, "--help"], {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.check_output(command, cwd=ROOT, text=True, env=environment)


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_every_command_of_the_readme(clone, command):
    """Front-door commands run on the toys at the quick scale; of what runs long or elsewhere, that it is there."""
    program, *arguments = command
    if program == "./run_all.sh":
        if arguments[:1] == ["test"]:
            assert re.search("test +ruff", clone.run("--help"))  # run by test_the_tests_end_with_what_failed
            return
        if "slurm" in arguments:
            assert arguments[arguments.index("--") + 1 :] == [*SLURM]  # run by test_slurm.py
            return
        arguments = ["alpha" if a == "fig08" else a for a in arguments]
        output = clone.run(*([] if "--scale" in arguments else ["--scale", "quick"]), *arguments)
        assert f"{PAPER}/alpha" in output
        assert "FAILED" not in output
    elif program == "conda":
        assert (ROOT / command[command.index("-f") + 1]).exists()  # held to the lock in test_environment.py
    elif command[:3] == [".venv/bin/jupyter", "lab", "notebooks"]:
        assert (ROOT / "notebooks").is_dir()  # opened in a browser in test_jupyterlab.py
    else:
        if program == "env":
            assert arguments[0] == "PYTHONPATH=src"
            program, *arguments = arguments[1:]
        assert program in ("python", ".venv/bin/python")
        script = arguments[:2] if arguments[0] == "-m" else arguments[:1]  # run in tests of its own, or long
        options = [a for a in arguments[len(script) :] if a.startswith("--")]
        assert [option for option in options if option not in help_of(*script)] == []


def test_help_names_every_option(bare):
    output = bare.run("--help", HESSIAN_PYTHON="nowhere")
    for word in ("--scale", "--only", "--jobs", "--dry-run", "test", "HESSIAN_PYTHON", "HESSIAN_DATA", "--executor"):
        assert word in output


def test_an_old_python_is_one_line(bare, tmp_path):
    """As on a machine that has no other: only the stub and what every system has are found."""
    stub = tmp_path / "python3"
    stub.write_text("#!/bin/sh\necho 3.9\n")
    stub.chmod(0o755)
    for tool in ("bash", "dirname", "cat", "cmp", "mkdir", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    output = bare.run(code=2, HESSIAN_PYTHON="", PATH=str(tmp_path))
    assert output.startswith("run_all.sh: Python 3.11, 3.12 or 3.13 is needed; found python3, which is 3.9;")
    assert len(output.splitlines()) == 1
    assert not (bare.root / ".venv").exists()
    for arguments in ([], ["test"]):
        output = bare.run(*arguments, code=2, HESSIAN_PYTHON=str(stub))
        assert output == "run_all.sh: Python 3.11, 3.12 or 3.13 is needed; HESSIAN_PYTHON is 3.9\n"


def test_without_a_network_the_environment_fails_in_one_line_and_is_not_taken_for_whole(bare):
    (bare.root / "requirements.lock").write_text("numpy==2.0.0\n")
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    output = bare.run(code=1, HESSIAN_PYTHON="", PYTHON=sys.executable, **offline)
    announced, line = output.splitlines()
    assert announced.startswith("Making the environment .venv")
    assert line.startswith("run_all.sh: the environment could not be made: ")
    assert re.search(r"numpy.* \(log: build/environment\.log\)$", line)
    assert (bare.root / ".venv" / "unfinished").exists()
    assert not (bare.root / ".venv" / "requirements.lock").exists()


#: Writes a record that says 2.0 ± 0.1.
DRIFTED = """
import json, os
from pathlib import Path
out = Path(os.environ["HESSIAN_OUT"])
out.mkdir(parents=True, exist_ok=True)
claim = {"id": "slope", "measured": 2.0, "interval": [1.9, 2.1], "verdict": "reproduced"}
(out / "drifted.json").write_text(json.dumps({"data": [], "claims": [claim]}))"""


def test_the_tests_end_with_what_failed(tmp_path):
    """A flaw for ruff; tests that pass and are skipped; notebooks that are honest, changed, on stand-in data, beside
    their quick record, or look where they run. Who runs them has set up everything otherwise."""
    clone = Clone(tmp_path / "a {clone} of 'ü'")
    write_notebook(clone.notebook("honest"), [PARAMETERS, "print(1)"], [None, "1\n"])
    write_notebook(clone.notebook("changed"), [PARAMETERS, "print(1)"], [None, "2\n"])
    announce = "print('STAND-IN DATA for MNIST: digits')"
    write_notebook(clone.notebook("replaced"), [PARAMETERS, announce, "print(1)"], [None, None, "2\n"])
    write_notebook(clone.notebook("drifted"), [PARAMETERS, DRIFTED], [None, None])
    where = "import os, random\nrandom.Random(0)"  # which the person has taken away
    where += "\nprint(os.environ.get('ATEN_CPU_CAPABILITY'), os.environ['OMP_NUM_THREADS'])"
    write_notebook(clone.notebook("looks"), [PARAMETERS, where], [None, "None 1\n"])
    write_notebook(clone.notebook("not_chosen"), [PARAMETERS, "1 / 0"])
    shutil.copy(ROOT / "notebooks" / "conftest.py", clone.root / "notebooks")
    quick = clone.root / "tests" / "quick" / PAPER / "drifted.json"
    quick.parent.mkdir(parents=True)
    claim = {"measured": 2.05, "interval": [1.95, 2.15], "verdict": "reproduced"}
    quick.write_text(json.dumps({"data": {}, "claims": {"slope": claim}}))
    (clone.root / "tests" / "test_toy.py").write_text(
        "import os\n\nimport pytest\n\n\ndef test_passes():\n    pass\n\n\n"
        "@pytest.mark.skip\ndef test_skipped():\n    pass\n\n\ndef test_deselected():\n    assert False\n"
    )
    mine = personal_settings(tmp_path / "mine")
    output = clone.run("test", "--", "-k", "not deselected and not not_chosen", code=1, **mine)
    *_, ruff, unit, notebooks, older, closing = output.splitlines()
    assert re.fullmatch(r"FAILED +ruff +Found \d+ errors?\..*", ruff)
    assert re.fullmatch(r"ok +unit tests +1 passed, 1 skipped.* in .*", unit)
    assert re.fullmatch(r"FAILED +notebooks +2 failed, 10 passed.* in .*", notebooks)
    assert re.fullmatch(r"FAILED +older processor +3 failed, 9 passed.* in .*", older)
    assert re.fullmatch(r"5 failed, 20 passed, 1 skipped, \d+ error in \d+\.00s", closing)
    assert f"stand-in data for MNIST, output not compared: notebooks/{PAPER}/replaced.ipynb" in output
    assert "slope: measured 2, committed 2.05 ± 0.03" in output

    output = clone.run("test", "-n", "0", "tests", "-k", "nothing_has_this_name", code=1)
    assert re.search(r"^ok +unit tests +3 deselected in .*", output, re.M)
    assert "== notebooks" not in output


#: Stands for a Python: says where the data sets, the cache and the Python are meant to be.
STUB = """#!/bin/sh
case $2 in
    *version_info*) echo 3.11 ;;
    common.pipeline.workflow) echo "$HESSIAN_DATA,$HESSIAN_CACHE,$HESSIAN_PYTHON" ;;
    pytest) echo "pytest: $*" ;;
esac"""


def test_relative_paths_are_those_from_where_the_command_was_typed(bare, tmp_path):
    stub, here = tmp_path / "my python", str(tmp_path)
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "clone").symlink_to(bare.root)
    environment = bare.environment | {"CDPATH": str(bare.root.parent)}

    def told(data, cache, python):
        variables = {"HESSIAN_DATA": data, "HESSIAN_CACHE": cache, "HESSIAN_PYTHON": python}
        command = {"args": ["bash", "clone/run_all.sh"], "cwd": here, "env": environment | variables, "text": True}
        return subprocess.check_output(**command).strip().split(",")

    assert told("data", "../cache", "./my python") == [f"{here}/data", f"{here}/../cache", f"{here}/./my python"]
    assert told("/data", "~/cache", str(stub)) == ["/data", "~/cache", str(stub)]
    environment["PATH"] = f"{here}:{environment['PATH']}"
    assert told("", "", "my python") == ["", "", "my python"]


def test_a_python_that_lacks_something_is_named(bare, tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB.replace("esac", "    *find_spec*) echo torch, nbval; exit 1 ;;\nesac"))
    stub.chmod(0o755)
    assert bare.run(code=2, HESSIAN_PYTHON=str(stub)) == f"run_all.sh: {stub} lacks torch, nbval\n"


@pytest.mark.parametrize(
    ("arguments", "unit", "notebooks"),
    [
        (["-k", "fig04"], ["-k fig04"], ["-k fig04 notebooks"] * 2),
        (["-k", "tests", "-x"], ["-k tests -x"], ["-k tests -x notebooks"] * 2),
        (["./tests/data", "-k", "a b"], ["-k a b tests/data"], []),
        (["notebooks/li_adaptive", "tests"], ["tests"], ["notebooks/li_adaptive"] * 2),
        (["ROOT/notebooks/li_adaptive"], [], ["ROOT/notebooks/li_adaptive"] * 2),
    ],
)
def test_arguments_of_the_tests_limit_all_of_them(bare, tmp_path, arguments, unit, notebooks):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    output = bare.run("test", *(a.replace("ROOT", str(bare.root)) for a in arguments), HESSIAN_PYTHON=str(stub))
    called = [line.replace(str(bare.root), "ROOT") for line in output.splitlines() if line.startswith("pytest: ")]
    assert [re.search("(?:-n  --dist loadfile )(.*)", c)[1] for c in called if "nbval" not in c] == unit
    assert [re.search("(?:-n  --dist loadfile )(.*)", c)[1] for c in called if "nbval" in c] == notebooks


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_two_at_once_are_tested_one_after_the_other(bare, tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    lock = bare.root / "build" / "test" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = bare.start("test", "tests", HESSIAN_PYTHON=str(stub))
        line = process.stdout.readline()
    assert line == "run_all.sh: other tests are at work in this clone; waiting for them to end\n"
    assert "pytest: " in finish(process) and process.returncode == 0


@pytest.mark.parametrize(
    ("code", "text", "reason"),
    [
        (-15, "Building DAG of jobs...\n", "Snakemake was ended by SIGTERM"),
        (-9, "", "Snakemake was ended by SIGKILL"),
        (1, "Will exit after finishing currently running jobs (scheduler).\nSomething", "Snakemake was asked to end"),
        (1, "WorkflowError:\nNo such plugin.\n\n", "Snakemake says: No such plugin."),
        (1, "", "Snakemake says: nothing"),
    ],
)
def test_how_snakemake_ended_is_said_of_what_it_did_not_start(tmp_path, monkeypatch, code, text, reason):
    monkeypatch.setattr(workflow.paths, "BUILD", tmp_path)
    log = tmp_path / "snakemake.log"
    log.write_text(text)
    task = Task(f"{PAPER}/alpha", "quick", {}, "0" * 64, tmp_path / "alpha")
    line = workflow.why_incomplete(task, None, workflow.how_snakemake_ended(code, log), log)
    assert line == f"it was not started; {reason} (log: {log})"


def test_a_damaged_record_is_named(restored):
    file = restored.root / "figures" / "quick" / PAPER / "beta.json"
    file.write_text(f"<<<<<<< HEAD\n{file.read_text()}")
    output = restored.run("--scale", "quick", code=1)
    name = f"figures/quick/{PAPER}/beta.json"
    assert re.search(rf"^run_all\.sh: {name} is damaged: Expecting value: .*$", output, re.M)
    assert "Traceback" not in output


# The comparison of records


def record(**changes):
    claim = {"id": "slope", "verdict": "reproduced", "measured": 2.0, "interval": [1.0, 3.0]}
    return {"claims": [claim | changes.pop("claim", {})], "numbers": {"x": [1.0, 2.0], "word": "a"} | changes}


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (record(), "identical"),
        (record(x=[1.0, 2.002]), "same verdicts; numbers within 0.001"),
        (record(claim={"interval": [1.0, 4.0]}), "same verdicts; numbers within 0.2"),
        (record(x=[0.0, 2.0]), "same verdicts; numbers within 1"),
        (record(word="b"), "same verdicts; numbers within inf"),
        (record(x=[1.0]), "same verdicts; numbers within 0; 1 numbers in only one of the two"),
        (
            record(claim={"verdict": "untested"}),
            "verdicts differ: slope (reproduced -> untested); numbers within 0",
        ),
        (
            record(claim={"id": "other"}),
            "verdicts differ: slope (reproduced -> absent), other (absent -> reproduced); numbers within 0; "
            "6 numbers in only one of the two",
        ),
    ],
)
def test_comparison(new, expected):
    assert summary.compare(new, record()) == expected


def test_comparison_with_nothing():
    assert summary.compare(record(), None) == "no committed record"


@pytest.mark.parametrize(("stand_in", "there"), [(True, True), (True, False), (False, True)])
def test_a_result_on_stand_in_data_is_outlived_when_the_data_come(tmp_path, monkeypatch, stand_in, there):
    from common.data import images

    task = Task(f"{PAPER}/alpha", "quick", {}, "0" * 64, tmp_path)
    task.record.write_text(json.dumps({"data": [{"name": "MNIST", "stand_in": stand_in}]}))
    task.timing.write_text(json.dumps(vars(Cost(1.0, 1.0, 0.0, 100))))
    monkeypatch.setattr(images, "available", lambda name: there and name == "MNIST")
    assert workflow.outlived(task) is (stand_in and there)
