// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// jobOf is a disk that starts from a golden, if there is one, and becomes its next generation if its pod says so.
func jobOf(golden string, d *disk) *disk {
	d.from, d.commitTo = "golden/"+golden, golden
	return d
}

// A job's work is so many files, each of so many bytes, and one whose name has the job's word.
const (
	parts    = 16
	partSize = 40 << 10
	workName = "work of "
)

func part(word string, i int) []byte {
	line := fmt.Appendf(nil, "part %d of %s\n", i, word)
	return bytes.Repeat(line, partSize/len(line)+1)[:partSize]
}

func partName(i int) string { return fmt.Sprint("part-", i) }

// writeWork replaces the work of another job, file by file. It syncs nothing, as jobs do.
func (n *node) writeWork(d *disk, word string) error {
	root := n.volume(d).Target
	other, err := filepath.Glob(filepath.Join(root, workName+"*"))
	if err != nil {
		return err
	}
	for _, path := range other {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	for i := range parts {
		if err := os.WriteFile(filepath.Join(root, partName(i)), part(word, i), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, workName+word), nil, 0o600)
}

// piecesName is a file with a hole in every other block of 64 KiB. Its filesystem's image has more extents once it
// was trimmed than a generation may have, so it is packed.
const (
	piecesName = "pieces"
	pieces     = 36
	pieceSize  = 64 << 10
)

func (n *node) writePieces(d *disk) error {
	f, err := os.Create(filepath.Join(n.volume(d).Target, piecesName))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(noise(2 * pieces * pieceSize)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	for i := range int64(pieces) {
		const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		if err := unix.Fallocate(int(f.Fd()), punch, 2*i*pieceSize, pieceSize); err != nil {
			return err
		}
	}
	return nil
}

// readWork returns the word of the job whose work a published disk has, or "" if the disk is empty. Anything but the
// whole work of one job is an error.
func (n *node) readWork(d *disk) (word string, err error) {
	root := n.volume(d).Target
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", err
	}
	var names, want []string
	for _, e := range entries {
		if e.Name() == "lost+found" || e.Name() == piecesName {
			continue
		}
		names = append(names, e.Name())
		if is, ok := strings.CutPrefix(e.Name(), workName); ok {
			word = is
		}
	}
	if names == nil {
		return "", nil
	}
	for i := range parts {
		want = append(want, partName(i))
	}
	want = append(want, workName+word)
	slices.Sort(want)
	if !slices.Equal(names, want) {
		return "", fmt.Errorf("volume %s has no whole work of one job: %q", d.id, names)
	}
	for i := range parts {
		b, err := os.ReadFile(filepath.Join(root, partName(i)))
		if err != nil {
			return "", err
		}
		if !bytes.Equal(b, part(word, i)) {
			return "", fmt.Errorf("volume %s has the work of job %q, and %s of %d bytes is not of it: %.60q",
				d.id, word, partName(i), len(b), b)
		}
	}
	return word, nil
}

// hasWork returns an error if a published disk has the work of none of these jobs. "" stands for an empty disk.
func (n *node) hasWork(d *disk, words ...string) error {
	word, err := n.readWork(d)
	if err == nil && !slices.Contains(words, word) {
		err = fmt.Errorf("volume %s has the work of job %q, expected one of %q", d.id, word, words)
	}
	return err
}

// mark asks for a disk's commit, as a job does that succeeds.
func (n *node) mark(d *disk) error {
	path := filepath.Join(n.volume(d).Target, image.CommitMark)
	return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600))
}

func (n *node) unmark(d *disk) error {
	return os.Remove(filepath.Join(n.volume(d).Target, image.CommitMark))
}

// generation is the image of one generation of a golden in the pool.
type generation struct {
	path   string
	number int
	size   int64 // 0 if a power cut took its content
}

// generations lists those of a golden, the oldest first.
func (n *node) generations(golden string) (all []generation, err error) {
	paths, err := filepath.Glob(filepath.Join(n.Pool, "goldens", namespace+"."+golden+".*"))
	for _, path := range paths {
		fi, statErr := os.Lstat(path)
		if errors.Is(statErr, os.ErrNotExist) {
			continue
		}
		number, numberErr := strconv.Atoi(filepath.Ext(path)[1:])
		if err := errors.Join(statErr, numberErr); err != nil {
			return nil, err
		}
		all = append(all, generation{path, number, fi.Size()})
	}
	slices.SortFunc(all, func(a, b generation) int { return a.number - b.number })
	return all, err
}

