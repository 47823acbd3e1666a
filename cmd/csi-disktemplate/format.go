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
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

func newFormatCommand() *cobra.Command {
	var (
		vm            vmFlags
		fs, size      string
		label, output string
		options       map[string]string
	)
	cmd := &cobra.Command{
		Use:   "format --fs FILESYSTEM --size SIZE -o FILE",
		Short: "Format one disk image inside a VM",
		Long: `Format one disk image inside a VM, with no Kubernetes in sight.

The image is a sparse file with the filesystem directly on it (no partition
table), checked by the VM's kernel and by the filesystem's own checker. It needs
no root. An existing file is never overwritten; a failed run leaves none.`,
		Example: `  csi-disktemplate format --fs xfs --size 1Gi -o disk.img
  csi-disktemplate format --fs ext4 --size 10Gi --label data --option inode-size=512 -o disk.img`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			spec, err := formatSpec(fs, size, label, options)
			if err != nil {
				return err
			}
			if output == "" {
				return errors.New("--output: must name the file to make")
			}
			if err := vm.validate(); err != nil {
				return err
			}
			return format(cmd.Context(), cmd.ErrOrStderr(), vm, spec, output)
		},
	}
	f := cmd.Flags()
	f.StringVar(&fs, "fs", "ext4", "filesystem: "+strings.Join(diskfs.Names(), ", ")+", or raw for an empty image")
	f.StringVar(&size, "size", "", "size as a Kubernetes quantity, as 512Mi or 10Gi; rounded up to MiB (default: the filesystem's)")
	f.StringVar(&label, "label", "", "filesystem label")
	f.StringToStringVar(&options, "option", nil, "further format options of the filesystem, as inode-size=512; may be repeated")
	f.StringVarP(&output, "output", "o", "", "the image to make (required)")
	vm.add(f)
	return cmd
}

// formatSpec reads the flags that say what to make.
func formatSpec(name, size, label string, options map[string]string) (diskfs.Spec, error) {
	fs, err := diskfs.Lookup(name)
	if err != nil {
		return diskfs.Spec{}, fmt.Errorf("--fs: %w", err)
	}
	spec := diskfs.Spec{Filesystem: fs.Name, Size: fs.DefaultSize(), Label: label, Options: options}
	if size != "" {
		if spec.Size, err = fs.ParseSize(size); err != nil {
			return spec, fmt.Errorf("--size %q: %w", size, err)
		}
	}
	return spec, spec.Validate()
}

// format makes the image as a file without a name and links it in when it is whole.
func format(ctx context.Context, w io.Writer, vm vmFlags, spec diskfs.Spec, output string) error {
	if _, err := os.Lstat(output); err == nil {
		return fmt.Errorf("--output %s: exists already; remove it or give another name", output)
	}
	f, err := tmpfile.Create(filepath.Dir(output), 0o644)
	if err != nil {
		return fmt.Errorf("--output: %w; the filesystem there must know unnamed files (O_TMPFILE), as btrfs, ext4, xfs and tmpfs do", err)
	}
	defer f.Close()
	start := time.Now()
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return err
	}
	var report vmformat.Report
	if fs.Formatted() {
		if report, err = formatInVM(ctx, w, vm, f, spec); err != nil {
			return err
		}
	} else if err := f.Truncate(spec.Size); err != nil {
		return err
	}
	if err := errors.Join(tmpfile.Link(f, output), tmpfile.SyncDir(filepath.Dir(output))); err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	fmt.Fprintf(w, "%s: %s", output, spec)
	if report.UUID != "" {
		fmt.Fprintf(w, ", UUID %s, made by %s on Linux %s under %s", report.UUID, report.Mkfs, report.Kernel, report.Accelerator)
	}
	fmt.Fprintf(w, " (%s)\n", time.Since(start).Round(time.Millisecond))
	return nil
}

func formatInVM(ctx context.Context, w io.Writer, vm vmFlags, f *os.File, spec diskfs.Spec) (vmformat.Report, error) {
	formatter, err := vm.formatter("")
	if err != nil {
		return vmformat.Report{}, err
	}
	p := newProgress(w)
	report, err := formatter.Format(ctx, f, spec, p.enter)
	p.end(err)
	return report, err
}

// progress shows the stages: one line that grows on a terminal, a line each
// elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	stage    guest.Stage
	since    time.Time
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

func (p *progress) enter(s guest.Stage) {
	p.leave("ok")
	p.stage, p.since = s, time.Now()
	if p.terminal && s != guest.StageDone {
		fmt.Fprintf(p.w, "%s …", s)
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
