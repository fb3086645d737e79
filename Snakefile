"""Notebook x scale -> result. Called by run_all.sh; by hand: snakemake --cores 2 --config scale=quick

No notebook has an input but the pieces that it needs, trainings say, where run_all.sh has found that they are missing:
the name of an output holds the hash of all that it depends on (see common.pipeline.execute), so an output that exists
is up to date, in a fresh clone and on a cluster's nodes too.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "src"))
from common import paths
from common.pipeline.execute import (
    THREADS,
    committed_costs,
    needed_mb,
    needed_minutes,
    plan,
    shown,
)
from common.pipeline.isolation import isolate, tether
from common.pipeline.workflow import marker_of

tether()
isolate()

SCALE = config.get("scale", "laptop")
TASKS, BROKEN = plan(SCALE)
for ident, reason in BROKEN.items():
    print(f"{ident} left out: {reason}", file=sys.stderr)
COSTS = committed_costs()
GPU = {"gpu": 1} if SCALE == "paper" else {}
LISTED = paths.BUILD / SCALE / "pieces.json"
PIECES = json.loads(LISTED.read_text()) if LISTED.exists() else {}


rule all:
    input:
        [shown(task.timing) for task in TASKS],


planned = set()
for position, task in enumerate(TASKS):
    for piece in PIECES.get(task.ident, []):
        if piece in planned:
            continue
        planned.add(piece)

        rule:
            name:
                "piece__" + piece.replace("/", "__").replace(".", "_")
            output:
                touch(shown(marker_of(SCALE, piece))),
            log:
                shown(marker_of(SCALE, piece)) + ".log",
            params:
                python=lambda _: sys.executable,  # as a plain value it could hold no braces
                ident=task.ident,
                scale=SCALE,
                piece=piece,
            threads: THREADS
            resources:
                mem_mb=needed_mb(task, COSTS),
                runtime=needed_minutes(task, COSTS),
                **GPU,
            priority: 1000 - position
            shell:
                "exec env HESSIAN_TETHERED=$PPID OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
                " OPENBLAS_NUM_THREADS={threads} {params.python:q} -m common.pipeline.prepare {params.ident}"
                " --scale {params.scale} --piece {params.piece:q} > {log:q} 2>&1"

    rule:
        name:
            task.ident.replace("/", "__")
        input:
            ancient([shown(marker_of(SCALE, piece)) for piece in PIECES.get(task.ident, [])]),
        output:
            record=shown(task.record),
            timing=shown(task.timing),
        log:
            shown(task.executed),
        params:
            python=lambda _: sys.executable,
            ident=task.ident,
            scale=task.scale,
            folder=shown(task.folder),
        threads: THREADS
        resources:
            mem_mb=needed_mb(task, COSTS),
            runtime=needed_minutes(task, COSTS),
            **GPU,
        priority: len(TASKS) - position
        shell:
            "exec env HESSIAN_TETHERED=$PPID {params.python:q}"
            " -m common.pipeline.execute {params.ident} --scale {params.scale} --out {params.folder:q}"