// isCommitted reports whether a golden has a generation that was made of a disk.
func (n *node) isCommitted(d *disk) (bool, error) {
	all, err := n.generations(d.commitTo)
	for _, g := range all {
		b := make([]byte, 4096)
		size, err := syscall.Getxattr(g.path, string(pool.VolumeAttr), b)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var record struct{ Volume string }
		if err == nil {
			err = json.Unmarshal(b[:size], &record)
		}
		if err != nil {
			return false, fmt.Errorf("the record of %s: %w", g.path, err)
		}
		if record.Volume == d.id {
			return true, nil
		}
	}
	return false, err
}

// newest returns the word of the job whose work a golden has, or "" if there is no such golden. It starts a volume from
// the golden, and checks the filesystem in the golden's image.
func (n *node) newest(golden, fs string) (word string, err error) {
	d := jobOf(golden, inline("from-"+golden, fs, "filesystem"))
	d.commitTo = ""
	if err := n.publish(d); err != nil {
		return "", err
	}
	word, err = n.readWork(d)
	if err := errors.Join(err, n.unpublish(d), os.RemoveAll(n.podDir(d))); err != nil {
		return "", err
	}
	all, err := n.generations(golden)
	if len(all) > 0 {
		testenv.Fsck(n.t, fs, all[len(all)-1].path)
	}
	return word, err
}

// isKept reports whether an ended disk waits for its commit.
func (n *node) isKept(d *disk) bool {
	_, err := os.Lstat(filepath.Join(n.Pool, "commits", d.id))
	return err == nil
}

// stuck is how long a kept disk may be there that the plugin has no plan for. A plugin that has just started has
// none until its first sweep.
const stuck = 2 * time.Second

// settle waits until the commit of an ended disk has ended, too, or the plugin was killed meanwhile. A plugin that
// could not remove the disk's image is started again, and then does.
func (n *node) settle(d *disk) error {
	idle := time.Now()
	for end := idle.Add(harness.CallTimeout); n.isKept(d); time.Sleep(10 * time.Millisecond) {
		select {
		case <-n.Exited():
			return status.Error(codes.Unavailable, "the plugin was killed after its answer")
		default:
		}
		if sums, err := n.Metrics(); err != nil || sums["csi_disktemplate_commits_waiting"] > 0 {
			idle = time.Now()
		}
		if time.Since(idle) > stuck {
			if err := n.startWithoutPlan(d); err != nil {
				return err
			}
			idle = time.Now()
		}
		if time.Now().After(end) {
			return fmt.Errorf("volume %s still waits for its commit", d.id)
		}
	}
	return nil
}

// startWithoutPlan starts a plugin again that could not remove the image of an ended disk. It makes no further call fail.
func (n *node) startWithoutPlan(d *disk) error {
	log, err := os.ReadFile(n.Log)
	if err != nil {
		return err
	}
	if !strings.Contains(string(log), "cannot be removed; the next sweep tries again") {
		return fmt.Errorf("the plugin has forgotten volume %s, which waits for its commit", d.id)
	}
	n.kill()
	if err := os.Remove(filepath.Join(n.fail, failpoint.PlanFile)); err != nil {
		return err
	}
	n.start()
	return nil
}

// lineage is a golden, and one job after the other that starts from it and commits to it.
type lineage struct {
	*disk         // of the job
	golden string // its name
	jobs   int    // how many there were
	// The word of the last generation, and that of the job.
	last, next string
	lenient    bool // a commit may fail if the log says so
	pieces     bool // jobs leave many extents
}

func newLineage(d *disk) *lineage {
	golden := "golden-of-" + d.id
	return &lineage{disk: jobOf(golden, d), golden: golden}
}

// of is a step with the lineage.
func (l *lineage) of(verb string, do func(n *node) error) step {
	return step{verb + " golden " + l.golden, do}
}

// begin looks at the golden. It must have its last generation, or that of the job before. The next job gets another
// volume: two never have the same id.
func (l *lineage) begin() step {
	return l.of("look at", func(n *node) error {
		if err := l.find(n, l.last, l.next); err != nil {
			return err
		}
		n.mustHave("before the next job", "") // what was looked at has ended
		if err := os.RemoveAll(n.podDir(l.disk)); err != nil {
			return err
		}
		l.jobs++
		l.next = fmt.Sprintf("job %d of %s", l.jobs, l.golden)
		l.disk.id = fmt.Sprintf("%s-%d", l.golden, l.jobs)
		return nil
	})
}

// find checks that the golden has the work of one of some jobs, whole.
func (l *lineage) find(n *node, words ...string) error {
	word, err := n.newest(l.golden, l.fs)
	if err == nil && !slices.Contains(words, word) {
		err = fmt.Errorf("golden %s has the work of job %q, expected one of %q", l.golden, word, words)
	}
	if err == nil {
		l.last = word
	}
	return err
}

// starts checks that the job has found what the last one left.
func (l *lineage) starts() step {
	return l.of("find in the volume of", func(n *node) error { return n.hasWork(l.disk, l.last) })
}

