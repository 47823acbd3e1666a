// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"fmt"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// ErrNotFound means that a node has nothing of that name.
var ErrNotFound = errors.New("not found")

// Node answers questions about a node. A function that is nil belongs to what only a running plugin knows.
// All may be called at the same time. Errors are [ErrNotFound], those of the pool, and of the connection.
type Node struct {
	Plugin    func() (Plugin, error)
	Status    func() (Status, error)
	Volumes   func() ([]Volume, error)
	Volume    func(id string) (Volume, error) // with what takes longer to find out
	Templates func() ([]Template, error)
	Template  func(key string) (Template, error) // with how it was made
	Snapshots func() ([]Snapshot, error)
	Snapshot  func(id string) (Snapshot, error) // with what takes longer to find out
	Contents  func() ([]Content, error)
	Goldens   func() ([]Golden, error)
	Requests  func() (Requests, error)
	Findings  func() ([]health.Finding, error) // of each requirement, met ones too
	Why       func(asked string) (Why, error)
}

// Plugin is the running plugin, and its pool.
type Plugin struct {
	Version     string    `json:"version"`
	Driver      string    `json:"driver"`
	Node        string    `json:"node"`
	PID         int       `json:"pid"`
	Since       time.Time `json:"since"`
	Accelerator string    `json:"accelerator,omitempty"` // of the formatting VM: kvm or tcg
	KubeletDir  string    `json:"kubeletDir"`
	Pool        Pool      `json:"pool"`
	Ending      int       `json:"volumesEnding"` // volumes and snapshots that are deleted, and still take space
}

// Status is a running plugin, and how it is.
type Status struct {
	Plugin   Plugin           `json:"plugin"`
	Volumes  int              `json:"volumes"`
	Findings []health.Finding `json:"findings"` // what is wrong now, without the limitations of the node
}

// Pool is a pool's space. Size and Available are those of the least of its layers.
type Pool struct {
	Path      string  `json:"path"`
	Kind      string  `json:"kind"` // for people
	Size      int64   `json:"sizeBytes"`
	Available int64   `json:"availableBytes"`
	Headroom  int64   `json:"headroomBytes"` // of what is available: new volumes leave it free
	Promised  int64   `json:"promisedBytes"` // to claims and snapshots, taken or not
	Left      int64   `json:"leftBytes"`     // of what is available: what can still be promised to a thick claim
	Layers    []Layer `json:"layers"`        // from the pool's own filesystem down
}

// Layer is a filesystem that the pool's data lie on.
type Layer struct {
	Path      string `json:"path"`
	Type      string `json:"type"`
	Size      int64  `json:"sizeBytes"`
	Available int64  `json:"availableBytes"`
	Shared    bool   `json:"withNode,omitempty"` // the node itself is on it
}

// Pod names a pod.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// String is NAMESPACE/NAME, as far as it is known.
func (p Pod) String() string {
	if p.Name == "" {
		return p.UID
	}
	return p.Namespace + "/" + p.Name
}

// State is what a volume is doing.
type State string

// The states of volumes.
const (
	Published State = "published" // pods have it
	Staged    State = "staged"    // mounted, or attached as a block device, and no pod has it
	Attached  State = "attached"  // it has a loop device, and nobody sees it
	Idle      State = "idle"      // an image and nothing else
	Kept      State = "kept"      // its pod is done, and it waits to be committed to a golden
	Ending    State = "ending"    // it is deleted, and still takes space
)

// Volume is a volume of the node.
type Volume struct {
	ID           string            `json:"id"`
	Lifecycle    string            `json:"lifecycle"` // inline or claim
	State        State             `json:"state"`
	Pod          *Pod              `json:"pod,omitempty"`   // of an inline volume
	Claim        string            `json:"claim,omitempty"` // the name that a claim was made with, as pvc-…
	Filesystem   string            `json:"filesystem"`
	Mode         string            `json:"mode"`
	Size         int64             `json:"sizeBytes"`
	Used         int64             `json:"usedBytes"`          // of the filesystem where it is mounted, else as allocated
	Allocated    int64             `json:"allocatedBytes"`     // of the pool, shared extents included
	Own          *int64            `json:"ownBytes,omitempty"` // that no other file shares; only of one volume
	Content      string            `json:"content,omitempty"`  // what it was born with
	Label        string            `json:"label,omitempty"`
	Options      map[string]string `json:"formatOptions,omitempty"`
	UUID         string            `json:"uuid,omitempty"`
	Created      time.Time         `json:"created"`
	Template     string            `json:"template,omitempty"` // the key of what it was cloned from, or
	Golden       string            `json:"golden,omitempty"`   // the generation that it started from, or
	Source       string            `json:"source,omitempty"`   // the snapshot or volume that it is a copy of
	From         string            `json:"from,omitempty"`     // this and the next three as they were asked for
	OrElse       string            `json:"orElse,omitempty"`
	CommitTo     string            `json:"commitTo,omitempty"`
	CommitWhen   string            `json:"commitWhen,omitempty"`
	Access       string            `json:"access,omitempty"`   // the mount options that an inline volume asked for
	Warm         bool              `json:"wasReady,omitempty"` // it was made before anybody asked for it
	Durability   string            `json:"durability,omitempty"`
	Provisioning string            `json:"provisioning,omitempty"` // of a claim: thin or thick
	PublishedAt  []string          `json:"publishedAt,omitempty"`
	StagedAt     []string          `json:"stagedAt,omitempty"`
	Devices      []string          `json:"devices,omitempty"`
	Conditions   []Condition       `json:"conditions,omitempty"` // in a list only of volumes that are attached
	Requests     []Request         `json:"requests,omitempty"`   // only of one volume: its calls of late
}

