// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

// mostWarnings is how many warnings of a claim or pod are shown. Kubernetes repeats itself.
const mostWarnings = 3

// podWhy is what a pod waits for: in the cluster, and on the nodes that have its volumes, or are to make them.
type podWhy struct {
	Pod        string     `json:"pod"` // NAMESPACE/NAME
	Node       string     `json:"node,omitempty"`
	Scheduler  string     `json:"scheduler,omitempty"` // why it has no node yet
	Inline     []string   `json:"inlineVolumes,omitempty"`
	Claims     []claimWhy `json:"claims,omitempty"`
	Warnings   []string   `json:"warnings,omitempty"` // events of a pod that has no node
	Nodes      []nodeWhy  `json:"nodes,omitempty"`    // each that was asked
	Unanswered []string   `json:"unanswered,omitempty"`
}

// nodeWhy is what the plugin of a node says.
type nodeWhy struct {
	Node string `json:"node"`
	admin.Why
}

// claimWhy is one of a pod's claims that the driver makes, or of which it is not known who does.
type claimWhy struct {
	Name     string   `json:"name"`
	Phase    string   `json:"phase"`
	Class    string   `json:"class,omitempty"`
	Volume   string   `json:"volume"`         // its id, or the name that it is to be made with
	Node     string   `json:"node,omitempty"` // that the scheduler chose for it
	Warnings []string `json:"warnings,omitempty"`
	Note     string   `json:"note,omitempty"` // what could not be found out
}

