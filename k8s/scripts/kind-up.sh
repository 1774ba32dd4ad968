#!/usr/bin/env bash
# A cluster on this machine. Each node reports the whole machine's cores, so that ten replicas find their places on it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
METRICS_SERVER=https://github.com/kubernetes-sigs/metrics-server/releases/download/v0.8.0/components.yaml

need kind 'to make a cluster'
need kubectl 'to reach it'
kind get clusters | grep -qx order-service || kind create cluster --config k8s/scripts/kind.yaml --wait 2m
# The HPA reads CPU there. kind's kubelets have certificates that nobody signed.
cluster apply -f "$METRICS_SERVER"
cluster -n kube-system patch deployment metrics-server --type=json \
    -p='[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--kubelet-insecure-tls"}]'
cluster -n kube-system rollout status deployment/metrics-server --timeout=3m
