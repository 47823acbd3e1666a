// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"sigs.k8s.io/yaml"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// golden runs a golden command on the plugin's pool, which must say something.
func (b *born) golden(wantCode int, says string, args ...string) (out string) {
	b.Helper()
	code, out := testenv.Product(b.T, append(append([]string{"golden"}, args...), "--pool", b.Pool)...)
	if code != wantCode || !regexp.MustCompile(`(?m)`+says).MatchString(out) {
		b.Errorf("golden %v: exit code %d: %s; want %s", args, code, out, says)
	}
	return out
}

// claim makes a claim and publishes it to a pod. The claim ends with the test.
func (b *born) claim(name, snapshot string) *harness.Volume {
	b.Helper()
	r := harness.CreateRequest(name, 64<<20, harness.Mounted("ext4"), nil)
	if snapshot != "" {
		r.VolumeContentSource = harness.FromSnapshot(snapshot)
	}
	created, err := b.client.Create(b.Context(), r)
	for harness.MayTryAgain(err) {
		created, err = b.client.Create(b.Context(), r)
	}
	if err != nil {
		b.Fatal(err)
	}
	v := b.Claim(created.VolumeId, r.VolumeCapabilities[0], "uid-"+name)
	v.Context = created.VolumeContext
	if err := errors.Join(v.MakeDirs(), b.client.Stage(b.Context(), v), b.client.Publish(b.Context(), v)); err != nil {
		b.Fatal(err)
	}
	return v
}

func (b *born) end(v *harness.Volume) {
	b.Helper()
	if err := errors.Join(b.client.Unpublish(b.Context(), v), b.client.Unstage(b.Context(), v), b.client.Delete(b.Context(), v.ID)); err != nil {
		b.Error(err)
	}
}

// snapshot writes a file to a claim and takes a snapshot of it.
func (b *born) snapshot(v *harness.Volume, name string) (id string) {
	b.Helper()
	if err := os.WriteFile(filepath.Join(v.Target, "name"), []byte(name), 0o640); err != nil {
		b.Fatal(err)
	}
	s, err := b.client.Snapshot(b.Context(), name, v.ID)
	if err != nil {
		b.Fatal(err)
	}
	return s.SnapshotId
}

func (b *born) deleteSnapshots(ids ...string) {
	b.Helper()
	for _, id := range ids {
		if _, err := b.client.DeleteSnapshot(b.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
			b.Error(err)
		}
	}
}

// goldens is what golden list prints as JSON.
func (b *born) goldens(args ...string) (all []admin.Golden) {
	b.Helper()
	out, err := exec.CommandContext(b.Context(), testenv.Binary(b.T), append(append([]string{"golden"}, args...), "-o", "json", "--pool", b.Pool)...).Output()
	var list struct {
		Goldens []admin.Golden `json:"goldens"`
	}
	if err := errors.Join(err, json.Unmarshal(out, &list)); err != nil {
		b.Fatalf("%s: %v", out, err)
	}
	return list.Goldens
}

// TestGoldenCommands makes, shows, hands on and removes goldens, all beside a running plugin that sweeps all the time.
func TestGoldenCommands(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			b := startBorn(t, kind, "contents:\n- {name: files, tar: files.tar, namespaces: [shop]}\n- {name: vm, disk: vm.raw, namespaces: [shop]}\n",
				"--goldens", "--sweep-interval", "50ms")
			b.write(filepath.Join(b.dir, "files.tar"), archiveOf(t, file{"name", "files", 0}))
			b.write(filepath.Join(b.dir, "vm.raw"), make([]byte, 5<<20))
			b.golden(0, `^There are no goldens\.$`, "list")
			b.golden(1, "`csi-disktemplate golden list` shows", "describe", "shop/cache")
			origin := b.claim("origin", "")
			first, second, third := b.snapshot(origin, "first"), b.snapshot(origin, "second"), b.snapshot(origin, "third")
			b.goldensArePromoted(first, second, third)
			b.goldensAreListed(origin.ID, second)
			b.end(origin)
			b.deleteSnapshots(first, second, third)
			v := b.mustPublish("inline", "ext4", "from", "golden/cache")
			b.mustHave(v, file{"name", "second", 0})
			b.mustUnpublish(v)
			b.goldenIsHandedOn()
			b.goldensAreRemoved()
		})
	}
}

