// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// withGoldens is a configuration with goldens: namespace trusted writes the shared golden "base", and everybody
// starts from it.
func withGoldens(l golden.Limits) Config {
	check := func(namespaces ...string) func(name, namespace string) error {
		return func(name, namespace string) error {
			if name == "base" && (len(namespaces) == 0 || namespace == namespaces[0]) {
				return nil
			}
			return fmt.Errorf("%w: shared golden %s: not for namespace %s", errdefs.ErrInvalid, name, namespace)
		}
	}
	return Config{Goldens: &Goldens{
		Limits: func() (golden.Limits, error) { return l, nil }, CheckRead: check(), CheckWrite: check("trusted"),
	}}
}

// job asks for a volume that starts from a golden and commits to it.
func (n *node) job(id, filesystem string) InlineRequest {
	r := n.request(id, "", 0)
	r.Lineage = image.Lineage{From: "golden/cache", CommitTo: "cache"}
	r.Spec.Filesystem, r.Spec.Size = filesystem, warmSizes[filesystem]
	return r
}

// mustWrite writes a file in a volume, and makes the directories on the way.
func (n *node) mustWrite(r InlineRequest, name, content string) {
	n.t.Helper()
	if err := write(r, name, content); err != nil {
		n.t.Fatal(err)
	}
}

func write(r InlineRequest, name, content string) error {
	path := filepath.Join(r.Target, name)
	return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644))
}

// mustHold checks what a file in a volume holds. "" means that there is none.
func (n *node) mustHold(r InlineRequest, name, want string) {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.Target, name))
	if string(b) != want || err != nil && !(want == "" && errors.Is(err, os.ErrNotExist)) {
		n.t.Errorf("%s: %s holds %q, not %q: %v", r.ID, name, b, want, err)
	}
}

// mustSettle waits until all commits have ended, and checks that they left the generations of all goldens, and
// nothing else.
func (n *node) mustSettle(want ...string) {
	n.t.Helper()
	testenv.Eventually(n.t, "commits to end", func() bool {
		_, waiting := n.Commits()
		return n.Ending() == 0 && waiting == 0
	})
	var got []string
	all, err := n.Goldens()
	for _, h := range all {
		got = append(got, h.Generation.String())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || err != nil {
		n.t.Errorf("there are the goldens %v, not %v: %v", got, want, err)
	}
	if left, err := n.pool.Commits(); err != nil || len(left) > 0 {
		n.t.Errorf("volumes are kept: %v %v", left, err)
	}
}

// mustForgetGoldens removes all goldens.
func (n *node) mustForgetGoldens() {
	n.t.Helper()
	all, err := n.Goldens()
	if err != nil {
		n.t.Fatal(err)
	}
	n.commits.remove(all)
}

// outcomes are how many volumes were committed, unmarked, refused and failed.
func (n *node) outcomes() [4]int64 {
	counts, _ := n.Commits()
	return [4]int64{counts[Committed], counts[Unmarked], counts[Refused], counts[Failed]}
}

// TestCommit has each job start from what the last one left, with an identity of its own, with each filesystem.
func TestCommit(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 4*gib, withGoldens(golden.Limits{Generations: 2}))
			for _, fs := range []string{"ext4", "xfs", "btrfs"} {
				t.Run(fs, func(t *testing.T) {
					n := n.with(t)
					n.commitTwice(fs)
					n.mustForgetGoldens()
				})
			}
		})
	}
}

