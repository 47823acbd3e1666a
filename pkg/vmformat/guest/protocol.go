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
	"strconv"
	"strings"
	"unicode"
)

// Paths inside the initramfs, and names on which host and guest must agree.
const (
	InitPath   = "/init"
	SetupPath  = "/setup.json"
	MarkerPath = "/zz-complete" // packed after everything else
	Marker     = "csi-disktemplate initramfs is complete\n"
	LibDir     = "/lib"

	// ControlSerial is the virtio-blk serial of the disk with the [Batch], and the verdicts
	// after it. Disk returns those of the templates.
	ControlSerial = "control"

	// ContentSerial is the serial of the disk with the archives of an order's [Content].
	ContentSerial = "content"

	// MaxJobs is how many disks for templates a VM has. Those that have no job are empty.
	MaxJobs = 16

	// BatchSize is the space for the batch on the control disk, in bytes, from its beginning.
	BatchSize = 64 << 10
	// VerdictSize is the size of each verdict after the batch, in bytes, one block.
	VerdictSize = 4096
	// ControlSize is the size of the control disk, in bytes.
	ControlSize = BatchSize + MaxJobs*VerdictSize

	// StagePrefix starts a console line that announces a [Stage].
	StagePrefix = "csi-disktemplate: stage "
)

// Disk returns the virtio-blk serial of the disk for a batch's job of that index.
func Disk(job int) string { return fmt.Sprintf("template%d", job) }

// VerdictAt returns where on the control disk a job's verdict is, in bytes.
func VerdictAt(job int) int64 { return BatchSize + int64(job)*VerdictSize }

// Stage is a step of the work as the guest announces it on its console.
type Stage string

// The stages, in order. The first two are the VM's, the others those of each job.
const (
	StageBoot   Stage = "boot"   // from power-on until /init runs mkfs
	StageReady  Stage = "ready"  // the guest waits for a line on its console
	StageMkfs   Stage = "mkfs"   // mkfs and fsync
	StageUnpack Stage = "unpack" // a content, until it is on the disk; only of a job that has one
	StageCheck  Stage = "check"  // superblock, read-only mount, checker
	StageDone   Stage = "done"   // the verdict is being written
)

// Progress is how far a job has come.
type Progress struct {
	Stage Stage
	// Done and Total are bytes of the archives, in [StageUnpack]. Total is 0 in the other stages.
	Done, Total int64
}

// line is the console line that announces p.
func (p Progress) line(job int) string {
	if p.Total == 0 {
		return fmt.Sprintf("%s%s %d", StagePrefix, p.Stage, job)
	}
	return fmt.Sprintf("%s%s %d %d %d", StagePrefix, p.Stage, job, p.Done, p.Total)
}

// ParseProgress returns the progress that a console line announces and the index of its job, and
// whether it announces any.
func ParseProgress(line string) (p Progress, job int, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(line), StagePrefix)
	if !ok {
		return Progress{}, 0, false
	}
	words := strings.Fields(rest)
	number := func(i int) int64 {
		if i >= len(words) {
			return 0
		}
		n, _ := strconv.ParseInt(words[i], 10, 64)
		return max(n, 0)
	}
	if len(words) > 0 {
		p.Stage = Stage(words[0])
	}
	if p.Total = number(3); p.Total > 0 {
		p.Done = min(number(2), p.Total)
	}
	if n := number(1); n < MaxJobs {
		job = int(n)
	}
	return p, job, true
}

// Setup tells the guest what to load. It is a file of the initramfs.
type Setup struct {
	Modules    []string `json:"modules"`    // files to load before the guest is ready, dependencies first
	Transports []string `json:"transports"` // show the disks: to load when the guest has been told to go on
	Version    []string `json:"version"`    // argv that prints mkfs's version
}

// Batch is the work of one VM. The host writes it to the control disk.
type Batch struct {
	// Seed makes the guest's random numbers those of this run: a VM that was saved after its
	// boot would else draw the same ones each time it is restored.
	Seed   []byte  `json:"seed"`
	Time   int64   `json:"time"` // wall clock, in ns since 1970, for the same reason
	Orders []Order `json:"orders"`
}

// Order is one job of a batch. Its disk is that of its index.
type Order struct {
	Nonce  string  `json:"nonce"` // for its verdict
	Job    Job     `json:"job"`
	Layers []Layer `json:"layers,omitempty"` // the archives of the job's content, bottom first
}

// Job tells the guest what to make. It is data: the host has decided every word of it, and the
// guest carries it out in order.
type Job struct {
	Filesystem string   `json:"filesystem"`
	Size       int64    `json:"size"` // bytes
	Label      string   `json:"label,omitempty"`
	Mkfs       []string `json:"mkfs"`                // argv; DevicePlaceholder stands for the disk
	Check      []string `json:"check"`               // argv; DevicePlaceholder stands for the disk
	MountData  string   `json:"mountData,omitempty"` // for the check

	Content  *Content `json:"content,omitempty"`  // nil: the filesystem stays empty
	FillData string   `json:"fillData,omitempty"` // the mount's data while it is filled
}

// DevicePlaceholder stands for the template's block device in a [Job]'s commands.
const DevicePlaceholder = "@DISK@"

