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
failed=0

# part NAME SECONDS COMMAND...: its RESULT lines, what it ended with, and the end of its log if that is bad
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    grep -a '^RESULT' "$OUT/$name.log"
    echo "RESULT part $name: $([ $status = 0 ] && echo ok || echo "FAILED ($status)") in $((SECONDS - start)) s"
    [ $status = 0 ] || { failed=1; tail -n 15 "$OUT/$name.log" | cut -c1-200; }
}

pytest() { # NAME SECONDS TESTS...: on the GPU that CUDA_VISIBLE_DEVICES names
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m pytest -q -s -p no:cacheprovider -m gpu --tb=short "$@"
    tail -n 1 "$OUT/$name.log" | sed "s/^/RESULT $name: /"
}

real="tests/e2e/test_gpu_real.py"
[ "${REAL_MODELS:-}" = none ] && real=""
for each in $parts; do
    case $each in
        tests) # what needs one GPU runs on both at once, then what needs two
            (CUDA_VISIBLE_DEVICES=0 pytest tests-engine 200 tests/compute tests/memory tests/doctor) &
            # shellcheck disable=SC2086
            (CUDA_VISIBLE_DEVICES=1 pytest tests-served 200 tests/e2e/test_gpu.py $real) &
            wait
            pytest tests-pairs 120 tests/transfer tests/distributed $(ls tests/e2e/test_gpu_tp.py 2>/dev/null) ;;
        engine) CUDA_VISIBLE_DEVICES=0 part engine 90 "$python" -m benchmarks.gpu_engine ;;
        profile) CUDA_VISIBLE_DEVICES=0 part profile 90 "$python" -m benchmarks.gpu_profile ;;
        load) CUDA_VISIBLE_DEVICES=0 part load 60 "$python" -m benchmarks.gpu_load ;;
        pair | both) part "$each" 150 "$python" -m benchmarks.gpu_serving "$each" --seconds 5 --json "$OUT/$each.json" ;;
        *) echo "no part $each"; exit 2 ;;
    esac
done
echo "RESULT suite: $([ $failed = 0 ] && echo ok || echo FAILED) in $SECONDS s on $(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | xargs)"
exit $failed
