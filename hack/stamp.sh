#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Prints the linker flags that stamp a build of this checkout with its version, commit
# and date:
#
#   go build -ldflags "$(hack/stamp.sh)" ./cmd/csi-disktemplate
#
# The version is what `git describe` makes of the release tags. Where no tag can be seen,
# it is the release of cmd/csi-disktemplate/RELEASE, with "-dev" and the commit. It prints
# nothing where git finds no commit, as in an archive of the sources: then the binary
# itself knows its release.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
# A checkout within another repository has that one's commits.
[[ $(git rev-parse --show-toplevel 2>/dev/null) == "$PWD" ]] || exit 0
commit=$(git rev-parse HEAD 2>/dev/null) || exit 0
version=$(git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null) ||
	version=$(<cmd/csi-disktemplate/RELEASE)-dev+$(git describe --always --dirty=.dirty --exclude '*')
echo "-X main.version=$version -X main.commit=$commit -X main.date=$(git log -1 --format=%cs)"
