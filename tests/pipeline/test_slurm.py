"""The same notebooks on a cluster: a SLURM of one node, started here from Debian's packages slurm-wlm and munge."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from toys import PAPER, SLURM, Clone

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")

#: One node that has what is asked for: no accounting, no limits by control groups.
CONFIGURATION = """
ClusterName=toys
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000 State=UNKNOWN
PartitionName=toys Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


#: Where jobs look for it, whatever the environment says.
INSTALLED = Path("/etc/slurm/slurm.conf")


@pytest.fixture
def slurm():
    """A cluster of one node, to which SLURM's commands speak while the test runs."""
    missing = [program for program in PROGRAMS if not find(program)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start SLURM's daemons for itself")
    if INSTALLED.exists():
        pytest.skip(f"this machine belongs to a cluster: there is {INSTALLED}")
    with contextlib.ExitStack() as stack:
        # Not pytest's own folder: the name of a socket must be short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host, key = socket.gethostname().partition(".")[0], folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, folder=folder, controller=free_port(), daemon=free_port())
        )
        INSTALLED.unlink(missing_ok=True)  # a link to nothing, of a test that was killed
        INSTALLED.symlink_to(folder / "slurm.conf")
        stack.callback(INSTALLED.unlink)
        files = {"key": key, "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={folder / file}" for name, file in files.items()]
        for program, *arguments in (
            ["munged", "--foreground", "--force", *options],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", host],
        ):
            stack.enter_context(running([find(program), *arguments], folder / f"{program}.out"))
        wait_for_idle(folder)
        stack.callback(subprocess.run, ["scancel", "--full", "--user=root"], timeout=20, check=False)
        yield


def find(program):
    """Where a program lies, among those that are meant for root too."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


@contextlib.contextmanager
def running(command, log):
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_idle(folder, seconds=20):
    end = time.monotonic() + seconds
    while True:
        done = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, check=False)
        if done.stdout.strip() == "idle":
            return
        if time.monotonic() > end:
            logs = [file.read_text(errors="replace")[-1500:] for file in (*folder.glob("*.log"), *folder.glob("*.out"))]
            pytest.fail("\n".join(["SLURM did not start", done.stdout, done.stderr, *logs]))
        time.sleep(0.2)


def test_a_cluster_runs_the_notebooks(slurm, tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    clone = Clone(tmp_path / "clone")
    clone.add_toys()
    output = clone.run(
        "--scale", "quick", "--only", "eta", "--", *SLURM,
        "--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
    )  # fmt: skip
    assert clone.ran(output) == {"beta"}
    assert f"[1/1] {PAPER}/beta done" in output
    log = (clone.root / "build" / "quick" / "snakemake.log").read_text()
    assert "SLURM jobid" in log
