// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// lasting asks for an inline volume of the smallest size that each filesystem takes.
func (n *node) lasting(id, filesystem string, d image.Durability) InlineRequest {
	n.t.Helper()
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		n.t.Fatal(err)
	}
	r := n.request(id, filesystem, fs.DefaultSize())
	r.Durability = d
	return r
}

// flushesOf writes and syncs a file in a volume, and returns how many flushes that made of its
// loop device: the 16th number of Documentation/ABI/stable/sysfs-block, stat.
func (n *node) flushesOf(r InlineRequest) int {
	n.t.Helper()
	index := n.loops(r.ID)[0]
	count := func() int {
		fields := strings.Fields(queueSays(n.t, index, "../stat"))
		if len(fields) < 16 {
			n.t.Fatalf("stat has the fields %v", fields)
		}
		flushes, err := strconv.Atoi(fields[15])
		if err != nil {
			n.t.Fatal(err)
		}
		return flushes
	}
	before := count()
	f, err := os.Create(filepath.Join(r.Target, "file"))
	if err != nil {
		n.t.Fatal(err)
	}
	_, err = f.WriteString("kept")
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		n.t.Fatal(err)
	}
	return count() - before
}

// mustKeep checks that a volume holds what flushesOf wrote, or nothing.
func (n *node) mustKeep(r InlineRequest, want bool) {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.Target, "file"))
	if has := string(b) == "kept"; has != want || err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("the volume holds what was written: %v, want %v: %v", has, want, err)
	}
}

