// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
)

func newTemplateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "List the templates of a pool, or build one",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newTemplateListCommand(), newTemplateBuildCommand())
	return cmd
}

func newTemplateListCommand() *cobra.Command {
	var dir, form string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the templates of a pool",
		Long: `List the templates of a pool.

EXTENTS is how many pieces a template has on the pool. A clone costs 10 to 24 µs for
each of them, so with some hundreds a volume takes milliseconds longer to make.`,
		Example: `  csi-disktemplate template list
  csi-disktemplate template list -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := openExisting(cmd, dir)
			if err != nil {
				return err
			}
			defer p.Close()
			all, err := template.NewStore(template.Config{Pool: p}).List()
			if err != nil {
				return err
			}
			return listOf(all).print(cmd.OutOrStdout(), form)
		},
	}
	addExistingPool(cmd.Flags(), &dir)
	addValueP(cmd.Flags(), &form, "output", "o", "", outputForm, "form of the list (default: a table)")
	return cmd
}

// listed is a template as it is printed.
type listed struct {
	Key        string     `json:"key"`
	Filesystem string     `json:"filesystem"`
	Size       int64      `json:"sizeBytes"`
	Content    string     `json:"content,omitempty"`
	Takes      int64      `json:"takesBytes"`
	Extents    int        `json:"extents"`
	Used       *time.Time `json:"lastUsed,omitempty"`
	Holder     string     `json:"lockedBy,omitempty"`
}

// listOf says how templates are printed.
func listOf(templates []template.Cached) plan[listed] {
	var all []listed
	for _, t := range templates {
		l := listed{
			Key: t.Key, Filesystem: t.Filesystem, Size: t.Size, Content: t.Content, Takes: t.Takes, Extents: t.Extents, Holder: t.Holder,
		}
		if !t.Used.IsZero() {
			used := t.Used.UTC().Truncate(time.Second)
			l.Used = &used
		}
		all = append(all, l)
	}
	return plan[listed]{
		actions: all, name: "templates", none: "There are no templates.",
		columns: "TEMPLATE\tFILESYSTEM\tSIZE\tCONTENT\tTAKES\tEXTENTS\tLAST USED",
		row: func(l listed) string {
			used, bytes := "-", "-"
			if l.Used != nil {
				used = l.Used.Format(time.DateTime + "Z")
			}
			if l.Size > 0 { // a disk has the size of its content
				bytes = size.Format(l.Size)
			}
			return strings.Join([]string{
				l.Key, l.Filesystem, bytes, cmp.Or(l.Content, "-"), size.Format(l.Takes), strconv.Itoa(l.Extents), used,
			}, "\t")
		},
	}
}

// buildOptions are the flags of `csi-disktemplate template build`.
type buildOptions struct {
	formatOptions
	pool   string
	accept func(diskfs.Spec) error // refuses what the command has no use for; may be nil
}

func newTemplateBuildCommand() *cobra.Command {
	var o buildOptions
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build a template, unless it is there",
		Long: `Build a template, unless it is there, so that the first volume of its kind waits for
nothing. It may run beside the plugin. With --content the template is born with a
content that --contents names; if that is a whole disk, it decides all but its name.`,
		Example: `  csi-disktemplate template build --fs xfs --size 10Gi
  csi-disktemplate template build --contents contents.yaml --content-dir . --content postgres --size 1Gi`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := openExisting(cmd, o.pool)
			if err != nil {
				return err
			}
			defer p.Close()
			return buildTemplate(cmd.Context(), p, o, cmd.OutOrStdout())
		},
	}
	o.add(cmd.Flags())
	return cmd
}

func (o *buildOptions) add(f *pflag.FlagSet) {
	addExistingPool(f, &o.pool)
	o.addSpec(f)
	o.addContent(f)
	addVM(f, &o.vm)
}

// tellInterval is the time between two lines that say how far a build has come.
const tellInterval = 2 * time.Second

// buildTemplate builds a template, unless it is there, and prints what it does meanwhile.
func buildTemplate(ctx context.Context, p *pool.Pool, o buildOptions, out io.Writer) error {
	began := time.Now()
	return o.withTemplate(ctx, p, out, func(t *template.Template) error {
		how := "was there"
		if !t.Hit {
			how = fmt.Sprintf("was built in %s", time.Since(began).Round(time.Millisecond))
		}
		_, err := fmt.Fprintf(out, "Template %s (%s) %s.\n", t.Key, t.Spec, how)
		return err
	})
}

// withTemplate has a template, builds it if it is not there, and closes it after its use. While it builds, it
// prints how far that has come.
func (o buildOptions) withTemplate(
	ctx context.Context, p *pool.Pool, out io.Writer, use func(*template.Template) error,
) error {
	formatter, err := newFormatter(o.vm, p.CacheDir())
	if err != nil {
		return err
	}
	b, err := newBuilder(ctx, o.contents, p, formatter)
	if err != nil {
		return err
	}
	spec, err := o.specOf(ctx, b)
	if err == nil && o.accept != nil {
		err = o.accept(spec)
	}
	if err != nil {
		return err
	}
	store := b.store()
	defer store.Close()
	told, stop := context.WithCancel(ctx)
	defer stop()
	go b.tellOn(told, spec, out)
	t, err := store.Ensure(ctx, spec)
	stop()
	if err != nil {
		return err
	}
	defer t.Close()
	return use(t)
}

// store returns a store of the templates that b builds in its pool. The caller closes it.
func (b *builder) store() *template.Store {
	return template.NewStore(template.Config{
		Pool: b.pool, Fingerprint: b.fingerprint, Resolve: b.resolve, Format: b.format, Progress: b.progress,
	})
}

// tellOn prints how far a build has come, until ctx ends.
func (b *builder) tellOn(ctx context.Context, spec diskfs.Spec, out io.Writer) {
	tick := time.NewTicker(tellInterval)
	defer tick.Stop()
	for last := ""; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if text := b.progress(spec); text != "" && text != last {
			fmt.Fprintln(out, text)
			last = text
		}
	}
}
