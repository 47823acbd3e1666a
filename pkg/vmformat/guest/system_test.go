// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package guest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// Attributes as they are on disk: capability.h and posix_acl_xattr.h of linux/.
const (
	netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"   // cap_net_raw=ep
	acl    = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00" + // user 1000 reads
		"\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
)

// unpackInto unpacks archives in a directory, as the guest does it.
func unpackInto(dir string, c Content, archives ...[]byte) (v Verdict, err error) {
	layers, disk := diskOf(archives...)
	err = v.fill(dir, c, layers, disk)
	return v, err
}

// tree describes all files beneath a directory.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	names := map[uint64]string{} // the first name of each file
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err == nil {
			found[rel], err = describe(path, rel, names)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// hasTree compares what was unpacked with what must be there.
func hasTree(t testing.TB, dir string, want map[string]string) {
	t.Helper()
	is := tree(t, dir)
	for name, w := range want {
		if is[name] != w {
			t.Errorf("%s is %s, want %s", name, is[name], w)
		}
	}
	for name, i := range is {
		if want[name] == "" && name != lostFound {
			t.Errorf("%s is there: %s", name, i)
		}
	}
}

// TestUnpack unpacks every kind of entry on each filesystem, in three layers.
func TestUnpack(t *testing.T) {
	long := strings.Repeat("n", 255)
	sparse := string(make([]byte, 3<<20)) + "end"
	old := map[string]string{"user.a": "1", "trusted.b": "2", "system.posix_acl_access": acl}
	ping := map[string]string{"security.capability": netRaw, "user.x": "y\x00z"}
	bottom := archive(t,
		item{name: "./", mode: 0o1777, uid: 3, gid: 4},
		item{name: "etc/", mode: 0o2750, uid: 1, gid: 2, attrs: old},
		item{name: "etc/passwd", mode: 0o4755, uid: 70000, gid: 80000, content: "root"},
		item{name: "/bin/ping", mode: 0o755, content: "ping", attrs: ping},
		item{name: "acl", mode: 0o640, content: "acl", attrs: map[string]string{"system.posix_acl_access": acl}},
		item{name: "ping2", kind: tar.TypeLink, link: "/bin/ping"},
		item{name: "abs", kind: tar.TypeSymlink, link: "/etc/passwd", uid: 5, gid: 6},
		item{name: "up", kind: tar.TypeSymlink, link: "../../..", attrs: map[string]string{"trusted.l": "v"}},
		item{name: "uplink", kind: tar.TypeLink, link: "up"},
		item{name: "sparse", content: sparse},
		item{name: "empty", content: ""},
		item{name: long + "/" + long, content: "long"},
		item{name: "keep/a", content: "a"}, item{name: "keep/b", content: "b"},
		item{name: "gone/x/y", content: "y"},
		item{name: "opaque/"}, item{name: "opaque/old", content: "old"}, item{name: "opaque/dir/old", content: "old"},
		item{name: "linkdir", kind: tar.TypeSymlink, link: "keep"},
		item{name: "linkimplied", kind: tar.TypeSymlink, link: "keep"},
		item{name: "tree/of/files", content: "f"},
		item{name: "twice", content: "first"}, item{name: "twice", content: "second"},
		item{name: ".wh.literal", content: "in the first layer it is a file"},
	)
	middle := archive(t,
		item{name: "etc/", mode: 0o755, attrs: map[string]string{"user.c": "3"}},
		item{name: "opaque/new", content: "new"},
		item{name: "linkdir/", mode: 0o700},
		item{name: "linkimplied/f", content: "f"},
		item{name: "tree", content: "a file now"},
		item{name: "empty/", mode: 0o711},
		item{name: ".wh.gone"}, item{name: "keep/.wh.a"}, item{name: "nowhere/.wh.x"}, item{name: "abs/.wh.x"},
		item{name: "opaque/.wh..wh..opq"}, // after the new file, which it must not hide
		item{name: ".wh..wh.plnk/1", content: "aufs"}, item{name: ".wh..wh.aufs"},
		item{name: "shortlived", content: "x"},
	)
	top := archive(t, item{name: ".wh.shortlived"}, item{name: "ping2", mode: 0o600, content: "another file"})
	want := map[string]string{
		".":               "dir 1777 3:4 then",
		"etc":             `dir 755 0:0 then user.c="3"`,
		"etc/passwd":      `file 4755 70000:80000 "root" then`,
		"bin":             "dir 755 0:0",
		"bin/ping":        fmt.Sprintf("file 755 0:0 \"ping\" then security.capability=%q user.x=%q", netRaw, "y\x00z"),
		"acl":             fmt.Sprintf("file 640 0:0 \"acl\" then system.posix_acl_access=%q", acl),
		"ping2":           `file 600 0:0 "another file" then`,
		"abs":             "link 777 5:6 → /etc/passwd then",
		"up":              `link 777 0:0 → ../../.. then trusted.l="v"`,
		"uplink":          `link 777 0:0 → ../../.. then trusted.l="v"`,
		"sparse":          fmt.Sprintf("file 644 0:0 %.20q then", sparse),
		"empty":           "dir 711 0:0 then",
		"keep":            "dir 755 0:0",
		"keep/b":          `file 644 0:0 "b" then`,
		"opaque":          "dir 755 0:0 then",
		"opaque/new":      `file 644 0:0 "new" then`,
		"linkdir":         "dir 700 0:0 then",
		"linkimplied":     "dir 755 0:0",
		"linkimplied/f":   `file 644 0:0 "f" then`,
		"tree":            `file 644 0:0 "a file now" then`,
		"twice":           `file 644 0:0 "second" then`,
		".wh.literal":     `file 644 0:0 "in the first layer i" then`,
		long:              "dir 755 0:0",
		long + "/" + long: `file 644 0:0 "long" then`,
	}
	for _, kind := range []testenv.Kind{testenv.Ext4, testenv.XFS, testenv.Btrfs} {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Pool(t)
			v, err := unpackInto(dir, Content{}, bottom, middle, top)
			if err != nil {
				t.Fatal(err)
			}
			if v.Entries != 32 || v.Bytes > 200 || v.Full != "" {
				t.Errorf("the verdict has %d entries, %d bytes, full %q", v.Entries, v.Bytes, v.Full)
			}
			hasTree(t, dir, want)
			var st unix.Stat_t
			err = unix.Stat(filepath.Join(dir, "sparse"), &st)
			if err != nil || st.Size != int64(len(sparse)) || st.Blocks > 64 {
				t.Errorf("the sparse file has %d bytes and takes %d sectors: %v", st.Size, st.Blocks, err)
			}
		})
	}
}

