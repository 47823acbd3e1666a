#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Runs every fuzz target there is, one after the other: hack/fuzz.sh 10s, or 1h, or
# 100000x. What a target found is in its package's testdata/fuzz afterwards, and
# fails `go test` until it is mended.
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:?how long each target is to run, as 10s}
go=${GO:-go}

# `go test -list` names a package after its tests.
targets=$("$go" test -list '^Fuzz' ./... | awk '
	/^Fuzz/ { name[n++] = $1 }
	/^ok/ { for (i = 0; i < n; i++) print $2, name[i]; n = 0 }')
[ -n "$targets" ] || { echo "fuzz: found no targets" >&2; exit 1; }

# Go makes every input that is news as small as it can, which by its default takes
# longer than finding it did.
flags=(-fuzztime "$each" -fuzzminimizetime 500x -parallel "$(nproc)")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=
while read -r package target; do
	echo "$package $target"
	"$go" test -run '^$' -fuzz "^$target\$" "${flags[@]}" "$package" </dev/null 2>&1 | tee "$log" && continue
	# Before 1.27, Go may take the end of its own time for a failure: go.dev/issue/75804.
	if grep -qx ' *context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; then
		continue
	fi
	failed="$failed $target"
done <<<"$targets"
[ -z "$failed" ] || { echo "fuzz: failed:$failed" >&2; exit 1; }
