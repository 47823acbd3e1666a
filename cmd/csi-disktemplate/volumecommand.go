// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func newVolumeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "List the volumes of a node, or describe some",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(volumes.listCommand(), volumes.describeCommand())
	return cmd
}

// volumes are how volumes are shown.
var volumes = thing[admin.Volume]{
	one: "volume", many: "volumes", names: "VOLUME", example: "shop/web-0",
	about: `STATE is what the volume is doing: published (a pod has it), staged, attached, idle (an
image and nothing else), kept (for a commit to a golden) or ending (deleted, and it still
takes space). USED is what its filesystem has in use where that is mounted, and else what
the image has allocated. CONDITIONS are looked for in volumes that are attached.`,
	detail: `A volume is named by its id, by its pod as NAMESPACE/NAME, which names all that the pod
has, or by the name that a claim was made with. Own bytes are free when the volume goes;
shared ones are those of other files too, for example of its template.`,
	list: func(n admin.Node) ([]admin.Volume, error) { return n.Volumes() },
	more: func(n admin.Node, v admin.Volume) (admin.Volume, error) { return n.Volume(v.ID) },
	name: func(v admin.Volume) string { return v.ID },
	also: func(v admin.Volume) (names []string) {
		if v.Pod != nil && v.Pod.Name != "" {
			names = append(names, v.Pod.String())
		}
		if v.Claim != "" && v.Claim != v.ID {
			names = append(names, v.Claim)
		}
		return names
	},
	hint: func(v admin.Volume) string { return fmt.Sprintf("%s %s of %s", v.State, v.Lifecycle, ownerOf(v)) },
	columns: []column[admin.Volume]{
		{title: "VOLUME", text: func(v admin.Volume) string { return v.ID }},
		{title: "KIND", text: func(v admin.Volume) string { return v.Lifecycle }},
		{title: "OF", text: ownerOf},
		{title: "FILESYSTEM", text: func(v admin.Volume) string { return v.Filesystem }},
		{title: "SIZE", text: func(v admin.Volume) string { return size.Format(v.Size) }},
		{title: "USED", text: func(v admin.Volume) string { return size.Format(v.Used) }},
		{title: "STATE", text: func(v admin.Volume) string { return string(v.State) }},
		{title: "AGE", text: func(v admin.Volume) string { return ageOf(v.Created) }},
		{title: "CONDITIONS", text: func(v admin.Volume) string { return codesOf(v.Conditions) }},
		{title: "MODE", wide: true, text: func(v admin.Volume) string { return v.Mode }},
		{title: "ALLOCATED", wide: true, text: func(v admin.Volume) string { return size.Format(v.Allocated) }},
		{title: "FROM", wide: true, text: originOf},
		{title: "WAS READY", wide: true, text: func(v admin.Volume) string { return yes(v.Warm) }},
		{title: "PROMISE", wide: true, text: func(v admin.Volume) string { return cmp.Or(v.Durability, v.Provisioning) }},
		{title: "AT", wide: true, text: func(v admin.Volume) string {
			return strings.Join(slices.Concat(v.PublishedAt, v.StagedAt), ",")
		}},
	},
	fields: volumeFields,
}

// ownerOf is the pod of an inline volume, or the name of a claim.
func ownerOf(v admin.Volume) string {
	if v.Claim != "" || v.Pod == nil {
		return v.Claim
	}
	return v.Pod.String()
}

// originOf is what a volume was made of.
func originOf(v admin.Volume) string {
	switch {
	case v.Golden != "":
		return "golden " + v.Golden
	case v.Source != "":
		return v.Source
	case v.Template != "":
		return "template " + v.Template
	}
	return ""
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return ""
}

// ageOf is how long ago something was, as kubectl has it.
func ageOf(t time.Time) string { return duration.HumanDuration(time.Since(t)) }

// sinceText is a time, and how long ago it was.
func sinceText(t time.Time) string {
	return fmt.Sprintf("%s (%s ago)", t.UTC().Format(time.DateTime+"Z"), ageOf(t))
}

func codesOf(conditions []admin.Condition) string {
	var codes []string
	for _, c := range conditions {
		codes = append(codes, c.Code)
	}
	return strings.Join(codes, ",")
}

func volumeFields(v admin.Volume) []field {
	pod := "-"
	if v.Pod != nil {
		pod = fmt.Sprintf("%s (uid %s)", v.Pod, cmp.Or(v.Pod.UID, "-"))
	}
	fields := []field{
		{"Kind", v.Lifecycle}, {"Pod", pod}, {"Claim", cmp.Or(v.Claim, "-")}, {"State", string(v.State)},
		{"  published at", lines(v.PublishedAt)}, {"  staged at", lines(v.StagedAt)}, {"  devices", lines(v.Devices)},
		{"Filesystem", specText(v.Filesystem, v.Size, v.Label, v.Options, v.Content)},
		{"Mode", v.Mode}, {"UUID", cmp.Or(v.UUID, "-")},
		{"Used", size.Format(v.Used)}, {"Allocated", size.Format(v.Allocated)},
	}
	if v.Own != nil {
		fields = append(fields, field{"  own", size.Format(*v.Own)}, field{"  shared", size.Format(v.Shared())})
	}
	fields = append(fields, []field{
		{"Created", sinceText(v.Created)}, {"From", cmp.Or(originOf(v), "-")}, {"Was ready", cmp.Or(yes(v.Warm), "-")},
		{"Durability", cmp.Or(v.Durability, "-")}, {"Provisioning", cmp.Or(v.Provisioning, "-")},
		{"Access", cmp.Or(v.Access, "-")}, {"Asked from", cmp.Or(v.From, "-")}, {"  or else", cmp.Or(v.OrElse, "-")},
		{"Commit to", cmp.Or(v.CommitTo, "-")}, {"  when", cmp.Or(v.CommitWhen, "-")},
	}...)
	fields = append(fields, conditionFields(v.Conditions)...)
	return append(fields, requestFields(v.Requests)...)
}

// specText is what is inside of an image, as other messages spell it.
func specText(filesystem string, bytes int64, label string, options map[string]string, content string) string {
	return diskfs.Spec{Filesystem: filesystem, Size: bytes, Label: label, Options: options, Content: content}.String()
}

// lines are texts, one a line.
func lines(texts []string) string { return cmp.Or(strings.Join(texts, "\n"), "-") }

// conditionFields describe what is wrong with a volume.
func conditionFields(conditions []admin.Condition) []field {
	if len(conditions) == 0 {
		return []field{{"Conditions", "none"}}
	}
	return append([]field{{name: "Conditions"}}, conditionsUnder(conditions)...)
}

// requestFields describe calls.
func requestFields(requests []admin.Request) []field {
	if len(requests) == 0 {
		return []field{{"Calls", "-"}}
	}
	fields := []field{{name: "Calls"}}
	for _, r := range requests {
		fields = append(fields, field{"  " + r.Method, requestText(r)})
	}
	return fields
}

// requestText says what became of a call.
func requestText(r admin.Request) string {
	began := r.Began.UTC().Format(time.DateTime + "Z")
	if r.UnderWay {
		return strings.TrimSuffix(fmt.Sprintf("%s under way for %.1f s: %s", began, r.Duration, r.WaitsFor), ": ")
	}
	return strings.TrimSuffix(fmt.Sprintf("%s %s in %.1f ms: %s", began, r.Code, r.Duration*1000, r.Error), ": ")
}
