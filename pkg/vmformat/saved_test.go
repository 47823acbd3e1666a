// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// orderFor makes an order for an ext4.
func orderFor(t *testing.T, mib int64) *order {
	t.Helper()
	spec := diskfs.Spec{Filesystem: "ext4", Size: mib << 20}
	job, err := newJob(spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &order{ctx: t.Context(), file: image(t, testenv.Dir(t)), spec: spec, job: job, done: make(chan result, 1)}
}

// good waits for an order, and checks what the node has of it.
func (o *order) good(t *testing.T, f *Formatter) {
	t.Helper()
	r := <-o.done
	if r.err != nil {
		t.Errorf("%s: %v", o.spec, r.err)
		return
	}
	if _, err := f.accept(o.file, o.spec, nil, r.report); err != nil {
		t.Errorf("%s: %v", o.spec, err)
	}
	testenv.Fsck(t, "ext4", o.file.Name())
}

// TestManyInOneBoot formats as many files as a VM has disks. One mkfs among them fails, and only
// its own file does.
func TestManyInOneBoot(t *testing.T) {
	f := newFormatter(t, nil)
	var orders []*order
	for i := range int64(guest.MaxJobs) {
		orders = append(orders, orderFor(t, 64+i))
	}
	const bad = 5
	orders[bad].job.Mkfs = append(orders[bad].job.Mkfs[:1:1], "-F", "-O", "nosuchfeature", guest.DevicePlaceholder)
	f.run(orders)
	first, _, _ := strings.Cut(orders[0].nonce, "-")
	uuids := map[string]bool{}
	for i, o := range orders {
		if vm, _, _ := strings.Cut(o.nonce, "-"); vm != first {
			t.Errorf("order %d was done by another VM", i)
		}
		if i == bad {
			if r := <-o.done; r.err == nil || !strings.Contains(r.err.Error(), "mkfs failed with exit code 1") {
				t.Errorf("the mkfs that fails: %v", r.err)
			}
			continue
		}
		o.good(t, f)
		fs, err := diskfs.Lookup("ext4")
		if err != nil {
			t.Fatal(err)
		}
		sb, err := fs.Identify(o.file)
		if err != nil || uuids[sb.UUID.String()] {
			t.Errorf("order %d has the UUID %s, as another one: %v", i, sb.UUID, err)
		}
		uuids[sb.UUID.String()] = true
	}
}

// TestVMKilledHalfWay kills a VM at its second file of three. All three are formatted again, each in
// a VM of its own.
func TestVMKilledHalfWay(t *testing.T) {
	f := newFormatter(t, nil)
	orders := []*order{orderFor(t, 64), orderFor(t, 65), orderFor(t, 66)}
	boots, killed := make([]int, len(orders)), ""
	for i, o := range orders {
		o.progress = func(p guest.Progress) {
			if p.Stage == guest.StageBoot {
				boots[i]++
			}
			if i == 1 && p.Stage == guest.StageMkfs && killed == "" {
				killed, _, _ = strings.Cut(o.nonce, "-")
				syscall.Kill(findProcess(killed), syscall.SIGKILL)
			}
		}
	}
	f.run(orders)
	vms := map[string]bool{killed: true}
	for _, o := range orders {
		o.good(t, f)
		vm, _, _ := strings.Cut(o.nonce, "-")
		vms[vm] = true
	}
	if killed == "" || len(vms) != 4 || fmt.Sprint(boots) != "[2 2 2]" {
		t.Errorf("%d VMs, and the files were begun %v times", len(vms), boots)
	}
}

// TestSaved formats with a VM that was saved. Its files must be as good as others, and not have the
// random numbers of another run. A saved VM that is damaged, or whose parts changed, is not used.
func TestSaved(t *testing.T) {
	for _, fs := range diskfs.Names() {
		t.Run(fs, func(t *testing.T) {
			dir := testenv.Dir(t)
			init := filepath.Join(dir, "init")
			testenv.Run(t, "cp", testenv.Binary(t), init)
			f := newFormatter(t, func(c *Config) { c.Init, c.Save, c.CacheDir = init, true, filepath.Join(dir, "cache") })
			uuids := map[string]bool{}
			mib := int64(400)
			format := func(restored bool) {
				t.Helper()
				mib++
				file := image(t, dir)
				r, err := f.Format(t.Context(), file, diskfs.Spec{Filesystem: fs, Size: mib << 20}, nil, nil)
				if err != nil {
					t.Fatal(err)
				}
				if r.Restored != restored || uuids[r.UUID] {
					t.Errorf("restored: %v, want %v; UUID %s", r.Restored, restored, r.UUID)
				}
				uuids[r.UUID] = true
				testenv.Fsck(t, fs, file.Name())
			}
			format(false)
			format(true)
			state := f.saved[fs].state
			f.Spare()
			if fi, err := state.Stat(); err != nil || fi.Size() > 0 {
				t.Errorf("a saved VM that was spared takes %d bytes: %v", fi.Size(), err)
			}
			format(false)
			format(true)
			if entries, err := os.ReadDir(f.cfg.CacheDir); err != nil || len(entries) != 1 {
				t.Errorf("%v is in the cache, want the kernel only: %v", entries, err)
			}
			if fs != "ext4" {
				return
			}
			if err := f.saved[fs].state.Truncate(8 << 20); err != nil {
				t.Fatal(err)
			}
			format(false) // after a VM that fails
			format(false) // is saved again
			format(true)
			if err := os.Chtimes(init, time.Now(), time.Now().Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
			format(false)
			format(true)
		})
	}
}

// TestSavedWhereThereIsRoom formats with a cache that is on a small filesystem. It must not take
// that space.
func TestSavedWhereThereIsRoom(t *testing.T) {
	small := testenv.Ext4.Mount(t, 512<<20)
	f := newFormatter(t, func(c *Config) { c.Save, c.CacheDir = true, small })
	for range 2 {
		r, err := f.Format(t.Context(), image(t, testenv.Dir(t)), diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}, nil, nil)
		if err != nil || r.Restored {
			t.Errorf("restored: %v, %v", r.Restored, err)
		}
	}
	if len(f.saved) > 0 || f.saving["ext4"] {
		t.Error("the VM was saved")
	}
}
