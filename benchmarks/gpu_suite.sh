#!/usr/bin/env bash
# All GPU tests and the figures of docs/benchmarks.md, on a machine with two GPUs, in at most 8 minutes:
#
#     benchmarks/gpu_suite.sh [PART ...]     # all parts, or: tests engine profile load pair both
#
# Prints lines that begin with RESULT; everything else goes to files in $OUT (./gpu-suite). Each part has a time limit, and
# one that fails does not end the others. REAL_MODELS: see tests/e2e/packed.py; without it and without a network the tests of
# real models are left out (REAL_MODELS=none).
set -u -o pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OUT="${OUT:-$PWD/gpu-suite}"
mkdir -p "$OUT"
python="${PYTHON:-python3}"
parts="${*:-tests engine profile load pair both}"
failed="$OUT/failed" # a file: some parts run in shells of their own
rm -f "$failed"

# part NAME SECONDS COMMAND...: its RESULT lines, what it ended with, and the end of its log if that is bad
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    grep -a '^RESULT' "$OUT/$name.log"
    echo "RESULT part $name: $([ $status = 0 ] && echo ok || echo "FAILED ($status)") in $((SECONDS - start)) s"
    [ $status = 0 ] || { touch "$failed"; tail -n 15 "$OUT/$name.log" | cut -c1-200; }
}

pytest() { # NAME SECONDS TESTS...: on the GPU that CUDA_VISIBLE_DEVICES names
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m pytest -q -s -p no:cacheprovider -m gpu --tb=short --durations=8 "$@"
    grep -aE '^(FAILED|ERROR) ' "$OUT/$name.log" | cut -c1-200 | sed "s/^/RESULT $name: /"
    tail -n 1 "$OUT/$name.log" | sed "s/^/RESULT $name: /"
}

real="tests/e2e/test_gpu_real.py"
[ "${REAL_MODELS:-}" = none ] && real=""
kernels=$(ls tests/compute/cuda/test_*.py | grep -v test_executor)
# shellcheck disable=SC2086 # lists of files
for each in $parts; do
    case $each in
        tests) # kernels and servers by several processes on a GPU each; then what measures memory, alone, and what needs two
            (CUDA_VISIBLE_DEVICES=0 pytest tests-kernels 180 $kernels -n 8 --dist load
             CUDA_VISIBLE_DEVICES=0 pytest tests-memory 90 tests/compute/cuda/test_executor.py tests/memory tests/doctor) &
            (CUDA_VISIBLE_DEVICES=1 pytest tests-served 180 tests/e2e/test_gpu.py tests/e2e/test_experts.py \
                tests/e2e/test_fp8.py -n 3 --dist loadfile &
             [ -z "$real" ] || CUDA_VISIBLE_DEVICES=1 pytest tests-real 200 $real -n 2 --dist loadscope
             wait) &
            wait
            pytest tests-tp 120 tests/e2e/test_tp.py tests/e2e/test_gpu_offload.py &
            pytest tests-pairs 120 tests/transfer tests/distributed -n 4 --dist load
            wait ;;
        engine) CUDA_VISIBLE_DEVICES=0 part engine 90 "$python" -m benchmarks.gpu_engine ;;
        profile) CUDA_VISIBLE_DEVICES=0 part profile 90 "$python" -m benchmarks.gpu_profile ;;
        load) CUDA_VISIBLE_DEVICES=0 part load 60 "$python" -m benchmarks.gpu_load ;;
        pair | both) part "$each" 150 "$python" -m benchmarks.gpu_serving "$each" --seconds 5 --json "$OUT/$each.json" ;;
        *) echo "no part $each"; exit 2 ;;
    esac
done
echo "RESULT suite: $([ -e "$failed" ] && echo FAILED || echo ok) in $SECONDS s on $(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | xargs)"
[ ! -e "$failed" ]
