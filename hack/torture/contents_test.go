// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// contents are what the operator of a node names: an archive, an image, a disk, and the disk in an image. A registry on
// the loopback interface has the images.
type contents struct {
	t    *testing.T
	dir  string // has the list, and the files
	host string // of the registry
	list string
	want map[string][]byte // what each content consists of: the one file in a filesystem, or the whole disk
}

// bornFile is the file that each content of kind tar has, and nothing else.
const bornFile = "born"

// largeSize is more than what a template must take for its verification to be noted (pkg/template/verified.go).
const largeSize = 72 * mib

func newContents(t *testing.T) *contents {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	c := &contents{t: t, dir: testenv.Dir(t), host: strings.TrimPrefix(server.URL, "http://"), list: "contents:\n", want: map[string][]byte{}}
	files, image, raw := noise(3*mib/2), noise(mib/8), noise(mib)
	c.write("files.tgz", zipped(t, archiveOf(t, bornFile, files)))
	c.push("image:1", archiveOf(t, bornFile, raw[:1000]), archiveOf(t, ".wh."+bornFile, nil), archiveOf(t, bornFile, image))
	c.write("disk.qcow2", c.qcow2(raw))
	c.push("disk:1", archiveOf(t, "disk/disk.qcow2", c.qcow2(image)))
	c.name("files", "tar: files.tgz", files)
	c.name("image", "oci: "+c.host+"/image:1", image)
	c.name("disk", "disk: disk.qcow2", raw)
	large := noise(largeSize)
	c.write("large.raw", large)
	c.name("large", "disk: large.raw", large)
	c.name("vm", "disk: oci://"+c.host+"/disk:1", image)
	return c
}

// noise is so many bytes that cannot be compressed.
func noise(size int) []byte {
	b := make([]byte, size)
	crand.Read(b)
	return b
}

// name enters a content in the list.
func (c *contents) name(name, source string, want []byte) {
	c.t.Helper()
	c.list += fmt.Sprintf("- {name: %s, %s, namespaces: [%s]}\n", name, strings.Replace(source, ": ", ": '", 1)+"'", namespace)
	c.want[name] = want
	c.write("contents.yaml", []byte(c.list))
}

// write replaces a file.
func (c *contents) write(name string, b []byte) {
	c.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := errors.Join(os.WriteFile(path+".new", b, 0o600), os.Rename(path+".new", path)); err != nil {
		c.t.Fatal(err)
	}
}

