#!/usr/bin/env bash
# A run on a lent GPU machine: what works, what is wrong, how fast it is; the most valuable facts first.
#
#   bash benchmarks/gpu_first_run.sh     from the root of the repository (the folder of pyproject.toml)
#   STEPS="versions own all torch" LIMIT=200 bash benchmarks/gpu_first_run.sh
#
# STEPS chooses and orders; the default is "versions torch cupy jax own rows bench":
#   versions         of the driver, the libraries and the compiler
#   torch cupy jax   smoke: calls against float64, streams, graphs; in torch every kernel's time
#   own              the tests of calls on GPUs of each library
#   rows             tests of any array library, in PyTorch and CuPy;  all: every one of them
#   bench            gpu.py, at most three minutes;  BENCH="--only torch --without compile" chooses
#   sanitize         a few calls under compute-sanitizer, each array in memory of its own
# LIMIT is for all of it, in seconds (default 520). Each step has a limit of its own, and one that
# fails or hangs does not stop the next. The exit status is 1 if a step failed, had no time, or had
# all its tests skipped, and 2 where no library has a GPU: nothing is run then.
# OUT is where everything is written while it happens (default ./first_run_out):
#   log.txt       all that was printed          facts.jsonl  a line of JSON for each fact
#   failures.txt  each failing test, at once    steps.txt    what ran, for how long, how it ended
#   bench/        the benchmark's records, as they are made, and its JSON
# Wheels that the machine lacks lie in .whl/, which git ignores (array_api_compat is needed, jax_triton of use):
#   python3 -m pip download --no-deps -d .whl array-api-compat==1.16.0 jax-triton==0.3.1
# DRY=1 runs every step where there is no GPU, on tiny arrays: see _gpu_dry.py.
set -u -o pipefail
if [ $# -gt 0 ]; then # it takes none
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  case $1 in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi
ROOT=$PWD
HERE=$ROOT/benchmarks
[ -f "$ROOT/pyproject.toml" ] && [ -d "$ROOT/backends" ] || { echo "run this from the project's root"; exit 2; }
LIMIT=${LIMIT:-520}
[[ $LIMIT =~ ^[1-9][0-9]*$ ]] || { echo "LIMIT=$LIMIT: give whole seconds, such as 520"; exit 2; }
OUT=${OUT:-$ROOT/first_run_out}; mkdir -p "$OUT"
STEPS=${STEPS:-versions torch cupy jax own rows bench}
DRY=${DRY:-}
PY=${PY:-python3}
SECONDS=0
: >"$OUT/steps.txt"; : >"$OUT/facts.jsonl"; : >"$OUT/failures.txt"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ls "$ROOT"/.whl/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$ROOT"/.whl/*.whl ||
    for wheel in "$ROOT"/.whl/*.whl; do $PY -m zipfile -e "$wheel" "$site"; done
fi
export OUT DRY PYTHONPATH="$ROOT:$site:$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# JAX would take three quarters of the memory at once, from whoever comes next.
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_TRACEBACK_FILTERING=off TF_CPP_MIN_LOG_LEVEL=2
[ -n "$DRY" ] && export OMP_NUM_THREADS=1

step() { # NAME SECONDS COMMAND...: run it for so long at most, and go on whatever happens
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) begun=$SECONDS status
  shift 2
  if [ "$left" -lt 12 ]; then echo "$name: no time was left" | tee -a "$OUT/steps.txt"; return; fi
  [ "$most" -gt "$left" ] && most=$left
  echo; echo "==== $name (at most ${most} s, ${left} s left)"
  timeout -s INT -k 8 "$most" "$@"
  status=$?
  echo "$name: status $status after $((SECONDS - begun)) s" | tee -a "$OUT/steps.txt"
}

tests() { # NAME SECONDS PROCESSES ROWS ARGUMENTS...
  local name=$1 most=$2 many=$3 rows=$4; shift 4
  # The installed pytest and its plugins are the machine's own; only failures matter here.
  step "$name" "$most" $PY -m pytest -q --tb=short -rfE -n "${DRY:-$many}" -p _gpu_failures -p no:cacheprovider \
    -o minversion=1 -o addopts= -W default -m gpu --backends "$rows" "$@"
}

a_gpu() { # Whether a library has one: the first that has ends the search. Prints why others have none.
  local library why
  for library in cupy torch jax; do # the fastest to import first
    why=$(timeout 60 $PY -c "import sys, _gpu_$library as engine; sys.exit(engine.missing())" 2>&1 | tail -n 1) && return
    echo "$library: ${why:-no answer within a minute}"
  done
  return 1
}

main() {
if [ -z "$DRY" ] && ! a_gpu; then echo "no GPU here; DRY=1 tries the steps without one"; exit 2; fi
for name in $STEPS; do
  case $name in
    versions)
      step versions 60 bash -c '
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader
        ldconfig -p | grep libcuda.so; git rev-parse --short HEAD; gcc --version | head -1
        '"$PY"' -c "
import os, sys, sysconfig, _report, groupnorm
found = _report.versions(*sys.argv[1:])
print(found, *(name + \" IS MISSING\" for name in sys.argv[1:] if name not in found), os.cpu_count(), \"CPUs\")
print(\"Python.h\", os.path.exists(sysconfig.get_paths()[\"include\"] + \"/Python.h\"), groupnorm.__file__)
" numpy torch triton jax jaxlib jax-cuda13-plugin jax-triton cupy-cuda13x array-api-compat ml_dtypes flax pytest pytest-xdist hypothesis' ;;
    torch) step torch 150 $PY "$HERE/_gpu_smoke.py" torch ;;
    cupy) step cupy 60 $PY "$HERE/_gpu_smoke.py" cupy ;;
    jax) step jax 95 $PY "$HERE/_gpu_smoke.py" jax ;;
    sanitize)
      sanitizer=(compute-sanitizer --tool memcheck --error-exitcode 9)
      [ -n "$DRY" ] && sanitizer=(env)
      step sanitize 120 "${sanitizer[@]}" $PY "$HERE/_gpu_smoke.py" cupy sanitize ;;
    own) tests own 80 6 torch:cuda,jax:gpu,cupy tests/torch/test_gpu.py tests/cupy/test_cupy.py tests/jax/test_gpu.py ;;
    rows)
      # Without a GPU a few of them in Triton's interpreter, and below the list of all of them.
      few=(); [ -n "$DRY" ] && few=(--interpret --backends torch -m "not gpu" -k nan_in_the_padding)
      tests rows 75 12 torch:cuda,cupy tests/portable/test_{accuracy,masks,activation,gradients,layouts,dtypes}.py "${few[@]}" ;;
    all) tests all 150 12 torch:cuda,cupy tests ${DRY:+--collect-only -q} ;;
    bench)
      most=$((LIMIT - SECONDS - 45)); [ $most -gt 180 ] && most=180
      if [ $most -ge 45 ]; then
        step bench $((most + 40)) $PY "$HERE/gpu.py" --seconds $most --into "$OUT/bench" ${BENCH:-}
      else
        echo "bench: no time was left" | tee -a "$OUT/steps.txt"
      fi ;;
    *) echo "no step is called $name" | tee -a "$OUT/steps.txt" ;;
  esac
done

echo; echo "==== in short"
cat "$OUT/steps.txt"
grep -hoE '"fact": "(WRONG|FAILED)[^"]*".*' "$OUT/facts.jsonl" | cut -c1-260 | head -40
for kind in right WRONG FAILED; do echo "$kind: $(grep -c "\"fact\": \"$kind" "$OUT/facts.jsonl")"; done
grep -h '^====' "$OUT/failures.txt" | head -30
grep -hE '"fact": "(copy|host|.*, us")' "$OUT/facts.jsonl" | cut -c1-420
echo "$SECONDS s in all"
[ -s "$OUT/steps.txt" ] && ! grep -vq ': status 0 ' "$OUT/steps.txt" && ! grep -qE '"fact": "(WRONG|FAILED)' "$OUT/facts.jsonl"
}

main 2>&1 | tee "$OUT/log.txt"
