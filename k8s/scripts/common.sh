# For the scripts beside it: what is missing is said in one line, and ends them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

need() { # PROGRAM PURPOSE
    command -v "$1" >/dev/null || { echo "$1 is not installed; it is needed $2" >&2; exit 1; }
}

CONTEXT=${CONTEXT:-kind-order-service}
NAMESPACE=order-service

cluster() {
    kubectl --context "$CONTEXT" "$@"
}

need_cluster() {
    need kubectl 'to reach a cluster'
    cluster version >/dev/null 2>&1 || { echo "no cluster answers as $CONTEXT; \`make kind-up\` makes one, CONTEXT= names another" >&2; exit 1; }
}
