// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"cmp"
	"os"

	"golang.org/x/sys/unix"
)

// Content is what a filesystem is filled with, as far as it decides the bytes.
type Content struct {
	Digest string `json:"digest"` // "sha256:…" of the content

	UID  *int    `json:"uid,omitempty"`  // owner of the root directory; nil: as the archive says, else 0
	GID  *int    `json:"gid,omitempty"`  // its group; nil: as the archive says, else 0
	Mode *uint32 `json:"mode,omitempty"` // its permission and set-id bits; nil: as the archive says, else 0755

	// FSGroup is the group of everything, prepared as kubelet does it for a pod's fsGroup: see
	// prepared. nil: groups are as the archive says.
	FSGroup *int64 `json:"fsGroup,omitempty"`
}

// Layer is where a tar archive is on the disk with the serial [ContentSerial], in bytes. Its
// tar is neither compressed nor encrypted.
type Layer struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// owned are the owner and the mode of a file.
type owned struct {
	uid, gid int
	mode     uint32 // permission, set-id and sticky bits
}

// implied are those of a directory that no entry of the archive describes.
var implied = owned{0, 0, 0o755}

// root returns the owner and mode of the root directory, from those that it has.
func (c Content) root(has owned) owned {
	want := owned{*cmp.Or(c.UID, &has.uid), *cmp.Or(c.GID, &has.gid), *cmp.Or(c.Mode, &has.mode)}
	return c.prepared(want, unix.S_IFDIR)
}

// prepared applies FSGroup to a file of a type (S_IFMT). Kubelet then finds nothing to do under
// the policy OnRootMismatch: SetVolumeOwnership and requiresPermissionChange in pkg/volume/volume_linux.go of
// Kubernetes. A symbolic link has no mode of its own.
func (c Content) prepared(o owned, kind uint32) owned {
	if c.FSGroup == nil {
		return o
	}
	o.gid = int(*c.FSGroup)
	switch kind {
	case unix.S_IFLNK:
	case unix.S_IFDIR:
		o.mode |= 0o660 | 0o110 | unix.S_ISGID
	default:
		o.mode |= 0o660
	}
	return o
}

// ownedOf reads owner and mode of an open file.
func ownedOf(fd int) (owned, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return owned{}, os.NewSyscallError("fstat", err)
	}
	return owned{int(st.Uid), int(st.Gid), st.Mode & 0o7777}, nil
}
