"""JupyterLab in a real browser: a notebook is opened, run whole, changed and run again, as a reader would do it."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from common import paths

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")

PAPER, NOTEBOOK, CHANGED = "dong_quantifying", "fig08_scaling_linear", "realizations"

#: JupyterLab as it comes, but for what would ask, fetch, save by itself, or take cells out of sight off the page.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

#: What `jupyter lab` runs; but it ends in good order, kernels and all, once nobody holds the other end of its standard
#: input, so that it outlives no test, however that ended.
SERVER = """
import os, signal, threading
from jupyterlab.labapp import main

def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=watch, daemon=True).start()
main()
"""

#: Milliseconds to wait for anything at all: a busy machine is slow, not wrong.
PATIENCE = 120_000

#: How JupyterLab marks what came over stderr, and tracebacks; older ones tell these from those.
WRONG = ".jp-Notebook :is([data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type$='.jupyter.error'])"

#: Where a page that disappointed is photographed.
SCREENSHOT = paths.BUILD / "test" / "jupyterlab.png"


def runs(browser):
    """Whether it is more than the stub that tells how to install it."""
    return subprocess.run([browser, "--version"], capture_output=True, timeout=60).returncode == 0


@pytest.fixture
def page():
    """A page of a headless browser, one whose contents reach no further than this machine."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path and runs(path)), None)
    with playwright.sync_playwright() as p:
        browser = browser or p.chromium.executable_path
        if not os.path.exists(browser):
            pytest.skip("no browser: install chromium, or run `python -m playwright install chromium`")
        with p.chromium.launch(executable_path=browser, args=SWITCHES, timeout=PATIENCE) as chromium:
            page = chromium.new_page(viewport={"width": 1500, "height": 1100})
            page.set_default_timeout(PATIENCE)
            playwright.expect.set_options(timeout=PATIENCE)
            page.route(re.compile(r"^https?://(?!127\.0\.0\.1:)"), lambda route: route.abort())
            yield page


@pytest.fixture
def repository(tmp_path):
    """A copy of what a notebook needs, the notebooks without outputs: what shows was computed here."""
    root = tmp_path / "repository"
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("notebooks", "src/common", "scales"):
        shutil.copytree(paths.ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(paths.ROOT / "requirements.lock", root)
    committed = Path("figures", "laptop", PAPER, f"{NOTEBOOK}.json")
    (root / committed).parent.mkdir(parents=True)
    shutil.copy(paths.ROOT / committed, root / committed)
    for file in root.glob("notebooks/*/*.ipynb"):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, file)
    return root


@pytest.fixture
def lab(repository, tmp_path):
    """The address of a JupyterLab that serves that copy, with this Python as its kernel."""
    own = {name: tmp_path / name.lower() for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    for name, content in SETTINGS.items():
        file = own["JUPYTER_CONFIG_DIR"] / "lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    foreign = ("JUPYTER", "IPYTHON", "HESSIAN_SCALE", "HESSIAN_OUT", "MPLBACKEND")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= {name: str(folder) for name, folder in own.items()}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(repository / "src")}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]  # should it be taken meanwhile, the server tries others
    command = [
        sys.executable, "-c", SERVER, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        f"--ServerApp.root_dir={repository}", "--IdentityProvider.token=", "--ServerApp.password=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    log = tmp_path / "jupyterlab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=repository, env=env, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield address(server, own["JUPYTER_RUNTIME_DIR"], log)
    finally:
        print(log.read_text())  # pytest shows it if the test fails
        server.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def address(server, runtime, log):
    """What the server itself says it listens on, once it does."""
    deadline = time.monotonic() + PATIENCE / 1000
    file = runtime / f"jpserver-{server.pid}.json"
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return f"http://127.0.0.1:{json.loads(file.read_text())['port']}"
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()}")


def open_notebook(page, *path):
    """Double-click through the file browser down to a file."""
    for name in path:
        page.locator(".jp-DirListing-item").filter(has=page.get_by_text(name, exact=True)).dblclick()
    playwright.expect(page.locator(".jp-NotebookPanel .jp-CodeCell").last).to_be_attached()
    wait_for_kernel(page)


def wait_for_kernel(page):
    """Wait until there is one with nothing to do, nor anything left to tell."""
    status = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"^Python 3\b.* \| Idle$"))
    playwright.expect(status).to_be_visible()