func (n *node) commitTwice(fs string) {
	first := n.job(fs+"-1", fs)
	if res := n.mustPublish(first); res.Golden != "" {
		n.t.Errorf("the first volume starts from golden %s", res.Golden)
	}
	n.mustWrite(first, "one", "first")
	n.mustWrite(first, image.CommitMark, "yes")
	n.mustUnpublish(first)
	n.mustSettle("default/cache@1")

	second := n.job(fs+"-2", "")
	second.Spec.Size = 0 // the golden decides
	if res := n.mustPublish(second); res.Golden != "default/cache@1" || res.Existed {
		n.t.Errorf("the second volume: %+v", res)
	}
	if res := n.mustPublish(second); !res.Existed {
		n.t.Errorf("the same request again: %+v", res)
	}
	if got := findmnt(n.t, "FSTYPE", second.Target); got != fs {
		n.t.Errorf("it is %s", got)
	}
	n.mustHold(second, "one", "first")
	n.mustHold(second, image.CommitMark, "")
	if _, err := os.Lstat(filepath.Join(second.Target, image.CommitDir)); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("the directory of the mark is there: %v", err)
	}
	n.mustWrite(second, "one", "second")
	n.mustWrite(second, image.CommitDir+"/other", "stays")

	third := n.job(fs+"-3", "") // starts while the second one runs
	n.mustPublish(third)
	n.mustHold(third, "one", "first")
	if a, b := findmnt(n.t, "UUID", second.Target), findmnt(n.t, "UUID", third.Target); a == b {
		n.t.Errorf("two volumes have the UUID %s", a)
	}
	n.mustUnpublish(second) // not marked
	n.mustSettle("default/cache@1")
	n.mustWrite(third, "one", "third")
	third.CommitWhen = "" // a different request is refused, and this one is the same
	n.mustWrite(third, image.CommitMark, "")
	n.mustWrite(third, image.CommitDir+"/other", "stays")
	n.mustUnpublish(third)
	n.mustSettle("default/cache@1", "default/cache@2")

	fourth := n.job(fs+"-4", "")
	fourth.CommitWhen = image.CommitAlways
	n.mustPublish(fourth)
	n.mustHold(fourth, "one", "third")
	n.mustHold(fourth, image.CommitDir+"/other", "stays")
	n.mustUnpublish(fourth)
	n.mustSettle("default/cache@2", "default/cache@3")
	all, err := n.Goldens()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, h := range all {
		testenv.Fsck(n.t, fs, n.goldens.Path(h.Generation))
	}
}

