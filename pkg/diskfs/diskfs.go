// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Sizes, in bytes.
const (
	MiB = 1 << 20
	// MaxSize is the largest image: a template's key has a 32-bit number of MiB.
	MaxSize = (1<<32 - 1) << 20

	// blockSize is the block size and the sector size of every image.
	blockSize = 4096
	// usefulSize is the default size of a filesystem that could be smaller.
	usefulSize = 256 * MiB
)

var (
	// ErrUnknown means that there is no filesystem of that name.
	ErrUnknown = errors.New("unknown filesystem")
	// ErrInvalid means that a label or a format option is not allowed.
	ErrInvalid = errors.New("invalid format")
	// ErrOutOfRange means that a size is outside the filesystem's limits.
	ErrOutOfRange = errors.New("size out of range")
	// ErrCorrupt means that the image does not contain the filesystem that it should.
	ErrCorrupt = errors.New("corrupt image")
	// ErrUnclean means that the filesystem was not unmounted, and its journal waits for replay.
	ErrUnclean = errors.New("filesystem not cleanly unmounted")
)

// Filesystem is one row of the table.
type Filesystem struct {
	Name    string   // the filesystem's type, as mount(2) and CSI's fsType spell it
	Package string   // Debian package that has the programs below
	Mkfs    string   // formatting program
	Checker string   // checking program
	Modules []string // kernel modules that can mount it, without their dependencies

	// MinSize is the smallest image, in bytes, a whole number of MiB. It is the least with which
	// mkfs succeeds for every combination of the allowed options, and a kernel mounts the result
	// and writes a file.
	MinSize int64
	// MaxSize is the largest image, in bytes, for which the checker fits into the memory of the
	// formatting VM.
	MaxSize int64

	// MountData are the options that every mount of a clone needs.
	MountData []string
	// ROMountData are the options with which a read-only mount of a clean
	// filesystem writes nothing to the device.
	ROMountData []string
	// FillMountData are the options of the mount in which a new filesystem is filled, before it is
	// ever used. A failure then costs nothing: the image is thrown away.
	FillMountData []string

	// Grower is the program that grows the filesystem while it is not mounted. It is empty for
	// filesystems that every kernel lets the plugin grow while they are mounted.
	Grower string

	maxLabel    int // bytes
	options     []option
	mkfs        func(opts map[string]string) []string // everything but label and device
	check       []string                              // everything but the device
	repair      []string                              // the same, for the repair that Grower wants first
	conflict    func(opts map[string]string) error    // refuses options that are valid, but not together; may be nil
	identify    func(r io.ReaderAt) (Superblock, error)
	verify      func(r io.ReaderAt, size int64) (Superblock, error)
	newIdentity func(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error
}

// table has every filesystem, sorted by name.
var table = []*Filesystem{&btrfs, &ext4, &raw, &xfs}

// Superblock is a filesystem's description of itself.
type Superblock struct {
	UUID      uuid.UUID
	Label     string
	Size      int64 // bytes that the filesystem covers
	BlockSize int   // bytes

	slack int64 // the filesystem leaves fewer bytes than this unused at the end of its device
}

// Short reports whether the filesystem could grow on a device of size bytes.
func (sb Superblock) Short(size int64) bool { return size-sb.Size >= sb.slack }

// covers returns [ErrCorrupt] unless the filesystem covers an image of so many bytes.
func (sb Superblock) covers(bytes int64) error {
	if sb.Size <= bytes && !sb.Short(bytes) {
		return nil
	}
	return corrupt("the filesystem covers %s (%d bytes), want at most the image's %s and no less than %d bytes",
		size.Format(sb.Size), sb.Size, size.Format(bytes), bytes-sb.slack+1)
}

// Lookup finds a filesystem by name, or returns [ErrUnknown].
func Lookup(name string) (*Filesystem, error) {
	var names []string
	for _, fs := range table {
		if fs.Name == name {
			return fs, nil
		}
		names = append(names, fs.Name)
	}
	return nil, fmt.Errorf("%w %q: choose one of %s", ErrUnknown, name, strings.Join(names, ", "))
}

// The names of two filesystems that requests mean without saying so.
const (
	Default = "ext4" // that of a volume whose request names none
	Disk    = "raw"  // that of a disk whose consumer, or content, decides what is inside
)

// Names lists the filesystems that are formatted, sorted. It leaves out raw.
func Names() []string {
	var names []string
	for _, fs := range table {
		if fs.Formatted() {
			names = append(names, fs.Name)
		}
	}
	return names
}

// Formatted reports whether there is a filesystem inside. It is false for raw, which has no template,
// nothing to verify and no identity.
func (fs *Filesystem) Formatted() bool { return fs.Mkfs != "" }

// DefaultSize is the size, in bytes, if none is asked for.
func (fs *Filesystem) DefaultSize() int64 { return max(usefulSize, fs.MinSize) }

// RoundUp rounds a size in bytes up to whole MiB. It returns a size above [MaxSize] as it is, since
// rounding could overflow. No filesystem allows such a size.
func RoundUp(size int64) int64 {
	if size > MaxSize {
		return size
	}
	return (size + MiB - 1) / MiB * MiB
}

// checkSize returns [ErrOutOfRange] for a size, in bytes, outside the limits.
func (fs *Filesystem) checkSize(bytes int64) error {
	if bytes >= fs.MinSize && bytes <= fs.MaxSize {
		return nil
	}
	return fmt.Errorf("%w: %s is outside the limits of %s, %s to %s; ask for a size in between",
		ErrOutOfRange, size.Format(bytes), fs.Name, size.Format(fs.MinSize), size.Format(fs.MaxSize))
}

// CheckLabel returns [ErrInvalid] for a label that is too long for the filesystem, or that a command
// line or a path in /dev/disk/by-label could not contain. The empty label means none.
func (fs *Filesystem) CheckLabel(label string) error {
	if len(label) > fs.maxLabel {
		return fmt.Errorf("%w: label %.64q has %d bytes, %s allows %d; shorten it", ErrInvalid, label, len(label), fs.Name, fs.maxLabel)
	}
	if strings.HasPrefix(label, "-") || strings.ContainsFunc(label, notLabel) {
		return fmt.Errorf("%w: label %.64q: a label has only letters, digits, '.', '_' and '-', and does not begin with '-'", ErrInvalid, label)
	}
	return nil
}

func notLabel(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
}

// option is one entry of a filesystem's allow-list.
type option struct {
	key  string
	want string // the allowed values, for messages
	ok   func(value string) bool
}

// oneOf is an option with a closed list of values.
func oneOf(key string, values ...string) option {
	return option{key, "one of " + strings.Join(values, ", "), func(v string) bool { return slices.Contains(values, v) }}
}

// number is an option with a range of decimal numbers. Only the canonical spelling is allowed: "5"
// and "05" would make two templates with one content.
func number(key, kind string, lo, hi int, ok func(int) bool) option {
	return option{key, fmt.Sprintf("%s from %d to %d", kind, lo, hi), func(v string) bool {
		n, err := strconv.Atoi(v)
		return err == nil && strconv.Itoa(n) == v && n >= lo && n <= hi && ok(n)
	}}
}

// CheckOptions returns [ErrInvalid] for a format option that is not on the
// filesystem's allow-list.
func (fs *Filesystem) CheckOptions(opts map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		i := slices.IndexFunc(fs.options, func(o option) bool { return o.key == key })
		if i < 0 {
			return fmt.Errorf("%w: option %.64q is unknown: %s has %s", ErrInvalid, key, fs.Name, fs.optionNames())
		}
		if o := fs.options[i]; !o.ok(opts[key]) {
			return fmt.Errorf("%w: %s option %s=%.64q: use %s", ErrInvalid, fs.Name, key, opts[key], o.want)
		}
	}
	if fs.conflict != nil {
		return fs.conflict(opts)
	}
	return nil
}

