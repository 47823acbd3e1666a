// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
// greeting, the answers to its two commands, and events.
type qmpMessage struct {
	QMP   json.RawMessage `json:"QMP"`
	Error *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason    string `json:"reason"`
		Operation string `json:"operation"`
		NoSpace   bool   `json:"nospace"`
	} `json:"data"`
}

// maxMonitor bounds what is read from a QEMU, in bytes. A format takes some hundred. A QEMU
// that says more than this has been taken over.
const maxMonitor = 1 << 20

// short bounds the text that an error quotes. QEMU's own words are shorter.
func short(s string) string { return fmt.Sprintf("%.200s", s) }

// monitor speaks QMP until the other end closes. A disk that fails stops the VM
// (werror=stop). QEMU would then wait for ever, so it is told to quit at once.
func monitor(conn io.ReadWriter) (events, error) {
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
		var command string
		switch {
		case m.QMP != nil:
			command = "qmp_capabilities"
		case m.Error != nil:
			return ev, fmt.Errorf("QEMU's monitor: %s", short(m.Error.Desc))
		case m.Event == "SHUTDOWN":
			ev.shutdown = short(m.Data.Reason)
		case m.Event == "BLOCK_IO_ERROR":
			if ev.ioError == nil {
				ev.ioError = &ioFail{operation: short(m.Data.Operation), noSpace: m.Data.NoSpace, reason: short(m.Data.Reason)}
			}
			command = "quit"
		}
		if command != "" {
			if err := json.NewEncoder(conn).Encode(map[string]string{"execute": command}); err != nil {
				return ev, err
			}
		}
	}
}
