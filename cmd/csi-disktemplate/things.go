// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/meant"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
)

// thing is one kind of what a node has, as the commands list and describe it.
type thing[A any] struct {
	one, many string // as in `volume list`, and the name of the list in JSON
	list      func(admin.Node) ([]A, error)
	more      func(admin.Node, A) (A, error) // what a description has beside the list; nil is nothing
	name      func(A) string
	also      func(A) []string // other names that describe takes, for example a volume's pod; may be nil
	hint      func(A) string   // what completion shows beside a name
	columns   []column[A]
	fields    func(A) []field
	names     string // as --help shows the arguments of describe
	about     string // what the lists have, for --help
	detail    string // the same for a description
	example   string // a name, for the examples
	lastFirst bool   // a description begins with the end of the list
}

// column is a column of a table.
type column[A any] struct {
	title string
	wide  bool // shown with -o wide only
	text  func(A) string
}

// field is a line of a description: a heading if it has no value.
type field struct{ name, value string }

// The forms of lists, descriptions, plans and single objects; nothing is a table or a text.
var (
	listForm     = formKind("json", "yaml", "wide", "name")
	describeForm = formKind("json", "yaml", "name")
	planForm     = formKind("json", "yaml", "wide")
	objectForm   = formKind("json", "yaml")
)

func formKind(words ...string) kind[string] {
	must := "must be one of " + strings.Join(words, ", ") + ", or not given"
	k := kindOf(strings.Join(words, "|"), must, func(s string) (string, bool) {
		return s, s == "" || slices.Contains(words, s)
	})
	k.words = words
	return k
}

// whose says where a command finds the node that it asks.
type whose struct{ pool, kubeletDir string }

func (k thing[A]) listCommand() *cobra.Command {
	var at whose
	var form string
	cmd := &cobra.Command{
		Use: "list", Short: "List the " + k.many + " of a node",
		Long:    "List the " + k.many + " of a node.\n\n" + k.about,
		Example: fmt.Sprintf("  %[1]s list\n  %[1]s list -o wide\n  %[1]s list -o json", "csi-disktemplate "+k.one),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return at.ask(cmd, func(n admin.Node) error {
				all, err := k.list(n)
				if err != nil && len(all) == 0 {
					return err
				}
				return errors.Join(k.print(cmd.OutOrStdout(), all, form), err)
			})
		},
	}
	at.add(cmd)
	addValueP(cmd.Flags(), &form, "output", "o", "", listForm, "form of the list (default: a table)")
	return cmd
}

func (k thing[A]) describeCommand() *cobra.Command {
	var at whose
	var form string
	cmd := &cobra.Command{
		Use: "describe " + k.names + "...", Short: "Show everything about some " + k.many,
		Long:    "Show everything about some " + k.many + ".\n\n" + k.detail,
		Example: fmt.Sprintf("  %[1]s describe %[2]s\n  %[1]s describe %[2]s -o yaml", "csi-disktemplate "+k.one, k.example),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return nil
			}
			return fmt.Errorf("name at least one %s, as %s; %s", k.one, k.names, k.those())
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return at.ask(cmd, func(n admin.Node) error { return k.describe(cmd.OutOrStdout(), n, args, form) })
		},
	}
	at.add(cmd)
	addValueP(cmd.Flags(), &form, "output", "o", "", describeForm, "form of what is shown (default: a text)")
	cmd.ValidArgsFunction = k.completion(&at.pool)
	return cmd
}

// those says which names there are.
func (k thing[A]) those() string {
	return fmt.Sprintf("`csi-disktemplate %s list` shows those that are there", k.one)
}

func (at *whose) add(cmd *cobra.Command) {
	addExistingPool(cmd.Flags(), &at.pool)
	addKubeletDir(cmd.Flags(), &at.kubeletDir)
	f := cmd.Flags().Lookup("kubelet-dir")
	f.Usage = "kubelet's root directory, if no plugin runs; the variable KUBELET_DIR replaces the default"
}

// alone is said by a command that has no plugin to ask. One of an older version does not answer either.
const alone = "No plugin answers on this pool; what only a plugin knows is shown as -."

// ask asks the plugin that runs on the pool or, if there is none, the pool itself.
func (at whose) ask(cmd *cobra.Command, do func(admin.Node) error) error {
	client, err := at.dial(cmd)
	if errors.Is(err, admin.ErrNoPlugin) {
		p, err := openExisting(cmd, at.pool)
		if err != nil {
			return err
		}
		defer p.Close()
		fmt.Fprintln(cmd.ErrOrStderr(), alone)
		return at.askPool(p, do)
	}
	if err != nil {
		return err
	}
	defer client.Close()
	return do(client.Node(cmd.Context()))
}

// dial connects to the plugin, which answers also where its pool cannot be read.
func (at whose) dial(cmd *cobra.Command) (*admin.Client, error) {
	plugin, err := findRunning(at.pool)
	if err != nil {
		return nil, err
	}
	if plugin == nil {
		return nil, admin.ErrNoPlugin
	}
	client, err := admin.Dial(cmd.Context(), plugin.root)
	if err != nil && !errors.Is(err, admin.ErrNoPlugin) {
		err = fmt.Errorf("process %d works on this pool, and cannot be asked: %w; `csi-disktemplate doctor` says more", plugin.pid, err)
	}
	return client, err
}

// askPool has a pool answer without its plugin. It changes nothing.
func (at whose) askPool(p *pool.Pool, do func(admin.Node) error) error {
	root := at.kubeletDir
	if _, err := os.Stat(root); err != nil {
		root = p.Root() // no volume is published there, and none can be seen to be
	}
	m, err := volume.NewManager(volume.Config{Pool: p, TargetRoot: root})
	if err != nil {
		return err
	}
	defer m.Close()
	store := template.NewStore(template.Config{Pool: p})
	defer store.Close()
	return do(rooms{pool: p, volumes: m, templates: store, goldens: golden.NewStore(p)}.node())
}

