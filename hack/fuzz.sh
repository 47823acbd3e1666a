#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Runs every fuzz target, one after the other: hack/fuzz.sh 10s, or 1h, or 100000x. An input that
# fails is written to the package's testdata/fuzz. From then on `go test` fails until the code is
# fixed.
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:?give the time for each target, as 10s}
go=${GO:-go}

# `go test -list` prints a package's name after the names of its tests.
targets=$("$go" test -list '^Fuzz' ./... | awk '
	/^Fuzz/ { name[n++] = $1 }
	/^ok/ { for (i = 0; i < n; i++) print $2, name[i]; n = 0 }')
[ -n "$targets" ] || { echo "fuzz: there are no targets" >&2; exit 1; }

# Go makes every new input as small as it can. By default that takes longer than finding it.
flags=(-fuzztime "$each" -fuzzminimizetime 500x -parallel "$(nproc)")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=
while read -r package target; do
	echo "$package $target"
	"$go" test -run '^$' -fuzz "^$target\$" "${flags[@]}" "$package" </dev/null 2>&1 | tee "$log" && continue
	# Before 1.27, Go may report the end of its own time limit as a failure: go.dev/issue/75804.
	if grep -qx ' *context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; then
		continue
	fi
	failed="$failed $target"
done <<<"$targets"
[ -z "$failed" ] || { echo "fuzz: failed:$failed" >&2; exit 1; }
