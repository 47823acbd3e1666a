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
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

// mostLogLines is how much of a container's log a bundle has, from its end: some megabytes.
const mostLogLines = "20000"

// part is a file of a bundle, and how to get what is in it.
type part struct {
	name string
	get  func(context.Context) ([]byte, error)
}

// bundled is a file of a bundle.
type bundled struct {
	name string
	data []byte
}

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
			return f.bundle(cmd.Context(), cmd.OutOrStdout(), to, driverName)
		},
	}
	cmd.Flags().StringVarP(&to, "output", "o", "", "the file to write, which must not exist (default: disktemplate-DATE-TIME.tar.gz)")
	addDriverName(cmd.Flags(), &driverName)
	return cmd
}

// bundle writes a bundle, and says what is in it.
func (f *fleet) bundle(ctx context.Context, out io.Writer, to, driverName string) error {
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("%s exists: give --output another name, or remove it", to)
	}
	pods, err := f.pods(ctx)
	if err != nil {
		return err
	}
	// Pods of other namespaces with the project's labels are not the project's.
	namespace := pods[0].Meta.Namespace
	parts := slices.Concat(f.clusterParts(namespace, pods, driverName), f.nodeParts(pods), f.logParts(ctx, namespace))
	files, failed := gathered(ctx, parts)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("nothing was written: %w", context.Cause(ctx))
	}
	if failed != "" {
		files = append(files, bundled{"errors.txt", scrubbed([]byte(failed))})
	}
	files = append([]bundled{{"README.txt", []byte(bundleReadme(files))}}, files...)
	dir := strings.TrimSuffix(filepath.Base(to), ".tar.gz")
	if err := writeWhole(to, func(w io.Writer) error { return writeTar(w, dir, files) }); err != nil {
		return err
	}
	fmt.Fprint(out, bundleReadme(files))
	fmt.Fprintf(out, "\nWritten to %s. Look into it before you send it.\n", to)
	if failed != "" {
		fmt.Fprintf(out, "It lacks:\n%s", scrubbed([]byte(failed)))
	}
	return nil
}

// asks is a part that kubectl prints.
func (f *fleet) asks(name string, args ...string) part {
	return part{name, func(ctx context.Context) ([]byte, error) { return f.client().Run(ctx, args...) }}
}

// clusterParts are what Kubernetes knows.
func (f *fleet) clusterParts(namespace string, pods []kubectl.Pod, driverName string) (parts []part) {
	ask := func(name string, args ...string) {
		parts = append(parts, f.asks(name, args...))
	}
	ofProject := []string{"-l", projectLabel, "-n", namespace}
	ask("versions.json", "version", "-o", "json")
	ask("cluster/pods.txt", append([]string{"get", "pods", "-o", "wide"}, ofProject...)...)
	for _, kind := range []string{"pods", "daemonsets"} {
		args := append([]string{"describe", kind}, ofProject...)
		parts = append(parts, part{"cluster/" + kind + "-described.txt", func(ctx context.Context) ([]byte, error) {
			text, err := f.client().Run(ctx, args...)
			return described(text), err
		}})
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
	return parts
}

// nodeParts are what the plugin says on each node.
func (f *fleet) nodeParts(pods []kubectl.Pod) (parts []part) {
	for _, p := range pods {
		for name, args := range map[string][]string{
			"status": {"status"}, "doctor": {"doctor"}, "volumes": {"volume", "list"}, "templates": {"template", "list"},
			"snapshots": {"snapshot", "list"}, "contents": {"content", "list"}, "goldens": {"golden", "list"},
		} {
			name = path.Join("nodes", p.Spec.NodeName, p.Meta.Name, name+".json")
			parts = append(parts, part{name, func(ctx context.Context) ([]byte, error) { return f.exec(ctx, p, args...) }})
		}
	}
	return parts
}

// logParts are the logs of the project's pods: the plugin and its sidecars.
func (f *fleet) logParts(ctx context.Context, namespace string) (parts []part) {
	var found kubectl.List[kubectl.Pod]
	err := f.client().Get(ctx, &found, "pods", "-l", projectLabel, "-n", namespace)
	if err != nil {
		return []part{{"logs", func(context.Context) ([]byte, error) { return nil, err }}}
	}
	for _, p := range found.Items {
		for _, c := range p.Status.Containers {
			log := []string{"logs", "-n", p.Meta.Namespace, "pod/" + p.Meta.Name, "-c", c.Name,
				"--timestamps", "--tail=" + mostLogLines}
			name := path.Join("logs", p.Meta.Namespace, p.Meta.Name, c.Name)
			parts = append(parts, f.asks(name+".log", log...))
			if c.Restarts > 0 {
				parts = append(parts, f.asks(name+".previous.log", append(slices.Clone(log), "--previous")...))
			}
		}
	}
	return parts
}

// gathered gets all parts, without their secrets, in the order of their names, and says which could not be had.
func gathered(ctx context.Context, parts []part) (files []bundled, failed string) {
	slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.name, b.name) })
	data, errs := make([][]byte, len(parts)), make([]error, len(parts))
	together(len(parts), func(i int) { data[i], errs[i] = parts[i].get(ctx) })
	for i, p := range parts {
		if errs[i] != nil {
			failed += printable(fmt.Sprintf("%s: %v", p.name, errs[i])) + "\n"
			continue
		}
		files = append(files, bundled{p.name, scrubbed(data[i])})
	}
	return files, failed
}

// kinds say what the files of a bundle are, by the beginnings of their names.
var kinds = []struct{ prefix, text string }{
	{"versions.json", "the versions of kubectl and of Kubernetes"},
	{"cluster/", "pods, DaemonSets, CSIDriver and CSINodes, as Kubernetes describes them, and the events of the namespace"},
	{"nodes/", "what the plugin says on each node: status, doctor, volumes, templates, snapshots, contents, goldens"},
	{"logs/", "the logs of the project's containers, and of those before their last restart (previous)"},
	{"errors.txt", "what could not be had, and why"},
}

// bundleReadme says what is in a bundle.
func bundleReadme(files []bundled) string {
	var b strings.Builder
	fmt.Fprintf(&b, "A report about csi-disktemplate, by kubectl disktemplate %s.\n\n", versionName())
	for _, k := range kinds {
		n := 0
		for _, f := range files {
			if strings.HasPrefix(f.name, k.prefix) {
				n++
			}
		}
		if n > 0 {
			fmt.Fprintf(&b, "%-14s %3d  %s\n", k.prefix, n, k.text)
		}
	}
	b.WriteString(`
No Secret and no ConfigMap was read. What looks like a password, a token or a private key was replaced by ` + removed + `,
and so were the values of environment variables that the project's manifests do not set. It may have missed some.
Names of namespaces, pods, nodes, claims, contents and images are in it, and logs can have more.
`)
	return b.String()
}

// writeTar writes the files below one directory, compressed.
func writeTar(out io.Writer, dir string, files []bundled) error {
	z := gzip.NewWriter(out)
	w := tar.NewWriter(z)
	for _, f := range files {
		h := &tar.Header{
			Typeflag: tar.TypeReg, Name: path.Join(dir, f.name), Mode: 0o600, Size: int64(len(f.data)), ModTime: time.Now(),
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(f.data); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), z.Close())
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
