// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/meant"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Names of the attributes of an inline volume.
const (
	attrContent    = "content"
	attrDurability = "durability"
	attrSize       = "size"
	attrLabel      = "label"
	attrPublishAs  = "publishAs"
	attrFrom       = "from" // this and the next three are also parameters of a StorageClass
	attrOrElse     = "orElse"
	attrCommitTo   = "commitTo"
	attrCommitWhen = "commitWhen"
)

// setting is what users read of an attribute or a parameter, in Markdown. The tables in docs/inline-volumes.md and
// docs/claims.md are made of it.
type setting struct{ name, values, byDefault, meaning string }

const (
	labelSetting       = "letters, digits, `.`, `_`, `-`; [as long as the filesystem allows](filesystems.md)"
	contentSetting     = "a name that [the operator lists](contents.md)"
	filesystemsSetting = "`btrfs`, `ext4`, `xfs`"
)

var (
	fromSetting = setting{attrFrom, "`golden/NAME`, `shared/NAME`", "none",
		"starts from what an earlier volume of the namespace left, or from a [shared golden](goldens.md)"}
	orElseSetting = setting{attrOrElse, "`golden/NAME`, `shared/NAME`, `content/NAME`; several with commas between",
		"an empty filesystem", "what it starts from where the node has no such golden; the first that is there counts"}
	commitWhenSetting = setting{attrCommitWhen, "`marked`, `always`", "`marked`",
		"whether the commit needs the file `.disktemplate/commit` in the volume"}
)

// commitToSetting is the setting of volumes that end in this way.
func commitToSetting(when string) setting {
	return setting{attrCommitTo, "`NAME`, `shared/NAME`", "none", "the volume becomes the golden's next generation when " + when}
}

type attribute struct {
	setting
	read func(r *volume.InlineRequest, fs *diskfs.Filesystem, value string) error
}

// attributes has every attribute of an inline volume. Everybody who may create a pod may write them, so they are
// hostile until they are checked here. To add one, add its row. A new field of [volume.InlineRequest] must also be
// compared in package volume; a test finds a forgotten one.
var attributes = []attribute{
	{setting{attrSize, "a Kubernetes quantity, rounded up to MiB",
		"`256Mi`, or the filesystem's minimum, or that of the content or golden", "the volume's size"},
		func(r *volume.InlineRequest, fs *diskfs.Filesystem, v string) (err error) {
			if r.Spec.Size, err = fs.ParseSize(v); err != nil {
				err = fmt.Errorf("volume attribute %s %.32q: %w", attrSize, v, err)
			}
			return err
		}},
	{setting{attrLabel, labelSetting, "none", "the filesystem's label"},
		func(r *volume.InlineRequest, fs *diskfs.Filesystem, v string) error {
			r.Spec.Label = v
			if err := fs.CheckLabel(v); err != nil {
				return fmt.Errorf("volume attribute %s: %w", attrLabel, err)
			}
			return nil
		}},
	{setting{attrContent, contentSetting, "none", "what is inside from the start"},
		func(r *volume.InlineRequest, _ *diskfs.Filesystem, v string) (err error) {
			r.Spec.Content, err = contentNamed("volume attribute "+attrContent, v)
			return err
		}},
	{setting{attrPublishAs, "`filesystem`, `diskImage`", "`filesystem`",
		"what the pod's directory has: the files, or `disk.img` for a VM that the pod starts"},
		func(r *volume.InlineRequest, _ *diskfs.Filesystem, v string) (err error) {
			r.Mode, err = mountMode("volume attribute "+attrPublishAs, v)
			return err
		}},
	{setting{attrDurability, "`synced`, `volatile`", "`synced`, or `--default-durability`",
		"whether what was synced outlives the node; [volatile](#volatile-volumes): a reboot empties the volume"},
		func(r *volume.InlineRequest, _ *diskfs.Filesystem, v string) (err error) {
			if r.Durability, err = image.ParseDurability(v); err != nil {
				err = invalid("volume attribute %s %w", attrDurability, err)
			}
			return err
		}},
	{fromSetting, goldenWord(attrFrom, func(l *image.Lineage) *string { return &l.From })},
	{orElseSetting, goldenWord(attrOrElse, func(l *image.Lineage) *string { return &l.OrElse })},
	{commitToSetting("its pod is done"), goldenWord(attrCommitTo, func(l *image.Lineage) *string { return &l.CommitTo })},
	{commitWhenSetting, goldenWord(attrCommitWhen, func(l *image.Lineage) *string { return (*string)(&l.CommitWhen) })},
}

// goldenWord reads an attribute about goldens. Package volume checks the words.
func goldenWord(name string, field func(*image.Lineage) *string) func(*volume.InlineRequest, *diskfs.Filesystem, string) error {
	return func(r *volume.InlineRequest, _ *diskfs.Filesystem, v string) error {
		return givenText(field(&r.Lineage), "volume attribute "+name, v)
	}
}

// readAttributes reads the attributes of an inline volume with this fsType, "" if the pod names none.
func readAttributes(r *volume.InlineRequest, fsType string, given map[string]string) error {
	names := make([]string, len(attributes))
	for i, a := range attributes {
		names[i] = a.name
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.Contains(names, key) {
			return unknownSetting("volume attribute", key, names)
		}
	}
	fs, err := filesystemNamed("fsType", cmp.Or(fsType, diskfs.Default))
	if err != nil {
		return err
	}
	for _, a := range attributes {
		if value, ok := given[a.name]; ok {
			if err := a.read(r, fs, value); err != nil {
				return err
			}
		}
	}
	if r.Spec.Content != "" || r.From != "" {
		r.Spec.Filesystem = fsType // the content or golden decides what is not given
		return nil
	}
	r.Spec.Filesystem, r.Spec.Size = fs.Name, cmp.Or(r.Spec.Size, fs.DefaultSize())
	return nil
}

// elsewhere says where a pod or a claim has what people look for among the attributes and parameters.
var elsewhere = map[string]string{
	"volume attribute fsType":   "it stands beside volumeAttributes, as fsType of csi",
	"volume attribute readOnly": "it stands beside volumeAttributes, as readOnly of csi",
	"parameter fsType":          "it is called " + paramFSType,
	"parameter size":            "a claim has its size in resources.requests.storage",
	"parameter durability":      "it is for inline volumes; leave it out",
}

// unknownSetting refuses an attribute or parameter that there is not.
func unknownSetting(kind, key string, names []string) error {
	say := "allowed are " + strings.Join(names, ", ")
	if where, ok := elsewhere[kind+" "+key]; ok {
		say = where
	} else if near := meant.Say(key, names, ""); near != "" {
		say = near + " Allowed are " + strings.Join(names, ", ")
	}
	return invalid("%s %.64q: unknown; %s", kind, key, say)
}