// anotherBoot unmounts a volume and gives its record the id of another boot, as if the node had
// been rebooted.
func (n *node) anotherBoot(r InlineRequest) {
	n.t.Helper()
	n.detach(r)
	img, err := n.images.Open(r.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	defer img.Close()
	img.Record.Boot = "01234567-89ab-cdef-0123-456789abcdef"
	if err := pool.SetRecord(img.File, pool.VolumeAttr, img.Record); err != nil {
		n.t.Fatal(err)
	}
}

// detach unmounts a volume by hand, and waits for its loop device to go.
func (n *node) detach(r InlineRequest) {
	n.t.Helper()
	testenv.Umount(n.t, r.Target)
	testenv.Eventually(n.t, "the device to be detached", func() bool { return len(n.loops(r.ID)) == 0 })
}

// TestVolatile publishes synced and volatile volumes one after the other, so that they get the
// same loop devices. A sync in a volatile volume makes no flush, one in any other does, and a
// device is given back as it is for everybody.
func TestVolatile(t *testing.T) {
	everywhere(t, 2*gib, func(n *node, filesystem string) {
		had := map[int]bool{}
		for i, d := range []image.Durability{image.Synced, image.Volatile, "", image.Volatile, image.Volatile, image.Synced} {
			r := n.lasting(fmt.Sprint(filesystem, i), filesystem, d)
			res := n.mustPublish(r)
			want := d
			if d == "" {
				want = image.Synced
			}
			if res.Durability != want {
				n.t.Errorf("volume %d is %s, want %s", i, res.Durability, want)
			}
			index := n.loops(r.ID)[0]
			had[index] = true
			if flushes := n.flushesOf(r); (flushes > 0) == (want == image.Volatile) {
				n.t.Errorf("%s volume %d on loop%d: %d flushes", want, i, index, flushes)
			}
			n.mustKeep(r, true)
			n.mustUnpublish(r)
			n.endings.patiently()
			if got := queueSays(n.t, index, "write_cache"); got != "write back" && fileBehind(index) == "" {
				n.t.Errorf("loop%d was left in the mode %q", index, got)
			}
		}
		n.t.Logf("six volumes had %d devices", len(had))
	})
}

// fileBehind is the file of a loop device that another program has taken meanwhile, or "".
func fileBehind(index int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", index))
	return string(b)
}

// TestLeftVolatile publishes a synced volume on a device that drops flushes, since the plugin
// died before it gave the device back; and a volatile one that is attached already, and whose
// device does not.
func TestLeftVolatile(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	volatile, synced := n.lasting("volatile", "ext4", image.Volatile), n.lasting("synced", "ext4", image.Synced)
	for range 20 { // other programs take devices meanwhile
		n.forgetDevices()
		n.mustPublish(volatile)
		left := n.loops(volatile.ID)[0]
		n.detach(volatile)
		n.mustUnpublish(volatile)
		n.forgetDevices()
		n.mustPublish(synced)
		if is := n.loops(synced.ID)[0]; is == left {
			if flushes := n.flushesOf(synced); flushes == 0 {
				t.Errorf("a synced volume on loop%d makes no flushes", is)
			}
			n.mustUnpublish(synced)
			return
		}
		n.mustUnpublish(synced)
	}
	t.Fatal("the synced volume never got the device that was left")
}

// TestAnotherBoot: a volatile volume of another boot is made again, and says so. In one boot it
// keeps what it holds, and a synced one always does.
func TestAnotherBoot(t *testing.T) {
	log := testenv.CaptureLog(t, "0")
	everywhere(t, 2*gib, func(n *node, filesystem string) {
		volatile, synced := n.lasting("volatile-"+filesystem, filesystem, image.Volatile), n.lasting("synced-"+filesystem, filesystem, image.Synced)
		for _, r := range []InlineRequest{volatile, synced} {
			n.mustPublish(r)
			n.flushesOf(r)
			n.detach(r)
			if res := n.mustPublish(r); !res.Existed || res.Durability != r.Durability {
				n.t.Errorf("volume %s in the same boot: %+v", r.ID, res)
			}
			n.mustKeep(r, true)
		}
		made := n.record(volatile.ID).Created
		for _, r := range []InlineRequest{volatile, synced} {
			n.anotherBoot(r)
			n.mustSweep(sweep.Options{First: true}) // the pod will come back
			log.Reset()
			n.mustPublish(r)
			n.mustKeep(r, r.Durability == image.Synced)
			n.mustHaveLost(r, log, r.Durability == image.Volatile)
			if res := n.mustPublish(r); !res.Existed {
				n.t.Errorf("volume %s was made a second time", r.ID)
			}
		}
		if lost := n.record(volatile.ID).Lost; !lost.Equal(made) {
			n.t.Errorf("a volume of %s was lost, and the record says %s", made, lost)
		}
		for _, r := range []InlineRequest{volatile, synced} {
			n.mustUnpublish(r)
			if _, err := n.Health(r.ID, r.Target); !errors.Is(err, errdefs.ErrNotFound) {
				n.t.Errorf("the health of an unpublished volume: %v", err)
			}
		}
	})
}

func (n *node) record(id string) image.Record {
	n.t.Helper()
	r, err := n.images.Get(id)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

// mustHaveLost checks that the log and the health of a volume say that its content was lost, or
// that neither does.
func (n *node) mustHaveLost(r InlineRequest, log *bytes.Buffer, want bool) {
	n.t.Helper()
	const says = `"The node has rebooted since a volatile volume was made; making it again, without what it held"`
	if logged := strings.Contains(log.String(), says+fmt.Sprintf(" volume=%q", r.ID)); logged != want {
		n.t.Errorf("the log says that volume %s lost its content: %v, want %v\n%s", r.ID, logged, want, log)
	}
	found, err := n.Health(r.ID, r.Target)
	n.t.Log(found)
	lost := len(found) == 1 && found[0].Code == "VolatileContentLost" && found[0].Severity == health.DataLoss && strings.Contains(found[0].Message(), r.ID)
	if err != nil || lost != want || !want && len(found) > 0 {
		n.t.Errorf("the conditions of volume %s are %v: %v", r.ID, found, err)
	}
	if claims, _, err := n.ListHealth("", 0); err != nil || len(claims) > 0 {
		n.t.Errorf("the health of claims lists %v: %v", claims, err)
	}
}

// TestLossIsRemembered: the first publish after a reboot removes the volume and fails, the second
// makes it again. Its condition says what happened all the same.
func TestLossIsRemembered(t *testing.T) {
	log := testenv.CaptureLog(t, "0")
	n := newNode(t, testenv.XFS, 2*gib)
	r := n.lasting("volatile", "ext4", image.Volatile)
	n.mustPublish(r)
	n.flushesOf(r)
	n.anotherBoot(r)
	was := n.quota
	var err error
	if n.quota, err = quota.New(n.pool, n.images, quota.Limits{Size: size.MiB}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.PublishInline(t.Context(), r); !errors.Is(err, diskfs.ErrOutOfRange) {
		t.Fatalf("a volume that is too large: %v", err)
	}
	n.quota = was
	n.mustPublish(r)
	n.mustKeep(r, false)
	n.mustHaveLost(r, log, true)
	n.mustUnpublish(r)
	log.Reset()
	n.mustPublish(r) // of a new pod
	n.mustHaveLost(r, log, false)
	n.mustUnpublish(r)
}

// TestChangedDefault changes the operator's default while volumes exist. One whose pod did not
// ask stays as it is, and its publish may be repeated. One that a pod asked for differently does
// not match.
func TestChangedDefault(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	for _, was := range image.Durabilities {
		for _, now := range image.Durabilities {
			t.Run(fmt.Sprintf("%s, then %s", was, now), func(t *testing.T) {
				n := n.with(t)
				n.durability = was
				r := n.lasting("volume", "ext4", "")
				n.mustPublish(r)
				n.durability = now
				if res := n.mustPublish(r); !res.Existed || res.Durability != was {
					t.Errorf("again: %+v, want %s", res, was)
				}
				if flushes := n.flushesOf(r); (flushes == 0) != (was == image.Volatile) {
					t.Errorf("a %s volume: %d flushes", was, flushes)
				}
				for _, asked := range image.Durabilities {
					r.Durability = asked
					_, err := n.PublishInline(t.Context(), r)
					if asked == was && err != nil || asked != was && !errors.Is(err, errdefs.ErrExists) {
						t.Errorf("it is %s, and %s is asked for: %v", was, asked, err)
					}
				}
				n.mustUnpublish(r)
			})
		}
	}
	t.Run("disk.img", func(t *testing.T) {
		n := n.with(t)
		n.durability = image.Volatile
		r := n.lasting("image", "ext4", "")
		r.Mode = image.ModeDiskImage
		n.mustPublish(r)
		if got := n.record(r.ID); got.Durability != "" || got.Boot != "" || got.Version != 2 {
			t.Errorf("the record of a disk.img is %+v", got)
		}
		r.Durability = image.Synced
		n.mustPublish(r)
		n.mustUnpublish(r)
	})
}

// TestRecordVersions: plugins that know no volatile volumes must refuse them, and take all others.
func TestRecordVersions(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	for d, want := range map[image.Durability]int{"": 2, image.Synced: 2, image.Volatile: 3} {
		r := n.lasting("volume", "ext4", d)
		n.mustPublish(r)
		if got := n.record(r.ID); got.Version != want || (got.Boot != "") != (d == image.Volatile) {
			t.Errorf("durability %q: the record is %+v, want version %d", d, got, want)
		}
		n.mustUnpublish(r)
	}
	c := n.mustCreate(claim("claim", "ext4", 64*mib))
	if c.Version != 2 || c.Durability != "" {
		t.Errorf("the record of a claim is %+v", c)
	}
	n.mustDelete(c.ID)
}
