// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Layer is a filesystem that the pool's data lie on: the pool's own, or one below it, which
// holds the file behind the loop device of the layer above.
type Layer struct {
	Path string // the pool's directory, or the file that holds the layer above
	fsctl.Status
	// Shared means that the node itself is on this filesystem: kubelet's directory is.
	Shared bool
	// Size and Allocated are those of the file that holds the layer above, in bytes. A sparse
	// file has allocated less than its size.
	Size, Allocated int64
}

// layers are the files that hold the pool's filesystem, and what is known of them.
type layers struct {
	files  []*os.File // from the top down: the file that holds the pool, the file that holds that one's filesystem, …
	shared []bool     // whether the node is on the pool's own filesystem, and on that of each file
	hidden string     // the loop device below the last of them, if it cannot be looked into; usually ""
	// filled means that the file that holds the pool had all of its space when it was opened.
	// Somebody has preallocated it, and it keeps its space.
	filled bool
}

// findLayers looks below a directory for as long as there are loop devices. nodeDir is a
// directory of the node's own filesystem; if it does not exist, no layer is shared.
func findLayers(dir *os.File, nodeDir string) (l layers, err error) {
	node, err := os.Open(nodeDir)
	if err == nil {
		defer node.Close()
	} else if nodeDir != "" && !errors.Is(err, os.ErrNotExist) {
		return l, err
	}
	for at := dir; ; {
		shared := false
		if node != nil {
			if shared, err = fsctl.Same(at, node); err != nil {
				break
			}
		}
		l.shared = append(l.shared, shared)
		var file *os.File
		if file, l.hidden, err = holder(at); err != nil || file == nil {
			break
		}
		l.files = append(l.files, file)
		at = file
	}
	if err == nil && len(l.files) > 0 {
		l.filled, err = filled(l.files[0])
	}
	if err != nil {
		l.close()
	}
	return l, err
}

// filled reports whether a file has all of its space.
func filled(f *os.File) (bool, error) {
	length, allocated, err := measure(f)
	return allocated >= length, err
}

func (l layers) close() {
	for _, f := range l.files {
		f.Close()
	}
}

// holder opens the file that holds the filesystem that f is on. It returns nil if that
// filesystem is on no loop device. If the device has only a part of the file, or if the file
// cannot be opened, holder names the device: the file may be in another mount namespace, or
// have lost its name.
func holder(f *os.File) (file *os.File, hidden string, err error) {
	on, err := mount.Holding(f)
	if errors.Is(err, mount.ErrNotMounted) {
		return nil, "", nil // nothing tells what it is on
	}
	if err != nil {
		return nil, "", err
	}
	index, whole := loopdev.Under(on.Major, on.Minor, on.Source)
	if index < 0 {
		return nil, "", nil
	}
	dev, err := loopdev.Open(index)
	if err != nil {
		return nil, "", err
	}
	defer dev.Close()
	path, err := loopdev.BackingFile(index)
	if err != nil {
		return nil, "", err
	}
	hidden = fmt.Sprintf("%s (%s)", dev.Path(), strings.TrimSuffix(path, " (deleted)"))
	if info, err := dev.Info(); err != nil || !whole || !info.Whole {
		return nil, hidden, err
	}
	// The kernel keeps the path from the time of the attachment. When a loopback pool is made,
	// its file has no name yet.
	for _, candidate := range []string{path, filepath.Join(filepath.Dir(on.Mountpoint), loopbackImage)} {
		file, err := os.OpenFile(candidate, os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if is, err := dev.Backs(file); err == nil && is {
			return file, "", nil
		}
		file.Close()
	}
	return nil, hidden, nil
}

// Layers describes the filesystems that the pool's data lie on, from the pool's own down.
func (p *Pool) Layers() ([]Layer, error) { return p.layers.below(p.dir) }

// below describes the filesystem that f is on, and the layers below it.
func (l layers) below(f *os.File) ([]Layer, error) {
	var found []Layer
	for i, f := range append([]*os.File{f}, l.files...) {
		st, err := fsctl.StatusOf(f)
		if err != nil {
			return nil, err
		}
		one := Layer{Path: f.Name(), Status: st, Shared: l.shared[i]}
		if i > 0 {
			if one.Size, one.Allocated, err = measure(f); err != nil {
				return nil, err
			}
		}
		found = append(found, one)
	}
	return found, nil
}

// measure returns how long a file is, and how much space it takes, in bytes.
func measure(f *os.File) (length, allocated int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	return fi.Size(), fi.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// Space is what the pool has room for, in bytes: the least of all layers. The size of a
// loopback pool is only an upper bound, since its file takes space as it is written to.
type Space struct {
	Total, Available int64
	// Headroom is what new volumes leave free for the node, if the pool's own filesystem is
	// the node's too. What they leave free on a layer below is not in Available.
	Headroom int64
	// Limit says which layer below the pool has less room than the pool itself; "" if none has.
	Limit string
}

// Space asks all layers for their space.
func (p *Pool) Space() (Space, error) {
	layers, err := p.Layers()
	if err != nil {
		return Space{}, err
	}
	return least(layers, p.nodeHeadroom), nil
}

// roomAround is what the filesystem that f is on has room for, in bytes.
func roomAround(f *os.File) (int64, error) {
	l, err := findLayers(f, "")
	if err != nil {
		return 0, err
	}
	defer l.close()
	found, err := l.below(f)
	if err != nil {
		return 0, err
	}
	return least(found, size.Share{}).Available, nil
}

// least adds up what the layers have, from the bottom to the top. A file may come to take
// what it has already and what its filesystem has free; the filesystem in it cannot use more.
//
// Free blocks of a filesystem may still have space in the file below. Such space counts as
// available, and is soon returned: see [Pool.Trim].
func least(layers []Layer, node size.Share) Space {
	var s Space // of the layer below
	for i, l := range slices.Backward(layers) {
		below := s
		s = Space{Total: l.Total, Available: l.Available, Headroom: l.headroom(node)}
		if i+1 == len(layers) {
			continue
		}
		file := layers[i+1]
		overhead := file.Size - l.Total // what the filesystem keeps for itself, as the log of an xfs
		if could := file.Allocated + max(0, below.Available-below.Headroom) - overhead; could < l.Total {
			s.Total = max(0, could)
			s.Available = max(0, min(l.Available, could-(l.Total-l.Available)))
			s.Limit = cmp.Or(below.Limit, file.limit(below.Headroom))
		}
	}
	return s
}

// Headroom is what new volumes leave free of a layer for the node, in bytes: 0 if the node is not on it.
func (p *Pool) Headroom(l Layer) int64 { return l.headroom(p.nodeHeadroom) }

// headroom is what new volumes leave free for the node.
func (l Layer) headroom(node size.Share) int64 {
	if !l.Shared {
		return 0
	}
	return node.Of(l.Total)
}

// limit describes a layer that has less room than the one above it, for a message.
func (l Layer) limit(headroom int64) string {
	text := fmt.Sprintf("the %s of %s, below the pool, has %s free", l.Type.Name(), l.Path, size.Format(l.Available))
	if headroom > 0 {
		text += fmt.Sprintf(", and %s of it is left to the node", size.Format(headroom))
	}
	return text
}
