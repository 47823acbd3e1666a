// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// events is what QEMU said of the machine's life over its monitor.
type events struct {
	shutdown string  // reason of the SHUTDOWN event; "" if there was none
	ioError  *ioFail // the first BLOCK_IO_ERROR, if there was one
}

type ioFail struct {
	operation string // read or write
	noSpace   bool
	reason    string
}

// reasonGuestShutdown is the only end of a machine that did its work: init
// powered it off. A panic, or an init that exits, resets it.
const reasonGuestShutdown = "guest-shutdown"

// qmpMessage is what this client understands of the QEMU Machine Protocol:
// a greeting, the answers to its two commands, and events.
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

// maxMonitor bounds what is read of a QEMU, in bytes. A format takes some
// hundred; one that says more than this has been taken over.
const maxMonitor = 1 << 20

// short bounds what becomes part of an error: QEMU's own words are shorter.
func short(s string) string { return fmt.Sprintf("%.200s", s) }

// monitor speaks QMP until the other end closes. A disk that fails stops the
// machine (werror=stop): it is told to quit at once, as it would wait for ever.
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
