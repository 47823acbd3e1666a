// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// formatOptions are the flags of `csi-disktemplate format`. The filesystem decides which
// sizes, labels and options are allowed, so [formatOptions.spec] reads these flags together.
type formatOptions struct {
	fs, size, label string
	options         map[string]string
	output          string
	vm              vmformat.Config
}

func newFormatCommand() *cobra.Command {
	var o formatOptions
	cmd := &cobra.Command{
		Use:   "format --fs FILESYSTEM --size SIZE -o FILE",
		Short: "Format one disk image inside a VM",
		Long: `Format one disk image inside a VM, without Kubernetes.

The image is a sparse file with the filesystem directly on it (no partition
table), checked by the VM's kernel and by the filesystem's own checker. It needs
no root. An existing file is never overwritten; a failed run leaves none.`,
		Example: `  csi-disktemplate format --fs xfs --size 1Gi -o disk.img
  csi-disktemplate format --fs ext4 --size 10Gi --label data --option inode-size=512 -o disk.img`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			spec, err := o.spec()
			if err != nil {
				return err
			}
			return format(cmd.Context(), cmd.ErrOrStderr(), o.vm, spec, o.output)
		},
	}
	o.add(cmd.Flags())
	return cmd
}

func (o *formatOptions) add(f *pflag.FlagSet) {
	o.addSpec(f)
	addValueP(f, &o.output, "output", "o", "", newFile, "the image to make")
	addVM(f, &o.vm)
}

// addSpec adds the flags that say what is made.
func (o *formatOptions) addSpec(f *pflag.FlagSet) {
	f.StringVar(&o.fs, "fs", "ext4", "filesystem: "+strings.Join(diskfs.Names(), ", ")+", or raw for an empty image")
	f.StringVar(&o.size, "size", "", "`size` as a Kubernetes quantity, as 512Mi or 10Gi; rounded up to MiB (default: the filesystem's own)")
	f.StringVar(&o.label, "label", "", "filesystem label")
	f.StringToStringVar(&o.options, "option", nil, "another format option of the filesystem as `NAME=VALUE`, as inode-size=512; may be repeated")
	f.Lookup("option").DefValue = "" // --help would show "[]"
}

// newFile is the name of a file to make. An image is a sparse file with a name of its own at
// the end, so there is nothing to write to a pipe.
var newFile = kind[string]{"string", func(s string) (string, error) {
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
		spec.Size, err = fs.ParseSize(o.size)
		if errors.Is(err, size.ErrInvalid) {
			err = errors.New("must be a quantity, as 512Mi or 10Gi" + size.Hint(o.size))
		}
		if err != nil {
			return spec, badFlag("size", o.size, err)
		}
	}
	return spec, spec.Validate()
}

// format makes the image as a file without a name, and links it to its name when it is whole.
func format(ctx context.Context, w io.Writer, vm vmformat.Config, spec diskfs.Spec, output string) error {
	if _, err := os.Lstat(output); err == nil {
		return badFlag("output", output, errors.New("exists already; remove it or give another name"))
	}
	f, err := tmpfile.Create(filepath.Dir(output), 0o644)
	if err != nil {
		return badFlag("output", output, fmt.Errorf("%w; choose a directory on btrfs, ext4, xfs or tmpfs: the filesystem must support unnamed files (O_TMPFILE)", err))
	}
	defer f.Close()
	start := time.Now()
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return err
	}
	var report vmformat.Report
	if fs.Formatted() {
		report, err = formatInVM(ctx, w, vm, f, spec)
	} else {
		err = f.Truncate(spec.Size)
	}
	if errors.Is(err, syscall.EFBIG) {
		return badFlag("size", size.Format(spec.Size), fmt.Errorf("the filesystem of %s holds no file of that size; choose a directory on btrfs or xfs", filepath.Dir(output)))
	}
	if err != nil {
		return err
	}
	if err := errors.Join(tmpfile.Link(f, output), tmpfile.SyncDir(filepath.Dir(output))); err != nil {
		return badFlag("output", output, err)
	}
	fmt.Fprintf(w, "%s: %s", output, spec)
	if report.UUID != "" {
		fmt.Fprintf(w, ", UUID %s, made by %s on Linux %s under %s", report.UUID, report.Mkfs, report.Kernel, report.Accelerator)
	}
	fmt.Fprintf(w, " (%s)\n", time.Since(start).Round(time.Millisecond))
	return nil
}

func formatInVM(ctx context.Context, w io.Writer, vm vmformat.Config, f *os.File, spec diskfs.Spec) (vmformat.Report, error) {
	formatter, err := newFormatter(vm, "")
	if err != nil {
		return vmformat.Report{}, err
	}
	if _, why, err := formatter.Accelerator(); err == nil && why != nil {
		fmt.Fprintf(w, "accelerator tcg, which is slower than kvm: %v\n", why)
	}
	p := newProgress(w)
	report, err := formatter.Format(ctx, f, spec, nil, p.enter)
	p.end(err)
	return report, err
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
