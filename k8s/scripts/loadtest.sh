#!/usr/bin/env bash
# A load test in the cluster: its log as it comes, its report in loadtests/results, its verdict as the exit status.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PROFILE=${PROFILE:-stress}

[[ -d k8s/overlays/loadtest/$PROFILE && $PROFILE != common ]] || { echo "PROFILE=$PROFILE: it is normal, peak or stress" >&2; exit 1; }
need_cluster
cluster -n "$NAMESPACE" get deployment order-service >/dev/null 2>&1 || { echo "there is no service to test; \`make k8s-deploy\` makes one" >&2; exit 1; }
cluster -n "$NAMESPACE" delete job loadtest-master loadtest-workers --ignore-not-found
cluster apply -k "k8s/overlays/loadtest/$PROFILE"
cluster -n "$NAMESPACE" wait --for=condition=ready --timeout=5m pod -l app.kubernetes.io/name=loadtest-master
cluster -n "$NAMESPACE" logs --follow job/loadtest-master
code=
while [[ -z $code ]]; do
    code=$(cluster -n "$NAMESPACE" get pod -l app.kubernetes.io/name=loadtest-master \
        -o jsonpath='{.items[0].status.containerStatuses[0].state.terminated.exitCode}')
    sleep 1
done
report=loadtests/results/k8s-$PROFILE-$(date -u +%Y%m%dT%H%M%SZ)
mkdir -p "$report"
cluster -n "$NAMESPACE" exec deploy/loadtest-report -- tar -C /results/current/ -cf - . | tar -xf - -C "$report"
echo "the report is in $report"
exit "$code"
