#!/usr/bin/env bash
# The images into the cluster, then an overlay: its migration first, and its replicas ready at the end.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OVERLAY=${OVERLAY:-local}

[[ -d k8s/overlays/$OVERLAY ]] || { echo "k8s/overlays/$OVERLAY is not there" >&2; exit 1; }
need_cluster
if [[ $CONTEXT == kind-* ]]; then
    need kind 'to bring the images into the cluster'
    need "$ENGINE" 'to build the images; ENGINE= names another'
    make image ENGINE="$ENGINE" VERSION="$VERSION"
    archive=$(mktemp -d)
    trap 'rm -r "$archive"' EXIT
    for name in order-service order-service-loadtest; do
        "$ENGINE" save "$name:$VERSION" -o "$archive/$name.tar"
        kind load image-archive "$archive/$name.tar" --name "${CONTEXT#kind-}"
    done
fi
# A Job cannot be changed: that of the last release makes room for this one's.
cluster -n "$NAMESPACE" delete job order-service-migration --ignore-not-found
cluster apply -k "k8s/overlays/$OVERLAY"
cluster -n "$NAMESPACE" wait --for=condition=complete --timeout=10m job/order-service-migration
cluster -n "$NAMESPACE" rollout status deployment/order-service --timeout=10m
