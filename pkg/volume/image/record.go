// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Mode is the form in which a volume is published.
type Mode string

// The modes.
const (
	ModeFilesystem Mode = "filesystem" // the target is the mounted filesystem
	ModeDiskImage  Mode = "diskImage"  // the target is a directory that holds the image as disk.img
	ModeBlock      Mode = "block"      // the target is a block device; claims only
)

// MountModes are the modes of a volume whose target is a directory.
var MountModes = []Mode{ModeFilesystem, ModeDiskImage}

// DiskName is the name of the file in the target of a [ModeDiskImage] volume. KubeVirt
// looks for this name.
const DiskName = "disk.img"

// Lifecycle says which call ends a volume.
type Lifecycle string

// The lifecycles. On disk a claim has the word of CSIDriver's volumeLifecycleModes.
const (
	Inline Lifecycle = ""           // lives from its publish to its unpublish
	Claim  Lifecycle = "persistent" // lives from CreateVolume to DeleteVolume
)

func (l Lifecycle) String() string {
	if l == Inline {
		return "inline"
	}
	return "claim"
}

// Pod is the pod that an inline volume is for.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Source is the snapshot or volume whose content a claim starts with. The zero value means
// none.
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

// recordVersion is the version of [Record] and [SnapshotRecord] that this plugin writes.
// Version 1 had inline volumes only.
const recordVersion = 2

// volatileVersion is the version of a volatile volume's [Record]. Plugins that read only up to
// version 2 would mount the volume after a reboot. They read all other records of this plugin.
// It is the highest version that this plugin reads.
const volatileVersion = 3

// Record describes a volume, in the attribute trusted.disktemplate of its image. It has
// everything that the request asked for, so that a repeated request can be told from a
// different one.
type Record struct {
	Version   int         `json:"version"`
	ID        string      `json:"id"`
	Lifecycle Lifecycle   `json:"lifecycle,omitempty"`
	Spec      diskfs.Spec `json:"spec"` // of the content; Size is the volume's
	Mode      Mode        `json:"mode"`
	Template  string      `json:"template,omitempty"`
	UUID      uuid.UUID   `json:"uuid,omitzero"` // of the filesystem that the node's kernel mounts
	Created   time.Time   `json:"created"`

	// Claims only.
	Name         string       `json:"name,omitempty"` // the name in the CreateVolume request
	Provisioning Provisioning `json:"thick,omitempty"`
	Source       Source       `json:"source,omitzero"`

	Lineage
	Golden string `json:"golden,omitempty"` // the generation that it started from
	// Boot is the boot in which it was made: [boot.ID]. Of volatile volumes, and of those that are to become goldens.
	Boot string `json:"boot,omitempty"`

	// Inline volumes only.
	Target string `json:"target,omitempty"`
	Access
	Pod        Pod        `json:"pod,omitzero"` // of a claim that is to become a golden only its namespace
	Durability Durability `json:"durability,omitempty"`
	// Lost is when the volatile volume was made whose content a reboot took, and which this one
	// replaced. It is zero if there was none.
	Lost time.Time `json:"lost,omitzero"`
}

// checkClaim returns [errdefs.ErrNotFound] for an inline volume.
func (r Record) checkClaim() error {
	if r.Lifecycle == Claim {
		return nil
	}
	return fmt.Errorf("%w: %s is an inline volume, of pod %s/%s", errdefs.ErrNotFound, r.ID, r.Pod.Namespace, r.Pod.Name)
}

// SnapshotRecord describes a snapshot, in the same attribute of its image.
type SnapshotRecord struct {
	Version int         `json:"version"`
	ID      string      `json:"id"`
	Name    string      `json:"name"`   // the name in the CreateSnapshot request
	Volume  string      `json:"volume"` // id of its source, which may be deleted by now
	Spec    diskfs.Spec `json:"spec"`
	Mode    Mode        `json:"mode"`
	UUID    uuid.UUID   `json:"uuid,omitzero"`
	Created time.Time   `json:"created"`
}

func checkRecord(path, wantID, id string, version int) error {
	if version >= 1 && version <= volatileVersion && id == wantID {
		return nil
	}
	return fmt.Errorf("%w: %s: its record has version %d and id %q, and this plugin reads versions 1 to %d; upgrade the plugin or move the file away",
		errdefs.ErrState, path, version, id, volatileVersion)
}

// maxID is the limit of CSI 1.13 for every identifier ("Size Limits"), in bytes.
const maxID = 128

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// CheckID returns [errdefs.ErrInvalid] for a text that cannot be the id of a volume or
// snapshot. The id becomes a file name, so it may have only characters that need no escaping
// there.
func CheckID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: id: must not be empty", errdefs.ErrInvalid)
	case len(id) > maxID:
		return fmt.Errorf("%w: id %.32q…: has %d bytes, at most %d are allowed", errdefs.ErrInvalid, id, len(id), maxID)
	case !idPattern.MatchString(id):
		return fmt.Errorf("%w: id %q: must start with a letter or digit and continue with letters, digits, '.', '_' or '-'", errdefs.ErrInvalid, id)
	}
	return nil
}

// VolumeKey and SnapshotKey name an image among the volumes and snapshots of a node, for
// maps and messages.
func VolumeKey(id string) string   { return "volumes/" + id }
func SnapshotKey(id string) string { return "snapshots/" + id }

// OfKey returns the id in a key, and whether it is that of a snapshot.
func OfKey(key string) (id string, snapshot bool) {
	if id, ok := strings.CutPrefix(key, SnapshotKey("")); ok {
		return id, true
	}
	return strings.TrimPrefix(key, VolumeKey("")), false
}
