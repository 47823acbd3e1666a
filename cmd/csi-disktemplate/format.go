// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/content"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// formatOptions are the flags that say what is made. The filesystem decides which sizes, labels
// and options are allowed, so [formatOptions.spec] reads these flags together.
type formatOptions struct {
	fs, size, label string
	options         map[string]string
	content         string
	contents        contentOptions
	vm              vmformat.Config
}

func newFormatCommand() *cobra.Command {
	var o diskOptions
	cmd := &cobra.Command{
		Use:   "format --fs FILESYSTEM --size SIZE -o FILE",
		Short: "Make one formatted disk image, or many",
		Long: `Make one formatted disk image, or many, without Kubernetes.

An image is a sparse file with the filesystem directly on it (no partition table),
formatted in a VM, and checked by the VM's kernel and by the filesystem's own
checker. It needs no root.

With -n there are many, and {} in -o is the number of each, from 1. The VM formats
one. The others are clones of it where the filesystem of -o can share extents
(btrfs, xfs), and sparse copies elsewhere. Each has a filesystem UUID of its own, so
all of them can be mounted at the same time. With --cache the formatted image is
kept, and the next run with the same filesystem, size and options starts no VM.

An image gets its name when it is whole and durable. An existing file is replaced
only with --force. A run that fails or is interrupted leaves whole images or none,
and says which.`,
		Example: `  csi-disktemplate format --fs xfs --size 1Gi -o disk.img
  csi-disktemplate format --fs ext4 --size 10Gi --label data --option inode-size=512 -o disk.img
  csi-disktemplate format --size 1Gi -n 200 --cache ~/.cache/disks -o 'disk-{}.img'
  csi-disktemplate format --contents contents.yaml --content-dir . --content postgres --cache ~/.cache/disks -o db.img`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("v") {
				quiet()
			}
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.add(cmd.Flags())
	return cmd
}

// addSpec adds the flags that say what is made.
func (o *formatOptions) addSpec(f *pflag.FlagSet) {
	f.StringVar(&o.fs, "fs", "ext4", "filesystem: "+strings.Join(diskfs.Names(), ", ")+", or raw for an empty image")
	f.StringVar(&o.size, "size", "", "`size` as a Kubernetes quantity, as 512Mi or 10Gi; rounded up to MiB (default: the filesystem's own)")
	f.StringVar(&o.label, "label", "", "filesystem label")
	f.StringToStringVar(&o.options, "option", nil, "another format option of the filesystem as `NAME=VALUE`, as inode-size=512; may be repeated")
	f.Lookup("option").DefValue = "" // --help would show "[]"
}

// addContent adds the flags that say what is inside.
func (o *formatOptions) addContent(f *pflag.FlagSet) {
	f.StringVar(&o.content, "content", "", "what is inside from the start: a `name` from --contents (default: nothing)")
	addContents(f, &o.contents)
}

// newFile is the name of a file to make. An image is a sparse file with a name of its own at
// the end, so there is nothing to write to a pipe.
var newFile = kind[string]{name: "string", read: func(s string) (string, error) {
	switch s {
	case "":
		return s, errors.New("must name the file to make")
	case "-":
		return s, errors.New("must name a file: an image cannot be written to standard output; a file of that name is ./-")
	}
	return s, nil
}}

// spec reads the flags that describe the filesystem.
func (o *formatOptions) spec() (diskfs.Spec, error) {
	fs, err := diskfs.Lookup(o.fs)
	if err != nil {
		return diskfs.Spec{}, fmt.Errorf("--fs: %w", err)
	}
	spec := diskfs.Spec{Filesystem: fs.Name, Size: fs.DefaultSize(), Label: o.label, Options: o.options}
	if o.size != "" {
		if spec.Size, err = o.sizeOf(fs); err != nil {
			return spec, err
		}
	}
	return spec, spec.Validate()
}

// sizeOf reads --size, within the limits of a filesystem.
func (o *formatOptions) sizeOf(fs *diskfs.Filesystem) (int64, error) {
	bytes, err := fs.ParseSize(o.size)
	if errors.Is(err, size.ErrInvalid) {
		err = errors.New("must be a quantity, as 512Mi or 10Gi" + size.Hint(o.size))
	}
	if err != nil {
		return 0, badFlag("size", o.size, err)
	}
	return bytes, nil
}

// specOf is the spec of the template. The list of contents has the size of one that is asked for
// without, and a whole disk decides all but its name.
func (o *formatOptions) specOf(ctx context.Context, b *builder) (diskfs.Spec, error) {
	if o.content == "" {
		return o.spec()
	}
	if err := b.resolve(ctx, o.content); err != nil && !errors.Is(err, template.ErrNoContent) {
		return diskfs.Spec{}, err
	}
	id, err := b.identity(o.content)
	if err != nil {
		return diskfs.Spec{}, err
	}
	if id.Kind == content.Disk {
		return diskfs.Spec{Filesystem: diskfs.Disk, Content: o.content}, nil
	}
	spec, err := o.spec()
	if err != nil {
		return spec, err
	}
	spec.Content = o.content
	if c, err := b.list.Find(o.content); err == nil && o.size == "" && c.Size > 0 {
		spec.Size = c.Size
	}
	return spec, spec.Validate()
}

// progress prints the stages of a format, one a line. A terminal also shows the stage that
// has begun, and how far it has come, if it can take that line back.
type progress struct {
	w        io.Writer
	terminal bool
	stage    guest.Stage
	since    time.Time
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(f.Fd())) && erases(os.Getenv("TERM"))}
}

// erases tells whether a terminal of this kind erases a line when it is told to; term(7).
func erases(kind string) bool { return kind != "" && kind != "dumb" }

func (p *progress) enter(at guest.Progress) {
	if at.Stage != p.stage {
		p.leave("ok")
		p.stage, p.since = at.Stage, time.Now()
	}
	switch {
	case !p.terminal || at.Stage == guest.StageDone:
	case at.Total > 0:
		fmt.Fprintf(p.w, "\r%s … %d%%", at.Stage, 100*at.Done/at.Total)
	default:
		fmt.Fprintf(p.w, "%s …", at.Stage)
	}
}

func (p *progress) leave(how string) {
	if p.stage == "" || p.stage == guest.StageDone {
		return
	}
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	fmt.Fprintf(p.w, "%-6s %6s  %s\n", p.stage, time.Since(p.since).Round(10*time.Millisecond), how)
}

func (p *progress) end(err error) {
	if err != nil {
		p.leave("failed")
		return
	}
	p.leave("ok")
}