// Shared are the bytes of a volume that other files of the pool share. Own must be known.
func (v Volume) Shared() int64 { return max(0, v.Allocated-*v.Own) }

// The states of templates.
const (
	There    = "there"
	Building = "building"
	Failed   = "failed" // its last build failed
)

// Template is a template of the pool, or one that is being built or could not be.
type Template struct {
	Key        string     `json:"key"`
	State      string     `json:"state"`
	Filesystem string     `json:"filesystem"`
	Size       int64      `json:"sizeBytes"` // 0 for that of a disk, which has the size of its content
	Content    string     `json:"content,omitempty"`
	Takes      int64      `json:"takesBytes"`
	Frees      int64      `json:"freesBytes"` // when it is removed: volumes keep what they share with it
	Extents    int        `json:"extents"`
	Used       *time.Time `json:"lastUsed,omitempty"`
	Holder     string     `json:"lockedBy,omitempty"`
	Since      *time.Time `json:"since,omitempty"` // of a build that is under way, or that failed
	// Reason says what a build does or waits for, or why it failed.
	Reason  string  `json:"reason,omitempty"`
	Percent *int    `json:"percent,omitempty"` // of the content that is unpacked
	Ready   []Ready `json:"ready,omitempty"`   // what is kept ready of it
	Made    *Made   `json:"made,omitempty"`    // only of one template; nil too if its record is damaged
}

// Made is how a template was made.
type Made struct {
	Label       string            `json:"label,omitempty"`
	Options     map[string]string `json:"formatOptions,omitempty"`
	UUID        string            `json:"uuid,omitempty"`
	Built       time.Time         `json:"built"`
	Took        float64           `json:"buildSeconds"`
	Kernel      string            `json:"kernel,omitempty"`
	Mkfs        string            `json:"mkfs,omitempty"`
	Accelerator string            `json:"accelerator,omitempty"`
	Digest      string            `json:"digest"`                  // of its data
	Content     string            `json:"contentDigest,omitempty"` // of its content, as it was then
}

// Ready is what is kept ready of a template or golden in one form.
type Ready struct {
	Form  string `json:"form"`
	Ready int    `json:"ready"`
	Level int    `json:"level"` // how many there are to be
}

// Snapshot is a snapshot of a claim.
type Snapshot struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Volume     string    `json:"volume"` // its source, which may be deleted by now
	Filesystem string    `json:"filesystem"`
	Mode       string    `json:"mode"`
	Size       int64     `json:"sizeBytes"`
	Allocated  int64     `json:"allocatedBytes"`
	Own        *int64    `json:"ownBytes,omitempty"` // only of one snapshot
	UUID       string    `json:"uuid,omitempty"`
	Created    time.Time `json:"created"`
}

// The states of contents.
const (
	Known       = "known"       // what it is at the moment
	Resolving   = "resolving"   // that is being found out
	Unavailable = "unavailable" // its source cannot be read
)

// Content is what volumes can be born with, as the operator lists it.
type Content struct {
	Name       string   `json:"name"`
	State      string   `json:"state,omitempty"` // empty if no plugin runs
	Kind       string   `json:"kind,omitempty"`
	Source     string   `json:"source,omitempty"` // a file, or an image
	Namespaces []string `json:"namespaces,omitempty"`
	Size       int64    `json:"sizeBytes,omitempty"` // of a volume that asks for none
	Digest     string   `json:"digest,omitempty"`
	Reason     string   `json:"reason,omitempty"` // why it is not available
	Templates  []string `json:"templates,omitempty"`
}

// Golden is a generation of a golden.
type Golden struct {
	Namespace  string            `json:"namespace,omitempty"`
	Name       string            `json:"name"`
	Generation int               `json:"generation"`
	Filesystem string            `json:"filesystem"`
	Size       int64             `json:"sizeBytes"`
	Label      string            `json:"label,omitempty"`
	Options    map[string]string `json:"formatOptions,omitempty"`
	UUID       string            `json:"uuid"`
	Used       int64             `json:"usedBytes"`
	Own        int64             `json:"ownBytes"`
	Shared     int64             `json:"sharedBytes"`
	Created    time.Time         `json:"created"`
	LastUse    time.Time         `json:"lastUse"`
	By         string            `json:"by"`
	Volume     string            `json:"volume,omitempty"`
	Ready      []Ready           `json:"ready,omitempty"` // what is kept ready of it
}

// Is is [NAMESPACE/]NAME, and String the same with @GENERATION.
func (g Golden) Is() string {
	if g.Namespace == "" {
		return g.Name
	}
	return g.Namespace + "/" + g.Name
}

func (g Golden) String() string { return fmt.Sprintf("%s@%d", g.Is(), g.Generation) }

// Condition is one thing that is wrong with a volume now.
type Condition struct {
	Code     string     `json:"code"`
	Object   string     `json:"object,omitempty"`
	Severity string     `json:"severity"` // limited, degraded, inaccessible or dataLoss
	Text     string     `json:"text"`
	Remedy   string     `json:"remedy,omitempty"`
	Since    *time.Time `json:"since,omitempty"`
}

// Conditions are conditions of a volume, as they are shown.
func Conditions(of []health.Condition) (shown []Condition) {
	for _, c := range of {
		shown = append(shown, Condition{
			Code: c.Code, Object: c.Object, Severity: severities[c.Severity], Text: c.Text, Remedy: c.Remedy, Since: At(c.Since),
		})
	}
	return shown
}

var severities = map[health.Severity]string{
	health.Limited: "limited", health.Degraded: "degraded", health.Inaccessible: "inaccessible", health.DataLoss: "dataLoss",
}

// At is a time as it is shown: UTC, in whole seconds. The zero time is nil.
func At(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}
