// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// doctorOptions are the flags of `csi-disktemplate doctor`. What is not given is the running plugin's.
type doctorOptions struct {
	pool, kubeletDir, output string
	loopbackSize             int64
}

// Exit codes of doctor.
const (
	exitDegraded = 1
	exitBroken   = 2
)

// exit ends the process with a code, after an error if there is one.
type exit struct {
	code int
	error
}

func (e *exit) Unwrap() error { return e.error }

// unwell is exit for errors of doctor itself: whoever cannot look must not say that all is well.
func unwell(err error) error {
	if err == nil {
		return nil
	}
	return &exit{exitBroken, err}
}

func newDoctorCommand() *cobra.Command {
	var o doctorOptions
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what the plugin needs, and what of it is missing",
		Long: `Say what the plugin needs, and what of it is missing: a line for each requirement,
which is good, degraded (and what that costs) or broken, and below it what to do.

Beside a running plugin it finds the plugin's flags by itself, and says what that plugin
says of itself, on its admin socket or at /readyz?verbose. Where no plugin runs it
looks by itself, and before there is a pool it says what the plugin would do. It
changes nothing. Trial files have no names, and a trial loop device detaches itself.

The exit code is 0 if all is good, 1 if something is degraded, and 2 if something is broken
or doctor cannot look.`,
		Example: `  csi-disktemplate doctor
  csi-disktemplate doctor --pool /var/lib/csi-disktemplate --loopback-pool-size 20Gi   # before there is a pool
  csi-disktemplate doctor -o json
  kubectl -n csi-disktemplate exec POD -c plugin -- csi-disktemplate doctor`,
		Args:              func(cmd *cobra.Command, args []string) error { return unwell(cobra.NoArgs(cmd, args)) },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return unwell(refuse(cmd.Flags())) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			return examine(cmd, o)
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return unwell(flagError(cmd, err)) })
	o.add(cmd.Flags())
	return cmd
}

func (o *doctorOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.pool, "pool", "", "the plugin's pool directory (default: that of the plugin that runs here, or "+defaultPool+")")
	f.StringVar(&o.kubeletDir, "kubelet-dir", "", "kubelet's root directory (default: that of the plugin that runs here, or the plugin's default)")
	addValue(f, &o.loopbackSize, "loopback-pool-size", "", optionalSize, "the size that the plugin is to be given, if there is no pool yet (default: that of the plugin that runs here)")
	addValueP(f, &o.output, "output", "o", "", objectForm, "form of the findings (default: lines)")
}

// options are the plugin's flags: those of the running one, or the defaults, and over them what was given.
func (o doctorOptions) options(plugin *running) pluginOptions {
	var p pluginOptions
	p.add(pflag.NewFlagSet("plugin", pflag.ContinueOnError)) // sets the defaults
	if plugin != nil {
		p = plugin.options
	}
	p.pool.Dir = cmp.Or(o.pool, p.pool.Dir, defaultPool)
	p.kubeletDir = cmp.Or(o.kubeletDir, p.kubeletDir)
	p.pool.LoopbackSize = cmp.Or(o.loopbackSize, p.pool.LoopbackSize)
	p.pool.NodeDir = p.kubeletDir
	return p
}

