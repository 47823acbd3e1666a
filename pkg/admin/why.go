// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// Why is what a pod's volumes wait for on this node.
type Why struct {
	Asked   string   `json:"asked"`
	Waits   []Wait   `json:"waits"`   // for each volume that waits
	Volumes []Volume `json:"volumes"` // those that it has
	// Others are failures that may be the pod's: their calls do not tell for which pod they are.
	Others   []Wait           `json:"others"`
	Findings []health.Finding `json:"findings"` // what is wrong with the plugin
}

// Wait is what one volume waits for.
type Wait struct {
	Volume  string    `json:"volume"` // its id, or the name of one that is to be made
	Pod     *Pod      `json:"pod,omitempty"`
	Method  string    `json:"method"`
	Since   time.Time `json:"since"` // of the call that is under way, or that failed last
	Cause   Cause     `json:"cause"`
	Text    string    `json:"text"`   // what it waits for, in words
	Remedy  string    `json:"remedy"` // what to do
	Percent *int      `json:"percent,omitempty"`
}

// Seen is what a plugin knows that [Explain] looks at.
type Seen struct {
	Requests  Requests
	Volumes   []Volume
	Templates []Template       // those that are being built, or could not be
	Findings  []health.Finding // what is wrong with the plugin
}

// Explain says what the volumes of a pod wait for. The pod is asked for as NAMESPACE/NAME or by its UID. The
// id of a volume does as well, or the name of a claim. It looks at nothing but what it is given.
func Explain(asked string, s Seen) Why {
	w := Why{Asked: asked, Waits: []Wait{}, Volumes: []Volume{}, Others: []Wait{}, Findings: append([]health.Finding{}, s.Findings...)}
	ids := map[string]bool{}
	for _, v := range s.Volumes {
		if v.isOf(asked) {
			w.Volumes, ids[v.ID], ids[v.Claim] = append(w.Volumes, v), true, true
		}
	}
	delete(ids, "")
	waiting := map[string]bool{}
	for _, r := range slices.Concat(s.Requests.UnderWay, s.Requests.Failed) {
		if waiting[r.Object] || r.ends() { // what is under way is newer than what failed
			continue
		}
		switch {
		case r.isOf(asked) || ids[r.Object]:
			w.Waits, waiting[r.Object] = append(w.Waits, s.wait(r)), true
		case r.Pod == nil:
			w.Others, waiting[r.Object] = append(w.Others, s.wait(r)), true
		}
	}
	return w
}

// isOf reports whether a volume is the one that was asked for, or of that pod.
func (v Volume) isOf(asked string) bool {
	if asked == "" {
		return false
	}
	if v.ID == asked || v.Claim == asked {
		return true
	}
	inPod := func(at string) bool { return strings.Contains(at, "/pods/"+asked+"/") }
	return v.Pod.is(asked) || slices.ContainsFunc(v.PublishedAt, inPod)
}

// isOf reports whether a call is for what was asked for.
func (r Request) isOf(asked string) bool { return r.Object == asked || r.Pod.is(asked) }

func (p *Pod) is(asked string) bool {
	return p != nil && asked != "" && (p.UID == asked || p.Name != "" && p.Namespace+"/"+p.Name == asked)
}

// endings are the methods for which no pod waits that is to start.
var endings = []string{"NodeUnpublishVolume", "NodeUnstageVolume", "DeleteVolume", "DeleteSnapshot"}

// ends reports whether a call takes something away, or only looks.
func (r Request) ends() bool {
	looks := strings.Contains(r.Method, "Get") || strings.Contains(r.Method, "List")
	return looks || r.Object == "" || slices.Contains(endings, r.Method)
}

// wait says what a call waits for, or why it failed.
func (s Seen) wait(r Request) Wait {
	w := Wait{Volume: r.Object, Pod: r.Pod, Method: r.Method, Since: r.Began, Cause: r.Cause, Text: r.Error}
	i := slices.IndexFunc(s.Templates, func(t Template) bool { return r.Template != "" && t.Key == r.Template })
	switch {
	case r.UnderWay && r.WaitsFor != "":
		w.Cause, w.Text = CauseTemplate, r.WaitsFor
	case r.UnderWay:
		w.Cause, w.Text = CauseBusy, fmt.Sprintf("the plugin works on it (%s)", r.Method)
	case r.Cause == CauseTemplate && r.Template != "" && i < 0:
		w.Text = fmt.Sprintf("template %s has been built since its last try", r.Template)
	case r.Cause == CauseTemplate && i >= 0:
		w.Text = s.Templates[i].Reason
	}
	if i >= 0 {
		w.Percent = s.Templates[i].Percent
	}
	w.Remedy = remedies[w.Cause]
	return w
}

// remedies say what to do, beside what an error says itself.
var remedies = map[Cause]string{
	CauseTemplate:  "wait: the pod goes on by itself; to have such a template before the first pod, see --prewarm",
	CauseContent:   "make the content available, see `csi-disktemplate content list`; the pod goes on by itself then",
	CauseSpace:     "make room in the pool, or in the layer below it that is named; the pod goes on by itself then",
	CauseLimit:     "delete volumes that count for the limit, or raise it; the pod goes on by itself then",
	CauseRequest:   "correct the volume in the pod's spec, or its StorageClass, and create the pod anew",
	CauseElsewhere: "create the pod anew on the source's node, for example with a nodeSelector",
	CauseBusy:      "wait: Kubernetes asks again by itself",
	CauseCondition: "mend what the plugin reports, see /readyz; the pod goes on by itself then",
	CauseNode:      "see the plugin's log, and the kernel's (dmesg); Kubernetes asks again by itself",
}
