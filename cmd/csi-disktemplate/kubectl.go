// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/meant"
)

const (
	// kubectlName is the name that kubectl looks for on PATH when somebody types `kubectl disktemplate`.
	kubectlName = "kubectl-disktemplate"
	// pluginLabels are those of the plugin's pods in all manifests, and container is where the plugin runs in them.
	pluginLabels = projectLabel + ",app.kubernetes.io/component=plugin"
	projectLabel = "app.kubernetes.io/name=csi-disktemplate"
	container    = "plugin"
	// answerTimeout is for one run of kubectl. The API server gives a node that is gone up to 30 s, and nobody wants to
	// look at a screen for longer; doctor on a busy node takes seconds.
	answerTimeout = 30 * time.Second
	// mostAtOnce is how many runs of kubectl there are at a time: each is a process, and a connection to the API server.
	mostAtOnce = 16
)

// fleet is the plugin on the nodes of a cluster, as kubectl reaches it.
type fleet struct {
	forKubectl pflag.FlagSet // that each run of kubectl gets
	namespace  string        // of the plugin; "" is wherever it is
}

// commandNamed returns the command for the name that the binary was started by.
func commandNamed(argv0 string) *cobra.Command {
	if filepath.Base(argv0) == kubectlName {
		return newKubectlCommand()
	}
	return newCommand()
}

// newKubectlCommand returns the command kubectl disktemplate.
func newKubectlCommand() *cobra.Command {
	var f fleet
	cmd := &cobra.Command{
		Use:         kubectlName,
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl disktemplate"},
		Short:       "Ask the plugin on all nodes of a cluster",
		Long: `Ask the plugin on all nodes of a cluster: how it is, and what a pod waits for.

It runs kubectl, with your credentials and permissions. You need: list pods, and get and
create pods/exec where the plugin runs; for status, doctor and bundle also list daemonsets
there; for why also get pods, persistentvolumeclaims, persistentvolumes and storageclasses,
and list events; for bundle also get pods/log, csidrivers and csinodes, and list events. It
changes nothing in the cluster.

Who may execute something in the plugin's pods is root on the nodes: it is a tool for
administrators.`,
		Example: `  kubectl disktemplate status
  kubectl disktemplate why web-0 -n shop
  kubectl disktemplate doctor
  kubectl disktemplate bundle -o report.tar.gz`,
		Version:       versionLine(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return refuse(cmd.Flags())
		},
	}
	cmd.SetVersionTemplate("{{.DisplayName}} {{.Version}}\n")
	f.add(cmd.PersistentFlags())
	cmd.SetFlagErrorFunc(flagError)
	cmd.AddCommand(f.statusCommand(), f.whyCommand(), f.doctorCommand(), f.bundleCommand())
	for _, c := range cmd.Commands() {
		c.RunE = inOneLine(c.RunE)
	}
	completeFlags(cmd)
	return cmd
}

// inOneLine makes the errors of a command printable. They quote objects of the cluster and what containers print, and
// whoever wrote those must not write lines of their own to an administrator's terminal.
func inOneLine(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := run(cmd, args); err != nil {
			return &lineError{err}
		}
		return nil
	}
}

// lineError is an error whose text is [printable].
type lineError struct{ error }

func (e *lineError) Error() string { return printable(e.error.Error()) }
func (e *lineError) Unwrap() error { return e.error }

func (f *fleet) add(flags *pflag.FlagSet) {
	f.forKubectl.String("as", "", "kubectl's: the user to impersonate")
	f.forKubectl.String("cluster", "", "kubectl's: the cluster of the kubeconfig to use")
	f.forKubectl.String("context", "", "kubectl's: the context of the kubeconfig to use")
	f.forKubectl.String("kubeconfig", "", "kubectl's: the kubeconfig to use")
	f.forKubectl.String("request-timeout", "", "kubectl's: how long to wait for the API server, as 5s")
	f.forKubectl.String("server", "", "kubectl's: the address of the API server")
	f.forKubectl.String("user", "", "kubectl's: the user of the kubeconfig to be")
	flags.AddFlagSet(&f.forKubectl)
	flags.StringVar(&f.namespace, "plugin-namespace", "", "namespace that the plugin is installed in (default: the only one that has pods of it)")
}

