# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Prints what failed in the output of `go test`, with -v or without: the tests and the
# first lines that they say, each cut, and no log of a plugin.
#
#   awk -f hack/failures.awk <output>

BEGIN { most = 40 } # lines of a test

# With -v a test's lines come before its result, after its name.
/^=== (RUN|NAME|CONT|PAUSE) / { test = $3; failed = 0; next }

/^ *--- (FAIL|PASS|SKIP): / {
	failed = $2 == "FAIL:"
	if (failed) print cut($0) said[$3]
	delete said[$3]
	test = ""
	lines = 0
	next
}

/^ +[A-Za-z0-9_]+_test\.go:[0-9]+: / {
	if (failed) {
		if (++lines <= most) print cut($0)
	} else if (test != "" && ++said_lines[test] <= most) said[test] = said[test] "\n" cut($0)
}

/^(panic|fatal error): |^WARNING: DATA RACE|^FAIL\t|^make.*: \*\*\* |^ci: / { print cut($0) }

function cut(line) { return length(line) > 400 ? substr(line, 1, 400) "…" : line }