func (fs *Filesystem) optionNames() string {
	var names []string
	for _, o := range fs.options {
		names = append(names, o.key)
	}
	if names == nil {
		return "no format options"
	}
	return "only " + strings.Join(names, ", ")
}

// MkfsArgs returns the arguments of the formatting program, without its name. Their order depends on
// the values only. Label and options must have passed their checks, and dev must read as zeroes
// throughout: mkfs is told so, and neither discards nor zeroes it.
func (fs *Filesystem) MkfsArgs(dev, label string, opts map[string]string) []string {
	if !fs.Formatted() {
		return nil
	}
	args := fs.mkfs(opts)
	if label != "" {
		args = append(args, "-L", label)
	}
	return append(args, dev)
}

// CheckArgs returns the arguments of the checking program, without its name, for a check that writes
// nothing. dev must not be mounted.
func (fs *Filesystem) CheckArgs(dev string) []string {
	if !fs.Formatted() {
		return nil
	}
	return append(slices.Clone(fs.check), dev)
}

// RepairArgs returns the arguments of the checking program, without its name, that make dev ready for
// [Filesystem.GrowArgs]: it replays the journal, and repairs what can be repaired without a doubt. dev
// must not be mounted. It is nil if there is no Grower.
func (fs *Filesystem) RepairArgs(dev string) []string {
	if fs.Grower == "" {
		return nil
	}
	return append(slices.Clone(fs.repair), dev)
}

