#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Starts a cluster of its own, runs the tests of hack/kube/e2e on it, and takes it
# down. After a failure all logs are in bin/e2e.
#
#   hack/kube/e2e.sh [flags of go test]
set -euo pipefail
export PATH="$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin"
export STATE=/var/tmp/csi-disktemplate-e2e
here=$(dirname "$(realpath "$0")")
logs=$here/../../bin/e2e
rm -rf "$logs"

"$here/cluster" down # a killed run may have left one
end() {
	local status=$?
	((status == 0)) || "$here/cluster" logs "$logs" || true
	"$here/cluster" down
	((status == 0)) || echo "e2e: logs are in $(realpath "$logs")" >&2
}
trap end EXIT
trap 'exit 1' INT TERM

SECONDS=0
"$here/build.sh" >/dev/null
echo "e2e: Kubernetes is built after $SECONDS s"
"$here/cluster" up
echo "e2e: the cluster is up after $SECONDS s"
(cd "$here/e2e" && go test -tags e2e -count 1 -timeout 60m -v "$@" .)
echo "e2e: all tests passed after $SECONDS s"
