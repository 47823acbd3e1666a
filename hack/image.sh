#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Packs a directory as a container image, in the form that `docker save` writes and
# `ctr image import`, `docker load` and `podman load` read.
#
#   hack/image.sh OUT.tar NAME:TAG ROOT ENTRYPOINT_JSON [CMD_JSON]
set -euo pipefail
out=$1 name=$2 root=$3 entrypoint=$4 cmd=${5:-null}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar --numeric-owner --owner=0 --group=0 --sort=name --mtime=@0 -C "$root" -cf "$scratch/layer.tar" .
layer=$(sha256sum "$scratch/layer.tar" | cut -d' ' -f1)
cat >"$scratch/config.json" <<J
{"architecture": "$(dpkg --print-architecture)", "os": "linux", "created": "1970-01-01T00:00:00Z",
 "config": {"Entrypoint": $entrypoint, "Cmd": $cmd, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]}, "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "hack/image.sh"}]}
J
config=$(sha256sum "$scratch/config.json" | cut -d' ' -f1)
mv "$scratch/config.json" "$scratch/$config.json"
mkdir "$scratch/$layer"
mv "$scratch/layer.tar" "$scratch/$layer/layer.tar"
echo "[{\"Config\": \"$config.json\", \"RepoTags\": [\"$name\"], \"Layers\": [\"$layer/layer.tar\"]}]" >"$scratch/manifest.json"
tar --numeric-owner --owner=0 --group=0 --mtime=@0 -C "$scratch" -cf "$out" manifest.json "$config.json" "$layer"
