# shellcheck shell=bash
# Sourced by the batch scripts. Each pd-serve process is a step of its own (`srun`), so that one that dies is started
# again and the others go on. SIGTERM to this script drains all of them: it goes on to the steps, never to `srun`, which
# would end them at once.
set -euo pipefail

export PD_SERVE=${PD_SERVE:-pd-serve}
export PD_MODEL=${PD_MODEL:-}
export PD_ROUTER_PORT=${PD_ROUTER_PORT:-8000}
PD_NODE_PORT=${PD_NODE_PORT:-8100}
PD_CPUS=${PD_CPUS:-1}
group=  # of a heterogeneous job, for the steps that follow
steps=()
count=0

# begin NODELIST: the router will run on the first of these. Everything of this run lies in a folder that all share.
begin() {
    first=$(scontrol show hostnames "$1" | head -n 1)
    export PD_ROUTER_HOST=${PD_ADDRESS:-$first}
    export PD_RUN=${PD_RUN_DIR:-$SLURM_SUBMIT_DIR}/pd-serve-$SLURM_JOB_ID
    mkdir -p "$PD_RUN"
    # A job that was requeued begins anew: with another secret, and nobody's order to end.
    rm -f "$PD_RUN"/{secret,ending,url}
    (umask 077 && head -c 32 /dev/urandom | base64 >"$PD_RUN/secret")
    trap drain TERM INT
}

drain() {
    echo "$(date +%T) told to end: draining"
    touch "$PD_RUN/ending"
    # Without --batch and --full the steps get it, and not this script.
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}

# step NAME ROLE: starts it in the background; its log is NAME.log in the run's folder.
step() {
    local name=$1 role=$2 gpus
    local where=(--nodes=1 --ntasks=1 --cpus-per-task="$PD_CPUS" --job-name="$name" --export=ALL)
    [[ -n $group ]] && where+=(--het-group="$group")
    [[ -n ${PD_MEM:-} ]] && where+=(--mem="$PD_MEM")
    case $role in
        # It needs no GPU, and shares the first host with a node.
        router) where+=(--overlap --nodelist="$first" --gpus=0) gpus=0 ;;
        prefill) gpus=${PREFILL_GPUS:-${GPUS:-0}} ;;
        decode) gpus=${DECODE_GPUS:-${GPUS:-0}} ;;
    esac
    if [[ $role != router ]]; then
        where+=(--exact)
        # A node's GPUs are of one host; cores and memory are those beside them.
        ((gpus)) && where+=(--gpus-per-task="$gpus" --mem-bind=local)
    fi
    keep "$name" "${where[@]}" "$DEPLOY/role.sh" "$role" "$((PD_NODE_PORT + count))" "$gpus" &
    steps+=($!)
    count=$((count + 1))
}

# Until it ends well, or is to end.
keep() {
    local name=$1 status
    shift
    trap - TERM INT
    while true; do
        status=0
        srun --output="$PD_RUN/$name.log" --open-mode=append "$@" </dev/null || status=$?
        echo "$(date +%T) $name ended with status $status"
        [[ $status == 0 || -e $PD_RUN/ending ]] && return
        sleep 2
        [[ -e $PD_RUN/ending ]] && return  # told to end meanwhile: nobody would tell the next step
    done
}

# Says when the router is ready, and ends when the steps have.
finish() {
    local url="http://$PD_ROUTER_HOST:$PD_ROUTER_PORT"
    (
        trap - TERM INT
        until curl -sf -o /dev/null --max-time 5 "$url/ready" || [[ -e $PD_RUN/ending ]]; do sleep 1; done
        [[ -e $PD_RUN/ending ]] || { echo "$url" >"$PD_RUN/url" && echo "$(date +%T) ready: $url"; }
    ) &
    local gate=$! pid
    for pid in "${steps[@]}"; do
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a signal ends a wait
    done
    kill "$gate" 2>/dev/null || true
    rm -f "$PD_RUN/secret"
    echo "$(date +%T) all ended"
}
