// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/internal/shapes"
)

// TestShapesOfCommands compares what commands print as JSON, and the plugin does not serve, with the document.
func TestShapesOfCommands(t *testing.T) {
	shapes.AreDocumented(t, "../../docs/json.md", "cmd/csi-disktemplate", "../../pkg/volume/sweep/plan.go", "clean.go", "disks.go",
		"kubectlstatus.go", "kubectldoctor.go", "../../pkg/driver/http.go", "kubectlwhy.go")
}

// The reference of commands stands between two lines of docs/operating.md.
const (
	commandsBegin = "<!-- Written by UPDATE=1 go test -run TestCommandsAreDocumented ./cmd/csi-disktemplate -->\n"
	commandsEnd   = "<!-- End of the tables of commands. -->\n"
)

// TestCommandsAreDocumented compares the tables of commands and flags with the commands. With UPDATE=1 in the
// environment it writes them.
func TestCommandsAreDocumented(t *testing.T) {
	for _, name := range []string{"NODE_NAME", "CSI_ENDPOINT", "KUBELET_DIR"} {
		t.Setenv(name, "")
	}
	const doc = "../../docs/operating.md"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, began := strings.Cut(string(b), commandsBegin)
	has, after, ended := strings.Cut(rest, commandsEnd)
	if !began || !ended {
		t.Fatalf("%s lacks the lines around the tables of commands", doc)
	}
	want := commandTables(newCommand(), newKubectlCommand())
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(doc, []byte(before+commandsBegin+want+commandsEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if has != want {
		t.Errorf("%s does not have the commands as they are; run the line that stands in it\n%s", doc, want)
	}
}

// documentedFlag is a flag, and the commands that have it in this form.
type documentedFlag struct {
	*pflag.Flag
	of []string
}

// commandTables are a table of the commands, and one of their flags.
func commandTables(roots ...*cobra.Command) string {
	host, _ := os.Hostname()
	var commands strings.Builder
	commands.WriteString("\n| command | does |\n|---|---|\n")
	var flags []*documentedFlag
	plugin := roots[0]
	eachOf(roots, func(cmd *cobra.Command) {
		name := strings.TrimPrefix(cmd.UseLine(), plugin.Name()+" ")
		if cmd == plugin {
			name = "[flags]"
		}
		fmt.Fprintf(&commands, "| `%s` | %s |\n", cell(strings.TrimSuffix(name, " [flags]")), cmd.Short)
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "help" || f.Name == "version" {
				return
			}
			if f.DefValue == host {
				f.DefValue = ""
			}
			i := slices.IndexFunc(flags, func(d *documentedFlag) bool { return d.Name == f.Name && d.Usage == f.Usage })
			if i < 0 {
				i, flags = len(flags), append(flags, &documentedFlag{Flag: f})
			}
			of := strings.TrimPrefix(cmd.CommandPath(), plugin.Name()+" ")
			if cmd == plugin {
				of = "the plugin"
			}
			flags[i].of = append(flags[i].of, of)
		})
	})
	slices.SortStableFunc(flags, func(a, b *documentedFlag) int { return cmp.Compare(a.Name, b.Name) })
	var table strings.Builder
	table.WriteString("\n| flag | default | of | is |\n|---|---|---|---|\n")
	for _, f := range flags {
		name, usage := pflag.UnquoteUsage(f.Flag)
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", cell(strings.TrimSpace("--"+f.Name+" "+name)), inCode(f.DefValue),
			strings.Join(f.of, ", "), cell(usage))
	}
	return commands.String() + table.String() + "\n"
}

func eachOf(roots []*cobra.Command, visit func(*cobra.Command)) {
	for _, root := range roots {
		eachCommand(root, visit)
	}
}

// eachCommand visits the commands that do something, and are ours, and the one at the root, which has flags of all.
func eachCommand(cmd *cobra.Command, visit func(*cobra.Command)) {
	if !cmd.HasSubCommands() || !cmd.HasParent() {
		visit(cmd)
	}
	for _, sub := range cmd.Commands() {
		eachCommand(sub, visit)
	}
}

// cell is a text in a cell of a table.
func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

func inCode(text string) string {
	if text == "" {
		return ""
	}
	return "`" + cell(text) + "`"
}

// TestCommandsHaveExamples: each command that does something shows how it is typed.
func TestCommandsHaveExamples(t *testing.T) {
	eachOf([]*cobra.Command{newCommand(), newKubectlCommand()}, func(cmd *cobra.Command) {
		if !strings.Contains(cmd.Example, cmd.CommandPath()) || cmd.Long == "" {
			t.Errorf("%s has no example, or no description", cmd.CommandPath())
		}
	})
}