def run_all(page, cells, before):
    """Run > Run All Cells, after ``before`` executions; wait for the end, or until something goes wrong.

    Returns
    -------
    tuple
        The figure's bytes and the table of claims as rows of texts.
    """
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(
        """([cells, before, wrong]) => {
            const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.textContent);
            if (document.querySelector(`.jp-Dialog, ${wrong}`)) return true;
            return prompts.length === cells && prompts.every((p, i) => p === `[${before + i + 1}]:`);
        }""",
        arg=[cells, before, WRONG],
    )
    assert page.locator(".jp-Dialog").all_inner_texts() == []
    wait_for_kernel(page)
    assert page.locator(WRONG).all_inner_texts() == []

    shown = page.locator(".jp-Notebook .jp-OutputArea-output")
    figure = shown.locator("img")
    playwright.expect(figure).to_have_count(1)
    figure.scroll_into_view_if_needed()
    playwright.expect(figure).to_be_visible()
    assert figure.evaluate("async img => { await img.decode(); return img.naturalWidth }") > 500
    kind, _, content = figure.get_attribute("src").partition(",")
    assert kind == "data:image/png;base64"

    table = shown.locator("table").filter(has=page.get_by_role("columnheader", name="verdict, laptop"))
    playwright.expect(table).to_have_count(1)
    table.scroll_into_view_if_needed()
    playwright.expect(table).to_be_visible()
    rows = table.locator("tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    return base64.b64decode(content), rows


def change(page, name, old, new):
    """Select the value of a parameter by a double click, and type over it."""
    line = page.locator(".jp-Notebook .jp-CodeCell").first.locator(".cm-line").filter(has_text=f"{name}: int = ")
    line.get_by_text(str(old), exact=True).dblclick()
    page.keyboard.type(str(new))
    playwright.expect(line).to_contain_text(f"{name}: int = {new} ")


def test_a_reader_opens_runs_and_changes_a_notebook(page, lab, repository):
    original = repository / "notebooks" / PAPER / f"{NOTEBOOK}.ipynb"
    cells = sum(cell.cell_type == "code" for cell in nbformat.read(original, as_version=4).cells)
    written = repository / "build" / "interactive" / PAPER
    try:
        page.goto(f"{lab}/lab")
        open_notebook(page, "notebooks", PAPER, original.name)

        figure, claims = run_all(page, cells, before=0)
        record = json.loads((written / f"{NOTEBOOK}.json").read_text())
        assert record["scale"] == "quick"
        assert figure == (written / record["figures"][0]).read_bytes()
        assert claims[0][-2:] == ["verdict, quick", "verdict, laptop"]
        assert [row[0] for row in claims[1:]] == [claim["id"] for claim in record["claims"]]
        assert [row[-2] for row in claims[1:]] == [claim["verdict"] for claim in record["claims"]]

        change(page, CHANGED, record["parameters"][CHANGED], 20)
        changed_figure, changed_claims = run_all(page, cells, before=cells)
        changed_record = json.loads((written / f"{NOTEBOOK}.json").read_text())
        assert changed_record["scale"] == "custom"
        assert changed_record["parameters"] == record["parameters"] | {CHANGED: 20}
        assert changed_figure == (written / record["figures"][0]).read_bytes() != figure
        assert changed_claims[0][-2:] == ["verdict, custom", "verdict, laptop"]
        assert [row[-2] for row in changed_claims[1:]] == [claim["verdict"] for claim in changed_record["claims"]]
    except BaseException:
        with contextlib.suppress(playwright.Error):
            SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOT)
        raise
