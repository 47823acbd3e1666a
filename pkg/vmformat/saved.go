// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

// saved is a VM that has booted for a filesystem and waits for its batch: QEMU's migration
// stream, in a file without a name. It goes with this process.
type saved struct {
	state *os.File
	base  string // base digest of the files that it was booted from
	parts []part // these files, and QEMU
}

// part is a file of this machine, as it was when it was used.
type part struct {
	path string
	info os.FileInfo
}

// partsOf looks at files.
func partsOf(paths []string) ([]part, error) {
	var parts []part
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{path, info})
	}
	return parts, nil
}

// changed reports whether one of the files is not the one that was used, or is not there.
func (s *saved) changed() bool {
	for _, p := range s.parts {
		now, err := os.Stat(p.path)
		if err != nil || !os.SameFile(now, p.info) || now.Size() != p.info.Size() || !now.ModTime().Equal(p.info.ModTime()) {
			return true
		}
	}
	return false
}

// saveRoom is how many bytes must be free where a VM is saved. It takes 115 to 130 MiB, and is not
// worth the last space of a pool.
const saveRoom = 2 << 30

// savePlace makes the file for a saved VM in dir. It returns nil where none can be kept: that only
// costs time.
func savePlace(dir string) *os.File {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil
	}
	f, err := tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil
	}
	if st, err := fsctl.StatusOf(f); err != nil || st.Available < saveRoom {
		f.Close()
		return nil
	}
	return f
}

// again opens a file anew, from its beginning, for reading. It need not have a name.
func again(f *os.File) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// start brings one VM to the point where it does its batch: it boots, or it is restored. In
// between it may be saved.
//
// The guest waits for a line on its console. A restored one gets it once QEMU runs it. One that
// has booted gets it when it says that it is ready, or when it has been saved.
type start struct {
	qmp      *os.File
	console  io.Writer // QEMU's standard input
	restored bool
	save     *os.File // nil if the VM is not to be saved

	mu      sync.Mutex // for qmp: commands come from the console and from the monitor
	saved   bool
	ready   time.Time
	saving  bool // it is ready, and waits until it was saved
	settled bool // the guest was told to go on
}

// onReady is called when the guest says that it is ready.
func (s *start) onReady() {
	if s.restored {
		return // this was said before it was saved
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saving = s.save != nil
	if s.save == nil || s.begin() != nil {
		s.goOn()
	}
}

// isReady reports whether the guest was told to go on, or is being saved before that.
func (s *start) isReady() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.settled || s.saving
}

// begin has QEMU save the VM. The migration has no limit of bandwidth: the default would make it
// take a second.
func (s *start) begin() error {
	return errors.Join(
		execute(s.qmp, "migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}}),
		execute(s.qmp, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(1) << 40}),
		s.give(),
		execute(s.qmp, "migrate", map[string]any{"uri": "fd:state"}),
	)
}

// give hands QEMU the descriptor of the file: SCM_RIGHTS in unix(7), getfd in QEMU's QMP reference.
func (s *start) give() error {
	const command = `{"execute": "getfd", "arguments": {"fdname": "state"}}` + "\n"
	return os.NewSyscallError("sendmsg", syscall.Sendmsg(int(s.qmp.Fd()), []byte(command), syscall.UnixRights(int(s.save.Fd())), nil, 0))
}

// onMonitor is called for what QEMU says.
func (s *start) onMonitor(m qmpMessage) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case m.Error != nil && s.save != nil && !s.settled:
		s.goOn() // without being saved
	case m.Error != nil:
		return m.failure()
	case m.Event == "RESUME" && s.restored:
		s.goOn()
	case m.Event == "MIGRATION" && s.save != nil && (m.Data.Status == "completed" || m.Data.Status == "failed"):
		s.saved = m.Data.Status == "completed"
		return execute(s.qmp, "query-status", nil)
	case m.Return.Status == "finish-migrate":
		// The event comes a moment before the VM may be resumed.
		time.Sleep(time.Millisecond)
		return execute(s.qmp, "query-status", nil)
	case m.Return.Status != "" && !s.settled:
		if err := execute(s.qmp, "cont", nil); err != nil {
			return err
		}
		s.goOn()
	}
	return nil
}

// goOn tells the guest to go on. A failure shows as a guest that never ends.
func (s *start) goOn() {
	if s.settled {
		return
	}
	s.settled, s.ready = true, time.Now()
	io.WriteString(s.console, "\n")
}
