// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// contextKey begins the option that gives all files one SELinux context.
const contextKey = "context="

// needsText reports whether a filesystem has to get its options as the text of mount(2).
//
// Before Linux 6.8 btrfs mounts itself once more inside, with this text and without the SELinux
// context that fsconfig(2) took. The kernel then finds one superblock with two contexts, and returns
// EINVAL: btrfs_mount in fs/btrfs/super.c, selinux_set_mnt_opts in security/selinux/hooks.c. Such a
// btrfs also takes any option before it looks at what all of them mean.
func needsText(c Config) bool {
	if c.FSType != "btrfs" || !slices.ContainsFunc(c.Data, isContext) {
		return false
	}
	fs, err := fsopen(c.FSType)
	if err != nil {
		return false
	}
	defer fs.Close()
	return sys.On(fs, func(fd int) error { return unix.FsconfigSetString(fd, "no-such-option", "") }) == nil
}

func isContext(option string) bool { return strings.HasPrefix(option, contextKey) }

// newByText is [New] by mount(2). That mounts only at a path, so it does so in a mount namespace
// that nobody else sees, and clones the mount. The namespace ends with its thread.
func newByText(c Config) (*Detached, error) {
	what := c.FSType + " on " + c.Source
	var d *Detached
	err := sys.OnThread(func() (err error) {
		if err := Unshare(); err != nil {
			return err
		}
		// The mount table will show this source, so the kernel's nodes have to be at /dev. EBUSY: they
		// are.
		err = unix.Mount("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "")
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return os.NewSyscallError("mount devtmpfs", err)
		}
		// Any directory that exists on every machine will do, since it is hidden only here.
		const at = "/proc"
		err = sys.PathEffect("mount", func() error { return unix.Mount(c.Source, at, c.FSType, 0, text(c.Data)) })
		if err != nil {
			return fmt.Errorf("%w: the kernel's log may say more (dmesg | grep -i %s)", err, c.FSType)
		}
		d, err = cloneAt(at, what)
		return errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
	})
	if err == nil {
		err = d.SetAttr(c.Attr)
	}
	if err != nil {
		if d != nil {
			d.Close()
		}
		return nil, fmt.Errorf("mount %s: %w", what, err)
	}
	return d, nil
}

// text is the options as mount(2) takes them. A context may have commas, so it is quoted.
func text(options []string) string {
	var words []string
	for _, o := range options {
		if value, ok := strings.CutPrefix(o, contextKey); ok {
			o = contextKey + `"` + value + `"`
		}
		words = append(words, o)
	}
	return strings.Join(words, ",")
}

// cloneAt is [Clone] of what the calling thread sees at a path. what is the name of the mount.
func cloneAt(path, what string) (*Detached, error) {
	root, err := sys.OpenEffect("open_tree", what, func() (int, error) {
		return unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
	if err != nil {
		return nil, fmt.Errorf("open_tree: %w", err)
	}
	return &Detached{root}, nil
}
