#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Makes the plugin's image without any registry, as a docker-archive: the content
# that the Containerfile gives it, under the name that the manifests have. Needs
# the packages of deploy/image/packages, and bin/csi-disktemplate (make build).
#
#   deploy/image/build.sh OUT.tar [NAME:TAG]
set -euo pipefail
here=$(dirname "$(realpath "$0")")
out=$1
name=${2:-$(sed -n 's|^ *image: \(.*/csi-disktemplate:.*\)|\1|p' "$here/../kubernetes/base/plugin.yaml")}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"
"$here/rootfs.sh" "$root" "$here/../../bin/csi-disktemplate"
"$here/../../hack/image.sh" "$out" "$name" "$root" '["/usr/bin/csi-disktemplate"]'
