// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Mode is the form in which a volume is published.
type Mode string

// The modes.
const (
	ModeFilesystem Mode = "filesystem" // the target is the mounted filesystem
	ModeDiskImage  Mode = "diskImage"  // the target holds the image as disk.img
	ModeBlock      Mode = "block"      // the target is a block device; claims only
)

// MountModes are the modes of a volume whose target is a directory.
var MountModes = []Mode{ModeFilesystem, ModeDiskImage}

// DiskImageName is the file that a ModeDiskImage volume's target holds. It is the
// name KubeVirt looks for.
const DiskImageName = "disk.img"

// Lifecycle tells what ends a volume.
type Lifecycle string

// The lifecycles, as CSIDriver's volumeLifecycleModes has them.
const (
	Ephemeral  Lifecycle = ""           // made by its publish, gone with its unpublish: an inline volume
	Persistent Lifecycle = "persistent" // from CreateVolume to DeleteVolume: a claim
)

// Access is what a mount of a volume allows. The zero value is the usual:
// writable, and nothing in it runs as somebody else or is a device.
type Access struct {
	ReadOnly bool `json:"readOnly,omitempty"`
	NoATime  bool `json:"noATime,omitempty"`
	NoExec   bool `json:"noExec,omitempty"`
	SUID     bool `json:"suid,omitempty"` // set-user-ID programs take effect
	Dev      bool `json:"dev,omitempty"`  // device nodes take effect
}

// attr: a pod's own data may hold anything, so that no set-user-ID program and
// no device node in it takes effect unless an administrator has asked for that.
func (a Access) attr() mount.Attr {
	return mount.Attr{ReadOnly: a.ReadOnly, NoATime: a.NoATime, NoExec: a.NoExec, NoSUID: !a.SUID, NoDev: !a.Dev}
}

// String lists the options as mount(8) has them.
func (a Access) String() string {
	var words []string
	for _, w := range []struct {
		on      bool
		yes, no string
	}{
		{a.ReadOnly, "ro", "rw"}, {a.SUID, "suid", "nosuid"}, {a.Dev, "dev", "nodev"},
		{a.NoExec, "noexec", "exec"}, {a.NoATime, "noatime", "relatime"},
	} {
		if w.on {
			words = append(words, w.yes)
		} else {
			words = append(words, w.no)
		}
	}
	return strings.Join(words, ",")
}

// Pod is who a volume is for.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Source is what a claim's first content is a copy of. The zero value is none.
type Source struct {
	Snapshot string `json:"snapshot,omitempty"` // id; or
	Volume   string `json:"volume,omitempty"`   // id
}

func (s Source) String() string {
	switch {
	case s.Snapshot != "":
		return "snapshot " + s.Snapshot
	case s.Volume != "":
		return "volume " + s.Volume
	}
	return "none"
}

// recordVersion is the version of the form of [Record] and [Snapshot] written
// here. Version 1 had ephemeral volumes only, and is read as such.
const recordVersion = 2

// Record is what a volume's image says of itself, in trusted.disktemplate: what
// its request said, so that a repeated one can be told from a different one.
type Record struct {
	Version   int         `json:"version"`
	ID        string      `json:"id"`
	Lifecycle Lifecycle   `json:"lifecycle,omitempty"`
	Spec      diskfs.Spec `json:"spec"` // of what is inside; Size is the volume's
	Mode      Mode        `json:"mode"`
	Template  string      `json:"template,omitempty"`
	UUID      uuid.UUID   `json:"uuid,omitzero"` // of the filesystem that the node's kernel mounts
	Created   time.Time   `json:"created"`

	// Of persistent volumes.
	Name   string `json:"name,omitempty"`  // as CreateVolume had it
	Thick  bool   `json:"thick,omitempty"` // its space is its own
	Source Source `json:"source,omitzero"`

	// Of ephemeral volumes.
	Target string `json:"target,omitempty"`
	Access
	Pod Pod `json:"pod,omitzero"`
}

// Snapshot is what a snapshot's image says of itself, likewise.
type Snapshot struct {
	Version int         `json:"version"`
	ID      string      `json:"id"`
	Name    string      `json:"name"`   // as CreateSnapshot had it
	Volume  string      `json:"volume"` // id of its source, which may be gone
	Spec    diskfs.Spec `json:"spec"`
	Mode    Mode        `json:"mode"`
	UUID    uuid.UUID   `json:"uuid,omitzero"`
	Created time.Time   `json:"created"`
}

// image is a volume's open file and what it says of itself.
type image struct {
	*os.File
	Record
	fresh bool // made by this call
}

// open opens the image of a volume. It is ErrNotFound if there is none.
func (m *Manager) open(id string) (*image, error) {
	img := &image{}
	var err error
	if img.File, err = openImage("volume", id, m.pool.OpenVolume, &img.Record); err != nil {
		return nil, err
	}
	if err := checkRecord(img.Name(), id, img.ID, img.Version); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

// Name is the image's path. A Record has a name too, its request's.
func (img *image) Name() string { return img.File.Name() }

// openClaim opens the image of a persistent volume. Others are ErrNotFound.
func (m *Manager) openClaim(id string) (*image, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	img, err := m.open(id)
	if err != nil {
		return nil, err
	}
	if img.Lifecycle != Persistent {
		img.Close()
		return nil, fmt.Errorf("%w: %s is an inline volume, of pod %s/%s", ErrNotFound, id, img.Pod.Namespace, img.Pod.Name)
	}
	return img, nil
}

// snapshot is a snapshot's open file and what it says of itself.
type snapshot struct {
	*os.File
	Snapshot
}

func (s *snapshot) Name() string { return s.File.Name() }

// openSnapshot opens a snapshot. It is ErrNotFound if there is none.
func (m *Manager) openSnapshot(id string) (*snapshot, error) {
	s := &snapshot{}
	var err error
	if s.File, err = openImage("snapshot", id, m.pool.OpenSnapshot, &s.Snapshot); err != nil {
		return nil, err
	}
	if err := checkRecord(s.Name(), id, s.ID, s.Version); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// openImage opens an image and reads its record.
func openImage(kind, id string, open func(id string) (*os.File, error), record any) (*os.File, error) {
	f, err := open(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s %s on this node", ErrNotFound, kind, id)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	if err := pool.GetRecord(f, pool.VolumeAttr, record); err != nil {
		f.Close()
		if !errors.Is(err, pool.ErrNoRecord) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w; the file is not one of ours: move it away", ErrState, err)
	}
	return f, nil
}

func checkRecord(path, wantID, id string, version int) error {
	if version >= 1 && version <= recordVersion && id == wantID {
		return nil
	}
	return fmt.Errorf("%w: %s: its record is of version %d and has the id %q; this plugin writes version %d: upgrade the plugin or move the file away",
		ErrState, path, version, id, recordVersion)
}
