#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Copies the groups of deploy/monitoring/alerts.yaml into the PrometheusRule of the component monitors. Kustomize
# cannot: it reads no file from outside of the component. TestAlertsAreOne compares the two.
set -euo pipefail
cd "$(dirname "$0")/.."
rule=deploy/kubernetes/components/monitors/prometheusrule.yaml
{
	sed '/^spec:$/q' "$rule"
	sed -n '/^groups:$/,$ s/^\(.\)/  \1/p' deploy/monitoring/alerts.yaml
} >"$rule.new"
mv "$rule.new" "$rule"
