#!/usr/bin/env bash
# Builds the images of the router and of CPU nodes without a registry, and serves a request with them.
#
# For root on Debian: apt-get install buildah mmdebstrap. The base comes from Debian's packages, and containers run with
# buildah's chroot isolation, on this machine's network: no daemon, no cgroups. STORAGE_DRIVER=vfs where overlay is not to be had. Variables of pip (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT) hold in the builds too; files that they name are mounted.
#
#   deploy/docker/try.sh             builds, serves, says times and sizes, removes everything
#   deploy/docker/try.sh --router    the router's image alone: built, started, asked for /health
#   KEEP=DIR deploy/docker/try.sh    the same in DIR, which stays, with the logs, and base and stages for the next call
set -euo pipefail
cd "$(dirname "$0")/../.."

only=${1:-}
work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
store=(buildah --storage-driver "${STORAGE_DRIVER:-overlay}" --root "$work/root" --runroot "$work/run")
pids=()

finish() {
    for pid in "${pids[@]}"; do stop "$pid" 2>/dev/null || true; done
    wait || true
    [[ -n ${KEEP:-} ]] || { "${store[@]}" umount --all >/dev/null 2>&1 || true; rm -rf --one-file-system "$work"; }
}
trap finish EXIT

fail() {
    echo "try.sh: $1" >&2
    for log in "$work"/*.log; do echo "$log:" && tail -n 20 "$log"; done >&2
    exit 1
}

# timed WHAT COMMAND...
timed() {
    local what=$1 begun=$SECONDS
    shift
    "$@" >"$work/$what.log" 2>&1 || fail "$what failed"
    echo "$what: $((SECONDS - begun)) s"
}

# How pip finds packages, in builds and in nodes that get their model with it.
args=() variables=() volumes=()
[[ -z ${KEEP:-} ]] || args+=(--layers)
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT; do
    value=${!name:-}
    [[ -n $value ]] || continue
    args+=(--build-arg "$name=$value")
    variables+=(--env "$name=$value")
    # A certificate's place may be one that the image's own packages write to: not mounted over, but copied beside it.
    if [[ $name == PIP_CERT ]]; then
        cp "$value" "$work/pip-cert.pem"
        args[-1]=PIP_CERT=/etc/pip-cert.pem variables[-1]=PIP_CERT=/etc/pip-cert.pem
        volumes+=(--volume "$work/pip-cert.pem:/etc/pip-cert.pem:ro")
    elif [[ -d $value ]]; then
        volumes+=(--volume "$value:$value:ro")
    fi
done

base() {
    # Without what Debian's images for containers leave out as well.
    [[ -e $work/base.tar ]] || mmdebstrap --mode=root --variant=minbase --include=ca-certificates \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' bookworm "$work/base.tar"
    local container
    ! "${store[@]}" inspect --type image pd-serve-base >/dev/null 2>&1 || return 0  # another one would void all stages
    container=$("${store[@]}" from scratch)
    "${store[@]}" add "$container" "$work/base.tar" /
    "${store[@]}" commit --rm "$container" pd-serve-base
}

image() {
    "${store[@]}" bud --isolation chroot --format docker --file deploy/docker/Dockerfile --target "$1" \
        --tag "pd-serve-$1" --build-arg BASE=localhost/pd-serve-base "${args[@]}" "${volumes[@]}" .
}

# In bytes of its files, as the machine that runs it will store them, and as a registry would (gzip).
size() {
    local container root
    container=$("${store[@]}" from "pd-serve-$1")
    root=$("${store[@]}" mount "$container")
    echo "$1: $(du -sm "$root" | cut -f1) MB, $(tar -C "$root" -c . | gzip -1 | wc -c | awk '{printf "%d", $1 / 1e6}') MB packed," \
        "of it $(du -sm "$root/opt/pd-serve" | cut -f1) MB of Python packages"
    "${store[@]}" rm "$container" >/dev/null
}

# serve NAME IMAGE PORT ARGUMENT...: a container in the background, under the image's own user and entry point.
serve() {
    local name=$1 image=$2 port=$3 container
    shift 3
    container=$("${store[@]}" from "pd-serve-$image")
    # tini is not the first process here, as it is under an engine that has PID namespaces.
    "${store[@]}" run --isolation chroot --env TINI_SUBREAPER=1 --env PD_SERVE_HOST=127.0.0.1 --env "PD_SERVE_PORT=$port" \
        --env PD_SERVE_SECRET_FILE=/run/secret "${variables[@]}" --volume "$work/secret:/run/secret:ro" "${volumes[@]}" \
        "$container" -- tini -- pd-serve "$@" >"$work/$name.log" 2>&1 &
    pids+=($!)
    containers[$name]=$container
}

# stop PID: TERM to the tini under a `buildah run`, which would itself end with everything below it.
stop() {
    local child
    for child in $(pgrep -P "$1"); do
        if [[ $(<"/proc/$child/comm") == tini ]]; then kill -TERM "$child"; else stop "$child"; fi
    done
}

# healthy NAME PORT PATH SECONDS: by the image's own check.
healthy() {
    local deadline=$((SECONDS + $4))
    until "${store[@]}" run --isolation chroot --env "PD_SERVE_PORT=$2" "${containers[$1]}" -- pd-serve-healthcheck "$3" \
        >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "$1 does not answer $3 with 200"
        sleep 0.5
    done
}

declare -A containers
port=$((20000 + RANDOM % 10000))
head -c 32 /dev/urandom | base64 >"$work/secret"
chmod 400 "$work/secret"
chown 10001 "$work/secret"

timed build-base base
timed build-router image router
size router
if [[ $only != --router ]]; then
    timed build-cpu image cpu
    size cpu
    serve prefill cpu $((port + 1)) prefill --router "http://127.0.0.1:$port"
    serve decode cpu $((port + 2)) decode --router "http://127.0.0.1:$port"
fi
begun=$SECONDS
serve router router "$port" router
healthy router "$port" /health 30
if [[ $only != --router ]]; then
    healthy router "$port" /ready 300
    echo "ready after $((SECONDS - begun)) s"
    python3 - "http://127.0.0.1:$port/v1/completions" <<'PYTHON' || fail "no answer"
import json, sys, urllib.request
body = json.dumps({"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})
request = urllib.request.Request(sys.argv[1], body.encode(), {"Content-Type": "application/json"})
print("answer:", json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"].strip())
PYTHON
fi

# As an engine stops a container: TERM, and each ends by itself with status 0.
for pid in "${pids[@]}"; do stop "$pid"; done
for pid in "${pids[@]}"; do wait "$pid" || fail "a container ended with $? after TERM"; done
pids=()
echo "ended by TERM, each with status 0"