func addDriverName(f *pflag.FlagSet, name *string) {
	addValue(f, name, "driver-name", driver.DefaultName, checked(driver.CheckName),
		"name of the driver, as the plugin was given it")
}

// client runs kubectl with the user's flags.
func (f *fleet) client() kubectl.Client {
	c := kubectl.Client{Timeout: answerTimeout}
	f.forKubectl.VisitAll(func(flag *pflag.Flag) {
		if value := flag.Value.String(); value != "" {
			c.Flags = append(c.Flags, "--"+flag.Name+"="+value)
		}
	})
	return c
}

// inNamespace are the arguments of kubectl get for the plugin's namespace.
func (f *fleet) inNamespace() []string {
	if f.namespace == "" {
		return []string{"-A"}
	}
	return []string{"-n", f.namespace}
}

// pods returns the plugin's pods, by their nodes. None is an error.
func (f *fleet) pods(ctx context.Context) ([]kubectl.Pod, error) {
	var found kubectl.List[kubectl.Pod]
	err := f.client().Get(ctx, &found, append([]string{"pods", "-l", pluginLabels}, f.inNamespace()...)...)
	if errors.Is(err, kubectl.ErrForbidden) && f.namespace == "" {
		return nil, fmt.Errorf("looking for the plugin: %w; or name its namespace by --plugin-namespace", err)
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the plugin: %w", err)
	}
	return ofPlugin(found.Items)
}

// ofPlugin returns the pods that are the plugin's, of all that have its labels. Whoever may create pods in some
// namespace can give theirs the labels, and what such a pod says would be shown to an administrator as the plugin's
// word. So a pod counts only if a DaemonSet made it and it is privileged, as the plugin must be to mount for others:
// where Pod Security is enforced, tenants make no such pod. Where they can, the administrator says which namespace is
// the plugin's.
func ofPlugin(labelled []kubectl.Pod) (pods []kubectl.Pod, err error) {
	var namespaces []string
	for _, p := range labelled {
		if p.MadeBy() != "" && p.Privileged(container) {
			pods, namespaces = append(pods, p), append(namespaces, p.Meta.Namespace)
		}
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("the plugin is not installed in this cluster, or not where you look: no privileged pod of a "+
			"DaemonSet has the labels %s; kubectl config current-context says which cluster it is", pluginLabels)
	}
	slices.Sort(namespaces)
	if namespaces = slices.Compact(namespaces); len(namespaces) > 1 {
		return nil, fmt.Errorf("pods with the plugin's labels are in several namespaces: %s; only one can be the plugin's: "+
			"name it by --plugin-namespace, and find out who made the others", strings.Join(namespaces, ", "))
	}
	slices.SortFunc(pods, func(a, b kubectl.Pod) int {
		return cmp.Or(cmp.Compare(a.Spec.NodeName, b.Spec.NodeName), cmp.Compare(a.String(), b.String()))
	})
	return pods, nil
}

// on returns the plugin's pods of a node. None is an error.
func on(pods []kubectl.Pod, node string) (there []kubectl.Pod, err error) {
	var nodes []string
	for _, p := range pods {
		if p.Spec.NodeName == node {
			there = append(there, p)
		}
		nodes = append(nodes, p.Spec.NodeName)
	}
	if len(there) == 0 {
		return nil, fmt.Errorf("no plugin runs on node %s; %s", node, meant.Say(node, nodes,
			"kubectl disktemplate status shows where it runs, and docs/installing.md says which nodes get it"))
	}
	return there, nil
}

// answer is what csi-disktemplate prints as JSON.
type answer interface {
	check() error // says what the answer lacks: any object is JSON, and an empty one would say that all is well
}

