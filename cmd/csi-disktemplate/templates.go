// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
)

func newTemplateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "List the templates of a node, describe some, or build one",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(templates.listCommand(), templates.describeCommand(), newTemplateBuildCommand())
	return cmd
}

// templates are how templates are shown.
var templates = thing[admin.Template]{
	one: "template", many: "templates", names: "TEMPLATE", example: "ext4-1024m-0123456789abcdef",
	about: `STATE is there, building, or failed (its last build did; REASON says why). TAKES is what
a template takes of the pool, and FREES what is free when it goes: volumes keep what they
share with it. EXTENTS is how many pieces it has; a clone costs 10 to 24 µs for each of
them, so with some hundreds a volume takes milliseconds longer to make. READY is how many
volumes of it are kept ready, and how many there are to be.`,
	detail: `A template is named by its key.`,
	list:   func(n admin.Node) ([]admin.Template, error) { return n.Templates() },
	more:   func(n admin.Node, t admin.Template) (admin.Template, error) { return n.Template(t.Key) },
	name:   func(t admin.Template) string { return t.Key },
	hint: func(t admin.Template) string {
		return strings.Join([]string{t.State, t.Filesystem, templateSize(t), t.Content}, " ")
	},
	columns: []column[admin.Template]{
		{title: "TEMPLATE", text: func(t admin.Template) string { return t.Key }},
		{title: "FILESYSTEM", text: func(t admin.Template) string { return t.Filesystem }},
		{title: "SIZE", text: templateSize},
		{title: "CONTENT", text: func(t admin.Template) string { return t.Content }},
		{title: "STATE", text: templateState},
		{title: "TAKES", text: ifThere(func(t admin.Template) string { return size.Format(t.Takes) })},
		{title: "FREES", text: ifThere(func(t admin.Template) string { return size.Format(t.Frees) })},
		{title: "EXTENTS", text: ifThere(func(t admin.Template) string { return strconv.Itoa(t.Extents) })},
		{title: "READY", text: func(t admin.Template) string { return readyText(t.Ready) }},
		{title: "LAST USED", text: func(t admin.Template) string { return timeText(t.Used) }},
		{title: "LOCKED BY", wide: true, text: func(t admin.Template) string { return t.Holder }},
		{title: "REASON", wide: true, text: func(t admin.Template) string { return t.Reason }},
	},
	fields: templateFields,
}

// ifThere leaves out what a template has only when it is there.
func ifThere(text func(admin.Template) string) func(admin.Template) string {
	return func(t admin.Template) string {
		if t.Extents == 0 {
			return ""
		}
		return text(t)
	}
}

// templateSize is the size of a template's volumes. A disk has the size of its content.
func templateSize(t admin.Template) string {
	if t.Size == 0 {
		return ""
	}
	return size.Format(t.Size)
}

func templateState(t admin.Template) string {
	if t.Percent != nil {
		return fmt.Sprintf("%s %d%%", t.State, *t.Percent)
	}
	return t.State
}

// readyText is how many volumes are ready, of how many.
func readyText(all []admin.Ready) string {
	if len(all) == 0 {
		return ""
	}
	ready, level := 0, 0
	for _, r := range all {
		ready, level = ready+r.Ready, level+r.Level
	}
	return fmt.Sprintf("%d/%d", ready, level)
}

// timeText is a time that may be unknown.
func timeText(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.Format(time.DateTime + "Z")
}

func templateFields(t admin.Template) []field {
	fields := []field{
		{"State", templateState(t)}, {"  since", cmp.Or(timeText(t.Since), "-")}, {"  reason", cmp.Or(t.Reason, "-")},
		{"  locked by", cmp.Or(t.Holder, "-")},
		{"Filesystem", t.Filesystem}, {"Size", cmp.Or(templateSize(t), "-")}, {"Content", cmp.Or(t.Content, "-")},
	}
	if m := t.Made; m != nil {
		var options []string
		for _, name := range slices.Sorted(maps.Keys(m.Options)) {
			options = append(options, name+"="+m.Options[name])
		}
		fields = append(fields, []field{
			{"  digest", cmp.Or(m.Content, "-")}, {"Label", cmp.Or(m.Label, "-")}, {"Options", lines(options)},
			{"UUID", cmp.Or(m.UUID, "-")}, {"Built", sinceText(m.Built)}, {"  in", fmt.Sprintf("%.1f s", m.Took)},
			{"  with", cmp.Or(m.Mkfs, "-")},
			{"  kernel", cmp.Or(m.Kernel, "-")}, {"  accelerator", cmp.Or(m.Accelerator, "-")}, {"Digest", m.Digest},
		}...)
	}
	fields = append(fields, []field{
		{"Takes", size.Format(t.Takes)}, {"  frees", size.Format(t.Frees)}, {"Extents", strconv.Itoa(t.Extents)},
		{"Last used", cmp.Or(timeText(t.Used), "-")},
	}...)
	return append(fields, readyFields(t.Ready)...)
}

// readyFields describe what is kept ready.
func readyFields(all []admin.Ready) []field {
	if len(all) == 0 {
		return []field{{"Ready", "-"}}
	}
	fields := []field{{name: "Ready"}}
	for _, r := range all {
		fields = append(fields, field{"  " + r.Form, fmt.Sprintf("%d of %d", r.Ready, r.Level)})
	}
	return fields
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
	_ = cmd.RegisterFlagCompletionFunc("content", contents.completion(&o.pool))
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