// GrowArgs returns the arguments of Grower, without its name, that make the filesystem on dev as large
// as dev. dev must not be mounted.
func (fs *Filesystem) GrowArgs(dev string) []string { return []string{dev} }

// Verify reads every superblock of an image of so many bytes, and returns the primary. It returns
// [ErrCorrupt] unless magic, checksum, geometry and label are right, the filesystem was cleanly
// unmounted, and every copy of the superblock agrees with the primary.
func (fs *Filesystem) Verify(r io.ReaderAt, bytes int64, label string) (Superblock, error) {
	if !fs.Formatted() {
		return Superblock{}, fs.nothingInside()
	}
	sb, err := fs.verify(r, bytes)
	if errors.Is(err, ErrUnclean) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err == nil && sb.Label != label {
		err = corrupt("the label is %q, want %q", sb.Label, label)
	}
	if err != nil {
		return Superblock{}, fmt.Errorf("verifying the %s image of %s: %w", fs.Name, size.Format(bytes), err)
	}
	return sb, nil
}

// Identify reads the primary superblock only, and returns [ErrCorrupt] unless its magic, checksum and
// geometry are right. It is cheap enough for every use of an image.
func (fs *Filesystem) Identify(r io.ReaderAt) (Superblock, error) {
	if !fs.Formatted() {
		return Superblock{}, fs.nothingInside()
	}
	sb, err := fs.identify(r)
	if err != nil {
		return Superblock{}, fmt.Errorf("identifying the %s image: %w", fs.Name, err)
	}
	return sb, nil
}

// NewIdentity gives dst, a clone of src, the filesystem UUID id, so that both can be mounted on one
// kernel. src and dst may be the same file, and dst may get yet another identity later.
//
// Errors are [ErrUnclean], [errors.ErrUnsupported] for an image without a feature that this needs,
// [ErrCorrupt], or the failure of a read or write. The first two come before the first write. After
// any other, dst must be discarded.
func (fs *Filesystem) NewIdentity(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error {
	if !fs.Formatted() {
		return fs.nothingInside()
	}
	err := failpoint.Before("pwrite")
	if err == nil {
		err = fs.newIdentity(src, dst, id)
	}
	if err != nil {
		return fmt.Errorf("giving the %s image a new identity: %w", fs.Name, err)
	}
	return nil
}

func (fs *Filesystem) nothingInside() error {
	return fmt.Errorf("%s: %w: it has no filesystem inside", fs.Name, errors.ErrUnsupported)
}

// corrupt returns [ErrCorrupt] with the reason.
func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrCorrupt}, args...)...)
}

// read reads n bytes at off. If the image ends too early, it returns [ErrCorrupt]; any other error is
// the reader's own.
func read(r io.ReaderAt, off int64, n int) ([]byte, error) {
	b := make([]byte, n)
	switch got, err := r.ReadAt(b, off); {
	case got == n: // ReadAt may return io.EOF with a full buffer
		return b, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, corrupt("the image ends before byte %d", off+int64(n))
	default:
		return nil, fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
}

// write writes one whole block.
func write(w io.WriterAt, off int64, block []byte) error {
	if _, err := w.WriteAt(block, off); err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(block), off, err)
	}
	return nil
}

// crc32c returns the CRC-32C that xfs and btrfs store. It is inverted at the end; ext4 stores it
// without that inversion.
func crc32c(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// cString returns the text before the first NUL.
func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}
