#!/bin/bash
# One pd-serve process, as the task of a step: role.sh ROLE PORT GPUS. See steps.sh.
set -euo pipefail
role=$1 port=$2 gpus=$3
[[ -e $PD_RUN/ending ]] && exit 0  # a step that was made just after all were told to end

# Where others reach this task. All hosts must be able to resolve it.
host=${PD_ADDRESS:-$(hostname -f)}

ulimit -l unlimited 2>/dev/null || echo "locked memory is limited to $(ulimit -l) KiB: RDMA may not register the KV cache"

if [[ $role == router ]]; then
    # shellcheck disable=SC2086  # flags are words
    exec $PD_SERVE router --host "$host" --port "$PD_ROUTER_PORT" --secret-file "$PD_RUN/secret" ${ROUTER_FLAGS:-}
fi

flags=(--router "http://$PD_ROUTER_HOST:$PD_ROUTER_PORT" --host "$host" --port "$port" --secret-file "$PD_RUN/secret")
[[ -n $PD_MODEL ]] && flags+=(--model "$PD_MODEL")
((gpus > 1)) && flags+=(--tp "$gpus")
# KV goes over this interface (InfiniBand's, say) and not over the one of the host's name.
if [[ -n ${PD_PEER_INTERFACE:-} ]]; then
    flags+=(--peer-host "$(ip -4 -o addr show dev "$PD_PEER_INTERFACE" | awk '{split($4, a, "/"); print a[1]; exit}')")
fi
[[ $role == prefill ]] && own=${PREFILL_FLAGS:-} || own=${DECODE_FLAGS:-}
# shellcheck disable=SC2086
exec $PD_SERVE "$role" "${flags[@]}" ${NODE_FLAGS:-} $own
