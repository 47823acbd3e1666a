#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Makes the plugin's image as a docker-archive, without any registry. It has the
# same content as an image made from the Containerfile, and the name that the
# manifests use. This needs the packages of deploy/image/packages, and
# bin/csi-disktemplate (make build).
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