// TestUnpackFSGroup prepares files for a pod's fsGroup.
func TestUnpackFSGroup(t *testing.T) {
	dir := testenv.Ext4.Pool(t)
	group, uid, mode := int64(2000), 1000, uint32(0o700)
	capable := map[string]string{"security.capability": netRaw}
	_, err := unpackInto(dir, Content{FSGroup: &group, UID: &uid, Mode: &mode}, archive(t,
		item{name: "dir/", mode: 0o700, uid: 5, gid: 6},
		item{name: "dir/setuid", mode: 0o4711, uid: 5, gid: 6, content: "s", attrs: capable},
		item{name: "implied/file", mode: 0o400, uid: 5, gid: 6},
		item{name: "link", kind: tar.TypeSymlink, link: "/", uid: 5, gid: 6},
		item{name: "again", kind: tar.TypeLink, link: "dir/setuid"},
	))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		".":            "dir 2770 1000:2000",
		"dir":          "dir 2770 5:2000 then",
		"again":        fmt.Sprintf("file 4771 5:2000 \"s\" then security.capability=%q", netRaw),
		"dir/setuid":   "= again",
		"implied":      "dir 2775 0:2000",
		"implied/file": `file 660 5:2000 "" then`,
		"link":         "link 777 5:2000 → / then",
	}
	hasTree(t, dir, want)
	if is := tree(t, dir)[lostFound]; is != "dir 2770 0:2000" {
		t.Errorf("lost+found is %s", is)
	}
}