// examine finds the plugin, and prints what it says, or what can be found out without it.
func examine(cmd *cobra.Command, o doctorOptions) error {
	plugin, err := findRunning(o.pool)
	if err != nil {
		return unwell(err)
	}
	if plugin != nil {
		plugin.assume()
	}
	p := o.options(plugin)
	pool.CleanAll = cleanAllLine(os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME"), p.pool.Dir)
	found, answered := askPlugin(cmd.Context(), plugin, p)
	if !answered {
		patience := patienceAlone
		if plugin != nil {
			patience = patienceBeside
		}
		own, err := within(patience, func() ([]health.Finding, error) { return lookAround(cmd, p, plugin == nil) })
		if err != nil {
			return unwell(err)
		}
		found = append(found, own...)
	}
	if err := printFindings(cmd.OutOrStdout(), found, o.output); err != nil {
		return unwell(err)
	}
	switch health.Worst(found) {
	case health.StateBroken:
		return &exit{code: exitBroken}
	case health.StateDegraded:
		return &exit{code: exitDegraded}
	}
	return nil
}

// askPlugin begins with what is found about the plugin itself. With an answer these are all findings.
func askPlugin(ctx context.Context, plugin *running, o pluginOptions) (found []health.Finding, answered bool) {
	f := health.Finding{Requirement: "plugin", State: health.StateGood}
	switch {
	case plugin == nil && pool.Made(o.pool.Dir):
		f.State, f.Text = health.StateBroken, "no plugin works on the pool in "+o.pool.Dir
		f.Cost = "volumes in use stay as they are, and nothing is mounted, unmounted or made"
		f.Remedy = "start the plugin; if it does not stay, its log says why, with kubectl logs that of the container before"
		return []health.Finding{f}, false
	case plugin == nil:
		f.Text = "no plugin runs here yet"
		return []health.Finding{f}, false
	}
	said, err := plugin.findings(ctx)
	f.Text = fmt.Sprintf("process %d works on the pool in %s", plugin.pid, o.pool.Dir)
	switch {
	case err != nil:
		f.State, f.Text = health.StateBroken, f.Text+fmt.Sprintf(", and does not say how it is: %v", err)
		f.Remedy = "look into its log; if it hangs, end it: volumes in use stay as they are"
	case said == nil:
		f.Text += "; what it alone knows is in its log, since it has neither an admin socket nor --http-endpoint: its registration, listed templates, contents and goldens"
	}
	return append([]health.Finding{f}, said...), said != nil
}

// How long doctor looks at a node by itself, which takes a second, and longer beside many volumes. kubectl disktemplate
// waits half a minute for doctor beside a plugin, which had [answerTime] before.
const patienceBeside, patienceAlone = 15 * time.Second, 5 * time.Minute

// within waits for a look at the node. It may be in a system call that never returns.
func within(patience time.Duration, look func() ([]health.Finding, error)) ([]health.Finding, error) {
	type result struct {
		found []health.Finding
		err   error
	}
	done := make(chan result, 1)
	go func() {
		found, err := look()
		done <- result{found, err}
	}()
	select {
	case r := <-done:
		return r.found, r.err
	case <-time.After(patience):
		return []health.Finding{{
			Requirement: "pool", State: health.StateBroken, Code: health.PoolUnusable,
			Text:   fmt.Sprintf("looking at the node and its pool has not ended within %s", patience),
			Remedy: "see the kernel log for a disk that does not answer: the pool's, or one below it",
		}}, nil
	}
}

// lookAround looks at the node without asking a plugin. alone means that no plugin works on the pool.
func lookAround(cmd *cobra.Command, o pluginOptions, alone bool) ([]health.Finding, error) {
	formatter, err := newFormatter(o.vm, "")
	if err != nil {
		return nil, err
	}
	ofPool, done := lookAtPool(cmd, o, alone)
	defer done()
	all := nodeRequirements(o, ofPool, formatter)
	return health.Findings(all, health.Look(all)), nil
}

// lookAtPool returns the requirements of the pool that is there, or of the one that would be made.
func lookAtPool(cmd *cobra.Command, o pluginOptions, alone bool) (requirements []health.Requirement, done func()) {
	if !pool.Made(o.pool.Dir) {
		return pool.Prospects(o.pool), func() {}
	}
	p, err := openExistingAs(cmd, o.pool)
	if err != nil {
		return []health.Requirement{failing("pool", health.PoolUnusable, err)}, func() {}
	}
	volumes, err := volume.NewManager(volume.Config{Pool: p, TargetRoot: o.kubeletDir, Headroom: o.headroom, Overcommit: o.overcommit})
	if err != nil { // of kubelet's directory, which has a line of its own
		return p.Requirements(), func() { p.Close() }
	}
	if alone {
		if _, err := volumes.Sweep(cmd.Context(), sweep.Options{DryRun: true}); err != nil {
			requirements = append(requirements, failing("leftovers", health.LeftBehind, err))
		}
	}
	return append(poolRequirements(p, volumes), requirements...), func() { volumes.Close(); p.Close() }
}

// failing is a requirement that an error says not to be met.
func failing(name, code string, err error) health.Requirement {
	text, remedy := health.Advice(err)
	return health.Requirement{Name: name, Look: func() []health.Condition {
		return []health.Condition{{Code: code, Severity: health.Inaccessible, Text: text, Remedy: remedy}}
	}}
}

func printFindings(out io.Writer, found []health.Finding, form string) error {
	if form != "" {
		return printObject(out, struct {
			State health.State `json:"state"`
			driver.Findings
		}{health.Worst(found), driver.Findings{Findings: found}}, form)
	}
	_, err := io.WriteString(out, findingLines(found))
	return err
}

// findingLines has a line for each finding, and below it what it costs, since when it holds, and what to do.
func findingLines(found []health.Finding) string {
	width := 0
	for _, f := range found {
		width = max(width, len(f.Requirement))
	}
	var b strings.Builder
	indent := strings.Repeat(" ", len(health.StateDegraded)+width+5)
	for _, f := range found {
		fmt.Fprintf(&b, "%-*s  %-*s  %s\n", len(health.StateDegraded), f.State, width+1, printable(f.Requirement)+":", printable(strings.ReplaceAll(f.Text, "\n", "; ")))
		for _, more := range []struct{ head, text string }{{"costs: ", f.Cost}, {"do: ", f.Remedy}, {"since: ", since(f.Since)}} {
			if more.text != "" {
				fmt.Fprintf(&b, "%s%s%s\n", indent, more.head, printable(more.text))
			}
		}
	}
	return b.String()
}

func since(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// exitCode returns the code that an error ends the process with, and whether there is something to print.
func exitCode(err error) (code int, print bool) {
	if e := (*exit)(nil); errors.As(err, &e) {
		return e.code, e.error != nil
	}
	return 1, true
}
