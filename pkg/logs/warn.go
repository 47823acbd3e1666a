// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package logs has what klog lacks: warnings with keys and values ([Warn]), which klog's InfoS and
// ErrorS have and its Warning has not, and failures that repeat without flooding the log ([Repeats]).
//
// Which severity and which level a line gets is decided as Kubernetes does:
//
//   - E: the plugin or its node failed, and a person has to look at it.
//   - W: something is not as it should be, and the plugin goes on; or a call failed because of a
//     condition that an E or W has reported.
//   - I: everything else, also a call that failed because of what was asked for.
//
// The levels of -v are 0 for what changes something or fails, 2 for what the plugin does by
// itself though there is nothing to do, 4 for calls that change nothing and for failures that
// repeat, and 5 for requests.
//
// Source: "Logging Conventions" of kubernetes/community, contributors/devel/sig-instrumentation/logging.md.
package logs

import (
	"fmt"
	"strconv"
	"strings"

	"k8s.io/klog/v2"
)

// Warn logs a warning in the form of klog's InfoS: keys are texts, and a value belongs to each.
func Warn(message string, keysAndValues ...any) {
	klog.WarningDepth(1, line(message, keysAndValues))
}

// line formats a message as klog's InfoS does. But a value is always within one line.
func line(message string, pairs []any) string {
	var b strings.Builder
	b.WriteString(strconv.Quote(message))
	for i := 0; i+1 < len(pairs); i += 2 {
		fmt.Fprintf(&b, " %v=%s", pairs[i], value(pairs[i+1]))
	}
	return b.String()
}

// value quotes texts, and leaves numbers as they are.
func value(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return strconv.Quote(v)
	case error:
		return strconv.Quote(v.Error())
	case fmt.Stringer:
		return strconv.Quote(v.String())
	}
	return fmt.Sprint(v)
}
