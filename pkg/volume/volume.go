// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
)

var (
	// ErrInvalid means that a request asks for what cannot be.
	ErrInvalid = errors.New("invalid request")
	// ErrExists means that the volume, or something else at the target, is there
	// already and is not what was asked for.
	ErrExists = errors.New("already exists and is different")
	// ErrNotFound means that there is no such volume, or not at that path.
	ErrNotFound = errors.New("volume not found")
	// ErrState means that the node is not in the state the operation needs, and
	// that somebody has to look.
	ErrState = errors.New("operation not possible in this state")
)

// Mode is the form in which a volume is published.
type Mode string

// The modes.
const (
	ModeFilesystem Mode = "filesystem" // the target is the mounted filesystem
	ModeDiskImage  Mode = "diskImage"  // the target holds the image as disk.img
)

// Modes lists the allowed values.
var Modes = []Mode{ModeFilesystem, ModeDiskImage}

// DiskImageName is the file that a ModeDiskImage volume's target holds. It is the
// name KubeVirt looks for.
const DiskImageName = "disk.img"

// Pod is who a volume is for.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Request asks for an ephemeral volume, published.
type Request struct {
	ID       string
	Target   string // absolute path below the kubelet's directory; its parent exists
	Spec     diskfs.Spec
	Mode     Mode
	ReadOnly bool
	NoATime  bool
	Pod      Pod
}

// Result tells how a request was met.
type Result struct {
	Template    string // key; "" if the volume was there already
	TemplateHit bool
	Existed     bool
}

// recordVersion is the version of the form of [Record] written here.
const recordVersion = 1

// Record is what a volume's image says of itself, in trusted.disktemplate. It is
// what the request said, so that a repeated one can be told from a different one.
type Record struct {
	Version  int         `json:"version"`
	ID       string      `json:"id"`
	Spec     diskfs.Spec `json:"spec"`
	Mode     Mode        `json:"mode"`
	Target   string      `json:"target"`
	ReadOnly bool        `json:"readOnly,omitempty"`
	NoATime  bool        `json:"noATime,omitempty"`
	Pod      Pod         `json:"pod,omitzero"`
	Template string      `json:"template"`
	UUID     uuid.UUID   `json:"uuid"`
	Created  time.Time   `json:"created"`
}

// Config is what a Manager works with. All of it is required.
type Config struct {
	Pool      *pool.Pool
	Templates *template.Store
	// TargetRoot is the directory below which volumes are published, and outside
	// of which nothing is ever touched: the kubelet's.
	TargetRoot string
}

// Manager publishes and unpublishes the volumes of a pool.
type Manager struct {
	pool      *pool.Pool
	templates *template.Store
	loops     loopdev.Allocator
	rootPath  string
	root      *os.File // of rootPath
}

// NewManager returns a Manager.
func NewManager(c Config) (*Manager, error) {
	path, err := filepath.Abs(c.TargetRoot)
	if err != nil {
		return nil, err
	}
	root, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the directory below which volumes are published: %w; set --kubelet-dir to the kubelet's root directory", err)
	}
	return &Manager{pool: c.Pool, templates: c.Templates, rootPath: path, root: root}, nil
}

// Close lets go of what the Manager holds open. Volumes stay as they are.
func (m *Manager) Close() error { return m.root.Close() }

// maxID is the limit of CSI for every identifier ("Size Limits"), in bytes.
const maxID = 128

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// CheckID reports whether id can be the name of a volume. An id becomes the name
// of a file, so it is held to characters that need no escaping there.
func CheckID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: volume id: must not be empty", ErrInvalid)
	case len(id) > maxID:
		return fmt.Errorf("%w: volume id %.32q…: has %d bytes, at most %d are allowed", ErrInvalid, id, len(id), maxID)
	case !idPattern.MatchString(id):
		return fmt.Errorf("%w: volume id %q: must start with a letter or digit and continue with letters, digits, '.', '_' or '-'", ErrInvalid, id)
	}
	return nil
}

// Validate checks a request without looking at the node. Errors are ErrInvalid
// or of [diskfs.Spec.Validate].
func (r Request) Validate() error {
	if err := CheckID(r.ID); err != nil {
		return err
	}
	if !slices.Contains(Modes, r.Mode) {
		return fmt.Errorf("%w: publishAs %q: must be one of %v", ErrInvalid, r.Mode, Modes)
	}
	return r.Spec.Validate()
}

// relative returns target's path below the target root.
func (m *Manager) relative(target string) (string, error) {
	if strings.ContainsRune(target, 0) {
		return "", fmt.Errorf("%w: target path %q: must not contain NUL", ErrInvalid, target)
	}
	if !filepath.IsAbs(target) || filepath.Clean(target) != strings.TrimSuffix(target, "/") {
		return "", fmt.Errorf("%w: target path %q: must be absolute, without '.' or '..'", ErrInvalid, target)
	}
	rel, err := filepath.Rel(m.rootPath, target)
	if err != nil || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("%w: target path %q: must lie below %s (see --kubelet-dir)", ErrInvalid, target, m.rootPath)
	}
	return rel, nil
}

// record is what the image of r will say.
func (r Request) record() Record {
	return Record{
		Version: recordVersion, ID: r.ID, Spec: r.Spec, Mode: r.Mode, Target: r.Target,
		ReadOnly: r.ReadOnly, NoATime: r.NoATime, Pod: r.Pod,
	}
}

// conflict reports how a request differs from the volume that has its id.
func (have Record) conflict(r Request) error {
	var diff []string
	add := func(field string, is, asked any) {
		diff = append(diff, fmt.Sprintf("%s is %v, asked for %v", field, is, asked))
	}
	if !have.Spec.Equal(r.Spec) {
		add("content", have.Spec, r.Spec)
	}
	if have.Mode != r.Mode {
		add("publishAs", have.Mode, r.Mode)
	}
	if have.ReadOnly != r.ReadOnly {
		add("read-only", have.ReadOnly, r.ReadOnly)
	}
	if have.NoATime != r.NoATime {
		add("noatime", have.NoATime, r.NoATime)
	}
	if len(diff) > 0 {
		return fmt.Errorf("%w: volume %s: %s; unpublish it first", ErrExists, r.ID, strings.Join(diff, ", "))
	}
	// CSI 1.13, NodePublishVolume, the table of target paths: without the
	// capability to be published twice this is FAILED_PRECONDITION.
	if have.Target != r.Target {
		return fmt.Errorf("%w: volume %s is for %s, asked for %s; an inline volume has one target", ErrState, r.ID, have.Target, r.Target)
	}
	return nil
}