// Verdict is the guest's own report.
type Verdict struct {
	Nonce    string `json:"nonce"` // of this order, so that no other verdict passes
	OK       bool   `json:"ok"`
	Stage    Stage  `json:"stage"`             // where it ended
	ExitCode int    `json:"exitCode"`          // of the command that failed; ExitUnwritten if mkfs wrote nothing
	Error    string `json:"error,omitempty"`   // one line
	Output   string `json:"output,omitempty"`  // last lines of the failed command
	Kernel   string `json:"kernel,omitempty"`  // uname -r
	Mkfs     string `json:"mkfs,omitempty"`    // its version line
	UUID     string `json:"uuid,omitempty"`    // of the new filesystem
	MkfsMS   int64  `json:"mkfsMillis"`        // mkfs and fsync
	CheckMS  int64  `json:"checkMillis"`       // everything after mkfs and unpacking
	Written  int64  `json:"checkWroteSectors"` // 512-byte sectors written by the check: must be 0

	// Of a job with a content.
	Entries  int64 `json:"entries,omitempty"`      // entries that were unpacked
	Bytes    int64 `json:"bytes,omitempty"`        // of file content, without holes
	UnpackMS int64 `json:"unpackMillis,omitempty"` // unpacking, sync and unmount
	Full     Full  `json:"full,omitempty"`         // what the content needed more of
}

// Full is what a filesystem ran out of while it was filled.
type Full string

// The values of Full. The empty one means that everything fitted.
const (
	FullSpace  Full = "space"
	FullInodes Full = "inodes"
)

// ExitUnwritten is the exit code of a mkfs that claimed success but left no
// valid superblock behind.
const ExitUnwritten = 64

// ErrNoVerdict means that the verdict disk has no verdict of this run.
var ErrNoVerdict = errors.New("no verdict")

// A batch and a verdict begin with this header (little endian). The JSON follows.
//
//	 0  8 bytes  magic
//	 8  uint32   length of the JSON
//	12  uint32   crc32c of the JSON
var (
	verdictMagic = [8]byte{'C', 'S', 'I', 'D', 'T', 'V', '0', '1'}
	batchMagic   = [8]byte{'C', 'S', 'I', 'D', 'T', 'B', '0', '1'}
)

const header = 16

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal puts a header before a body, and zeros behind it up to size.
func seal(magic [8]byte, body []byte, size int) []byte {
	b := make([]byte, size)
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(body, castagnoli))
	copy(b[header:], body)
	return b
}

// unseal returns the body behind a header.
func unseal(magic [8]byte, b []byte) ([]byte, error) {
	if len(b) < header || !bytes.Equal(b[:8], magic[:]) {
		return nil, errors.New("it was never written")
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if uint64(n) > uint64(len(b)-header) {
		return nil, fmt.Errorf("its length of %d bytes does not fit the disk", n)
	}
	body := b[header : header+int(n)]
	if got, want := crc32.Checksum(body, castagnoli), binary.LittleEndian.Uint32(b[12:]); got != want {
		return nil, fmt.Errorf("checksum %#x, expected %#x", got, want)
	}
	return body, nil
}

// Marshal encodes b as exactly [BatchSize] bytes.
func (b Batch) Marshal() ([]byte, error) {
	body, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	if len(body) > BatchSize-header {
		return nil, fmt.Errorf("the batch of %d orders is %d bytes too large for its disk", len(b.Orders), len(body)-BatchSize+header)
	}
	return seal(batchMagic, body, BatchSize), nil
}

// ParseBatch decodes what [Batch.Marshal] returned.
func ParseBatch(b []byte) (Batch, error) {
	var batch Batch
	body, err := unseal(batchMagic, b)
	if err == nil {
		err = json.Unmarshal(body, &batch)
	}
	if err == nil && len(batch.Orders) > MaxJobs {
		err = fmt.Errorf("it has %d orders", len(batch.Orders))
	}
	if err != nil {
		return Batch{}, fmt.Errorf("the batch on the control disk: %w", err)
	}
	return batch, nil
}

// Marshal encodes v as exactly [VerdictSize] bytes. If it does not fit, Marshal cuts the
// beginning of Output, since its end explains a failure, and then the end of Error.
func (v Verdict) Marshal() ([]byte, error) {
	for {
		body, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		if excess := header + len(body) - VerdictSize; excess > 0 {
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
		return seal(verdictMagic, body, VerdictSize), nil
	}
}

// Shown is a line that a guest wrote, as errors quote it and terminals show it: valid UTF-8, in which each character
// without a glyph is a question mark, and a tab is a space.
func Shown(line string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, strings.ToValidUTF8(line, "?"))
}

func (v *Verdict) show() {
	for _, line := range []*string{(*string)(&v.Stage), &v.Error, &v.Kernel, &v.Mkfs, &v.UUID} {
		*line = Shown(*line)
	}
	output := strings.Split(v.Output, "\n")
	for i := range output {
		output[i] = Shown(output[i])
	}
	v.Output = strings.Join(output, "\n")
}

// ParseVerdict decodes a verdict that the guest wrote. Its texts are as [Shown] has them, and Output keeps its lines.
// Where there is none, or one of another nonce, it returns [ErrNoVerdict] with the reason.
func ParseVerdict(b []byte, nonce string) (Verdict, error) {
	var v Verdict
	body, err := unseal(verdictMagic, b)
	if err == nil {
		err = json.Unmarshal(body, &v)
	}
	if err != nil {
		return Verdict{}, fmt.Errorf("%w: %w", ErrNoVerdict, err)
	}
	if v.Nonce != nonce {
		return Verdict{}, fmt.Errorf("%w of this run: the nonce on the disk is %.64q, want %q", ErrNoVerdict, v.Nonce, nonce)
	}
	v.show()
	return v, nil
}