func (l *lineage) work() step {
	return l.of("do the job of", func(n *node) error {
		err := n.writeWork(l.disk, l.next)
		if err == nil && l.pieces {
			err = n.writePieces(l.disk)
		}
		return err
	})
}

func (l *lineage) marks() step {
	return l.of("ask for a generation of", func(n *node) error { return n.mark(l.disk) })
}

// commits ends the job's volume, and waits until nothing more happens.
func (l *lineage) commits() step {
	return l.of("commit to", func(n *node) error {
		end := n.unpublish
		if !l.inline {
			end = n.delete
		}
		if err := end(l.disk); err != nil {
			return err
		}
		return n.settle(l.disk)
	})
}

// committed checks that the golden has the job's work.
func (l *lineage) committed() step {
	return l.of("find in", func(n *node) error {
		if !l.lenient {
			return l.find(n, l.next)
		}
		last := l.last
		if err := l.find(n, last, l.next); err != nil || l.last == l.next {
			return err
		}
		return n.saysNotCommitted(l.disk)
	})
}

// saysNotCommitted returns an error if no plugin's log says that a volume is not committed: a plugin that dies before
// everything is written out commits nothing.
func (n *node) saysNotCommitted(d *disk) error {
	if logged, err := n.logged("A volume is not committed", strconv.Quote(d.id)); err != nil || logged {
		return err
	}
	return fmt.Errorf("volume %s has no generation of golden %s, and no plugin's log says that it is not committed", d.id, d.commitTo)
}

// unchanged checks that the golden is what it was.
func (l *lineage) unchanged() step {
	return l.of("find the last generation in", func(n *node) error { return l.find(n, l.last) })
}

// either checks that the golden has the last generation or the job's, whole.
func (l *lineage) either() step {
	return l.of("find one of two generations in", func(n *node) error { return l.find(n, l.last, l.next) })
}

// first makes the golden's first generation.
func (l *lineage) first(n *node) {
	n.t.Helper()
	by := &lineage{disk: l.disk, golden: l.golden, pieces: l.pieces, next: "the first job of " + l.golden}
	if !l.inline {
		by.disk = jobOf(l.golden, inline(l.id, l.fs, "filesystem"))
	}
	n.must("the first generation", n.run(publish(by.disk), by.work(), by.marks(), by.commits(), by.committed()))
	n.must("its pod", os.RemoveAll(n.podDir(by.disk)))
	l.last, l.next = by.next, by.next
}

// startOperation makes a volume from a golden. The volume goes without a mark.
func (l *lineage) startOperation() operation {
	op := operation{prepare: []step{l.begin()}, undoes: true, long: 4}
	d := l.disk
	if !l.inline {
		op.name, op.call = "create from "+l.golden, create(d)
		op.check = []step{stage(d), publish(d), l.starts()}
		op.giveUp, op.end = []step{remove(d)}, then(unuse(d), l.unchanged())
		return op
	}
	op.name, op.call, op.forget = "publish from "+l.golden, publish(d), d
	op.check = []step{l.starts(), l.work(), flushes(d)}
	op.giveUp, op.end = []step{unpublish(d)}, []step{unpublish(d), l.unchanged()}
	return op
}

// commitOperation ends a volume that asks to be the golden's next generation.
func (l *lineage) commitOperation() operation {
	d := l.disk
	op := operation{name: "unpublish and commit to " + l.golden, call: l.commits(), check: []step{l.committed()}, long: 8}
	op.prepare = []step{l.begin(), publish(d), l.starts(), l.work(), l.marks()}
	op.giveUp, op.forget = []step{l.commits(), l.either()}, d
	if !l.inline {
		op.name, op.forget = "delete and commit to "+l.golden, nil
		op.prepare = []step{
			l.begin(), create(d), stage(d), publish(d), l.starts(), l.work(), l.marks(), unpublish(d), unstage(d),
		}
	}
	return op
}

// goldenOperations are those of volumes that start from goldens and become generations of them.
func (n *node) goldenOperations() (all []operation) {
	n.t.Helper()
	larger, inPieces := inline("larger", "xfs", "filesystem"), inline("pieces", "ext4", "filesystem")
	for _, d := range []*disk{
		inline("ext4", "ext4", "filesystem"), inline("xfs", "xfs", "filesystem"), inline("btrfs", "btrfs", "filesystem"),
		claim("claim", "ext4", "filesystem"), larger, inPieces,
	} {
		l := newLineage(d)
		l.lenient, l.pieces = true, d == inPieces
		l.first(n)
		if d != inPieces {
			all = append(all, l.startOperation())
		}
		if d == larger {
			d.bytes *= 2
			continue
		}
		all = append(all, l.commitOperation())
	}
	return all
}

