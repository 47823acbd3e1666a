// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

// mostLogLines is how much of a container's log a bundle has, from its end: some megabytes. If its lines are so long that
// they are more than mostLog, their end is missing: kubelet cuts there.
const (
	mostLogLines = 20000
	mostLog      = 16 << 20
)

// part is a file of a bundle, and how to get what is in it.
type part struct {
	name string
	get  func(context.Context) ([]byte, error)
}

// inTurn are parts that are got one after the other. Several runs of the plugin's binary at the same time would take the
// memory of one container, which the plugin needs.
type inTurn []part

func (f *fleet) bundleCommand() *cobra.Command {
	var to, driverName string
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Gather in one file what a bug report needs",
		Long: `Gather in one file what a bug report needs: versions, what doctor says on each node, the lists
of volumes, templates, snapshots, contents and goldens, the logs of the project's pods, now and
before their last restart, descriptions of its pods, DaemonSets, CSIDriver and CSINodes, and the
events of its namespace.

It reads no Secrets and no ConfigMaps. It takes out what looks like a password, a token or a
private key, and the values of environment variables that the project's manifests do not set.
Names of namespaces, pods, nodes, claims and images stay. Look into the file before you send it
to anybody. What could not be had is named in errors.txt.`,
		Example: `  kubectl disktemplate bundle
  kubectl disktemplate bundle --context staging -o report.tar.gz`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				to = "disktemplate-" + time.Now().UTC().Format("20060102-150405") + ".tar.gz"
			}
			return f.writeBundle(cmd.Context(), cmd.OutOrStdout(), to, driverName)
		},
	}
	cmd.Flags().StringVarP(&to, "output", "o", "", "the file to write, which must not exist (default: disktemplate-DATE-TIME.tar.gz)")
	addDriverName(cmd.Flags(), &driverName)
	return cmd
}

// writeBundle writes a bundle, and says what is in it.
func (f *fleet) writeBundle(ctx context.Context, out io.Writer, to, driverName string) error {
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("%s exists: give --output another name, or remove it", to)
	}
	pods, err := f.pods(ctx)
	if err != nil {
		return err
	}
	// Pods of other namespaces with the project's labels are not the project's.
	namespace := pods[0].Meta.Namespace
	jobs := slices.Concat(f.clusterParts(namespace, pods, driverName), f.nodeParts(pods), f.logParts(ctx, namespace))
	var b bundle
	err = writeWhole(to, func(w io.Writer) error {
		return b.write(ctx, w, strings.TrimSuffix(filepath.Base(to), ".tar.gz"), jobs)
	})
	if err != nil {
		return fmt.Errorf("nothing was written: %w", err)
	}
	fmt.Fprint(out, b.readme())
	fmt.Fprintf(out, "\nWritten to %s. Look into it before you send it.\n", to)
	if len(b.failed) > 0 {
		fmt.Fprintf(out, "It lacks:\n%s", b.errors())
	}
	return nil
}

// asks is a part that kubectl prints.
func (f *fleet) asks(name string, args ...string) part {
	return part{name, func(ctx context.Context) ([]byte, error) { return f.client().Run(ctx, args...) }}
}

// clusterParts are what Kubernetes knows.
func (f *fleet) clusterParts(namespace string, pods []kubectl.Pod, driverName string) (jobs []inTurn) {
	ask := func(name string, args ...string) {
		jobs = append(jobs, inTurn{f.asks(name, args...)})
	}
	ofProject := []string{"-l", projectLabel, "-n", namespace}
	ask("versions.json", "version", "-o", "json")
	ask("cluster/pods.txt", append([]string{"get", "pods", "-o", "wide"}, ofProject...)...)
	for _, kind := range []string{"pods", "daemonsets"} {
		args := append([]string{"describe", kind}, ofProject...)
		jobs = append(jobs, inTurn{{"cluster/" + kind + "-described.txt", func(ctx context.Context) ([]byte, error) {
			text, err := f.client().Run(ctx, args...)
			return described(text), err
		}}})
	}
	ask("cluster/csidriver-described.txt", "describe", "csidriver/"+driverName)
	var nodes []string
	for _, p := range pods {
		if node := "csinode/" + p.Spec.NodeName; p.Spec.NodeName != "" && !slices.Contains(nodes, node) {
			nodes = append(nodes, node)
		}
	}
	if len(nodes) > 0 {
		ask("cluster/csinodes-described.txt", append([]string{"describe"}, nodes...)...)
	}
	ask("cluster/events-"+namespace+".txt", "get", "events", "-n", namespace, "--sort-by=.lastTimestamp", "-o", "wide")
	return jobs
}

// nodeParts are what the plugin says on each node.
func (f *fleet) nodeParts(pods []kubectl.Pod) (jobs []inTurn) {
	for _, p := range pods {
		var parts inTurn
		for _, c := range []struct {
			name string
			args []string
		}{
			{"status", []string{"status"}}, {"doctor", []string{"doctor"}}, {"volumes", []string{"volume", "list"}},
			{"templates", []string{"template", "list"}}, {"snapshots", []string{"snapshot", "list"}},
			{"contents", []string{"content", "list"}}, {"goldens", []string{"golden", "list"}},
		} {
			name := path.Join("nodes", p.Spec.NodeName, p.Meta.Name, c.name+".json")
			parts = append(parts, part{name, func(ctx context.Context) ([]byte, error) { return f.exec(ctx, p, c.args...) }})
		}
		jobs = append(jobs, parts)
	}
	return jobs
}

