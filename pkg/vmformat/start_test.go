// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStart plays QEMU, and checks when the guest is told to go on, and what QEMU was told by then.
func TestStart(t *testing.T) {
	event := func(name, status string) (m qmpMessage) { m.Event, m.Data.Status = name, status; return m }
	status := func(s string) (m qmpMessage) { m.Return.Status = s; return m }
	var failed qmpMessage
	if err := json.Unmarshal([]byte(`{"error": {"desc": "migration is not supported"}}`), &failed); err != nil {
		t.Fatal(err)
	}
	const saving = "migrate-set-capabilities migrate-set-parameters getfd migrate"
	for name, c := range map[string]struct {
		restored, save bool
		said           []qmpMessage // after the guest said that it is ready
		early, saved   bool         // the guest goes on before that; the VM was saved
		told           string
	}{
		"boots":          {early: true},
		"saved":          {save: true, said: []qmpMessage{event("MIGRATION", "active"), event("MIGRATION", "completed"), status("finish-migrate"), status("postmigrate")}, saved: true, told: saving + " query-status query-status cont"},
		"not saved":      {save: true, said: []qmpMessage{event("MIGRATION", "failed"), status("running")}, told: saving + " query-status cont"},
		"cannot be":      {save: true, said: []qmpMessage{failed}, told: saving},
		"restored":       {restored: true, said: []qmpMessage{event("RESUME", "")}},
		"resumed itself": {save: true, said: []qmpMessage{event("RESUME", ""), event("MIGRATION", "completed"), status("postmigrate")}, saved: true, told: saving + " query-status cont"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs, err := socketpair()
			if err != nil {
				t.Fatal(err)
			}
			defer theirs.Close()
			var console strings.Builder
			s := &start{qmp: ours, console: &console, restored: c.restored}
			if c.save {
				if s.save, err = os.Create(filepath.Join(t.TempDir(), "state")); err != nil {
					t.Fatal(err)
				}
				defer s.save.Close()
			}
			s.onReady()
			if got := console.String() == "\n"; got != c.early {
				t.Errorf("the guest goes on when it is ready: %v", got)
			}
			for i, m := range c.said {
				if !c.early && console.String() != "" {
					t.Errorf("the guest goes on after %d of what QEMU said", i)
				}
				if err := s.onMonitor(m); err != nil {
					t.Error(err)
				}
			}
			s.onMonitor(status("running"))
			if console.String() != "\n" || s.saved != c.saved {
				t.Errorf("the guest read %q; the VM was saved: %v", console.String(), s.saved)
			}
			ours.Close()
			var told []string
			for in := json.NewDecoder(theirs); ; {
				var command struct{ Execute string }
				if in.Decode(&command) != nil {
					break
				}
				told = append(told, command.Execute)
			}
			if got := strings.Join(told, " "); got != c.told {
				t.Errorf("QEMU was told %q, want %q", got, c.told)
			}
		})
	}
}
