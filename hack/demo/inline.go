// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// filesystems are shown one after the other. f_type is from statfs(2).
var filesystems = []struct {
	name  string
	magic int64
}{
	{"btrfs", unix.BTRFS_SUPER_MAGIC},
	{"xfs", unix.XFS_SUPER_MAGIC},
	{"ext4", unix.EXT4_SUPER_MAGIC},
}

// vol is one published volume.
type vol struct {
	*harness.Volume
	fs, pod  string
	magic    int64
	greeting string
	took     time.Duration // the publish call
	template template.Record
	hit      bool // the template was there before the run
	freed    int64
}

// publish asks for volumes as kubelet asks for those of pods.
func (d *demo) publish(ctx context.Context) error {
	say("Publishing %d inline volumes of each filesystem, %s each.", copies, volumeSize)
	for _, fs := range filesystems {
		for i := range copies {
			id := fmt.Sprintf("%s%s-%d", idPrefix, fs.name, i+1)
			pod := harness.Pod{Namespace: "demo", Name: id, UID: uuid.NewString()}
			v := &vol{fs: fs.name, magic: fs.magic, pod: pod.UID, Volume: d.Inline(id, fs.name, pod, map[string]string{"size": volumeSize})}
			if err := d.publishOne(ctx, v); err != nil {
				return fmt.Errorf("publishing %s: %w", v.ID, err)
			}
			d.volumes = append(d.volumes, v)
			what := "from the template that is there now"
			switch {
			case i == 0 && v.hit:
				what = "from a template of an earlier run"
			case i == 0:
				what = fmt.Sprintf("its template was built in a VM first, in %s", milliseconds(v.template.BuildMS))
			}
			detail("%-7s  %9s  %s", v.ID[len(idPrefix):], seconds(v.took), what)
		}
	}
	return nil
}

func (d *demo) publishOne(ctx context.Context, v *vol) error {
	if err := v.MakeDirs(); err != nil {
		return err
	}
	began := time.Now()
	if err := d.Publish(ctx, v.Volume); err != nil {
		return err
	}
	v.took = time.Since(began)
	// The images themselves say where they came from.
	var of image.Record
	if err := readRecord(filepath.Join(d.root, "volumes", v.ID), pool.VolumeAttr, &of); err != nil {
		return err
	}
	if err := readRecord(filepath.Join(d.root, "templates", of.Template), pool.TemplateAttr, &v.template); err != nil {
		return err
	}
	v.hit = v.template.Built.Before(began)
	return nil
}

// inspect checks that each volume is a real filesystem of its own.
func (d *demo) inspect(context.Context) error {
	say("Writing a different file into each, and %s of random bytes; reading them back.", size.Format(payload))
	for _, v := range d.volumes {
		v.greeting = fmt.Sprintf("I am %s of pod %.8s", v.ID[len(idPrefix):], v.pod)
		if err := v.write(); err != nil {
			return fmt.Errorf("writing to %s: %w", v.ID, err)
		}
	}
	uuids, greetings := map[string]string{}, map[string]string{}
	for _, v := range d.volumes {
		device, id, err := v.mounted()
		if err != nil {
			return fmt.Errorf("looking at %s: %w", v.ID, err)
		}
		if other, used := uuids[id]; used {
			return fmt.Errorf("%s and %s have the same UUID %s", other, v.ID, id)
		}
		uuids[id] = v.ID
		got, err := os.ReadFile(filepath.Join(v.Target, "greeting"))
		if err != nil {
			return err
		}
		if string(got) != v.greeting {
			return fmt.Errorf("%s holds %q, expected %q", v.ID, got, v.greeting)
		}
		if other, used := greetings[string(got)]; used {
			return fmt.Errorf("%s and %s hold the same file", other, v.ID)
		}
		greetings[string(got)] = v.ID
		detail("%-7s  %-11s  UUID %s  %q", v.ID[len(idPrefix):], device, id, got)
	}
	detail("%d mounted filesystems, %d UUIDs, %d different files", len(d.volumes), len(uuids), len(greetings))
	return nil
}

// unpublish takes the volumes away, one filesystem after the other, and measures how much space that frees.
func (d *demo) unpublish(ctx context.Context) error {
	say("Unpublishing them.")
	for i := 0; i < len(d.volumes); i += copies {
		pair := d.volumes[i : i+copies]
		before, err := d.available()
		if err != nil {
			return err
		}
		for _, v := range pair {
			if err := d.Unpublish(ctx, v.Volume); err != nil {
				return fmt.Errorf("unpublishing %s: %w", v.ID, err)
			}
		}
		if err := d.left(len(d.volumes) - i - copies); err != nil {
			return err
		}
		after, err := d.available()
		if err != nil {
			return err
		}
		pair[0].freed = after - before
	}
	detail("nothing is left: no image in %s, no loop device on one, no mount below %s", filepath.Join(d.root, "volumes"), kubeletDir)
	return nil
}

// report prints what was measured.
func (d *demo) report() error {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "FILESYSTEM\tTEMPLATE BUILT IN\tACCELERATOR\tPUBLISH, COLD\tPUBLISH AGAIN\tSPACE OF BOTH*")
	hits := 0
	for i := 0; i < len(d.volumes); i += copies {
		first, second := d.volumes[i], d.volumes[i+1]
		built := milliseconds(first.template.BuildMS)
		if first.hit {
			hits++
			built = "hit (" + built + " then)"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", first.fs, built, first.template.Provenance.Accelerator,
			seconds(first.took), seconds(second.took), size.Format(first.freed))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("* How much more space the pool had (statfs) once both were unpublished: all that %d disks of %s\n"+
		"  with %s of files each took beside their template.\n", copies, volumeSize, size.Format(payload))
	fmt.Printf("\nTemplates: %d built, %d hit.\n", len(filesystems)-hits, hits)
	return nil
}