// TestUnpackRefuses reads the errors for archives that nobody can have meant, or that want out
// of their root. Nothing is made outside.
func TestUnpackRefuses(t *testing.T) {
	testenv.Root(t)
	base := archive(t, item{name: "dir/f", content: "f"}, item{name: "up", kind: tar.TypeSymlink, link: ".."})
	good := archive(t, item{name: "file", content: strings.Repeat("x", 4096)})
	one := func(items ...item) [][]byte { return [][]byte{archive(t, items...)} }
	above := func(items ...item) [][]byte { return [][]byte{base, archive(t, items...)} }
	link := func(name, to string) item { return item{name: name, kind: tar.TypeLink, link: to} }
	symlink := func(name, to string) item { return item{name: name, kind: tar.TypeSymlink, link: to} }
	nobody := map[string]string{"nobody.x": "y"}
	for name, c := range map[string]struct {
		archives [][]byte
		words    []string
	}{
		"a path with ..":          {one(item{name: "a/../../x"}), []string{`entry "a/../../x"`, `".."`}},
		"a hard link with ..":     {one(link("x", "../outside")), []string{`entry "x"`, `"../outside"`}},
		"through a symbolic link": {one(symlink("l", ".."), item{name: "l/outside"}), []string{`"l/outside"`, `"l" is no directory`}},
		"through a file":          {one(item{name: "f"}, item{name: "f/g"}), []string{`"f/g"`, `"f" is no directory`}},
		"a hard link through one": {above(link("x", "up/outside")), []string{"layer 2 of 2", `"up/outside"`}},
		"a hard link to nothing":  {one(link("x", "y")), []string{`hard link to "y"`, "no such file"}},
		"a hard link to itself":   {one(item{name: "x"}, link("./x", "x")), []string{"to itself"}},
		"a character device":      {one(item{name: "null", kind: tar.TypeChar}), []string{`entry "null"`, "device"}},
		"a block device":          {one(item{name: "sda", kind: tar.TypeBlock}), []string{`entry "sda"`, "device"}},
		"a named pipe":            {one(item{name: "p", kind: tar.TypeFifo}), []string{`entry "p"`, "named pipe"}},
		"an unknown type":         {one(item{name: "z", kind: 'Z'}), []string{`entry "z"`, "unknown type"}},
		"a file as the root":      {one(symlink("/.", "x")), []string{"the root directory"}},
		"a whiteout of ..":        {above(item{name: "dir/.wh..."}), []string{`"dir/.wh..."`, "hides no file"}},
		"a whiteout of .":         {above(item{name: "dir/.wh.."}), []string{"hides no file"}},
		"a whiteout of nothing":   {above(item{name: "dir/.wh."}), []string{"hides no file"}},
		"a name that is too long": {one(item{name: strings.Repeat("n", 256)}), []string{"name too long"}},
		"a path that is too long": {one(item{name: strings.Repeat("n/", 3000) + "x"}), []string{"name too long"}},
		"an attribute of nobody":  {one(item{name: "x", attrs: nobody}), []string{`entry "x"`, `attribute "nobody.x"`}},
		"an owner out of range":   {one(item{name: "x", uid: 1<<32 - 1}), []string{"out of range"}},
		"a content that is cut":   {[][]byte{good[:1536+1000]}, []string{`entry "file"`, "unexpected EOF"}},
		"a header that is cut":    {[][]byte{good[:1536+4096+100]}, []string{`after entry "file"`, "unexpected EOF"}},
		"no archive at all":       {[][]byte{bytes.Repeat([]byte("no tar "), 512)}, []string{"its beginning", "invalid tar header"}},
		"ext4's own directory":    {one(item{name: "lost+found", content: "x"}), []string{"lost+found"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			outside, root := filepath.Join(dir, "outside"), filepath.Join(dir, "root")
			err := errors.Join(os.WriteFile(outside, []byte("x"), 0o600), os.MkdirAll(filepath.Join(root, lostFound), 0o700))
			if err != nil {
				t.Fatal(err)
			}
			_, err = unpackInto(root, Content{}, c.archives...)
			if err == nil {
				t.Fatal("it was unpacked")
			}
			t.Logf("the operator reads: %v", err)
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the message lacks %q", w)
				}
			}
			if found, err := os.ReadDir(dir); err != nil || len(found) != 2 {
				t.Errorf("beside the root are %v: %v", found, err)
			}
		})
	}
}

// TestUnpackKeepsLostFound hides everything of the lower layer but ext4's own directory.
func TestUnpackKeepsLostFound(t *testing.T) {
	dir := testenv.Ext4.Pool(t)
	_, err := unpackInto(dir, Content{}, archive(t, item{name: "a"}, item{name: "b"}),
		archive(t, item{name: ".wh..wh..opq"}, item{name: ".wh.lost+found"}, item{name: "c"}))
	if err != nil {
		t.Fatal(err)
	}
	hasTree(t, dir, map[string]string{".": "dir 755 0:0", "c": `file 644 0:0 "" then`})
	if tree(t, dir)[lostFound] == "" {
		t.Error("lost+found is gone")
	}
}

// TestUnpackFull fills filesystems that are too small, with large files, and with more files
// than there are inodes.
func TestUnpackFull(t *testing.T) {
	large := archive(t, item{name: "first", content: "x"}, item{name: "large", content: strings.Repeat("x", 100<<20)})
	var many []item
	for i := range 5000 {
		many = append(many, item{name: fmt.Sprintf("dir/%d", i)})
	}
	for name, c := range map[string]struct {
		dir     string
		archive []byte
		want    Full
	}{
		"ext4":        {testenv.Ext4.Mount(t, 64<<20), large, FullSpace},
		"btrfs":       {testenv.Btrfs.Mount(t, 128<<20), large, FullSpace},
		"ext4 inodes": {testenv.Mount(t, 64<<20, "mkfs.ext4", "-q", "-N", "1000"), archive(t, many...), FullInodes},
	} {
		v, err := unpackInto(c.dir, Content{}, c.archive)
		if !errors.Is(err, unix.ENOSPC) || v.Full != c.want || v.Entries == 0 {
			t.Errorf("%s: %v; it is full of %q, want %q, after %d entries", name, err, v.Full, c.want, v.Entries)
		}
	}
}