func (f *fleet) whyCommand() *cobra.Command {
	var namespace, driverName, form string
	cmd := &cobra.Command{
		Use:   "why POD",
		Short: "Say what a pod waits for, and what to do",
		Long: `Say what a pod waits for, and what to do. It finds the pod's node, and asks the plugin there,
by csi-disktemplate why. For a claim that has no volume yet it asks the node whose provisioner
makes it. A pod that has no node yet, or no volume of the driver, is told from these.`,
		Example: `  kubectl disktemplate why web-0
  kubectl disktemplate why web-0 -n shop
  kubectl disktemplate why shop/web-0 -o json`,
		Args: func(cmd *cobra.Command, args []string) error {
			if cobra.ExactArgs(1)(cmd, args) == nil && args[0] != "" {
				return nil
			}
			return errors.New("name one pod; kubectl get pods -A shows them")
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			w, err := f.why(cmd.Context(), namespace, args[0], driverName)
			if err != nil {
				return err
			}
			return w.print(cmd.OutOrStdout(), form)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace of the pod (default: that of kubectl's context)")
	addDriverName(cmd.Flags(), &driverName)
	addValueP(cmd.Flags(), &form, "output", "o", "", objectForm, "form of the answer (default: a text)")
	return cmd
}

// why finds out what a pod waits for.
func (f *fleet) why(ctx context.Context, namespace, asked, driverName string) (w podWhy, err error) {
	pod, err := f.pod(ctx, namespace, asked)
	if err != nil {
		return w, err
	}
	w = podWhy{Pod: pod.String(), Node: pod.Spec.NodeName, Scheduler: pod.Unscheduled()}
	for _, v := range pod.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == driverName {
			w.Inline = append(w.Inline, v.Name)
		}
		if name := pod.ClaimOf(v); name != "" {
			c, ours, err := f.claim(ctx, pod.Meta.Namespace, name, driverName)
			if err != nil {
				return w, err
			}
			if ours {
				w.Claims = append(w.Claims, c)
			}
		}
	}
	if w.isOurs() && w.Node == "" {
		w.Warnings, _ = f.warnings(ctx, pod.Meta.Namespace, "Pod", pod.Meta.Name) // the scheduler's word is there
	}
	return w, f.askNodes(ctx, &w)
}

// pod gets a pod, named NAME, NAMESPACE/NAME or pod/NAME.
func (f *fleet) pod(ctx context.Context, namespace, asked string) (pod kubectl.Pod, err error) {
	name := strings.TrimPrefix(strings.TrimPrefix(asked, "pods/"), "pod/")
	if in, of, ok := strings.Cut(name, "/"); ok {
		if namespace != "" && namespace != in {
			return pod, fmt.Errorf("pod %.200s: -n names another namespace, %s", asked, namespace)
		}
		namespace, name = in, of
	}
	args := []string{"pod/" + name}
	if namespace != "" {
		args = append(args, "-n", namespace)
	}
	if err := f.client().Get(ctx, &pod, args...); errors.Is(err, kubectl.ErrNotFound) {
		return pod, fmt.Errorf("%w; kubectl get pods -A shows those that are there, and -n names the namespace", err)
	} else if err != nil {
		return pod, fmt.Errorf("looking for the pod: %w", err)
	}
	return pod, nil
}

// claim describes a claim, and reports whether the driver makes it, as far as that is known.
func (f *fleet) claim(ctx context.Context, namespace, name, driverName string) (w claimWhy, ours bool, err error) {
	var c kubectl.Claim
	err = f.client().Get(ctx, &c, "persistentvolumeclaim/"+name, "-n", namespace)
	if errors.Is(err, kubectl.ErrNotFound) {
		return claimWhy{Name: name, Phase: "missing",
			Note: "the claim does not exist: create it, or correct its name in the pod's spec"}, true, nil
	}
	if errors.Is(err, kubectl.ErrForbidden) {
		return claimWhy{Name: name, Phase: "unknown", Note: err.Error()}, true, nil
	}
	if err != nil {
		return w, false, fmt.Errorf("looking for the claim %s: %w", name, err)
	}
	w = claimWhy{Name: name, Phase: c.Status.Phase, Class: c.Spec.Class, Volume: c.VolumeName(), Node: c.Node()}
	by, id, err := f.madeBy(ctx, c)
	if err != nil {
		w.Note = fmt.Sprintf("which driver makes it is not known: %v", err)
	}
	w.Volume = cmp.Or(id, w.Volume)
	if ours = by == driverName || err != nil; ours && c.Spec.Volume == "" {
		if w.Warnings, err = f.warnings(ctx, namespace, "PersistentVolumeClaim", name); err != nil {
			w.Note = strings.TrimPrefix(w.Note+fmt.Sprintf("; its events are not known: %v", err), "; ")
		}
	}
	return w, ours, nil
}

// madeBy returns the driver of a claim, and the id of its volume, if it has one.
func (f *fleet) madeBy(ctx context.Context, c kubectl.Claim) (driver, id string, err error) {
	if c.Spec.Volume != "" {
		var v kubectl.Volume
		err := f.client().Get(ctx, &v, "persistentvolume/"+c.Spec.Volume)
		if err == nil || c.Provisioner() == "" {
			return v.Spec.CSI.Driver, v.Spec.CSI.Handle, err
		}
	}
	if by := c.Provisioner(); by != "" || c.Spec.Class == "" {
		return by, "", nil
	}
	var class kubectl.Class
	err = f.client().Get(ctx, &class, "storageclass/"+c.Spec.Class)
	return class.Provisioner, "", err
}

// warnings are the last warnings about an object.
func (f *fleet) warnings(ctx context.Context, namespace, kind, name string) (texts []string, err error) {
	var events kubectl.List[kubectl.Event]
	err = f.client().Get(ctx, &events, "events", "-n", namespace,
		"--field-selector", "involvedObject.kind="+kind+",involvedObject.name="+name)
	for _, e := range kubectl.LastWarnings(events.Items, mostWarnings) {
		texts = append(texts, e.String())
	}
	return texts, err
}

func (w *podWhy) isOurs() bool { return len(w.Inline)+len(w.Claims) > 0 }

// question is what is asked of a node.
type question struct{ node, of string }

// questions are what to ask, and where: the pod's node about the pod and its claims, and the node that makes a claim.
func (w *podWhy) questions() (all []question) {
	if w.Node != "" && w.isOurs() {
		all = append(all, question{w.Node, w.Pod})
	}
	for _, c := range w.Claims {
		if node := cmp.Or(w.Node, c.Node); node != "" && c.Volume != "" {
			all = append(all, question{node, c.Volume})
		}
	}
	return all
}

// askNodes asks the plugins, and adds their answers.
func (f *fleet) askNodes(ctx context.Context, w *podWhy) error {
	questions := w.questions()
	if len(questions) == 0 {
		return nil
	}
	pods, err := f.pods(ctx)
	if err != nil {
		return err
	}
	answers, errs := make([]admin.Why, len(questions)), make([]error, len(questions))
	together(len(questions), func(i int) { answers[i], errs[i] = f.answerOf(ctx, pods, questions[i]) })
	for i, q := range questions {
		if errs[i] != nil {
			w.Unanswered = append(w.Unanswered, fmt.Sprintf("%s: %v", q.node, errs[i]))
			continue
		}
		w.add(q.node, answers[i])
	}
	slices.Sort(w.Unanswered)
	w.Unanswered = slices.Compact(w.Unanswered)
	// A node was asked about each of the pod's volumes by its name, so that nothing else is the pod's, as far as the
	// names are known.
	if !slices.ContainsFunc(w.Claims, func(c claimWhy) bool { return c.Note != "" }) {
		for i := range w.Nodes {
			w.Nodes[i].Others = []admin.Wait{}
		}
	}
	return nil
}

// add adds the answer of a node to what that has said before.
func (w *podWhy) add(node string, a admin.Why) {
	i := slices.IndexFunc(w.Nodes, func(n nodeWhy) bool { return n.Node == node })
	if i >= 0 {
		w.Nodes[i].Why = merged(w.Nodes[i].Why, a)
		return
	}
	a.Asked = w.Pod
	w.Nodes = append(w.Nodes, nodeWhy{node, a})
}

// whyAnswer is what csi-disktemplate why prints.
type whyAnswer struct{ admin.Why }

func (a *whyAnswer) check() error {
	if a.Asked == "" || a.Waits == nil || a.Volumes == nil {
		return errors.New("it does not say what was asked and what was found")
	}
	return nil
}

// answerOf has the plugin of a node answer. Of several pods, as during an update, it is the first that does.
func (f *fleet) answerOf(ctx context.Context, pods []kubectl.Pod, q question) (admin.Why, error) {
	there, err := on(pods, q.node)
	for _, p := range there {
		var a whyAnswer
		if err = f.ask(ctx, p, &a, "why", q.of); err == nil {
			return a.Why, nil
		}
	}
	return admin.Why{}, err
}

// merged joins two answers of a node about the same pod. What one knows to be the pod's, the other may only suspect.
func merged(a, b admin.Why) admin.Why {
	known := func(waits []admin.Wait, w admin.Wait) bool {
		return slices.ContainsFunc(waits, func(have admin.Wait) bool { return have.Volume == w.Volume })
	}
	for _, w := range b.Waits {
		if !known(a.Waits, w) {
			a.Waits = append(a.Waits, w)
		}
	}
	for _, v := range b.Volumes {
		if !slices.ContainsFunc(a.Volumes, func(have admin.Volume) bool { return have.ID == v.ID }) {
			a.Volumes = append(a.Volumes, v)
		}
	}
	// Both know of the same failures of other volumes.
	a.Others = slices.DeleteFunc(a.Others, func(w admin.Wait) bool { return known(a.Waits, w) })
	return a
}

// print prints an answer. One that no plugin gave is an error.
func (w *podWhy) print(out io.Writer, form string) error {
	if form != "" {
		if err := printObject(out, w, form); err != nil {
			return err
		}
	} else if err := w.printText(out); err != nil {
		return err
	}
	if len(w.Unanswered) > 0 {
		return errors.New(strings.Join(w.Unanswered, "; "))
	}
	return nil
}

func (w *podWhy) printText(out io.Writer) error {
	if err := printFields(out, printable(w.title()), w.fields()); err != nil {
		return err
	}
	for _, a := range w.Nodes {
		if err := printWhy(out, a.Why, "node "+a.Node); err != nil {
			return err
		}
		if w.Node != "" && len(a.Waits)+len(a.Volumes)+len(a.Others) == 0 {
			fmt.Fprintf(out, "  kubelet has not asked for its volumes yet: see kubectl -n %s\n",
				printable(strings.Replace(w.Pod, "/", " describe pod ", 1)))
		}
	}
	return nil
}

// title says where a pod is.
func (w *podWhy) title() string {
	switch {
	case !w.isOurs():
		return w.Pod + " has no volume of this driver, and does not wait for one: see kubectl describe pod."
	case w.Node == "" && w.Scheduler != "":
		return fmt.Sprintf("%s has no node yet: %s", w.Pod, w.Scheduler)
	case w.Node == "":
		return w.Pod + " has no node yet, and the scheduler does not say why."
	}
	return fmt.Sprintf("%s is on node %s.", w.Pod, w.Node)
}

// fields are what the cluster says. Kubernetes checks neither what an event says nor how a pod names its claim, so each
// value is made printable by itself: a line break in one of them is none here.
func (w *podWhy) fields() (fields []field) {
	if len(w.Warnings) > 0 {
		fields = append(fields, field{"Warnings", printableEach(w.Warnings)})
	}
	for _, c := range w.Claims {
		of := c.Name
		if c.Class != "" {
			of += " of class " + c.Class
		}
		fields = append(fields, field{"Claim", printable(of)}, field{"  is", printable(strings.ToLower(cmp.Or(c.Phase, "unknown")))})
		for _, f := range []field{
			{"  made by", printable(c.provisioner())}, {"  warnings", printableEach(c.Warnings)}, {"  note", printable(c.Note)},
		} {
			if f.value != "" {
				fields = append(fields, f)
			}
		}
	}
	return fields
}

// printableEach has a line for each text.
func printableEach(texts []string) string {
	var shown []string
	for _, t := range texts {
		shown = append(shown, printable(t))
	}
	return strings.Join(shown, "\n")
}

// provisioner says which node's provisioner makes a claim that has no volume yet.
func (c claimWhy) provisioner() string {
	switch {
	case c.Phase != "Pending":
		return ""
	case c.Node == "":
		return "nobody yet: the scheduler has chosen no node for it"
	}
	return "the provisioner of node " + c.Node
}
