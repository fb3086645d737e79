"""For all tests: what the annotations of `common` say of types and shapes is checked at every call."""

import contextlib
import os
import subprocess

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# An int is taken where a float is asked for, as the language itself has it (PEP 484).
install_import_hook("common", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from common.pipeline.isolation import isolate, tether  # noqa: E402

tether()
isolate()


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws from torch's generator is the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """What annotations refuse where they are checked, as in tests, functions refuse by hand elsewhere."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def read_only():
    """A function that lets nobody write to a folder, not even root, as long as the test runs."""
    with contextlib.ExitStack() as stack:

        def close(folder):
            if os.geteuid() != 0:
                folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
                for path in folders:
                    stack.callback(path.chmod, path.stat().st_mode)
                    path.chmod(0o555)
                return
            for options in (["--bind"], ["-o", "remount,bind,ro"]):
                done = subprocess.run(["mount", *options, folder, folder], capture_output=True, check=False)
                if done.returncode:
                    pytest.skip("a read-only folder cannot be mounted here")
                if options == ["--bind"]:
                    stack.callback(subprocess.run, ["umount", "-l", folder], check=True)

        yield close