// logParts are the logs of the project's pods: the plugin and its sidecars.
func (f *fleet) logParts(ctx context.Context, namespace string) (jobs []inTurn) {
	var found kubectl.List[kubectl.Pod]
	err := f.client().Get(ctx, &found, "pods", "-l", projectLabel, "-n", namespace)
	if err != nil {
		return []inTurn{{{"logs", func(context.Context) ([]byte, error) { return nil, err }}}}
	}
	for _, p := range found.Items {
		var parts inTurn
		for _, c := range p.Status.Containers {
			log := []string{"logs", "-n", p.Meta.Namespace, "pod/" + p.Meta.Name, "-c", c.Name, "--timestamps",
				fmt.Sprintf("--tail=%d", mostLogLines), fmt.Sprintf("--limit-bytes=%d", mostLog)}
			name := path.Join("logs", p.Meta.Namespace, p.Meta.Name, c.Name)
			parts = append(parts, f.asks(name+".log", log...))
			if c.Restarts > 0 {
				parts = append(parts, f.asks(name+".previous.log", append(slices.Clone(log), "--previous")...))
			}
		}
		jobs = append(jobs, parts)
	}
	return jobs
}

// bundle is a compressed tar that is being written.
type bundle struct {
	to     *tar.Writer
	dir    string // that all files are in
	mu     sync.Mutex
	files  []string
	failed []string // what could not be had, and why
}

// write gets all parts, without their secrets, and writes each as soon as it is there, so that no more of them are in
// memory than are got at a time.
func (b *bundle) write(ctx context.Context, out io.Writer, dir string, jobs []inTurn) error {
	z := gzip.NewWriter(out)
	b.to, b.dir = tar.NewWriter(z), dir
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	together(len(jobs), func(i int) {
		if err := b.gather(ctx, jobs[i]); err != nil {
			stop(err)
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(b.failed) > 0 {
		if err := b.add("errors.txt", []byte(b.errors())); err != nil {
			return err
		}
	}
	return errors.Join(b.add("README.txt", []byte(b.readme())), b.to.Close(), z.Close())
}

// gather gets parts one after the other. It fails only if they cannot be written. Where nobody answers in time, nobody is
// asked again: a node that is gone would take that time for each of its parts.
func (b *bundle) gather(ctx context.Context, parts inTurn) error {
	var silent error
	for _, p := range parts {
		if ctx.Err() != nil {
			return nil
		}
		if silent != nil {
			b.lacks(p.name, silent)
			continue
		}
		data, err := p.get(ctx)
		if err != nil {
			b.lacks(p.name, err)
			if errors.Is(err, kubectl.ErrNoAnswer) {
				silent = fmt.Errorf("not asked for, after %w for %s", err, p.name)
			}
			continue
		}
		if strings.HasSuffix(p.name, ".log") && len(data) >= mostLog {
			b.lacks(p.name, fmt.Errorf("its end: it is cut after %d MiB", mostLog>>20))
		}
		if err := b.add(p.name, scrubbed(data)); err != nil {
			return err
		}
	}
	return nil
}

// add writes a file.
func (b *bundle) add(name string, data []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.files = append(b.files, name)
	h := &tar.Header{
		Typeflag: tar.TypeReg, Name: path.Join(b.dir, name), Mode: 0o600, Size: int64(len(data)), ModTime: time.Now(),
	}
	if err := b.to.WriteHeader(h); err != nil {
		return err
	}
	_, err := b.to.Write(data)
	return err
}

// lacks notes what could not be had.
func (b *bundle) lacks(name string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failed = append(b.failed, printable(fmt.Sprintf("%s: %v", name, err))+"\n")
}

// errors says what could not be had.
func (b *bundle) errors() string {
	return string(scrubbed([]byte(strings.Join(slices.Sorted(slices.Values(b.failed)), ""))))
}

// kinds say what the files of a bundle are, by the beginnings of their names.
var kinds = []struct{ prefix, text string }{
	{"versions.json", "the versions of kubectl and of Kubernetes"},
	{"cluster/", "pods, DaemonSets, CSIDriver and CSINodes, as Kubernetes describes them, and the events of the namespace"},
	{"nodes/", "what the plugin says on each node: status, doctor, volumes, templates, snapshots, contents, goldens"},
	{"logs/", "the logs of the project's containers, and of those before their last restart (previous)"},
	{"errors.txt", "what could not be had, and why"},
}

// readme says what is in a bundle.
func (b *bundle) readme() string {
	var text strings.Builder
	fmt.Fprintf(&text, "A report about csi-disktemplate, by kubectl disktemplate %s.\n\n", versionName())
	for _, k := range kinds {
		n := 0
		for _, name := range b.files {
			if strings.HasPrefix(name, k.prefix) {
				n++
			}
		}
		if n > 0 {
			fmt.Fprintf(&text, "%-14s %3d  %s\n", k.prefix, n, k.text)
		}
	}
	text.WriteString(`
No Secret and no ConfigMap was read. What looks like a password, a token or a private key was replaced by ` + removed + `,
and so were the values of environment variables that the project's manifests do not set. It may have missed some.
Names of namespaces, pods, nodes, claims, contents and images are in it, and logs can have more.
`)
	return text.String()
}

// writeWhole writes a file that is there when it is whole, for its owner alone. It replaces none.
func writeWhole(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".disktemplate-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Link(f.Name(), name)
}
