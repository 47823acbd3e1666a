// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"unicode"
	"unicode/utf8"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// hear returns the events that the monitor reads from QEMU's words, and its answers.
func hear(said io.Reader) (events, string, error) {
	var answers bytes.Buffer
	ev, err := monitor(struct {
		io.Reader
		io.Writer
	}{said, &answers}, ignored)
	return ev, answers.String(), err
}

// FuzzQEMU lets a QEMU, perhaps one that has been taken over, say anything on its monitor and
// its console. The sizes of the pieces must make no difference, the text that is kept and
// reported must be bounded, and no text may turn a failure into a success.
func FuzzQEMU(f *testing.F) {
	for _, s := range []string{
		"", "garbage", `{"error": {"desc": "bad command"}}`, `{"error": null}`, "null", "{}", `{"QMP": {}}{"return": {}}`,
		`{"QMP": {}}{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}`,
		`{"event": "SHUTDOWN", "data": {"reason": "guest-panic"}} {"EVENT": "SHUTDOWN"}`,
		`{"event": "BLOCK_IO_ERROR", "data": {"operation": "write", "nospace": true, "reason": "No space"}}`,
		`{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}} {"error": {"desc": "` + strings.Repeat("é", 5000) + `"}}`,
		`{"event": "BLOCK_IO_ERROR", "data": {"reason": "` + strings.Repeat("é", 5000) + `"}}`,
		guest.StagePrefix + "mkfs 3\r\nKernel panic - not syncing: \xff\n\n" + strings.Repeat("ä", 1000) + "\n",
		strings.Repeat("x\n", 50) + strings.Repeat("\xff", 2000),
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, piece uint8) {
		if len(b) > maxMonitor/2 {
			return
		}
		ev := fuzzMonitor(t, b)
		fuzzConsole(t, b, 1+int(piece), ev)
	})
}

func fuzzMonitor(t *testing.T, b []byte) events {
	t.Helper()
	ev, answers, err := hear(bytes.NewReader(b))
	slow, slowAnswers, slowErr := hear(iotest.OneByteReader(bytes.NewReader(b)))
	if !reflect.DeepEqual(ev, slow) || answers != slowAnswers || fmt.Sprint(err) != fmt.Sprint(slowErr) {
		t.Errorf("read at once: %+v, %v; in pieces: %+v, %v", ev, err, slow, slowErr)
	}
	for line := range strings.Lines(answers) {
		if line != `{"execute":"qmp_capabilities"}`+"\n" && (line != `{"execute":"quit"}`+"\n" || ev.ioError == nil) {
			t.Errorf("QEMU was told %q", line)
		}
	}
	o := good()
	o.events, o.monitor = ev, err
	judged(t, o, ev.ioError == nil && ev.shutdown == reasonGuestShutdown && err == nil)
	if err != nil {
		return ev
	}
	// The monitor also hears what comes later, and does not forget what came before.
	const failed, off = ` {"event": "BLOCK_IO_ERROR", "data": {"operation": "read", "reason": "EIO"}}`, ` {"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}`
	then, _, err := hear(io.MultiReader(bytes.NewReader(b), strings.NewReader(off)))
	if err != nil || then.shutdown != reasonGuestShutdown || !reflect.DeepEqual(then.ioError, ev.ioError) {
		t.Errorf("after %+v and a power-off it has %+v: %v", ev, then, err)
	}
	then, answers, err = hear(io.MultiReader(bytes.NewReader(b), strings.NewReader(failed)))
	if err != nil || then.ioError == nil || then.shutdown != ev.shutdown || !strings.HasSuffix(answers, `"quit"}`+"\n") || ev.ioError != nil && *ev.ioError != *then.ioError {
		t.Errorf("after %+v and a failed disk it has %+v: %v", ev, then, err)
	}
	return ev
}

// judged checks a judgement, and that its message is valid UTF-8, bounded, and only shown by a terminal.
func judged(t *testing.T, o outcome, pass bool) {
	t.Helper()
	err := o.judge()
	if (err == nil) != pass {
		t.Errorf("%+v is judged %v, want success: %v", o, err, pass)
	}
	if err == nil {
		return
	}
	limit := 2*guest.VerdictSize + len(strings.Join(o.console, "\n  ")) + len(o.panic)
	if text := err.Error(); !errors.Is(err, ErrFormat) || !utf8.ValidString(text) || len(text) > limit {
		t.Errorf("the error has %d bytes: %.600q", len(text), text)
	}
	for line := range strings.Lines(err.Error()) {
		if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("a terminal obeys %.600q", line)
		}
	}
}

func fuzzConsole(t *testing.T, b []byte, piece int, ev events) {
	t.Helper()
	var stages, slowStages []string
	c := &console{progress: func(p guest.Progress, job int) { stages = append(stages, fmt.Sprint(p, job)) }}
	c.Write(b)
	lines, panicked := c.last()
	slow := &console{progress: func(p guest.Progress, job int) { slowStages = append(slowStages, fmt.Sprint(p, job)) }}
	for rest := b; len(rest) > 0; rest = rest[min(piece, len(rest)):] {
		slow.Write(rest[:min(piece, len(rest))])
	}
	slowLines, slowPanicked := slow.last()
	if !reflect.DeepEqual(lines, slowLines) || panicked != slowPanicked || !reflect.DeepEqual(stages, slowStages) {
		t.Errorf("read at once: %q, %q, %q; in pieces: %q, %q, %q", lines, panicked, stages, slowLines, slowPanicked, slowStages)
	}
	if len(lines) > consoleLines || panicked != "" && !strings.Contains(panicked, "Kernel panic") || len(panicked) > consoleWidth {
		t.Errorf("kept %d lines, panic %q", len(lines), panicked)
	}
	for _, line := range lines {
		if line == "" || len(line) > consoleWidth || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("kept the line %q", line)
		}
	}
	o := good()
	o.events, o.console, o.panic = ev, lines, panicked
	o.verdict, o.noVerdict = guest.ParseVerdict(b, "n")
	judged(t, o, false)
}
