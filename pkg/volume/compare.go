// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// A repeated request is fine, and a different one for the same volume is not (CSI 1.13,
// "Idempotency"). So each field of a request is compared with the volume's record here. A
// test changes every field in turn and checks that the change is noticed.

// compare returns [errdefs.ErrExists] if the volume that has the request's id differs from
// what is asked for, and [errdefs.ErrState] if it has another target.
func (r InlineRequest) compare(have image.Record) error {
	var diff differences
	if asked := asHave(r.Spec, have.Spec, r.Lineage); !have.Spec.Equal(asked) {
		diff.add("content", have.Spec.String(), asked.String())
	}
	diff.add("lifecycle", have.Lifecycle, image.Inline)
	diff.add("publishAs", have.Mode, r.Mode)
	diff.add("access", have.Access, r.Access)
	diff.lineage(have.Lineage, r.Lineage)
	if r.Durability != "" { // else any will do: the operator's default may have changed since
		diff.add("durability", cmp.Or(have.Durability, image.Synced), r.Durability)
	}
	if err := diff.error("volume "+r.ID, "unpublish it first"); err != nil {
		return err
	}
	// CSI 1.13, NodePublishVolume, the table of target paths: without the capability to be
	// published twice this is FAILED_PRECONDITION.
	if have.Target != r.Target {
		return fmt.Errorf("%w: volume %s has the target %s, and %s is asked for; an inline volume has one target: unpublish it there first", errdefs.ErrState, r.ID, have.Target, r.Target)
	}
	return nil
}

// compare returns [errdefs.ErrExists] if the claim that has the request's id differs from
// what is asked for.
func (r ClaimRequest) compare(have image.Record) error {
	var diff differences
	diff.add("name", have.Name, r.Name)
	diff.add("lifecycle", have.Lifecycle, image.Claim)
	asked := asHave(r.Spec, have.Spec, r.Lineage)
	if (r.Source != image.Source{}) { // the source decided, and may be deleted by now
		r.Mode = r.modeOf(have.Mode)
		asked = r.asSource(have.Spec)
		asked.Size = r.Spec.Size
	}
	switch has := have.Spec.Size; {
	case asked.Size > has:
		diff.add("size", size.Format(has), size.Format(asked.Size))
	case r.Limit > 0 && has > r.Limit:
		diff.add("size", size.Format(has), fmt.Sprintf("a limit of %d bytes", r.Limit))
	}
	if asked.Size = have.Spec.Size; !have.Spec.Equal(asked) {
		diff.add("content", have.Spec.String(), asked.String())
	}
	diff.add("mode", have.Mode, r.Mode)
	diff.add("provisioning", have.Provisioning, r.Provisioning)
	diff.add("source", have.Source, r.Source)
	diff.lineage(have.Lineage, r.Lineage)
	return diff.error("volume "+have.ID, "use another name")
}

// CompareClass returns [errdefs.ErrExists] if a claim differs from one of the request's
// class. Name, size and source are not compared.
func (r ClaimRequest) CompareClass(have image.Record) error {
	r.Name, r.Spec.Size, r.Limit, r.Source = have.Name, have.Spec.Size, 0, have.Source
	if r.DefaultSpec {
		r.Spec = have.Spec
	}
	return r.compare(have)
}

// compareSnapshot returns [errdefs.ErrExists] if the snapshot that has the id of this name
// differs from what is asked for.
func compareSnapshot(have image.SnapshotRecord, name, volumeID string) error {
	var diff differences
	diff.add("name", have.Name, name)
	diff.add("source volume", have.Volume, volumeID)
	return diff.error("snapshot "+have.ID, "use another name")
}

// differences collects how a volume differs from what was asked for.
type differences []string

func (d *differences) add(field string, is, asked any) {
	if is != asked {
		*d = append(*d, fmt.Sprintf("its %s is %v, and %v is asked for", field, is, asked))
	}
}

func (d *differences) lineage(is, asked image.Lineage) {
	d.add("from", is.From, asked.From)
	d.add("orElse", is.OrElse, asked.OrElse)
	d.add("commitTo", is.CommitTo, asked.CommitTo)
	d.add("commitWhen", is.CommitWhen, asked.CommitWhen)
}

func (d differences) error(what, remedy string) error {
	if len(d) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s: %s; %s", errdefs.ErrExists, what, strings.Join(d, "; "), remedy)
}
