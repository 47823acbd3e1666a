// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package kubectl

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Meta is an object's metadata.
type Meta struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	UID         string            `json:"uid"`
	Annotations map[string]string `json:"annotations"`
	Owners      []owner           `json:"ownerReferences"`
}

type owner struct {
	Kind       string `json:"kind"`
	UID        string `json:"uid"`
	Controller bool   `json:"controller"`
}

// List is a list of objects.
type List[T any] struct {
	Items []T `json:"items"`
}

// Pod is a pod.
type Pod struct {
	Meta Meta `json:"metadata"`
	Spec struct {
		NodeName   string          `json:"nodeName"`
		Volumes    []PodVolume     `json:"volumes"`
		Containers []containerSpec `json:"containers"`
	} `json:"spec"`
	Status struct {
		Phase      string            `json:"phase"`
		Conditions []podCondition    `json:"conditions"`
		Containers []containerStatus `json:"containerStatuses"`
	} `json:"status"`
}

// DaemonSet is a DaemonSet.
type DaemonSet struct {
	Meta   Meta `json:"metadata"`
	Status struct {
		// Desired is the number of nodes that are to have a pod of it.
		Desired int `json:"desiredNumberScheduled"`
	} `json:"status"`
}

// PodVolume is a volume of a pod's spec. What is not nil is its kind.
type PodVolume struct {
	Name string `json:"name"`
	CSI  *struct {
		Driver string `json:"driver"`
	} `json:"csi"`
	Claim *struct {
		Name string `json:"claimName"`
	} `json:"persistentVolumeClaim"`
	Ephemeral *struct{} `json:"ephemeral"`
}

type containerSpec struct {
	Name     string `json:"name"`
	Security struct {
		Privileged bool `json:"privileged"`
	} `json:"securityContext"`
}

type podCondition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

type containerStatus struct {
	Name     string `json:"name"`
	Ready    bool   `json:"ready"`
	Restarts int    `json:"restartCount"`
	State    struct {
		Running *struct{} `json:"running"`
		Waiting *reason   `json:"waiting"`
		Ended   *reason   `json:"terminated"`
	} `json:"state"`
}

type reason struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// String is NAMESPACE/NAME.
func (p Pod) String() string { return p.Meta.Namespace + "/" + p.Meta.Name }

// MadeBy returns the UID of the DaemonSet that made the pod, or "" if none did.
func (p Pod) MadeBy() string {
	for _, o := range p.Meta.Owners {
		if o.Kind == "DaemonSet" && o.Controller {
			return o.UID
		}
	}
	return ""
}

// Privileged reports whether a container of the pod is root on its node.
func (p Pod) Privileged(container string) bool {
	return slices.ContainsFunc(p.Spec.Containers, func(c containerSpec) bool { return c.Name == container && c.Security.Privileged })
}

// Ready reports whether the pod is ready.
func (p Pod) Ready() bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c podCondition) bool { return c.Type == "Ready" && c.Status == "True" })
}

// Unscheduled says why the scheduler found no node yet, or "" if it says nothing.
func (p Pod) Unscheduled() string {
	for _, c := range p.Status.Conditions {
		if c.Type == "PodScheduled" && c.Status == "False" {
			return cmp.Or(c.Message, c.Reason)
		}
	}
	return ""
}

// NotRunning says why nothing can be executed in a container, or "" if something can.
func (p Pod) NotRunning(container string) string {
	for _, c := range p.Status.Containers {
		switch {
		case c.Name != container:
		case c.State.Running != nil:
			return ""
		case c.State.Waiting != nil:
			return strings.TrimSuffix(c.State.Waiting.Reason+": "+c.State.Waiting.Message, ": ")
		case c.State.Ended != nil:
			return "it has ended: " + c.State.Ended.Reason
		}
	}
	return "it does not run yet: " + cmp.Or(p.Status.Phase, "unknown")
}

// ClaimOf returns the name of the claim of a volume, or "" if it has none. A generic ephemeral volume has a claim that
// is made for its pod, see https://kubernetes.io/docs/concepts/storage/ephemeral-volumes/#persistentvolumeclaim-naming.
func (p Pod) ClaimOf(v PodVolume) string {
	switch {
	case v.Claim != nil:
		return v.Claim.Name
	case v.Ephemeral != nil:
		return p.Meta.Name + "-" + v.Name
	}
	return ""
}

// Claim is a PersistentVolumeClaim.
type Claim struct {
	Meta Meta `json:"metadata"`
	Spec struct {
		Class  string `json:"storageClassName"`
		Volume string `json:"volumeName"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

// Node is the node that the scheduler chose for a claim whose volume is made for its first consumer, or "".
func (c Claim) Node() string { return c.Meta.Annotations["volume.kubernetes.io/selected-node"] }

// Provisioner is the driver that is asked for the claim's volume, or "" while nobody is asked.
func (c Claim) Provisioner() string {
	return cmp.Or(c.Meta.Annotations["volume.kubernetes.io/storage-provisioner"],
		c.Meta.Annotations["volume.beta.kubernetes.io/storage-provisioner"])
}

// VolumeName is the name that external-provisioner makes a claim's volume with.
func (c Claim) VolumeName() string { return cmp.Or(c.Spec.Volume, "pvc-"+c.Meta.UID) }

// Class is a StorageClass.
type Class struct {
	Provisioner string `json:"provisioner"`
}

// Volume is a PersistentVolume.
type Volume struct {
	Spec struct {
		CSI struct {
			Driver string `json:"driver"`
			Handle string `json:"volumeHandle"`
		} `json:"csi"`
	} `json:"spec"`
}

// Event is an event.
type Event struct {
	Type     string    `json:"type"`
	Reason   string    `json:"reason"`
	Message  string    `json:"message"`
	Last     time.Time `json:"lastTimestamp"` // zero if it was recorded by the newer API
	Recorded time.Time `json:"eventTime"`
}

// String is the reason and the message.
func (e Event) String() string { return fmt.Sprintf("%s: %s", e.Reason, e.Message) }

// LastWarnings returns at most n warnings, the newest first.
func LastWarnings(events []Event, n int) (last []Event) {
	for _, e := range events {
		if e.Type == "Warning" {
			last = append(last, e)
		}
	}
	slices.SortStableFunc(last, func(a, b Event) int { return b.at().Compare(a.at()) })
	return last[:min(n, len(last))]
}

func (e Event) at() time.Time {
	if e.Last.IsZero() {
		return e.Recorded
	}
	return e.Last
}
