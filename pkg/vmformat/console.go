// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"strings"
	"sync"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// console collects what the VM prints, and reports the progress that it announces there, with the
// index of the job.
type console struct {
	progress func(guest.Progress, int)

	mu    sync.Mutex
	lines []string
	part  []byte
	panic string
}

const (
	consoleLines = 20   // an error shows so many
	consoleWidth = 1024 // bytes of one line that are kept
)

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range b {
		switch {
		case ch == '\n':
			c.line(string(c.part))
			c.part = c.part[:0]
		case ch != '\r' && len(c.part) < consoleWidth:
			c.part = append(c.part, ch)
		}
	}
	return len(b), nil
}

// line takes one line. It may contain any bytes, or end within a character.
func (c *console) line(s string) {
	s = guest.Shown(s)
	if p, job, ok := guest.ParseProgress(s); ok {
		c.progress(p, job)
		return
	}
	if c.panic == "" && strings.Contains(s, "Kernel panic") {
		c.panic = strings.TrimSpace(s)
	}
	if s = strings.TrimSpace(s); s != "" {
		c.lines = append(c.lines, s)
	}
	if len(c.lines) > consoleLines {
		c.lines = c.lines[1:]
	}
}

// last returns the last lines printed, and the line of a kernel panic, which may be further
// up: a backtrace follows it.
func (c *console) last() (lines []string, panic string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.part) > 0 {
		c.line(string(c.part))
		c.part = nil
	}
	return c.lines, c.panic
}
