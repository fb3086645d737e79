"""Variables of the environment that make this machine compute as an older one, for tests that must pass on any.

``python -m common.pipeline.older_processor`` prints them, ready for ``env``. With ``--probe`` it says on the standard
error which of them the libraries that are installed here heed: those that change a bit of a product, sum, exponential
or eigenvalue.
"""

import os
import subprocess
import sys

import numpy._core._multiarray_umath as numpy_core

#: By what each is for. What a library does not heed does no harm; MKL heeds its first on Intel's processors only.
VARIABLES = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own loops
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # convolutions
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",  # products and eigenvalues of torch
    "MKL_CBWR": "COMPATIBLE",  # the same
    "OPENBLAS_CORETYPE": "Nehalem",  # products and eigenvalues of NumPy and SciPy
    "NPY_DISABLE_CPU_FEATURES": ",".join(  # NumPy's own loops; it objects to what it would not use anyway
        f for f in ("AVX2", "AVX512F") if f in numpy_core.__cpu_dispatch__ and numpy_core.__cpu_features__.get(f)
    ),
}

_PROBE = """
import hashlib, numpy as np, torch
x = torch.linspace(-1, 1, 90_000, dtype=torch.float64).reshape(300, 300).cos() * 3
image = x.float().reshape(1, 10, 90, 100)
convolved = torch.conv2d(image, image[:, :, :3, :3].expand(16, -1, -1, -1))
n = x.numpy()
results = [x @ x, x.float() @ x.float(), x.exp(), x.float().sum(0), torch.linalg.eigvalsh(x @ x.T), convolved]
results += [n @ n, np.linalg.eigvalsh(n @ n.T), np.exp(n), n.astype("f").sum(1)]
print(hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest())
"""


def heeded() -> list[str]:
    """Names of the variables that change a result, each set alone.

    Raises
    ------
    RuntimeError
        If one of them lets nothing be computed at all.
    """
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "1"}
    environments = [plain, *(plain | {name: value} for name, value in VARIABLES.items())]
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    probes = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE, text=True) for e in environments]
    usual, *bits = [probe.communicate()[0] for probe in probes]
    if failed := [name for name, probe in zip(["none", *VARIABLES], probes, strict=True) if probe.returncode]:
        raise RuntimeError(f"nothing can be computed with {', '.join(failed)} of the variables set")
    return [name for name, found in zip(VARIABLES, bits, strict=True) if found != usual]


def main() -> None:
    """Print the assignments, a line each, and with ``--probe`` what is heeded."""
    if "--probe" in sys.argv[1:]:
        names = heeded()
        others = [name for name in VARIABLES if name not in names]
        print(f"Heeded here: {', '.join(names) or 'nothing'}; not: {', '.join(others) or 'nothing'}", file=sys.stderr)
    for name, value in VARIABLES.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
