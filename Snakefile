"""Notebook x scale -> result. Called by run_all.sh; by hand: snakemake --cores 2 --config scale=quick

No rule has an input: the name of an output holds the hash of all that it depends on (see common.pipeline.execute), so an
output that exists is up to date, in a fresh clone and on a cluster's nodes too.
"""

import os
import sys
from pathlib import Path

SOURCE = str(Path(workflow.basedir) / "src")
sys.path.insert(0, SOURCE)
from common.pipeline.execute import THREADS, plan, shown, stop_with_parent

if os.environ.get("HESSIAN_TETHERED"):
    stop_with_parent()

TASKS, BROKEN = plan(config.get("scale", "laptop"))
for ident, reason in BROKEN.items():
    print(f"{ident} left out: {reason}", file=sys.stderr)


rule all:
    input:
        [shown(task.timing) for task in TASKS],


for position, task in enumerate(TASKS):

    rule:
        name:
            task.ident.replace("/", "__")
        output:
            record=shown(task.record),
            timing=shown(task.timing),
        log:
            shown(task.executed),
        params:
            source=SOURCE,
            python=sys.executable,
            ident=task.ident,
            scale=task.scale,
            folder=shown(task.folder),
        threads: THREADS
        priority: len(TASKS) - position
        shell:
            "exec env PYTHONPATH={params.source:q} {params.python:q}"
            " -m common.pipeline.execute {params.ident} --scale {params.scale} --out {params.folder:q}"