func (b *born) goldensArePromoted(first, second, third string) {
	b.Helper()
	b.golden(0, `\AGolden shop/cache@1 was made of snapshot first\.\n\z`, "promote", "--snapshot", first, "shop/cache")
	b.golden(0, `\AGolden shop/cache@2 was made of snapshot second\.\n\z`, "promote", "--snapshot", second, "shop/cache")
	b.golden(0, `\AGolden shop/cache@3 was made of snapshot third\.\nRemoved golden shop/cache@1\.\n\z`, "promote", "--snapshot", third, "shop/cache")
	b.golden(0, `Golden shop/cache@4 was made`, "promote", "--snapshot", first, "--golden-generations", "0", "shop/cache")
	b.golden(0, `Removed golden shop/cache@2\.\nRemoved golden shop/cache@3\.\n`, "promote", "--snapshot", second, "shop/cache")
	content := []string{"promote", "--accel", "tcg", "--contents", b.list, "--content-dir", b.dir, "--content"}
	b.golden(0, `^Golden go-modules@1 was made of content files\.$`, append(content, "files", "--size", "64Mi", "go-modules")...)
	for says, args := range map[string][]string{
		`content vm is a whole disk`:                 append(content, "vm", "--size", "64Mi", "vm"),
		`unknown content: "other" is not listed`:     append(content, "other", "--size", "64Mi", "other"),
		`give --size too`:                            append(content, "files", "go-modules"),
		`leave one out`:                              append(content, "files", "--snapshot", first, "x"),
		`give --snapshot ID, or --content NAME`:      {"promote", "shop/cache"},
		`must be NAMESPACE/NAME`:                     {"promote", "--snapshot", first, "a/b/c"},
		`name one golden, as NAMESPACE/NAME`:         {"promote", "--snapshot", first},
		`(?i)snapshot.*nothing`:                      {"promote", "--snapshot", "nothing", "shop/cache"},
		`--golden-generations "-1": must be a whole`: {"promote", "--snapshot", first, "--golden-generations", "-1", "shop/cache"},
	} {
		b.golden(1, says, args...)
	}
}

func (b *born) goldensAreListed(origin, second string) {
	b.Helper()
	table := b.golden(0, "", "list")
	for _, line := range []string{
		`NAMESPACE +NAME +GENERATION +FILESYSTEM +SIZE +USED +OWN +AGE +LAST USE +BY`,
		`- +go-modules +1 +ext4 +64Mi +\S+ +\S+ +\d+m?s +20\d\d-\S+ \S+Z +content files`,
		`shop +cache +5 +ext4 +64Mi +\S+ +\S+ +\d+m?s +20\d\d-\S+ \S+Z +snapshot ` + second + ` of claim origin`,
	} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).MatchString(table) {
			b.Errorf("no line is %s:\n%s", line, table)
		}
	}
	all := b.goldens("list")
	if len(all) != 3 || all[0].Name != "go-modules" || all[0].By != "content files" || all[2].Generation != 5 {
		b.Fatalf("%+v", all)
	}
	for _, g := range all {
		if g.Used <= 0 || g.Own < 0 || g.Own >= g.Used || g.Own+g.Shared != g.Used || g.Created.IsZero() {
			b.Errorf("%+v", g)
		}
	}
	if one := b.goldens("describe", "shop/cache@4"); len(one) != 1 || one[0].UUID != all[1].UUID {
		b.Errorf("%+v", one)
	}
	b.golden(0, `(?s)\Ashop/cache@5\n  Filesystem +ext4 64Mi\n  UUID +`+all[2].UUID+`\n.*    shared +\S+\n.*  By +snapshot second of claim origin\n  Volume +-\n  Ready.*\n\nshop/cache@4\n`, "describe", "shop/cache")
	b.golden(1, `did you mean shop/cache@4 or shop/cache@5 or shop/cache\?`, "describe", "shop/cache@1")
	b.golden(1, "it has shop/cache@4, shop/cache@5", "snapshot", "shop/cache@1")
}

// goldenIsHandedOn makes a claim of the VolumeSnapshot that a golden became.
func (b *born) goldenIsHandedOn() {
	b.Helper()
	line := []string{"snapshot", "shop/cache", "--node", "node1", "--namespace", "other"}
	printed := b.golden(0, `^# Golden shop/cache@5 on node node1: ext4 64Mi, by "snapshot second of claim origin"\.\n# Claims that start from it need ext4, a size of at least 64Mi, and a pod on that node\.$`, line...)
	if again := b.golden(0, "", line...); again != printed {
		b.Errorf("the second time it printed\n%s, and the first time\n%s", again, printed)
	}
	type ref struct{ Name, Namespace string }
	var content struct {
		Kind     string
		Metadata struct {
			Name   string
			Labels map[string]string
		}
		Spec struct {
			DeletionPolicy, Driver, SourceVolumeMode string
			Source                                   struct{ SnapshotHandle string }
			VolumeSnapshotRef                        ref
		}
	}
	var snapshot struct {
		Kind     string
		Metadata ref
		Spec     struct {
			Source struct{ VolumeSnapshotContentName string }
		}
	}
	one, two, _ := strings.Cut(printed, "\n---\n")
	if err := errors.Join(yaml.UnmarshalStrict([]byte(without(one, "apiVersion")), &content), yaml.UnmarshalStrict([]byte(without(two, "apiVersion")), &snapshot)); err != nil {
		b.Fatalf("%v\n%s", err, printed)
	}
	c, s := content, snapshot
	if c.Kind != "VolumeSnapshotContent" || c.Metadata.Labels["snapshot.storage.kubernetes.io/managed-by"] != "node1" || c.Spec.Driver != "csi.disktemplate.io" ||
		c.Spec.DeletionPolicy != "Delete" || c.Spec.SourceVolumeMode != "Filesystem" || c.Spec.VolumeSnapshotRef != s.Metadata {
		b.Errorf("%+v", c)
	}
	if s.Kind != "VolumeSnapshot" || s.Metadata != (ref{"golden-cache-5", "other"}) || s.Spec.Source.VolumeSnapshotContentName != c.Metadata.Name {
		b.Errorf("%+v", s)
	}
	restored := b.claim("restored", c.Spec.Source.SnapshotHandle)
	if text, err := os.ReadFile(filepath.Join(restored.Target, "name")); string(text) != "second" {
		b.Errorf("the claim has %q: %v", text, err)
	}
	b.end(restored)
	b.deleteSnapshots(c.Spec.Source.SnapshotHandle)
	b.golden(1, "give --namespace", "snapshot", "go-modules")
	b.golden(1, `did you mean go-modules\?`, "snapshot", "go-module", "--namespace", "other")
	b.golden(1, `--namespace "Other"`, "snapshot", "go-modules", "--namespace", "Other")
}