// TestCommitMark commits nothing that its pod has not marked by a regular file: no link is followed.
func TestCommitMark(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := errors.Join(os.Mkdir(elsewhere, 0o755), os.WriteFile(filepath.Join(elsewhere, "commit"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for name, mark := range map[string]func(root string) error{
		"none":        func(string) error { return nil },
		"elsewhere":   func(root string) error { return os.WriteFile(filepath.Join(root, "commit"), nil, 0o644) },
		"link-to-dir": func(root string) error { return os.Symlink(elsewhere, filepath.Join(root, image.CommitDir)) },
		"link-to-file": func(root string) error {
			return markAs(root, func(p string) error { return os.Symlink("/etc/hostname", p) })
		},
		"fifo":             func(root string) error { return markAs(root, func(p string) error { return syscall.Mkfifo(p, 0o644) }) },
		"directory":        func(root string) error { return markAs(root, func(p string) error { return os.Mkdir(p, 0o755) }) },
		"file-for-the-dir": func(root string) error { return os.WriteFile(filepath.Join(root, image.CommitDir), nil, 0o644) },
	} {
		r := n.job(name, "ext4")
		n.mustPublish(r)
		if err := mark(r.Target); err != nil {
			t.Fatal(err)
		}
		n.mustUnpublish(r)
		n.mustSettle()
	}
	if got := n.outcomes(); got != [4]int64{0, 7, 0, 0} {
		t.Errorf("outcomes: %v", got)
	}
	if found := n.GoldenHealth(); len(found) > 0 {
		t.Errorf("conditions: %v", found)
	}
	// A plugin that died has only the image: the mark is looked for there too.
	r := n.job("kept", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, "one", "x")
	n.keepByHand(r)
	n.mustSweep(sweep.Options{First: true}, "commit kept volume kept")
	n.mustSettle()
	if got := n.outcomes(); got != [4]int64{0, 8, 0, 0} {
		t.Errorf("outcomes: %v", got)
	}
}

// markAs makes the mark's directory, and what is to be in the place of the mark.
func markAs(root string, make func(path string) error) error {
	return errors.Join(os.Mkdir(filepath.Join(root, image.CommitDir), 0o755), make(filepath.Join(root, image.CommitMark)))
}

// keepByHand ends a volume as a plugin does that dies right after its image is kept.
func (n *node) keepByHand(r InlineRequest) {
	n.t.Helper()
	n.detach(r)
	if err := os.Remove(r.Target); err != nil {
		n.t.Fatal(err)
	}
	img, err := n.images.Open(r.ID)
	if err == nil {
		defer img.Close()
		err = errors.Join(img.MarkWritten(), n.images.Keep(img))
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.quota.Forget(r.ID)
}

// TestCommitResumed has a plugin go on with what another one has kept, once: also if that died after the generation
// had its name.
func TestCommitResumed(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("first", "xfs")
	n.mustPublish(r)
	n.mustWrite(r, "one", "first")
	n.mustWrite(r, image.CommitMark, "")
	n.keepByHand(r)
	kept := n.pool.Commit(r.ID)
	if err := os.Link(kept, kept+"-again"); err != nil {
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{DryRun: true}, "commit kept volume first", "leave file first-again")
	n.mustSweep(sweep.Options{}, "commit kept volume first", "leave file first-again")
	testenv.Eventually(t, "the commit", func() bool { _, err := os.Stat(kept); return errors.Is(err, os.ErrNotExist) })
	if err := os.Rename(kept+"-again", kept); err != nil {
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{First: true}, "commit kept volume first")
	n.mustSettle("default/cache@1")
	n.mustSweep(sweep.Options{})
	second := n.job("second", "")
	n.mustPublish(second)
	n.mustHold(second, "one", "first")
	n.mustUnpublish(second)
}

// TestCommitOfUnseen commits nothing of a volume that somebody else unmounted, as the kernel does for a plugin that is
// killed: what could not be written is lost then, and nobody is told.
func TestCommitOfUnseen(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("unseen", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	n.detach(r)
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail("golden default/cache stays as it is: volume unseen of pod default/pod-unseen is not committed: " +
		"operation not possible in this state: the plugin was killed, or somebody else unmounted the volume, before it was seen")
	c := claim("unseen", "ext4", 64*mib)
	c.Namespace, c.CommitTo, c.CommitWhen = "ci", "cache", image.CommitAlways
	v := n.mustCreate(c)
	n.mustPublishClaim(v, "pod")
	n.mustUnpublishClaim(v, "pod")
	n.mustUnstage(v.ID)
	n.mustPublishClaim(v, "pod") // from here on it may be written to again
	n.mustUnpublishClaim(v, "pod")
	testenv.Umount(t, n.staging(v.ID))
	n.mustUnstage(v.ID)
	n.mustDelete(v.ID)
	n.mustSettle()
	if counts, _ := n.Commits(); counts[Failed] != 2 {
		t.Errorf("outcomes: %v", counts)
	}
}

// TestCommitOfSameID commits a volume that has the id of an earlier one, as a static pod's volume has that is started
// again. While that one waits for its commit, the later one is not committed, and says so.
func TestCommitOfSameID(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("same", "ext4")
	run := func(word string) {
		n.mustPublish(r)
		n.mustWrite(r, "one", word)
		n.mustWrite(r, image.CommitMark, "")
		n.mustUnpublish(r)
	}
	run("first")
	n.mustSettle("default/cache@1")
	if err := n.commits.turns.Acquire(t.Context(), mostCommits); err != nil {
		t.Fatal(err)
	}
	run("second")
	run("third")
	n.mustFail("golden default/cache stays as it is: volume same of pod default/pod-same is not committed: " +
		"still under way: an earlier volume of the same id still waits for its commit")
	if _, waiting := n.Commits(); waiting != 1 {
		t.Errorf("%d commits wait", waiting)
	}
	n.commits.turns.Release(mostCommits)
	n.mustSettle("default/cache@1", "default/cache@2")
	n.mustPublish(r)
	n.mustHold(r, "one", "second")
	n.mustUnpublish(r)
}

// TestCommitOfAnotherBoot commits nothing of a volume that the node has rebooted under: what was not synced may be
// missing.
func TestCommitOfAnotherBoot(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("rebooted", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	n.anotherBoot(r)
	n.mustPublish(r)
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail("golden default/cache stays as it is: volume rebooted of pod default/pod-rebooted is not committed: " +
		"operation not possible in this state: the node has rebooted since the volume was made, so what was written to it may be missing")

	r = n.job("kept", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	n.anotherBoot(r)
	n.mustPublish(r)
	n.keepByHand(r)
	n.mustSweep(sweep.Options{First: true}, "delete kept volume kept")
	n.mustSettle()
}

// mustFail checks the conditions of commits that failed.
func (n *node) mustFail(texts ...string) {
	n.t.Helper()
	found := n.GoldenHealth()
	if len(found) != len(texts) {
		n.t.Errorf("conditions: %+v", found)
	}
	for i, c := range found {
		if i < len(texts) && !strings.HasPrefix(c.Message(), texts[i]) {
			n.t.Errorf("condition %q, not %q", c.Message(), texts[i])
		}
	}
}

// TestManyFromOneGolden starts twenty volumes at once, and has two commit at once: each of these is a generation, and
// those that were there stay what they are.
func TestManyFromOneGolden(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 4*gib, withGoldens(golden.Limits{}))
			first := n.job("first", "ext4")
			n.mustPublish(first)
			n.mustWrite(first, "one", "first")
			n.mustWrite(first, image.CommitMark, "")
			n.mustUnpublish(first)
			n.mustSettle("default/cache@1")
			var jobs []InlineRequest
			for i := range 20 {
				jobs = append(jobs, n.job(fmt.Sprint("job", i), ""))
			}
			var all sync.WaitGroup
			for _, r := range jobs {
				all.Go(func() { n.mustPublish(r) })
			}
			all.Wait()
			for _, r := range jobs {
				n.mustHold(r, "one", "first")
				n.mustWrite(r, "one", r.ID)
			}
			for _, r := range jobs[:2] {
				n.mustWrite(r, image.CommitMark, "")
			}
			for _, r := range jobs {
				all.Go(func() { n.mustUnpublish(r) })
			}
			all.Wait()
			n.mustSettle("default/cache@1", "default/cache@2", "default/cache@3")
		})
	}
}

// TestManyCommits ends many volumes of a namespace before their turn comes. The last ones are committed, those of other
// goldens too, and another namespace does not wait for them.
func TestManyCommits(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4*gib, withGoldens(golden.Limits{Generations: 1}))
	end := func(namespace, id, to string) {
		r := n.of(namespace, id)
		r.Lineage = image.Lineage{CommitTo: to, CommitWhen: image.CommitAlways}
		n.mustPublish(r)
		n.mustWrite(r, "id", id)
		n.mustUnpublish(r)
	}
	if err := n.commits.turns.Acquire(t.Context(), mostCommits); err != nil {
		t.Fatal(err)
	}
	end("ci", "first", "other")
	for i := range mostKept + 4 {
		end("ci", fmt.Sprint("job", i), "cache")
	}
	end("dev", "dev", "cache")
	end("ci", "late", "unheard-of")
	testenv.Eventually(t, "volumes to end", func() bool { return n.Ending() == 0 })
	n.commits.turns.Release(mostCommits)
	n.mustSettle("ci/cache@15", "ci/other@1", "dev/cache@1")
	if counts, _ := n.Commits(); counts[Superseded] != 5 || counts[Refused] != 1 {
		t.Errorf("outcomes: %v", counts)
	}
	r := n.of("ci", "next")
	r.Lineage.From = "golden/cache"
	n.mustPublish(r)
	n.mustHold(r, "id", fmt.Sprint("job", mostKept+3))
	n.mustUnpublish(r)
}

// TestGoldenBoundaries: a namespace can neither start from another's golden, nor commit to it, nor find out whether
// there is one.
func TestGoldenBoundaries(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	theirs := n.job("theirs", "ext4")
	theirs.Pod.Namespace = "trusted"
	theirs.CommitTo, theirs.CommitWhen = "shared/base", image.CommitAlways
	n.mustPublish(theirs)
	n.mustWrite(theirs, "secret", "x")
	n.mustUnpublish(theirs)
	n.mustSettle("base@1")
	own := n.job("own", "ext4")
	own.Pod.Namespace = "trusted"
	own.CommitWhen = image.CommitAlways
	n.mustPublish(own)
	n.mustWrite(own, "secret", "x")
	n.mustUnpublish(own)
	n.mustSettle("base@1", "trusted/cache@1")

	other := n.job("other", "ext4") // of the namespace "default", with the same words
	if res := n.mustPublish(other); res.Golden != "" {
		t.Errorf("it starts from %s", res.Golden)
	}
	n.mustHold(other, "secret", "")
	n.mustUnpublish(other)
	n.mustSettle("base@1", "trusted/cache@1")

	read := n.job("read", "")
	read.Lineage = image.Lineage{From: "golden/cache", OrElse: "shared/base"}
	read.Spec.Size = 0
	if res := n.mustPublish(read); res.Golden != "base@1" {
		t.Errorf("it starts from %q", res.Golden)
	}
	n.mustUnpublish(read)

	for _, l := range []image.Lineage{
		{From: "golden/trusted/cache"}, {From: "golden/../trusted.cache"}, {From: "golden/trusted.cache"}, {From: "shared/other"},
		{CommitTo: "shared/base"}, {CommitTo: "trusted/cache"}, {CommitTo: "_.base"}, {CommitTo: "shared/other"},
	} {
		r := n.request("refused", "ext4", warmSizes["ext4"])
		r.Lineage = l
		n.mustRefuse(r, errdefs.ErrInvalid)
	}
	nobody := n.job("nobody", "ext4")
	nobody.Pod = image.Pod{}
	n.mustRefuse(nobody, errdefs.ErrInvalid, "nobody says which namespace")
}

// TestGoldensOff refuses what asks for goldens where there are none, and drops what a plugin with goldens has kept.
func TestGoldensOff(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	for _, l := range []image.Lineage{{From: "golden/cache"}, {From: "shared/base"}, {CommitTo: "cache"}} {
		r := n.request("refused", "ext4", warmSizes["ext4"])
		r.Lineage = l
		n.mustRefuse(r, errdefs.ErrInvalid, "this node has no goldens; the operator turns them on with --goldens")
	}
	r := n.request("kept", "ext4", warmSizes["ext4"])
	n.mustPublish(r)
	img, err := n.images.Open(r.ID)
	if err == nil {
		img.Record.CommitTo = "cache"
		err = errors.Join(pool.SetRecord(img.File, pool.VolumeAttr, img.Record), img.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	n.anotherBoot(r) // it has none
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail("golden default/cache stays as it is: volume kept of pod default/pod-kept is not committed: invalid request: golden \"cache\": this node has no goldens")
}

// TestGoldenBounds keeps goldens within their limits. What does not fit is refused, the volume goes all the same, and
// the last generation stays.
func TestGoldenBounds(t *testing.T) {
	const limit = 64 * mib
	n := newNodeWith(t, testenv.XFS, 4*gib, withGoldens(golden.Limits{Owner: limit, All: 100 * mib}))
	commit := func(id, namespace, name string, bytes int64) {
		t.Helper()
		r := n.request(id, "ext4", 256*mib)
		r.Lineage = image.Lineage{CommitTo: name, CommitWhen: image.CommitAlways}
		r.Pod.Namespace = namespace
		n.mustPublish(r)
		n.mustDirty(r.Target, int(bytes))
		n.mustUnpublish(r)
	}
	commit("a", "ci", "cache", 30*mib)
	n.mustSettle("ci/cache@1")
	commit("b", "ci", "cache", 100*mib)
	n.mustSettle("ci/cache@1")
	n.mustFail("golden ci/cache stays as it is: volume b of pod ci/pod-b is not committed: limit reached: golden ci/cache would have 1")
	commit("c", "ci", "other", 40*mib)
	n.mustSettle("ci/other@1")
	commit("d", "dev", "cache", 30*mib)
	n.mustSettle("ci/other@1", "dev/cache@1")
	commit("e", "dev", "cache", 30*mib) // the older generation of its own goes, and not that of another
	n.mustSettle("ci/other@1", "dev/cache@2")
	if got := n.outcomes(); got != [4]int64{4, 0, 1, 0} {
		t.Errorf("outcomes: %v", got)
	}

	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(n.goldens.Path(golden.Generation{Name: golden.Name{Namespace: "ci", Name: "other"}, Number: 1}), old, old); err != nil {
		t.Fatal(err)
	}
	n.commits.cfg.Limits = func() (golden.Limits, error) { return golden.Limits{Unused: time.Minute}, nil }
	n.mustSweep(sweep.Options{})
	n.mustSettle("dev/cache@2")
}

// TestCommitToFullPool refuses a commit where only the headroom is free.
func TestCommitToFullPool(t *testing.T) {
	c := withGoldens(golden.Limits{})
	c.Headroom = mustShare(t, "25%")
	n := newNodeWith(t, testenv.XFS, 1*gib, c)
	r := n.job("full", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	fill := filepath.Join(filepath.Dir(n.pool.Root()), "fill")
	defer os.Remove(fill)
	if err := exec.Command("fallocate", "-l", "850M", fill).Run(); err != nil {
		t.Fatal(err)
	}
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail("golden default/cache stays as it is: volume full of pod default/pod-full is not committed: pool is full")
}

func mustShare(t *testing.T, text string) size.Share {
	t.Helper()
	share, err := size.ParseShare(text)
	if err != nil {
		t.Fatal(err)
	}
	return share
}

// TestCommitOfHeldVolume commits nothing that somebody may still write to.
func TestCommitOfHeldVolume(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	defer func(d time.Duration) { detached = d }(detached)
	detached = 200 * time.Millisecond
	r := n.job("held", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	at, err := os.Open(r.Target)
	if err != nil {
		t.Fatal(err)
	}
	copied, err := mount.Clone(at)
	at.Close()
	if err != nil {
		t.Fatal(err)
	}
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail("golden default/cache stays as it is: volume held of pod default/pod-held is not committed: " +
		"operation not possible in this state: something still has the volume mounted")
	copied.Close()
}

// TestLargerThanGolden grows a volume that asks for more than its golden has, and refuses less.
func TestLargerThanGolden(t *testing.T) {
	everywhereWith(t, 6*gib, withGoldens(golden.Limits{Generations: 1}), func(n *node, fs string) {
		r := n.job(fs+"1", fs)
		r.Spec.Size = 512 * mib
		n.mustPublish(r)
		n.mustWrite(r, image.CommitMark, "")
		n.mustUnpublish(r)
		n.mustSettle("default/cache@1")
		r = n.job(fs+"2", fs)
		r.Spec.Size = 1 * gib
		n.mustPublish(r)
		if u, err := n.Stats(r.ID, r.Target); err != nil || u.TotalBytes < 700*mib {
			n.t.Errorf("it has %d bytes: %v", u.TotalBytes, err)
		}
		n.mustWrite(r, image.CommitMark, "")
		n.mustUnpublish(r)
		n.mustSettle("default/cache@2")
		r = n.job(fs+"3", fs)
		r.Spec.Size = 512 * mib
		_, err := n.PublishInline(n.t.Context(), r)
		if want := "golden default/cache@2: size out of range: it has 1Gi, and 512Mi is asked for; ask for at least that, or for no size"; err == nil || err.Error() != want {
			n.t.Errorf("less: %v, not %q", err, want)
		}
		r = n.job(fs+"4", "ext4")
		if r.Spec.Filesystem == fs {
			r.Spec.Filesystem = "xfs"
		}
		n.mustRefuse(r, errdefs.ErrInvalid, "it is "+fs+", and "+r.Spec.Filesystem+" is asked for; ask for the same")
		n.mustForgetGoldens()
	})
}

// TestWarmGolden takes volumes from those that are ready of a golden, and never of an older generation.
func TestWarmGolden(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			c := withGoldens(golden.Limits{Generations: 1})
			c.Warm, c.WarmMost = 2, 8
			n := newNodeWith(t, kind, 4*gib, c)
			for i := range 6 {
				r := n.job(fmt.Sprint("job", i), "")
				n.mustPublish(r)
				want := fmt.Sprint(i - 1)
				if i == 0 {
					want = ""
				}
				n.mustHold(r, "number", want)
				n.mustWrite(r, "number", fmt.Sprint(i))
				n.mustWrite(r, image.CommitMark, "")
				n.mustUnpublish(r)
				n.mustSettle(fmt.Sprint("default/cache@", i+1))
				if i > 0 {
					n.mustBeReady(4) // two of the empty disk, and two of the golden
				}
			}
			_, taken := n.Warm()
			hits := int64(0)
			for _, form := range taken {
				hits += form.Hits
			}
			if hits < 4 {
				t.Errorf("%d of 6 were ready", hits)
			}
			all, err := n.Goldens()
			if err != nil || len(all) != 1 {
				t.Fatal(all, err)
			}
			if err := os.Remove(n.goldens.Path(all[0].Generation)); err != nil { // by a command
				t.Fatal(err)
			}
			n.mustSweep(sweep.Options{})
			n.mustBeReady(2)
		})
	}
}

// TestWarmGoldenMadeAgain removes a golden, as a command does beside the plugin, and commits to its name again: the new
// generation has the old one's number, and nothing that was ready of the old one is handed out.
func TestWarmGoldenMadeAgain(t *testing.T) {
	c := withGoldens(golden.Limits{})
	c.Warm, c.WarmMost = 2, 8
	n := newNodeWith(t, testenv.XFS, 4*gib, c)
	for _, round := range []string{"first", "second"} {
		r := n.job(round, "ext4")
		r.Lineage.From = ""
		n.mustPublish(r)
		n.mustWrite(r, "round", round)
		n.mustWrite(r, image.CommitMark, "")
		n.mustUnpublish(r)
		n.mustSettle("default/cache@1")
		for i := range 3 { // the last one was ready
			r := n.job(fmt.Sprint(round, i), "")
			r.Lineage.CommitTo = ""
			n.mustPublish(r)
			n.mustHold(r, "round", round)
			n.mustUnpublish(r)
			testenv.Eventually(t, "volumes that are ready of both kinds", func() bool {
				ready, level := n.ready()
				return ready >= 4 && ready == level
			})
		}
		if err := n.goldens.Remove(golden.Generation{Name: golden.Name{Namespace: "default", Name: "cache"}, Number: 1}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVolatileCommit commits a volume whose syncs cost nothing.
func TestVolatileCommit(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("volatile", "ext4")
	r.Durability = image.Volatile
	n.mustPublish(r)
	n.mustWrite(r, "one", "first")
	n.mustWrite(r, image.CommitMark, "")
	n.mustUnpublish(r)
	n.mustSettle("default/cache@1")
	r = n.job("next", "")
	n.mustPublish(r)
	n.mustHold(r, "one", "first")
	n.mustUnpublish(r)
}

// TestClaimOfGolden has claims start from goldens, and commit when they are deleted.
func TestClaimOfGolden(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4*gib, withGoldens(golden.Limits{}))
	r := claim("one", "", 0)
	r.Namespace = "ci"
	r.Lineage = image.Lineage{From: "golden/cache", CommitTo: "cache"}
	v := n.mustCreate(r)
	if v.Golden != "" || v.Spec.Filesystem != "ext4" {
		t.Errorf("the first claim: %+v", v)
	}
	at := n.mustPublishClaim(v, "pod")
	n.mustWrite(InlineRequest{Target: at}, "one", "first")
	n.mustWrite(InlineRequest{Target: at}, image.CommitMark, "")
	n.mustEnd(v, "pod")
	n.mustSettle("ci/cache@1")

	r.Name = "two"
	r.Spec.Size = 2 * gib
	v = n.mustCreate(r)
	if again := n.mustCreate(r); v.Golden != "ci/cache@1" || again.UUID != v.UUID {
		t.Errorf("the second claim: %+v, and again %+v", v, again)
	}
	at = n.mustPublishClaim(v, "pod")
	n.mustHold(InlineRequest{Target: at}, "one", "first")
	if u, err := n.Stats(v.ID, at); err != nil || u.TotalBytes < 3*gib/2 {
		t.Errorf("it has %d bytes: %v", u.TotalBytes, err)
	}
	n.mustEnd(v, "pod")
	n.mustSettle("ci/cache@1")
}

// TestTornGolden starts from the generation before one whose content a power cut has taken, and sweeps that away.
func TestTornGolden(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("first", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	n.mustUnpublish(r)
	n.mustSettle("default/cache@1")
	torn := n.goldens.Path(golden.Generation{Name: golden.Name{Namespace: "default", Name: "cache"}, Number: 2})
	if err := os.WriteFile(torn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r = n.job("second", "")
	if res := n.mustPublish(r); res.Golden != "default/cache@1" {
		t.Errorf("it starts from %q", res.Golden)
	}
	n.mustUnpublish(r)
	n.mustSweep(sweep.Options{First: true}, "delete golden default/cache@2")
	n.mustSettle("default/cache@1")
	if err := os.WriteFile(filepath.Join(filepath.Dir(torn), "foreign"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{}, "leave file foreign")
}

// TestCommitGaveUp finds out that the filesystem of a generation has given up: nobody could start from it.
func TestCommitGaveUp(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	for _, name := range []string{"ext4", "xfs"} { // btrfs has no shutdown
		r := n.job(name, name)
		n.mustPublish(r)
		n.mustWrite(r, "one", "x")
		img, err := n.images.Open(r.ID)
		if err != nil {
			t.Fatal(err)
		}
		n.detach(r)
		fs, err := diskfs.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		change := func(root *os.File) error { return errors.Join(openat.Remove(root, "one"), fsctl.Sync(root)) }
		if err := n.commits.inside(img.File, fs, uuid.New(), change); err != nil {
			t.Fatal(err)
		}
		if err := n.commits.inside(img.File, fs, uuid.New(), fsctl.Shutdown); err == nil {
			t.Errorf("%s: nobody noticed", name)
		}
		img.Close()
		n.mustUnpublish(r)
	}
	n.mustSettle()
}

// TestCommitUnwritten commits nothing of a volume to which more was written than the pool had space for. The kernel drops
// what it cannot write, and the filesystem in the volume is sound all the same.
func TestCommitUnwritten(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 2*gib, withGoldens(golden.Limits{}))
			for _, fs := range []string{"ext4", "xfs", "btrfs"} {
				n.with(t).endUnwritten(n.job(fs, fs))
			}
		})
	}
}

func (n *node) endUnwritten(r InlineRequest) {
	n.t.Helper()
	r.Spec.Size, r.CommitWhen = 512*mib, image.CommitAlways
	n.mustPublish(r)
	is, err := n.pool.Space()
	if err != nil {
		n.t.Fatal(err)
	}
	fill := filepath.Join(filepath.Dir(n.pool.Root()), "fill")
	if err := exec.Command("fallocate", "-l", fmt.Sprint(is.Available-40*mib), fill).Run(); err != nil {
		n.t.Fatal(err)
	}
	for i := range 12 {
		if err := write(r, fmt.Sprint("file-", i), strings.Repeat("x", 16*mib)); err != nil {
			n.t.Logf("the kernel writes already, and the pod gets %v", err)
			break
		}
	}
	n.mustUnpublish(r)
	n.mustSettle()
	n.mustFail(fmt.Sprintf("golden default/cache stays as it is: volume %s of pod default/%s is not committed: ", r.ID, r.Pod.Name))
	// Where others write much, the kernel has begun to write before the volume ends.
	why := regexp.MustCompile("not committed: (not everything could be written to its image: pool is full|pool is full|.*its filesystem has given up)")
	if found := n.GoldenHealth(); len(found) == 1 && !why.MatchString(found[0].Message()) {
		n.t.Errorf("condition %q, not %s", found[0].Message(), why)
	}
	if err := os.Remove(fill); err != nil {
		n.t.Fatal(err)
	}
}
