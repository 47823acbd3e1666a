// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedlist"
)

// Content is one entry of the file:
//
//	contents:
//	- name: postgres-16            # a DNS label
//	  tar: postgres-16.tar.zst     # a file in Config.Dir; or one of
//	  oci: registry.example.com/ci/node-modules:1   # an image, or an artifact with layers of tar
//	  disk: fedora-42.qcow2        # a whole disk, raw or qcow2
//	  disk: oci://quay.io/containerdisks/fedora:42  # the same, in an image
//	  namespaces: [ci, staging]    # who may use it; "*" means everybody
//	  size: 2Gi                    # of a volume that asks for none
//	  owner: "999:999"             # of the root directory, as the next two, which disks have not
//	  mode: "0700"
//	  fsGroup: 999                 # everything belongs to this group
type Content struct {
	Name       string
	Kind       Kind
	File       string // name of a file in [Config].Dir; empty if there is a Reference
	Reference  string // of an image; empty if there is a File
	Namespaces watchedlist.Namespaces
	Size       int64 // bytes; 0 means none
	Options    Options
}

// Kind is what a content is made of.
type Kind string

// The kinds.
const (
	Tar  Kind = "tar"  // archives, that are unpacked in a filesystem
	Disk Kind = "disk" // a whole disk
)

// Options are of the root directory of a content of kind [Tar]. Nil means as the archive says.
type Options struct {
	UID, GID *int
	Mode     *uint32 // permission bits, with set-id bits and the sticky bit
	FSGroup  *int64  // everything belongs to this group, as kubelet's fsGroup has it
}

// format is how the file lists contents.
var format = watchedlist.Format[Content]{
	Key: "contents", What: "contents", Has: "name, namespaces, and one of tar, oci and disk",
	Name:     func(c *Content) *string { return &c.Name },
	Fields:   fields,
	Complete: (*Content).complete,
}

// fields are what an entry may have besides its name, and how each is read.
var fields = map[string]func(c *Content, value any) error{
	"tar":        (*Content).setTar,
	"oci":        (*Content).setOCI,
	"disk":       (*Content).setDisk,
	"namespaces": (*Content).setNamespaces,
	"size":       (*Content).setSize,
	"owner":      (*Content).setOwner,
	"mode":       (*Content).setMode,
	"fsGroup":    (*Content).setFSGroup,
}

// sources are the fields of which an entry has one.
var sources = []string{"tar", "oci", "disk"}

// complete checks what several fields say together.
func (c *Content) complete(entry map[string]any) error {
	if _, ok := entry["namespaces"]; !ok {
		return errors.New("namespaces is missing")
	}
	var have []string
	for _, key := range sources {
		if _, ok := entry[key]; ok {
			have = append(have, key)
		}
	}
	if len(have) != 1 {
		return fmt.Errorf("it has %d of %s, and must have one", len(have), strings.Join(sources, ", "))
	}
	for _, key := range []string{"owner", "mode", "fsGroup"} {
		if _, ok := entry[key]; ok && c.Kind == Disk {
			return fmt.Errorf("%s is of a root directory, and a disk has none that the plugin could change; leave it out", key)
		}
	}
	return nil
}

func (c *Content) setTar(value any) (err error) {
	c.Kind = Tar
	c.File, err = fileName(value)
	return err
}

func (c *Content) setOCI(value any) (err error) {
	c.Kind = Tar
	s, _ := value.(string)
	c.Reference, err = reference(s)
	return err
}

func (c *Content) setDisk(value any) (err error) {
	c.Kind = Disk
	if s, ok := value.(string); ok {
		if image, ok := strings.CutPrefix(s, "oci://"); ok {
			c.Reference, err = reference(image)
			return err
		}
	}
	c.File, err = fileName(value)
	return err
}

const wantFile = `the name of a file in the directory of contents, without "/" and "." at its beginning`

func fileName(value any) (string, error) {
	name, err := watchedlist.Text(value, wantFile)
	if err != nil {
		return "", err
	}
	if name == "" || len(name) > 255 || name[0] == '.' || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("must be %s", wantFile)
	}
	return name, nil
}

// image is the reference of an image: "Pulling manifests" in the OCI distribution specification, for its parts.
var image = regexp.MustCompile(`^([a-zA-Z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?` + // the registry
	`/[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)

// reference returns the reference of an image with its registry, and with a tag or a digest. Neither the registry
// nor "latest" is guessed: the same text would be another content elsewhere, or at another time.
func reference(s string) (string, error) {
	m := image.FindStringSubmatch(s)
	if m != nil && len(s) <= 512 && (m[3] != "" || m[4] != "") &&
		(m[1] == "localhost" || m[2] != "" || strings.ContainsAny(m[1], ".[")) {
		return s, nil
	}
	return "", errors.New("must be REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@sha256:DIGEST, " +
		"as registry.example.com/ci/modules:1")
}

// pinned returns the digest in a reference, or "".
func pinned(reference string) string {
	_, digest, _ := strings.Cut(reference, "@")
	return digest
}

// pin makes a reference one of a digest, and of no tag.
func pin(reference, digest string) string {
	name, _, _ := strings.Cut(reference, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	return name + "@" + digest
}

func (c *Content) setNamespaces(value any) (err error) {
	c.Namespaces, err = watchedlist.ParseNamespaces(value)
	return err
}

func (c *Content) setSize(value any) (err error) {
	s, ok := value.(string)
	if n, isNumber := value.(json.Number); isNumber {
		s, ok = n.String(), true
	}
	if !ok {
		return errors.New("must be a quantity, as 2Gi")
	}
	c.Size, err = size.Parse(s)
	if err == nil && c.Size <= 0 {
		err = errors.New("must be more than 0; leave it out if a volume always says its size")
	}
	return err
}

// maxID is the largest id of a user or group. The largest 32-bit number means "no change" to chown(2).
const maxID = math.MaxUint32 - 1

func (c *Content) setOwner(value any) error {
	want := fmt.Sprintf(`"UID:GID", two numbers from 0 to %d`, maxID)
	s, err := watchedlist.Text(value, want)
	if err != nil {
		return err
	}
	user, group, _ := strings.Cut(s, ":")
	uid, okUser := parseID(user)
	gid, okGroup := parseID(group)
	if !okUser || !okGroup {
		return fmt.Errorf("must be %s", want)
	}
	c.Options.UID, c.Options.GID = &uid, &gid
	return nil
}

func parseID(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return int(n), err == nil && n <= maxID && strconv.FormatUint(n, 10) == s
}

// octal is what permission bits look like.
var octal = regexp.MustCompile(`^0?[0-7]{3,4}$`)

func (c *Content) setMode(value any) error {
	const want = `permission bits as chmod(1) has them, from "0000" to "7777"`
	s, err := watchedlist.Text(value, want)
	if err != nil {
		return err
	}
	bits, err := strconv.ParseUint(s, 8, 32)
	if err != nil || !octal.MatchString(s) {
		return errors.New("must be " + want)
	}
	mode := uint32(bits)
	c.Options.Mode = &mode
	return nil
}

func (c *Content) setFSGroup(value any) error {
	n, _ := value.(json.Number)
	group, err := strconv.ParseInt(n.String(), 10, 32) // kubelet allows as much
	if err != nil || group < 0 {
		return fmt.Errorf("must be a number from 0 to %d", math.MaxInt32)
	}
	c.Options.FSGroup = &group
	return nil
}
