// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Format is how a file holds a disk.
type Format string

// The formats.
const (
	Raw   Format = "raw"
	Qcow2 Format = "qcow2"
)

const (
	sector = 512
	// maxSize is the largest disk, in bytes, as ext4 and xfs have it for a file on a usual pool.
	maxSize = 16 << 40
	// headSize is enough for all that is looked at in the beginning of a file, in bytes.
	headSize = 64 << 10
	// convertHint is the way out for all that is in another format.
	convertHint = "convert it with `qemu-img convert -O qcow2 OLD NEW`"
)

// foreign are formats that are refused: a magic number, where it is, and what to do.
var foreign = []struct {
	at          int64 // from the end of the file, if it is negative
	magic, what string
	hint        string
}{
	{0, "KDMV", "a VMDK disk", convertHint},
	{0, "COWD", "a VMDK disk", convertHint},
	{0, "# Disk DescriptorFile", "the description of a VMDK disk", convertHint},
	{0x40, "\x7f\x10\xda\xbe", "a VDI disk", convertHint},
	{0, "vhdxfile", "a VHDX disk", convertHint},
	{0, "conectix", "a VHD disk", convertHint},
	{-sector, "conectix", "a VHD disk", convertHint},
	{0, "QED\x00", "a QED disk", convertHint},
	{0, "WithoutFreeSpace", "a Parallels disk", convertHint},
	{0, "WithouFreSpacExt", "a Parallels disk", convertHint},
	{0, "\x1f\x8b\x08", "compressed with gzip", "decompress it"},
	{0, "\xfd7zXZ\x00", "compressed with xz", "decompress it"},
	{0, "\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it"},
	{0, "PK\x03\x04", "a zip archive", "unpack it"},
	{257, "ustar", "a tar archive", "use it as a content of the kind tar"},
}

// Inspect returns the format of a file, and the size of the disk in it, in bytes: a multiple of 512. A disk of another
// size is rounded up to whole MiB. Errors are [ErrUnusable], or those of reading.
func Inspect(f *os.File) (format Format, virtual int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	if !fi.Mode().IsRegular() {
		return "", 0, fmt.Errorf("%w: it is not a regular file", ErrUnusable)
	}
	return inspect(f, fi.Size())
}

func inspect(f io.ReaderAt, length int64) (format Format, virtual int64, err error) {
	head := make([]byte, min(headSize, length))
	if _, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return "", 0, err
	}
	format, virtual = Raw, length
	if strings.HasPrefix(string(head), qcowMagic) {
		format = Qcow2
		if virtual, err = qcow2Size(head); err != nil {
			return "", 0, err
		}
	} else if err := refuseForeign(f, length); err != nil {
		return "", 0, err
	}
	if virtual < 1 || virtual > maxSize {
		return "", 0, unusable("the disk has %d bytes, and must have 1 to %s", virtual, size.Format(maxSize))
	}
	return format, rounded(virtual), nil
}

func rounded(bytes int64) int64 {
	if bytes%sector == 0 {
		return bytes
	}
	return (bytes + size.MiB - 1) / size.MiB * size.MiB
}

func refuseForeign(f io.ReaderAt, length int64) error {
	for _, other := range foreign {
		at := other.at
		if at < 0 {
			at += length
		}
		b := make([]byte, len(other.magic))
		if at < 0 || at+int64(len(b)) > length {
			continue
		}
		if _, err := f.ReadAt(b, at); err != nil && err != io.EOF {
			return err
		}
		if string(b) == other.magic {
			return fmt.Errorf("%w: it is %s, and neither raw nor qcow2; %s", ErrUnusable, other.what, other.hint)
		}
	}
	return nil
}