// without leaves out the lines that begin with a key.
func without(text, key string) string {
	return regexp.MustCompile(`(?m)^`+key+`:.*\n`).ReplaceAllString(text, "")
}

func (b *born) goldensAreRemoved() {
	b.Helper()
	b.golden(1, `there is no golden shop/cahce on this node; did you mean shop/cache\?`, "rm", "go-modules", "shop/cahce")
	b.golden(1, "name at least one golden", "rm")
	if all := b.goldens("list"); len(all) != 3 {
		b.Errorf("after failures there are %+v", all)
	}
	b.golden(0, `\ARemoved golden go-modules@1\.\nRemoved golden shop/cache@4\.\n\z`, "rm", "shop/cache@4", "go-modules", "go-modules@1")
	b.golden(0, `\ARemoved golden shop/cache@5\.\n\z`, "rm", "shop/cache")
	b.golden(0, `^There are no goldens\.$`, "list")
}

// TestGoldenListOfOthers lists goldens beside a file that is none, and one whose record cannot be read.
func TestGoldenListOfOthers(t *testing.T) {
	dir := filepath.Join(testenv.XFS.Mount(t, 512<<20), "pool")
	open(t, pool.Config{Dir: dir})
	for name, size := range map[string]int64{"notes": 9, "shop.torn.1": 0, "shop.cache.1": 9} {
		if err := os.WriteFile(filepath.Join(dir, "goldens", name), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	code, out := testenv.Product(t, "golden", "list", "--pool", dir)
	if code != 1 || strings.Contains(out, "There are no goldens.") || !strings.Contains(out, "goldens/shop.cache.1") || strings.Contains(out, "torn") || strings.Contains(out, "notes") {
		t.Errorf("exit code %d: %s", code, out)
	}
	// It can be removed all the same.
	if code, out := testenv.Product(t, "golden", "rm", "shop/cache", "--pool", dir); code != 0 || out != "Removed golden shop/cache@1.\n" {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// TestGoldenCommandsElsewhere makes a golden outside of the mount namespace in which the plugin has its loopback pool.
func TestGoldenCommandsElsewhere(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 1<<30)
	n := harnesstest.New(t, filepath.Join(fs, "pool"))
	plugin := harnesstest.Launch(t, n, harness.Command{Binary: inContainer(t, fs, n.Kubelet), ID: "node1", Flags: []string{"--loopback-pool-size", "400Mi", "--accel", "tcg"}})
	t.Cleanup(func() { plugin.Kill() })
	b := &born{prewarmed: &prewarmed{t, n, plugin}, client: harnesstest.Connect(t, n)}
	if err := plugin.Serves(t.Context(), b.client); err != nil {
		t.Fatalf("%v\n%s", err, plugin.Tail())
	}
	created, err := b.client.Create(t.Context(), harness.CreateRequest("origin", 64<<20, harness.Mounted("ext4"), nil))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := b.client.Snapshot(t.Context(), "snapshot", created.VolumeId)
	if err != nil {
		t.Fatal(err)
	}
	if out, told := b.asked(0, "volume", "list", "-o", "name"); out != created.VolumeId+"\n" || told != "" { // by the plugin's socket
		t.Errorf("%s%s", out, told)
	}
	b.await("the template to have volumes ready", func() bool {
		out, _ := b.asked(0, "template", "list")
		return regexp.MustCompile(`there +\S+ +\S+ +\d+ +2/2 `).MatchString(out)
	})
	b.golden(0, `^Golden shop/cache@1 was made of snapshot snapshot\.$`, "promote", "--snapshot", snap.SnapshotId, "shop/cache")
	id := regexp.MustCompile(`snap-\w+`).FindString(b.golden(0, `^kind: VolumeSnapshot$`, "snapshot", "shop/cache", "--node", "node1"))
	b.golden(0, `^Removed golden shop/cache@1\.$`, "rm", "shop/cache")
	b.deleteSnapshots(snap.SnapshotId, id)
	if err := b.client.Delete(t.Context(), created.VolumeId); err != nil {
		t.Error(err)
	}
}
