#!/usr/bin/env bash
# The front door: ./run_all.sh regenerates every figure, ./run_all.sh test runs every test; --help says more.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# A relative path is one from where the command was typed; what has no slash in it may be a program on the PATH.
for name in HESSIAN_DATA HESSIAN_CACHE HESSIAN_PYTHON PYTHON; do
    value=${!name:-}
    if [[ -z $value || $value == [/~]* || ($name == *PYTHON && $value != */*) ]]; then continue; fi
    export "$name=$PWD/$value"
done
cd -- "$root"
# A person's own settings of Python could change what is computed.
for name in "${!PYTHON@}"; do
    [[ $name == PYTHON ]] || unset "$name"
done
export PYTHONPATH=$root/src PYTHONNOUSERSITE=1 PYTHONUTF8=1

usage() {
    cat <<'HELP'
Usage: ./run_all.sh [--scale quick|laptop|paper] [--only PATTERN] [--jobs N] [--dry-run] [-- SNAKEMAKE ARGUMENTS]
       ./run_all.sh test [PYTEST ARGUMENTS]

Runs every notebook whose result is missing or out of date, brings figures and records to figures/<scale>/, and ends
with a table: the verdict on every claim, seconds, memory, and how the records compare with the committed ones.

  --scale S      quick: all of it in minutes; laptop (default): the papers' sizes as far as two cores can;
                 paper: the papers' networks and data, for days on two cores or a GPU
  --only P       only notebooks whose <paper>/<notebook> contains P or matches it as a glob pattern
  --jobs N       notebooks at once (default: one per core)
  --dry-run      say what would run, and change nothing
  -- ARGUMENTS   go to Snakemake unchanged, such as: -- --executor slurm
  test           ruff, the unit tests, and every notebook at the quick scale, twice: as this processor computes, and as an
                 older one would; some with two threads too. PYTEST ARGUMENTS, such as -k fig04, choose among tests and
                 notebooks; paths, such as tests/data or notebooks/wu_dissecting, leave out all else

It can be interrupted at any moment; the same command then goes on where it was.

Environment: an active conda environment made from environment.yml is used as it is; otherwise .venv is made here with
the versions of requirements.lock, by pip as it is configured for you. On Linux, torch comes with CUDA (gigabytes) unless
pip is pointed to an index that has a build without it, for instance by PIP_EXTRA_INDEX_URL.
  PYTHON           the Python (3.11, 3.12 or 3.13) to make .venv with
  HESSIAN_PYTHON   use this Python, with all that it has installed, as it is
  HESSIAN_DATA     folder of the data sets (default: data)
  HESSIAN_CACHE    folder of trained networks (default: build/cache)
Relative paths are those from where the command is typed. Nothing else that is set up for Python, Jupyter, IPython or
matplotlib, by variables such as PYTHONPATH or by files in the home folder, reaches a run.
HELP
}

die() {
    printf 'run_all.sh: %s\n' "$2" >&2
    exit "$1"
}

# Whether a Python is one that every locked package has a wheel for; its version goes to $version.
recent() {
    version=$("$1" -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))' 2>/dev/null) || return 1
    [[ ${version%%.*} -eq 3 && ${version#*.} -ge 11 && ${version#*.} -le 13 ]]
}

find_python() {
    local candidate version found="" candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if recent "$candidate"; then
            base=$candidate
            return
        fi
        [[ -z $version ]] || found+=" found $candidate, which is $version;"
    done
    die 2 "Python 3.11, 3.12 or 3.13 is needed;${found:- found none;} name one by PYTHON=/path/to/python3.11 ./run_all.sh"
}

# .venv/requirements.lock is the lock file that .venv was completely installed from; .venv/unfinished is there while
# pip works, and after it was killed.
make_venv() {
    local log=build/environment.log base
    mkdir -p build
    exec 9>build/environment.lock
    if command -v flock >/dev/null; then flock 9; fi
    if ! [[ -x .venv/bin/python ]] || ! cmp -s requirements.lock .venv/requirements.lock; then
        if [[ -e .venv/unfinished ]]; then rm -rf .venv; fi
        find_python
        echo "Making the environment .venv from requirements.lock; this takes a few minutes (log: $log)"
        mkdir -p .venv
        touch .venv/unfinished
        {
            { [[ -x .venv/bin/python ]] || "$base" -m venv .venv; } &&
                .venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock &&
                .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
        } >"$log" 2>&1 9>&- </dev/null ||
            die 1 "the environment could not be made: $(grep -iE 'error|no space|not ' "$log" | tail -n 1) (log: $log)"
        cp requirements.lock .venv/requirements.lock
        rm .venv/unfinished
    fi
    exec 9>&-
    python=$root/.venv/bin/python
}

find_environment() {
    local needed='import importlib.util as u, sys
missing = [m for m in ("snakemake", "papermill", "torch", "curvlinops", "nbval") if u.find_spec(m) is None]
print(*missing, sep=", ")
sys.exit(bool(missing))'
    local version="" missing
    if [[ -n ${HESSIAN_PYTHON:-} ]]; then
        recent "$HESSIAN_PYTHON" || die 2 "Python 3.11, 3.12 or 3.13 is needed; HESSIAN_PYTHON is ${version:-no Python}"
        python=$HESSIAN_PYTHON
    elif [[ -n ${CONDA_PREFIX:-} ]] && "$CONDA_PREFIX/bin/python" -c "$needed" &>/dev/null; then
        recent "$CONDA_PREFIX/bin/python" || die 2 "Python 3.11, 3.12 or 3.13 is needed; the conda environment has $version"
        python=$CONDA_PREFIX/bin/python
    else
        make_venv
    fi
    missing=$("$python" -c "$needed") || die 2 "$python lacks ${missing:-what it takes to start}"
}

# The sum of the numbers in front of a word in the closing lines, such as 3 for skipped in "12 passed, 3 skipped in 4.5s".
count() {
    local line sum=0
    for line in "${closings[@]}"; do
        [[ ! $line =~ (^|[^0-9])([0-9]+)\ $1 ]] || sum=$((sum + BASH_REMATCH[2]))
    done
    echo "$sum"
}

# Runs one step of the tests, shows it as it goes, and keeps its closing line and whether it passed. That nothing was to
# be tested (pytest's code 5) is a failure only where everything was asked for.
step() {
    local name=$1 log=build/test/${1// /_}.log result=ok closing code=0
    shift
    printf '\n== %s\n' "$name"
    "$@" 2>&1 </dev/null | tee "$log" || code=$?
    closing=$(grep -E '^(All checks|Found [0-9]|[= ]*([0-9]+ [a-z]+|no tests ran).* in [0-9])' "$log" | tail -n 1) || true
    if [[ $code -ne 0 && ! ($code -eq 5 && $limited -eq 1) ]]; then
        result=FAILED failed=1
        [[ $closing =~ [0-9]\ (failed|error) ]] || closing="1 error, ${closing:-it did not come to its end} (log: $log)"
    fi
    closings+=("$closing")
    summary+=$(printf '%-7s %-16s %s' "$result" "$name" "$closing")$'\n'
}

# Sorts pytest's arguments: paths name unit tests or notebooks, all else goes to both.
sort_arguments() {
    local word before=""
    for word; do
        word=${word#./}
        case $before,$word in
            -[kmnopcW],* | --ignore,* | --deselect,*) both+=("$word") ;;
            *,tests | *,tests/* | *,"$root"/tests*) unit_paths+=("$word") ;;
            *,notebooks | *,notebooks/* | *,"$root"/notebooks*) notebook_paths+=("$word") ;;
            *) both+=("$word") ;;
        esac
        before=$word
    done
}

run_tests() {
    local closings=() summary="" total="" failed=0 limited=0 word n jobs began=$SECONDS
    local both=() unit_paths=() notebook_paths=() notebooks older
    [[ ${1:-} != -- ]] || shift
    [[ $# -eq 0 ]] || limited=1
    sort_arguments "$@"
    # One more than there are cores: what starts kernels and processes waits for them a fifth of its time.
    jobs=$("$python" -c 'from common.pipeline.workflow import cores; print(cores() + 1)')
    mkdir -p build/test
    exec 9>build/test/lock
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "run_all.sh: other tests are at work in this clone; waiting for them to end"
        flock 9
    fi
    # As common.pipeline.execute does: one BLAS thread a process, whatever runs beside it.
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 HESSIAN_TETHERED=$$
    unset HESSIAN_SCALE HESSIAN_OUT
    step "ruff" "$python" -m ruff check
    if [[ ${#unit_paths[@]} -gt 0 || ${#notebook_paths[@]} -eq 0 ]]; then
        step "unit tests" "$python" -m pytest -n "$jobs" --dist loadfile ${both+"${both[@]}"} ${unit_paths+"${unit_paths[@]}"}
    fi
    if [[ ${#notebook_paths[@]} -gt 0 || ${#unit_paths[@]} -eq 0 ]]; then
        notebooks=(
            -m pytest -p no:python --nbval-lax --nbval-cell-timeout 600 -n "$jobs" --dist loadfile
            ${both+"${both[@]}"} "${notebook_paths[@]:-notebooks}"
        )
        step "notebooks" env HESSIAN_SCALE=quick HESSIAN_OUT="$root/build/test/notebooks" "$python" "${notebooks[@]}"
        printf '\n'
        older=$("$python" -m common.pipeline.older_processor $([[ $limited -eq 1 ]] || echo --probe))
        # shellcheck disable=SC2086  # words, none with a blank in it
        step "older processor" env $older HESSIAN_SCALE=quick HESSIAN_OUT="$root/build/test/older" "$python" "${notebooks[@]}"
        if [[ $limited -eq 0 ]]; then
            # A notebook of each paper with two threads, which wait for each other without keeping a core busy.
            step "two threads" env OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
                HESSIAN_SCALE=quick HESSIAN_OUT="$root/build/test/threads" "$python" "${notebooks[@]}" \
                -k "fig09_scaling_hidden or fig02_shapes or fig19_20_trajectory or fig05_thresholds"
        fi
    fi
    printf '\n== summary\n%s' "$summary"
    for word in failed passed skipped error; do
        n=$(count "$word")
        [[ $n -eq 0 ]] || total+="${total:+, }$n $word"
    done
    printf '%s in %d.00s\n' "${total:-no tests ran}" $((SECONDS - began))
    return $failed
}

if [[ ${1:-} == test ]]; then
    shift
    find_environment
    run_tests "$@"
    exit
fi

options=() rest=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --scale | --only | --jobs)
            [[ -n ${2:-} ]] || die 2 "$1 needs a value; see ./run_all.sh --help"
            case $1=$2 in
                --scale=quick | --scale=laptop | --scale=paper | --only=*) ;;
                --scale=*) die 2 "unknown scale '$2'; there are quick, laptop and paper" ;;
                --jobs=*) [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "--jobs must be a whole number from 1 up, got '$2'" ;;
            esac
            options+=("$1=$2")
            shift 2
            ;;
        --dry-run)
            options+=("$1")
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        --)
            rest=("$@")
            break
            ;;
        *) die 2 "unknown option '$1'; see ./run_all.sh --help" ;;
    esac
done
find_environment
exec "$python" -m common.pipeline.workflow ${options+"${options[@]}"} ${rest+"${rest[@]}"}
