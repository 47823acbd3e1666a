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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// harm changes a range of a file, as a failing disk or a careless administrator may.
func harm(t testing.TB, path string, off int64, change func(b []byte)) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 128<<10)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	change(b)
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// refused checks the kind of an error, and the words that its message must contain.
func refused(t testing.TB, what string, err error, want error, words ...string) {
	t.Helper()
	t.Logf("%s: %v", what, err)
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, not %v", what, err, want)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v lacks %q", what, err, w)
		}
	}
	for _, fault := range plain.Faults(err.Error()) {
		t.Errorf("%s: %s: %v", what, fault, err)
	}
}

// superblock is the offset of each filesystem's superblock.
var superblock = map[string]int64{"ext4": 0, "xfs": 0, "btrfs": 64 << 10}

// TestDamagedImages damages images, as a disk may. Mounting and copying them is refused, with
// a message that says what to do. Other volumes are not affected.
func TestDamagedImages(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	sizes := map[string]int64{"ext4": 64 * mib, "xfs": 300 * mib, "btrfs": 128 * mib}
	checker := map[string]string{"ext4": "e2fsck", "xfs": "xfs_repair", "btrfs": "btrfs"}
	healthy := n.mustCreate(claim("healthy", "ext4", 64*mib))
	n.mustPublishClaim(healthy, "pod")
	for _, fs := range diskfs.Names() {
		for damage, do := range map[string]func(t testing.TB, path string){
			"flipped": func(t testing.TB, path string) {
				harm(t, path, superblock[fs], func(b []byte) { b[1024+4] ^= 1; b[4] ^= 1 })
			},
			"zeroed":    func(t testing.TB, path string) { harm(t, path, superblock[fs], func(b []byte) { clear(b) }) },
			"truncated": func(t testing.TB, path string) { mustTruncate(t, path, sizes[fs]/2) },
		} {
			t.Run(fs+"/"+damage, func(t *testing.T) {
				n := n.with(t)
				says := []string{checker[fs]} // the tool that can say more
				if damage == "truncated" {
					says = []string{size.Format(sizes[fs]), "the rest is lost"}
				}
				v := n.mustCreate(claim("damaged", fs, sizes[fs]))
				snap := n.mustSnapshot("snapshot", v.ID)
				do(t, n.pool.Volume(v.ID))
				do(t, n.pool.Snapshot(snap.ID))

				stage := StageRequest{ID: v.ID, Staging: n.staging(v.ID)}
				refused(t, "stage", n.Stage(t.Context(), stage), errdefs.ErrState, append(says, "snapshot")...)
				refused(t, "publish", n.PublishClaim(t.Context(), n.publishRequest(v, "pod")), errdefs.ErrState, says...)
				_, _, err := n.CreateClaim(t.Context(), from("clone", v, image.Source{Volume: v.ID}))
				refused(t, "clone", err, errdefs.ErrState, append(says, v.ID)...)
				_, _, err = n.CreateClaim(t.Context(), from("restored", v, image.Source{Snapshot: snap.ID}))
				refused(t, "restore", err, errdefs.ErrState, append(says, snap.ID)...)
				_, err = n.CreateSnapshot(t.Context(), "another", v.ID)
				refused(t, "snapshot", err, errdefs.ErrState, append(says, v.ID)...)

				n.mustEnd(v)
				if err := n.DeleteSnapshot(snap.ID); err != nil {
					t.Error(err)
				}
			})
		}
		// Behind a good superblock only the kernel notices damage.
		t.Run(fs+"/deeper", func(t *testing.T) {
			n := n.with(t)
			v := n.mustCreate(claim("deeper", fs, sizes[fs]))
			garble(t, n.pool.Volume(v.ID), superblock[fs])
			err := n.Stage(t.Context(), StageRequest{ID: v.ID, Staging: n.staging(v.ID)})
			t.Log(err)
			if err == nil || !strings.Contains(err.Error(), v.ID) || !strings.Contains(err.Error(), "dmesg") {
				t.Errorf("stage: %v", err)
			}
			n.mustEnd(v)
		})
		t.Run(fs+"/inline, not yet mounted", func(t *testing.T) {
			n := n.with(t)
			r := n.request("inline", fs, sizes[fs])
			img, err := n.newImage(r)
			if err == nil {
				err = errors.Join(n.images.Link(img), img.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
			harm(t, n.pool.Volume(r.ID), superblock[fs], func(b []byte) { clear(b) })
			_, err = n.PublishInline(t.Context(), r)
			refused(t, "publish", err, errdefs.ErrState, r.ID, "delete the pod")
			n.mustUnpublish(r)
		})
	}
	if h, err := n.Health(healthy.ID); err != nil || len(h) > 0 {
		t.Errorf("the healthy volume: %v %v", h, err)
	}
	n.mustEnd(healthy, "pod")
}

// garble overwrites everything in an image but the superblock.
func garble(t testing.TB, path string, superblock int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	garbage := bytes.Repeat([]byte{0xa5}, 4096)
	for e, err := range sparse.Data(f) {
		if err != nil {
			t.Fatal(err)
		}
		for at := e.Start; at < e.End; at += 4096 {
			if at == superblock {
				continue
			}
			if _, err := f.WriteAt(garbage, at); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func mustTruncate(t testing.TB, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// TestDisksAreNeverMounted checks that this node's kernel never mounts a disk, since a pod
// may have crafted each of its blocks. It also checks that a pod cannot change the record,
// which says that it is a disk.
func TestDisksAreNeverMounted(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	for _, r := range []ClaimRequest{
		{Name: "block", Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: image.ModeBlock},
		{Name: "image", Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: image.ModeDiskImage},
	} {
		t.Run(r.Name, func(t *testing.T) {
			n := n.with(t)
			v := n.mustCreate(r)
			at := n.mustPublishClaim(v, "pod")
			snap := n.mustSnapshot("snapshot", v.ID)
			asMount := claim("mounted", "ext4", 64*mib)
			for _, source := range []image.Source{{Snapshot: snap.ID}, {Volume: v.ID}} {
				asMount.Source = source
				_, _, err := n.CreateClaim(t.Context(), asMount)
				refused(t, "a filesystem of "+source.String(), err, errdefs.ErrInvalid, "a disk only to a disk")
			}
			stage := StageRequest{ID: v.ID, Staging: n.staging(v.ID), Use: Use{Filesystem: "ext4"}}
			err := n.Stage(t.Context(), stage)
			if v.Mode == image.ModeBlock {
				refused(t, "staging it as a filesystem", err, errdefs.ErrState, "volumeMode Filesystem", "made as block")
			} else if err != nil { // a diskImage volume, whose target has the file disk.img
				t.Error(err)
			}
			again := r
			again.Mode = image.ModeFilesystem
			_, _, err = n.CreateClaim(t.Context(), again)
			refused(t, "the same as a filesystem", err, errdefs.ErrExists, "mode is")
			if v.Mode == image.ModeDiskImage {
				at = filepath.Join(at, image.DiskName)
				for _, attr := range []string{"trusted.disktemplate", "trusted.disktemplate.frozen"} {
					out, err := testenv.Try("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "perl", "-e",
						`my $v = "{}"; syscall(188, $ARGV[0], $ARGV[1], $v, 2, 0) == 0 or die $!`, at, attr) // setxattr
					if err == nil || !strings.Contains(out, "not permitted") {
						t.Errorf("root without CAP_SYS_ADMIN sets %s of disk.img: %v %s", attr, err, out)
					}
				}
			}
			for _, place := range mountedBelow(t, n.kubelet) {
				if place.FSType == "ext4" {
					t.Errorf("%s is mounted", place.Mountpoint)
				}
			}
			n.mustEnd(v, "pod")
			if err := n.DeleteSnapshot(snap.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

func mountedBelow(t testing.TB, dir string) []*mountinfo.Info {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil || len(mounts) == 0 {
		t.Fatalf("%d mounts below %s: %v", len(mounts), dir, err)
	}
	return mounts
}

// TestForeignRecords has images that this plugin cannot make sense of: those of a newer
// plugin, those of somebody else, and those with a damaged record. They are neither used nor
// changed, and all calls about other images still work.
func TestForeignRecords(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	ours := n.mustCreate(claim("ours", "ext4", 64*mib))
	kept := n.mustSnapshot("kept", ours.ID)
	foreign, inline := n.mustCreate(claim("foreign", "ext4", 64*mib)), n.request("inline", "ext4", 64*mib)
	snap := n.mustSnapshot("snapshot", foreign.ID)
	n.mustPublish(inline)
	n.mustUnpublish(inline) // its template stays
	img, err := n.newImage(inline)
	if err == nil {
		err = errors.Join(n.images.Link(img), img.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	paths := []string{n.pool.Volume(foreign.ID), n.pool.Volume(inline.ID), n.pool.Snapshot(snap.ID)}
	records := map[string]string{}
	for _, path := range paths {
		records[path] = getRecord(t, path)
	}
	const upgrade, move = "upgrade the plugin or move the file away", "move it away"
	for name, c := range map[string]struct {
		change func(record string) string
		says   string
	}{
		"newer":         {func(r string) string { return strings.Replace(r, `"version":2`, `"version":4,"new":{"a":1}`, 1) }, upgrade},
		"no version":    {func(r string) string { return strings.Replace(r, `"version":2`, `"version":0`, 1) }, upgrade},
		"of another id": {func(r string) string { return strings.Replace(r, `"id":"`, `"id":"not-`, 1) }, upgrade},
		"garbled":       {func(r string) string { return r[:len(r)/2] }, move},
		"no JSON":       {func(string) string { return "\x00\xff" }, move},
		"gone":          {func(string) string { return "" }, move},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.with(t)
			images := map[string][]byte{}
			for _, path := range paths {
				setRecord(t, path, c.change(records[path]))
				images[path] = readAll(t, path)
			}
			ctx, id := t.Context(), foreign.ID
			_, err := n.GetClaim(id)
			refused(t, "get", err, errdefs.ErrState, c.says, n.pool.Volume(id))
			_, _, err = n.CreateClaim(ctx, claim("foreign", "ext4", 64*mib))
			refused(t, "create", err, errdefs.ErrState, c.says)
			_, _, err = n.CreateClaim(ctx, from("copy", ours, image.Source{Volume: id}))
			refused(t, "clone", err, errdefs.ErrState, c.says)
			_, _, err = n.CreateClaim(ctx, from("copy", ours, image.Source{Snapshot: snap.ID}))
			refused(t, "restore", err, errdefs.ErrState, c.says, n.pool.Snapshot(snap.ID))
			_, err = n.CreateSnapshot(ctx, "another", id)
			refused(t, "snapshot", err, errdefs.ErrState, c.says)
			_, err = n.CreateSnapshot(ctx, "snapshot", id)
			refused(t, "the same snapshot", err, errdefs.ErrState, c.says)
			refused(t, "stage", n.Stage(ctx, StageRequest{ID: id, Staging: n.staging(id)}), errdefs.ErrState, c.says)
			refused(t, "publish", n.PublishClaim(ctx, n.publishRequest(foreign, "pod")), errdefs.ErrState, c.says)
			_, _, err = n.Expand(id, Size{Required: 65 * mib}, nil)
			refused(t, "expand", err, errdefs.ErrState, c.says)
			_, err = n.Health(id)
			refused(t, "health", err, errdefs.ErrState, c.says)
			refused(t, "delete", n.DeleteClaim(id), errdefs.ErrState, c.says)
			refused(t, "delete the snapshot", n.DeleteSnapshot(snap.ID), errdefs.ErrState, c.says)
			_, err = n.PublishInline(ctx, inline)
			refused(t, "publish inline", err, errdefs.ErrState, c.says, n.pool.Volume(inline.ID))
			refused(t, "unpublish inline", n.Unpublish(inline.ID, inline.Target), errdefs.ErrState, c.says)

			for _, path := range paths {
				if got := getRecord(t, path); got != c.change(records[path]) {
					t.Errorf("%s: its record is %q now", path, got)
				}
				if !bytes.Equal(readAll(t, path), images[path]) {
					t.Errorf("%s: its content has changed", path)
				}
			}
			if claims, _, err := n.ListClaims("", 0); err != nil || len(claims) != 1 || claims[0].ID != ours.ID {
				t.Errorf("claims %v: %v", claims, err)
			}
			if snaps, _, err := n.ListSnapshots("", "", 0); err != nil || len(snaps) != 1 || snaps[0].ID != kept.ID {
				t.Errorf("snapshots %v: %v", snaps, err)
			}
			if free, err := n.Available(false); err != nil || free == 0 {
				t.Errorf("available %d: %v", free, err)
			}
			again, err := NewManager(Config{Pool: n.pool, Templates: n.contents.templates, TargetRoot: n.kubelet})
			if err != nil {
				t.Fatalf("a plugin that starts with them in its pool: %v", err)
			}
			again.Close()
			other := n.mustCreate(from("other", ours, image.Source{Snapshot: kept.ID}))
			n.mustPublishClaim(other, "pod")
			n.mustEnd(other, "pod")
		})
	}
	for _, path := range paths {
		setRecord(t, path, records[path])
	}
	n.mustPublish(inline)
	n.mustUnpublish(inline)
	n.mustDelete(ours.ID, foreign.ID)
	for _, id := range []string{kept.ID, snap.ID} {
		if err := n.DeleteSnapshot(id); err != nil {
			t.Error(err)
		}
	}
}

func getRecord(t testing.TB, path string) string {
	t.Helper()
	b := make([]byte, 4096)
	size, err := syscall.Getxattr(path, string(pool.VolumeAttr), b)
	if errors.Is(err, syscall.ENODATA) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:size])
}

// setRecord sets a record, or removes it if record is "".
func setRecord(t testing.TB, path, record string) {
	t.Helper()
	err := syscall.Setxattr(path, string(pool.VolumeAttr), []byte(record), 0)
	if record == "" {
		err = syscall.Removexattr(path, string(pool.VolumeAttr))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestTemplateReplaced replaces a template that this process has verified before. The plugin
// notices, and builds it anew. A directory that is not empty is left to its owner. Older
// volumes from that template are not affected.
func TestTemplateReplaced(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	before := n.request("before", "ext4", 64*mib)
	path := n.pool.Template(n.mustPublish(before).Template)
	other := n.request("other", "xfs", 300*mib)
	otherPath := n.pool.Template(n.mustPublish(other).Template)
	n.mustUnpublish(other)
	for name, replace := range map[string]func() error{
		"another template":         func() error { return os.Rename(otherPath, path) },
		"another template, linked": func() error { return errors.Join(os.Remove(path), os.Link(otherPath, path)) },
		"another's content": func() error {
			b := readAll(t, otherPath)
			return errors.Join(os.Remove(path), os.WriteFile(path, b, 0o400))
		},
		"garbage":     func() error { return errors.Join(os.Remove(path), os.WriteFile(path, []byte("garbage"), 0o400)) },
		"a link":      func() error { return errors.Join(os.Remove(path), os.Symlink(otherPath, path)) },
		"a directory": func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"nothing":     func() error { return os.Remove(path) },
	} {
		t.Run(name, func(t *testing.T) {
			n := n.with(t)
			n.mustPublish(other) // makes another template
			n.mustUnpublish(other)
			if err := replace(); err != nil {
				t.Fatal(err)
			}
			for i, wantHit := range []bool{false, true} {
				r := n.request(fmt.Sprintf("after-%d", i), "ext4", 64*mib)
				if res := n.mustPublish(r); res.TemplateHit != wantHit {
					t.Errorf("volume %d: template hit %v", i, res.TemplateHit)
				}
				if got := findmnt(t, "FSTYPE", r.Target); got != "ext4" {
					t.Errorf("volume %d has %s", i, got)
				}
				testenv.Umount(t, r.Target)
				testenv.Fsck(t, "ext4", n.pool.Volume(r.ID))
				n.mustUnpublish(r)
			}
		})
	}
	theirs := filepath.Join(path, "theirs")
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700), os.WriteFile(theirs, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := n.PublishInline(t.Context(), n.request("refused", "ext4", 64*mib))
	refused(t, "a directory with something in it", err, pool.ErrUnusable, path, "move it away")
	if _, err := os.Stat(theirs); err != nil {
		t.Error(err)
	}
	testenv.Umount(t, before.Target)
	testenv.Fsck(t, "ext4", n.pool.Volume(before.ID))
	n.mustUnpublish(before)
}

// TestClockSetBack has records and files from the future, and from long ago, as after the
// node's clock was set. No decision depends on their times.
func TestClockSetBack(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	for name, when := range map[string]time.Time{"future": time.Now().AddDate(20, 0, 0), "past": time.Unix(1, 0)} {
		t.Run(name, func(t *testing.T) {
			n := n.with(t)
			inline := n.request("inline", "ext4", 64*mib)
			key := n.mustPublish(inline).Template
			v := n.mustCreate(claim("claim", "ext4", 64*mib))
			at := n.mustPublishClaim(v, "pod")
			if err := writeSynced(filepath.Join(at, numbered(0)), content(0)); err != nil {
				t.Fatal(err)
			}
			snap := n.mustSnapshot("snapshot", v.ID)
			for path, attr := range map[string]pool.Attr{
				n.pool.Volume(inline.ID): pool.VolumeAttr, n.pool.Volume(v.ID): pool.VolumeAttr,
				n.pool.Snapshot(snap.ID): pool.VolumeAttr, n.pool.Template(key): pool.TemplateAttr,
			} {
				redate(t, path, attr, when)
			}

			if res := n.mustPublish(inline); !res.Existed {
				t.Error("the inline volume was made again")
			}
			other := n.request("other", "ext4", 64*mib)
			if res := n.mustPublish(other); !res.TemplateHit {
				t.Error("the template was built again")
			}
			_, res, err := n.CreateClaim(t.Context(), claim("claim", "ext4", 64*mib))
			if err != nil || !res.Existed {
				t.Errorf("creating the claim again: %+v %v", res, err)
			}
			if again := n.mustSnapshot("snapshot", v.ID); again.UUID != snap.UUID || !again.Created.Equal(when) {
				t.Errorf("creating the snapshot again: %+v", again)
			}
			if claims, _, err := n.ListClaims("", 0); err != nil || len(claims) != 1 {
				t.Errorf("claims %v: %v", claims, err)
			}
			// A claim's promise is read from its record, however old the record is.
			_, _, err = n.CreateClaim(t.Context(), disk("huge", 1<<40))
			refused(t, "more than the pool has", err, pool.ErrFull, "promised are 64Mi to thin claims")
			if h, err := n.Health(v.ID, at); err != nil || len(h) > 0 {
				t.Errorf("health %v: %v", h, err)
			}
			restored := n.mustCreate(from("restored", v, image.Source{Snapshot: snap.ID}))
			mustHold(t, "restored", n.mustPublishClaim(restored, "pod"), 1)
			if _, err := n.ExpandOnNode(v.ID, at, Size{Required: 64 * mib}, nil); err != nil {
				t.Error(err)
			}
			n.mustUnpublish(inline)
			n.mustUnpublish(other)
			n.mustEnd(v, "pod")
			n.mustEnd(restored, "pod")
			if err := n.DeleteSnapshot(snap.ID); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("the newest template", func(t *testing.T) {
		n := n.with(t)
		gone := errors.New("mkfs is gone")
		store := template.NewStore(template.Config{Pool: n.pool, Fingerprint: func(diskfs.Spec) (string, error) { return "", gone }})
		defer store.Close()
		tmpl, err := store.Ensure(t.Context(), diskfs.Spec{Filesystem: "ext4", Size: 64 * mib})
		if err != nil {
			t.Fatal(err)
		}
		tmpl.Close()
	})
}

// redate gives a file and its record another time.
func redate(t testing.TB, path string, attr pool.Attr, when time.Time) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var record map[string]any
	if err := pool.GetRecord(f, attr, &record); err != nil {
		t.Fatal(err)
	}
	dated := false
	for _, field := range []string{"created", "built"} {
		if record[field] != nil {
			record[field], dated = when, true
		}
	}
	if !dated {
		t.Fatalf("%s has no time", path)
	}
	if err := errors.Join(pool.SetRecord(f, attr, record), os.Chtimes(path, when, when)); err != nil {
		t.Fatal(err)
	}
}

// TestNewDisksAreEmpty makes disks in space that deleted disks have written to.
func TestNewDisksAreEmpty(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		n := newNode(t, kind, 400*mib)
		for _, thick := range []bool{false, true} {
			r := disk("disk", 64*mib)
			r.Provisioning = image.Provisioning(thick)
			for range 4 { // together they are as large as the pool, so space is used again
				v := n.mustCreate(r)
				at := n.mustPublishClaim(v, "pod")
				if b := readAll(t, at); len(bytes.Trim(b, "\x00")) > 0 || len(b) != 64*mib {
					t.Errorf("%s, thick %v: a new disk of %d bytes is not empty", kind.Name, thick, len(b))
				}
				f := openDisk(t, at, image.ModeBlock, os.O_RDWR)
				_, err := f.WriteAt(bytes.Repeat([]byte("secret! "), 64*mib/8), 0)
				if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
					t.Error(err)
				}
				n.mustEnd(v, "pod")
			}
		}
	}
}