// push has the registry have an image with these layers.
func (c *contents) push(repository string, layers ...[]byte) {
	c.t.Helper()
	img := v1.Image(empty.Image)
	for _, l := range layers {
		var err error
		if img, err = mutate.AppendLayers(img, static.NewLayer(zipped(c.t, l), types.DockerLayer)); err != nil {
			c.t.Fatal(err)
		}
	}
	ref, err := name.ParseReference(c.host + "/" + repository)
	if err == nil {
		err = remote.Write(ref, img)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// qcow2 makes a compressed qcow2 of a raw disk.
func (c *contents) qcow2(raw []byte) []byte {
	c.t.Helper()
	c.write("raw", raw)
	from, to := filepath.Join(c.dir, "raw"), filepath.Join(c.dir, "qcow2")
	testenv.Run(c.t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", from, to)
	b, err := os.ReadFile(to)
	if err = errors.Join(err, os.Remove(from), os.Remove(to)); err != nil {
		c.t.Fatal(err)
	}
	return b
}

// archiveOf makes a tar archive with one file.
func archiveOf(t *testing.T, name string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Size: int64(len(content))})
	if err == nil {
		_, err = w.Write(content)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err := w.Write(b)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// flags are those of a plugin with these contents. Torture builds more templates than somebody needs.
func (c *contents) flags() []string {
	list := filepath.Join(c.dir, "contents.yaml")
	return []string{"--contents", list, "--content-dir", c.dir, "--max-template-builds-per-hour", "1000000"}
}

// with is a disk that is born with a content.
func with(content string, d *disk) *disk {
	d.content = content
	if d.mode != "filesystem" {
		d.fs = "" // the content has whatever it has
	}
	return d
}

// born returns an error if a published disk lacks what its content has. A pod may have written to the first bytes of a
// disk.
func (n *node) born(d *disk) error {
	if d.content == "" {
		return nil
	}
	path, from := filepath.Join(n.volume(d).Target, bornFile), 0
	if d.mode != "filesystem" {
		path, from = n.contentFile(d), contentSize
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	want := n.want[d.content]
	got := make([]byte, len(want))
	if _, err := io.ReadFull(f, got); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !bytes.Equal(got[from:], want[from:]) {
		return fmt.Errorf("volume %s does not hold what content %s has", d.id, d.content)
	}
	return nil
}

// warmContents has the templates built that the workers use, and a large one.
func (n *node) warmContents() {
	n.t.Helper()
	large := with("large", inline("warm-large", "ext4", "diskImage"))
	large.bytes = largeSize
	for _, d := range []*disk{
		with("files", inline("warm-files", "ext4", "filesystem")), with("disk", inline("warm-disk", "ext4", "diskImage")),
		with("vm", inline("warm-vm", "ext4", "diskImage")), large,
	} {
		n.must("building a template with a content", n.run(publish(d), born(d), unpublish(d)))
		n.must("removing its pod", os.RemoveAll(n.podDir(d)))
	}
	n.mustHave("after building the templates with contents", "")
}

// templates lists the files of templates.
func (n *node) templates() (names []string) {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Pool, "templates"))
	n.must("templates", err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// unbuild removes the templates with contents, and the blobs, and makes the files of the contents other ones than those
// whose digests the plugin knows.
func (n *node) unbuild(d *disk) error {
	if err := n.removeTemplates(); err != nil {
		return err
	}
	for _, name := range n.blobs() {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	for _, name := range []string{"files.tgz", "disk.qcow2"} {
		if err := os.Chtimes(filepath.Join(n.dir, name), time.Time{}, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// removeTemplates removes the templates with contents.
func (n *node) removeTemplates() error {
	for _, name := range n.templates() {
		if slices.Contains(n.empty, name) {
			continue
		}
		if err := os.Remove(filepath.Join(n.Pool, "templates", name)); err != nil {
			return err
		}
	}
	return nil
}

func unbuild(d *disk) step { return on("remove the template of", d, (*node).unbuild) }

// blobs lists the files of blobs.
func (n *node) blobs() []string {
	n.t.Helper()
	names, err := filepath.Glob(filepath.Join(n.Pool, "cache/blobs/*"))
	n.must("blobs", err)
	return names
}

// tornBlobs lists the blobs that have not the digest that is their name.
func (n *node) tornBlobs() (torn []string) {
	n.t.Helper()
	for _, path := range n.blobs() {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) { // it was trimmed meanwhile
			continue
		}
		n.must("a blob", err)
		sum := sha256.Sum256(b)
		if filepath.Base(path) != "sha256-"+hex.EncodeToString(sum[:]) {
			torn = append(torn, path+" torn")
		}
	}
	return torn
}

// contentOperations are those for which a template with a content is built: a disk is converted, or a filesystem is
// filled in a VM. What images are made of is pulled.
func contentOperations() (all []operation) {
	for _, of := range []struct {
		*disk
		long int
	}{
		{with("disk", inline("born-disk", "ext4", "diskImage")), 8},
		{with("vm", inline("born-vm", "ext4", "diskImage")), 8},
		{with("disk", claim("born-claim", "ext4", "block")), 8},
		{with("files", inline("born-ext4", "ext4", "filesystem")), longer},
		{with("files", inline("born-xfs", "xfs", "filesystem")), 6 * longer},
		{with("image", inline("born-btrfs", "btrfs", "filesystem")), 6 * longer},
	} {
		op := inlineOperations(of.disk)[0]
		if !of.inline {
			op = claimOperations(of.disk)[0]
		}
		op.name, op.prepare, op.long = "build the template of "+of.id, []step{unbuild(of.disk)}, of.long
		op.check = then(op.check, born(of.disk))
		all = append(all, op)
	}
	return all
}

// takesVM reports whether a VM fills the volume of an operation of [contentOperations].
func (o operation) takesVM() bool { return o.long >= longer }

// TestKillInContent kills the plugin before each effect of what has a template with a content built.
func TestKillInContent(t *testing.T) {
	onNewPools(t, false, func(n *node) {
		kills := 0
		for i, op := range contentOperations() {
			if thorough || !op.takesVM() || n.base.name == onXFS.name {
				kills += n.killAtEach(op, op.ways(i)[i%len(op.ways(i))])
			}
		}
		if n.t.Logf("killed %d times", kills); kills < 10 {
			n.t.Error("operations have lost their effects")
		}
	})
}

// TestErrorInContent makes each of these effects fail.
func TestErrorInContent(t *testing.T) {
	onNewPools(t, false, func(n *node) {
		failures := 0
		for i, op := range contentOperations() {
			op.forget = nil // the plugin lives
			if thorough || !op.takesVM() || n.base.name == onBtrfs.name {
				failures += n.failAtEach(op, op.ways(i)[i%len(op.ways(i))], i)
			}
		}
		if n.t.Logf("failed %d times", failures); failures < 10 {
			n.t.Error("operations have lost their effects")
		}
	})
}

// TestKillAnytimeInContent kills the plugin at random moments while a VM unpacks a content, and while qemu-img converts a
// disk. Both end with it, and so do the loop devices of the latter.
func TestKillAnytimeInContent(t *testing.T) {
	random := seeded(t)
	times := count(t, 2)
	onNewPools(t, false, func(n *node) {
		n.contents.write("slow.qcow2", n.qcow2(n.want["large"]))
		n.name("slow", "disk: slow.qcow2", n.want["large"])
		n.kill()
		n.start() // reads the list
		slow := with("slow", inline("slow", "ext4", "diskImage"))
		slow.bytes = largeSize
		for _, d := range []*disk{slow, with("files", inline("files", "ext4", "filesystem"))} {
			begun := time.Now()
			n.must("building the template", n.run(publish(d), unpublish(d)))
			took := time.Since(begun)
			unanswered := 0
			for i := range times {
				n.must("no template", n.unbuild(d))
				answer := make(chan error)
				go func() { answer <- n.publish(d) }()
				time.Sleep(time.Duration(random.Int64N(int64(took))))
				n.kill()
				err := <-answer
				if err != nil {
					unanswered++
				}
				n.start()
				n.must("taking it away", n.unpublish(d))
				n.mustHave(fmt.Sprintf("kill %d in the build of %s, which gave %v", i+1, d.id, err), "")
			}
			n.must("once more", n.run(publish(d), born(d), unpublish(d)))
			n.t.Logf("killed %d times while %s was made, %d times before the answer", times, d.id, unanswered)
		}
	})
}

// freshContents is how many contents [node.buildContents] has built.
const freshContents = 40

// nameFresh enters contents of which nothing is built or pulled: disks in files, and in images.
func (c *contents) nameFresh() {
	c.t.Helper()
	for i := range freshContents {
		name, raw := fmt.Sprint("fresh-", i), noise(mib/4)
		packed := c.qcow2(raw)
		if i%2 == 0 {
			c.write(name+".qcow2", packed)
			c.name(name, "disk: "+name+".qcow2", raw)
			continue
		}
		c.push(name+":1", archiveOf(c.t, "disk/disk.qcow2", packed))
		c.name(name, "disk: oci://"+c.host+"/"+name+":1", raw)
	}
}

// buildContents has the templates of fresh contents built, one after the other, until ctx ends.
func (n *node) buildContents(ctx context.Context, l *ledger) error {
	for i := 0; i < freshContents && ctx.Err() == nil; i++ {
		d := with(fmt.Sprint("fresh-", i), inline(fmt.Sprint("of-fresh-", i), "ext4", "diskImage"))
		if i%2 == 0 { // its digest is found out, and saved, once more
			if err := os.Chtimes(filepath.Join(n.dir, d.content+".qcow2"), time.Time{}, time.Now()); err != nil {
				return err
			}
		}
		l.creating(d)
		if err := n.until(func() error { return n.publish(d) }); err != nil {
			return err
		}
		l.there(d)
		l.isBuilt(d.content)
		if err := n.born(d); err != nil {
			return err
		}
		l.deleting(d)
		if err := n.until(func() error { return n.unpublish(d) }); err != nil {
			return err
		}
		l.gone(d)
		if err := os.RemoveAll(n.podDir(d)); err != nil {
			return err
		}
	}
	return nil
}

// filling is a volume whose template is filled in a VM, while the power is cut.
func filling(i int) *disk {
	d := with("files", inline(fmt.Sprint("filling-", i), "ext4", "filesystem"))
	d.label = fmt.Sprint("cut", i)
	return d
}

// fillContents has templates filled, one after the other, until ctx ends.
func (n *node) fillContents(ctx context.Context, l *ledger) error {
	for i := 0; ctx.Err() == nil; i++ {
		d := filling(i)
		if err := n.until(func() error { return n.publish(d) }); err != nil {
			return err
		}
		l.isBuilt(d.label)
		if err := errors.Join(n.born(d), n.until(func() error { return n.unpublish(d) }), os.RemoveAll(n.podDir(d))); err != nil {
			return err
		}
	}
	return nil
}

// whileBuilding does something while templates with contents are built, unless there are only jobs.
func (n *node) whileBuilding(ctx context.Context, l *ledger, do func()) {
	n.t.Helper()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var g errgroup.Group
	if !n.onlyJobs {
		g.Go(func() error { return n.buildContents(ctx, l) })
		g.Go(func() error { return n.fillContents(ctx, l) })
	}
	do()
	stop()
	n.must("building templates with contents", g.Wait())
}

// afterContents checks the contents after a power cut. Blobs that have a name are whole, and the digests can be read. What
// was built is not built again, and the large template is read.
func (n *node) afterContents(c powercut) error {
	large := with("large", inline("again-large", "ext4", "diskImage"))
	large.bytes = largeSize
	disks := []*disk{large, with("files", inline("again-files", "ext4", "filesystem"))}
	if c.fills {
		disks = append(disks, filling(0))
	}
	for _, d := range disks {
		if err := n.run(publish(d), born(d), unpublish(d)); err != nil {
			return err
		}
	}
	if err := n.builtAgain(c.built); err != nil {
		return err
	}
	// The blobs that the power cut has left serve once more.
	if err := n.removeTemplates(); err != nil {
		return err
	}
	vm := with("vm", inline("again-vm", "ext4", "diskImage"))
	return n.run(publish(vm), born(vm), unpublish(vm))
}

// builtAgain returns an error if a template was built that had been built before a power cut. built has the contents or
// labels of those that the test had built meanwhile.
func (n *node) builtAgain(built []string) error {
	log, err := os.ReadFile(n.Log)
	if err != nil {
		return err
	}
	if strings.Contains(string(log), "The digests of contents were not read") {
		return errors.New("the digests of contents cannot be read")
	}
	for line := range strings.Lines(string(log)) {
		fresh := freshBuild.FindStringSubmatch(line)
		if fresh == nil && strings.Contains(line, "Building a template") || fresh != nil && slices.Contains(built, fresh[1]) {
			return fmt.Errorf("a template was built again: %s", line)
		}
	}
	return nil
}

// freshBuild is a build of a template that [node.buildContents] or [node.fillContents] may have begun.
var freshBuild = regexp.MustCompile(`"Building a template".* spec=".*(fresh-[0-9]+|cut[0-9]+)"`)

// TestPowerCutTearsTemplate changes a block of a large template on the disk below the pool, which nothing shows. A plugin in the
// same boot need not read the template. After a power cut the next one finds it out, and builds it anew.
func TestPowerCutTearsTemplate(t *testing.T) {
	outside := testenv.Dir(t)
	image := filepath.Join(outside, "disk")
	onXFS.kind.Format(t, image, 2<<30)
	at := mount(t, onXFS.kind, image)
	n := newNode(t, onXFS, at)
	n.start()
	d := with("large", inline("torn", "ext4", "diskImage"))
	d.bytes = largeSize
	n.must("a large template", n.run(publish(d), born(d), unpublish(d)))
	n.mustEnd()
	offset := physical(t, filepath.Join(n.Pool, "templates", n.templates()[0]), largeSize/2)
	unmount(t, at)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	n.must("the disk", err)
	_, err = f.WriteAt(make([]byte, contentSize), offset)
	n.must("the disk", errors.Join(err, f.Close()))
	at = mount(t, onXFS.kind, image)
	n.Pool = onXFS.pool(at)

	n.start()
	n.must("in the same boot", n.run(publish(d)))
	if n.born(d) == nil {
		t.Error("no block of the template was changed")
	}
	n.must("in the same boot", n.run(unpublish(d)))
	n.kill()
	n.anotherBoot()
	n.start()
	n.must("in another boot", n.run(publish(d), born(d), unpublish(d)))
	n.mustEnd()
}

// physical returns where a block of a file is on the disk below its xfs, by the output of filefrag.
func physical(t *testing.T, path string, at int64) int64 {
	t.Helper()
	for _, m := range extentLine.FindAllStringSubmatch(testenv.Run(t, "filefrag", "-b1", "-v", path), -1) {
		var n [3]int64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseInt(m[1+i], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		if n[0] <= at && at <= n[1] {
			return n[2] + at - n[0]
		}
	}
	t.Fatalf("%s has no block at %d", path, at)
	return 0
}

var extentLine = regexp.MustCompile(`(?m)^\s*[0-9]+:\s*([0-9]+)\.\.\s*([0-9]+):\s*([0-9]+)\.\.`)
