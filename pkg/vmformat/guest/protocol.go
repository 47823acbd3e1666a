// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// Paths inside the initramfs, and names on which host and guest must agree.
const (
	InitPath   = "/init"
	JobPath    = "/job.json"
	MarkerPath = "/zz-complete" // packed after everything else
	Marker     = "csi-disktemplate initramfs is complete\n"
	LibDir     = "/lib"

	// TemplateSerial and VerdictSerial are the virtio-blk serials of the two disks.
	TemplateSerial = "template"
	VerdictSerial  = "verdict"

	// NonceArg precedes the run's nonce among init's arguments. The kernel hands the
	// words after "--" on its command line to init.
	NonceArg = "nonce="

	// VerdictSize is the size of the verdict disk in bytes, one block.
	VerdictSize = 4096

	// StagePrefix starts a console line that announces a [Stage].
	StagePrefix = "csi-disktemplate: stage "
)

// Stage is a step of the formatting as the guest announces it on its console.
type Stage string

// The stages, in order.
const (
	StageBoot  Stage = "boot"  // from power-on until /init runs mkfs
	StageMkfs  Stage = "mkfs"  // mkfs and fsync
	StageCheck Stage = "check" // superblock, read-only mount, checker
	StageDone  Stage = "done"  // the verdict is being written
)

// ParseStage returns the stage that a console line announces, and whether it announces one.
func ParseStage(line string) (Stage, bool) {
	s, ok := strings.CutPrefix(strings.TrimSpace(line), StagePrefix)
	return Stage(s), ok
}

// Job tells the guest what to make. It is data: the host has decided every word of it, and the
// guest carries it out in order.
type Job struct {
	Filesystem string   `json:"filesystem"`
	Size       int64    `json:"size"` // bytes
	Label      string   `json:"label,omitempty"`
	Modules    []string `json:"modules"` // files to load, dependencies first
	Version    []string `json:"version"` // argv that prints mkfs's version
	Mkfs       []string `json:"mkfs"`    // argv; DevicePlaceholder stands for the disk
	Check      []string `json:"check"`   // argv; DevicePlaceholder stands for the disk
	MountData  string   `json:"mountData,omitempty"`
}

// DevicePlaceholder stands for the template's block device in a [Job]'s commands.
const DevicePlaceholder = "@DISK@"

// Verdict is the guest's own report.
type Verdict struct {
	Nonce    string `json:"nonce"` // of this run, so that a stale verdict does not pass
	OK       bool   `json:"ok"`
	Stage    Stage  `json:"stage"`             // where it ended
	ExitCode int    `json:"exitCode"`          // of the command that failed; ExitUnwritten if mkfs wrote nothing
	Error    string `json:"error,omitempty"`   // one line
	Output   string `json:"output,omitempty"`  // last lines of the failed command
	Kernel   string `json:"kernel,omitempty"`  // uname -r
	Mkfs     string `json:"mkfs,omitempty"`    // its version line
	UUID     string `json:"uuid,omitempty"`    // of the new filesystem
	BootMS   int64  `json:"bootMillis"`        // kernel's uptime when mkfs started
	MkfsMS   int64  `json:"mkfsMillis"`        // mkfs and fsync
	CheckMS  int64  `json:"checkMillis"`       // everything after mkfs
	Written  int64  `json:"checkWroteSectors"` // 512-byte sectors written after mkfs: must be 0
}

// ExitUnwritten is the exit code of a mkfs that claimed success but left no
// valid superblock behind.
const ExitUnwritten = 64

// ErrNoVerdict means that the verdict disk has no verdict of this run.
var ErrNoVerdict = errors.New("no verdict")

// A verdict disk begins with this header (little endian). The JSON follows.
//
//	 0  8 bytes  magic
//	 8  uint32   length of the JSON
//	12  uint32   crc32c of the JSON
var verdictMagic = [8]byte{'C', 'S', 'I', 'D', 'T', 'V', '0', '1'}

const verdictHeader = 16

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Marshal encodes v as exactly [VerdictSize] bytes. If it does not fit, Marshal cuts the
// beginning of Output, since its end explains a failure, and then the end of Error.
func (v Verdict) Marshal() ([]byte, error) {
	for {
		body, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		if excess := verdictHeader + len(body) - VerdictSize; excess > 0 {
			// JSON writes one byte as up to six, so this does not cut much more than needed.
			cut := excess/6 + 1
			switch {
			case v.Output != "":
				v.Output = v.Output[min(len(v.Output), cut):]
			case v.Error != "":
				v.Error = v.Error[:max(0, len(v.Error)-cut)]
			default:
				return nil, fmt.Errorf("the verdict is %d bytes too large for its disk", excess)
			}
			continue
		}
		b := make([]byte, VerdictSize)
		copy(b, verdictMagic[:])
		binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
		binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(body, castagnoli))
		copy(b[verdictHeader:], body)
		return b, nil
	}
}

// ParseVerdict decodes the verdict that the guest wrote. A disk without one, or with one of
// another nonce, returns [ErrNoVerdict] with the reason.
func ParseVerdict(b []byte, nonce string) (Verdict, error) {
	var v Verdict
	if len(b) < verdictHeader || !bytes.Equal(b[:8], verdictMagic[:]) {
		return v, fmt.Errorf("%w: the verdict disk was never written", ErrNoVerdict)
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if uint64(n) > uint64(len(b)-verdictHeader) {
		return v, fmt.Errorf("%w: its length of %d bytes does not fit the disk", ErrNoVerdict, n)
	}
	body := b[verdictHeader : verdictHeader+int(n)]
	if got, want := crc32.Checksum(body, castagnoli), binary.LittleEndian.Uint32(b[12:]); got != want {
		return v, fmt.Errorf("%w: checksum %#x, expected %#x", ErrNoVerdict, got, want)
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return Verdict{}, fmt.Errorf("%w: %w", ErrNoVerdict, err)
	}
	if v.Nonce != nonce {
		return Verdict{}, fmt.Errorf("%w of this run: the nonce on the disk is %.64q, want %q", ErrNoVerdict, v.Nonce, nonce)
	}
	return v, nil
}