// TestKillInGoldens kills the plugin before each effect of starting a volume from a golden, and of committing one,
// also before those that follow the answer. The golden has its last generation or the new one, and that is whole.
func TestKillInGoldens(t *testing.T) {
	onPools(t, false, func(n *node) {
		kills := 0
		for i, op := range n.goldenOperations() {
			for _, w := range op.ways(i) {
				kills += n.killAtEach(op, w)
			}
		}
		if n.t.Logf("killed %d times", kills); kills < 15 {
			n.t.Error("operations have lost their effects")
		}
	})
}

// TestErrorInGoldens makes each of these effects fail. A commit that fails says so, and leaves the last generation.
func TestErrorInGoldens(t *testing.T) {
	onPools(t, false, func(n *node) {
		failures := 0
		for i, op := range n.goldenOperations() {
			op.forget = nil // the plugin lives
			for j, w := range op.ways(i) {
				failures += n.failAtEach(op, w, i+j)
			}
		}
		if n.t.Logf("failed %d times", failures); failures < 15 {
			n.t.Error("operations have lost their effects")
		}
	})
}

// jobLife is the life of a pod that starts from a golden and commits to it. Some goldens are of one worker alone, and
// some of all.
func (w *worker) jobLife() error {
	fs := someForms[w.rand.IntN(3)].fs
	golden, common := w.name+"-"+fs, w.perhaps(3)
	if common {
		golden = "common-" + fs
	}
	d := jobOf(golden, inline(w.id("job"), fs, "filesystem"))
	word := fmt.Sprint(d.id, " ", w.rand.Uint64())
	w.creating(d)
	if err := w.until(func() error { return w.publish(d) }); err != nil {
		return err
	}
	w.there(d)
	words := w.golden(golden).words
	if common { // others commit meanwhile
		words = w.golden(golden).ever
	}
	err := w.hasWork(d, words...)
	if err == nil {
		err = w.writeWork(d, word)
	}
	if err != nil && !(w.base.loopback && wantsSpace(err)) { // else the job has failed, and does not ask for the commit
		return err
	}
	w.pause()
	if err != nil || w.perhaps(5) {
		return w.endJob(d)
	}
	w.committing(d, word)
	if err := w.mark(d); err != nil && !(w.base.loopback && wantsSpace(err)) {
		return err
	}
	if err := w.endJob(d); err != nil {
		return err
	}
	return w.seeCommit(d, word)
}

// endJob takes a job's volume away.
func (w *worker) endJob(d *disk) error {
	w.deleting(d)
	if err := w.until(func() error { return w.unpublish(d) }); err != nil {
		return err
	}
	w.gone(d)
	return os.RemoveAll(w.podDir(d))
}

// seeCommit waits until a commit has ended, and looks for its generation. Commits of others may have replaced it
// already.
func (w *worker) seeCommit(d *disk, word string) error {
	for end := time.Now().Add(harness.CallTimeout); w.isKept(d); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("volume %s still waits for its commit", d.id)
		}
	}
	seen, err := w.isCommitted(d)
	if err != nil {
		return err
	}
	if alone := w.committed(d, word, seen); alone && !seen {
		return w.saysNotCommitted(d)
	}
	return nil
}

// mustHaveGoldens checks that each golden has the whole work of one of the jobs that it may have, and returns how many
// must have one.
func (n *node) mustHaveGoldens(when string, goldens map[string]goldenEntry) (must int) {
	n.t.Helper()
	for name, g := range goldens {
		word, err := n.newest(name, g.fs)
		n.must(when+": golden "+name, err)
		if !slices.Contains(g.words, word) {
			n.t.Fatalf("%s: golden %s has the work of job %q, expected one of %q", when, name, word, g.words)
		}
		if !slices.Contains(g.words, "") {
			must++
		}
	}
	return must
}

// markForGood publishes a job's volume, and marks it. Its pod is still there when the power is cut, so nothing of
// it is ever committed.
func (n *node) markForGood(l *ledger) *disk {
	n.t.Helper()
	first := newLineage(inline("stays", "ext4", "filesystem"))
	first.first(n)
	l.goldens[first.golden] = goldenEntry{fs: first.fs, words: []string{first.last}}
	stays := jobOf(first.golden, inline("stays", "ext4", "filesystem"))
	l.creating(stays)
	n.must("a job that does not end", n.run(publish(stays), work(stays, "never committed"), mark(stays)))
	l.there(stays)
	testenv.Run(n.t, "sync", "--file-system", n.volume(stays).Target)
	return stays
}

// wholeGoldens lists the images of goldens that are not empty.
func (n *node) wholeGoldens(when string) (names []string) {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Pool, "goldens"))
	n.must(when+": goldens", err)
	for _, e := range entries {
		fi, err := e.Info()
		n.must(when+": goldens", err)
		if fi.Size() > 0 {
			names = append(names, e.Name())
		}
	}
	return names
}