// ask runs csi-disktemplate in a pod, and reads the JSON that it prints, also where it exits with another code than 0.
func (f *fleet) ask(ctx context.Context, p kubectl.Pod, into answer, args ...string) error {
	out, err := f.exec(ctx, p, args...)
	if err != nil {
		return err
	}
	err = json.Unmarshal(out, into)
	if err == nil {
		err = into.check()
	}
	if err != nil {
		return fmt.Errorf("its answer cannot be read: csi-disktemplate %s: %w; the plugin may be of another version than this "+
			"program (%s): see the pod's image, and install the same version here", args[0], err, versionName())
	}
	return nil
}

// exec is ask, and returns the JSON.
func (f *fleet) exec(ctx context.Context, p kubectl.Pod, args ...string) ([]byte, error) {
	if not := p.NotRunning(container); not != "" {
		return nil, fmt.Errorf("the plugin does not run: %s; see kubectl -n %s describe pod %s",
			not, p.Meta.Namespace, p.Meta.Name)
	}
	out, err := f.client().Exec(ctx, p, container, append(append([]string{"csi-disktemplate"}, args...), "-o", "json")...)
	if failed := (*kubectl.Failed)(nil); errors.As(err, &failed) && failed.Code > 0 && len(failed.Output) > 0 {
		return failed.Output, nil
	}
	return out, ofOtherVersion(err)
}

// ofOtherVersion explains the error of a plugin that does not know a command yet.
func ofOtherVersion(err error) error {
	if err != nil && strings.Contains(err.Error(), "unknown command") {
		return fmt.Errorf("the plugin is of another version than this program (%s): %w", versionName(), err)
	}
	return err
}

// spread says whether each node that is to have the plugin has a pod of it. Where a DaemonSet could not make a pod, for
// example because of an admission policy, there is nobody to ask, and no other sign of the node.
func (f *fleet) spread(ctx context.Context, pods []kubectl.Pod) []health.Finding {
	namespace := pods[0].Meta.Namespace
	var sets kubectl.List[kubectl.DaemonSet]
	if err := f.client().Get(ctx, &sets, "daemonsets", "-l", pluginLabels, "-n", namespace); err != nil {
		return []health.Finding{unknownSpread(err.Error(), "")}
	}
	if len(sets.Items) == 0 {
		return []health.Finding{unknownSpread(fmt.Sprintf("no DaemonSet of the namespace %s has the labels %s", namespace, pluginLabels),
			"give the plugin's DaemonSet the labels that it has in the project's manifests")}
	}
	var found []health.Finding
	for _, s := range sets.Items {
		found = append(found, spreadOf(s, pods))
	}
	return found
}

// spreadOf compares the nodes that are to have a pod of a DaemonSet with those that have one. The pods that are not on a
// node yet each stand for one.
func spreadOf(s kubectl.DaemonSet, pods []kubectl.Pod) health.Finding {
	on := map[string]bool{}
	for _, p := range pods {
		if p.MadeBy() == s.Meta.UID {
			on[cmp.Or(p.Spec.NodeName, "/"+p.Meta.Name)] = true // no node's name has a slash
		}
	}
	f := health.Finding{Requirement: spreadName, State: health.StateGood,
		Text: fmt.Sprintf("the plugin has a pod for each node that it is to be on (%d)", s.Status.Desired)}
	if len(on) < s.Status.Desired {
		f.State = health.StateBroken
		f.Text = fmt.Sprintf("the plugin has pods for only %d of %d nodes that it is to be on", len(on), s.Status.Desired)
		f.Cost = "pods on the other nodes get no volumes"
		f.Remedy = fmt.Sprintf("kubectl -n %s describe daemonset %s says why it makes no pods there", s.Meta.Namespace, s.Meta.Name)
	}
	return f
}

// spreadName is the requirement that each node which is to have the plugin has it.
const spreadName = "nodes"

func unknownSpread(why, remedy string) health.Finding {
	return health.Finding{Requirement: spreadName, State: health.StateDegraded, Remedy: remedy,
		Text: "whether the plugin has a pod for each node that it is to be on is not known: " + why}
}

// together calls do for each number below n, some at a time.
func together(n int, do func(i int)) {
	var g errgroup.Group
	g.SetLimit(mostAtOnce)
	for i := range n {
		g.Go(func() error { do(i); return nil })
	}
	_ = g.Wait() // none fails
}