// names are all names of one thing, its own first.
func (k thing[A]) allNames(a A) []string {
	if k.also == nil {
		return []string{k.name(a)}
	}
	return append([]string{k.name(a)}, k.also(a)...)
}

// choose returns the things that some names name, each once. The error is of all names.
func (k thing[A]) choose(all []A, names []string) (chosen []A, err error) {
	var known []string
	for _, a := range all {
		known = append(known, k.allNames(a)...)
	}
	var errs []error
	picked := map[string]bool{}
	for _, name := range names {
		before := len(picked)
		for _, a := range all {
			if slices.Contains(k.allNames(a), name) {
				picked[k.name(a)] = true
			}
		}
		if len(picked) == before && !slices.Contains(known, name) {
			errs = append(errs, fmt.Errorf("there is no %s %.200s on this node; %s", k.one, name,
				meant.Say(name, known, k.those())))
		}
	}
	for _, a := range all {
		if picked[k.name(a)] {
			chosen = append(chosen, a)
		}
	}
	return chosen, errors.Join(errs...)
}

// describe prints everything about the things that are named.
func (k thing[A]) describe(out io.Writer, n admin.Node, names []string, form string) error {
	all, err := k.list(n)
	if err != nil {
		return err
	}
	chosen, err := k.choose(all, names)
	if err != nil {
		return err
	}
	for i := range chosen {
		if k.more == nil {
			break
		}
		if chosen[i], err = k.more(n, chosen[i]); err != nil {
			return err
		}
	}
	if form != "" {
		return k.print(out, chosen, form)
	}
	if k.lastFirst {
		slices.Reverse(chosen)
	}
	for i, a := range chosen {
		if i > 0 {
			fmt.Fprintln(out)
		}
		if err := printFields(out, k.name(a), k.fields(a)); err != nil {
			return err
		}
	}
	return nil
}

// printFields prints a description. The lines of a value stand below each other.
func printFields(out io.Writer, title string, fields []field) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, printable(title))
	for _, f := range fields {
		if f.value == "" {
			fmt.Fprintf(w, "  %s\n", printable(f.name))
			continue
		}
		name := printable(f.name)
		for line := range strings.SplitSeq(f.value, "\n") {
			fmt.Fprintf(w, "  %s\t%s\n", name, printable(line))
			name = ""
		}
	}
	return w.Flush()
}

// print writes a list as --output says.
func (k thing[A]) print(out io.Writer, all []A, form string) error {
	switch form {
	case "json", "yaml":
		return printObject(out, map[string]any{k.many: append([]A{}, all...)}, form)
	case "name":
		for _, a := range all {
			fmt.Fprintln(out, printable(k.name(a)))
		}
		return nil
	}
	if len(all) == 0 {
		_, err := fmt.Fprintf(out, "There are no %s.\n", k.many)
		return err
	}
	return printTable(out, k.columns, all, form)
}

// printTable writes a table with a line for each of all, and with the wide columns if the form is wide.
func printTable[A any](out io.Writer, columns []column[A], all []A, form string) error {
	var titles []string
	columns = slices.DeleteFunc(slices.Clone(columns), func(c column[A]) bool { return c.wide && form != "wide" })
	for _, c := range columns {
		titles = append(titles, c.title)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(titles, "\t"))
	for _, a := range all {
		var cells []string
		for _, c := range columns {
			cells = append(cells, printable(cmp.Or(c.text(a), "-")))
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// printObject writes an object as JSON or YAML.
func printObject(out io.Writer, object any, form string) error {
	if form == "yaml" {
		text, err := yaml.Marshal(object)
		if err == nil {
			_, err = out.Write(text)
		}
		return err
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(object)
}

// completion completes names of the node whose pool is in a directory.
func (k thing[A]) completion(pool *string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var names []cobra.Completion
		whose{pool: *pool}.quietly(cmd, func(n admin.Node) {
			all, _ := k.list(n)
			for _, a := range all {
				for _, name := range k.allNames(a) {
					if !slices.Contains(given, name) {
						names = append(names, cobra.CompletionWithDesc(name, k.hint(a)))
					}
				}
			}
		})
		slices.Sort(names)
		return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
	}
}

// quietly is [whose.ask] for a shell, which can do nothing with an error.
func (at whose) quietly(cmd *cobra.Command, do func(admin.Node)) {
	silent := &cobra.Command{}
	silent.SetErr(io.Discard)
	silent.SetContext(cmd.Context())
	_ = at.ask(silent, func(n admin.Node) error {
		do(n)
		return nil
	})
}

// completeFlags completes the values of the flags of a command and of those below it.
func completeFlags(cmd *cobra.Command) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		words, limited := wordsOf(f)
		switch {
		case limited:
			_ = cmd.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
		case f.Name == "pool" || strings.HasSuffix(f.Name, "-dir"):
			_ = cmd.MarkFlagDirname(f.Name)
		}
	})
	for _, sub := range cmd.Commands() {
		completeFlags(sub)
	}
}

// wordsOf are the values of a flag, if these are few.
func wordsOf(f *pflag.Flag) (words []cobra.Completion, limited bool) {
	if f.Name == "fs" {
		return append(diskfs.Names(), diskfs.Disk), true
	}
	if v, ok := f.Value.(interface{ choices() []string }); ok {
		words = v.choices()
	}
	return words, len(words) > 0
}
