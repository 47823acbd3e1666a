// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// events is what QEMU reported of the VM over its monitor.
type events struct {
	shutdown string  // reason of the SHUTDOWN event; "" if there was none
	ioError  *ioFail // the first BLOCK_IO_ERROR, if there was one
}

type ioFail struct {
	operation string // read or write
	noSpace   bool
	reason    string
}

// reasonGuestShutdown is the only good end of a VM: init powered it off. A panic, or an init
// that exits, resets the VM.
const reasonGuestShutdown = "guest-shutdown"

// qmpMessage is the part of the QEMU Machine Protocol that this client understands: the
// greeting, the answers to its commands, and events.
type qmpMessage struct {
	QMP   json.RawMessage `json:"QMP"`
	Error *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Return struct {
		Status string `json:"status"` // of query-status
	} `json:"return"`
	Event string `json:"event"`
	Data  struct {
		Reason    string `json:"reason"`
		Operation string `json:"operation"`
		NoSpace   bool   `json:"nospace"`
		Status    string `json:"status"` // of MIGRATION
	} `json:"data"`
}

// failure returns why a command failed, or nil.
func (m qmpMessage) failure() error {
	if m.Error == nil {
		return nil
	}
	return fmt.Errorf("QEMU's monitor: %s", short(m.Error.Desc))
}

// maxMonitor bounds what is read from a QEMU, in bytes. A format takes some hundred, and one that
// saves the VM some thousand. A QEMU that says more than this has been taken over.
const maxMonitor = 1 << 20

// short bounds the text that an error quotes. QEMU's own words are shorter.
func short(s string) string { return guest.Shown(fmt.Sprintf("%.200s", s)) }

// execute is a command of QMP.
func execute(conn io.Writer, command string, arguments map[string]any) error {
	m := map[string]any{"execute": command}
	if arguments != nil {
		m["arguments"] = arguments
	}
	return json.NewEncoder(conn).Encode(m)
}

// monitor speaks QMP until the other end closes. A disk that fails stops the VM
// (werror=stop). QEMU would then wait for ever, so it is told to quit at once.
//
// heard gets everything else that QEMU says, also that a command failed.
func monitor(conn io.ReadWriter, heard func(qmpMessage) error) (events, error) {
	var ev events
	in := json.NewDecoder(io.LimitReader(conn, maxMonitor))
	for {
		var m qmpMessage
		if err := in.Decode(&m); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return ev, err
		}
		var err error
		switch {
		case m.QMP != nil:
			err = execute(conn, "qmp_capabilities", nil)
		case m.Event == "SHUTDOWN":
			ev.shutdown = short(m.Data.Reason)
		case m.Event == "BLOCK_IO_ERROR":
			if ev.ioError == nil {
				ev.ioError = &ioFail{operation: short(m.Data.Operation), noSpace: m.Data.NoSpace, reason: short(m.Data.Reason)}
			}
			err = execute(conn, "quit", nil)
		default:
			err = heard(m)
		}
		if err != nil {
			return ev, err
		}
	}
}
