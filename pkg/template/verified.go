// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"os"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/boot"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// identity is the identity of a file's content by stat(2). As long as it stays the same, a file
// that was verified once need not be verified again.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func identify(f *os.File) (identity, error) {
	st, err := stat(f)
	if err != nil {
		return identity{}, err
	}
	return identity{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
}

func stat(f *os.File) (*syscall.Stat_t, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return fi.Sys().(*syscall.Stat_t), nil
}

// notedBytes is the space from which on it is noted that a template was verified. To read so much takes
// 30 to 100 ms, and 10 GiB take 5 to 15 s. Less is read again by each process.
const notedBytes = 64 << 20

// noted is the identity of a template that was verified, for later processes. What it says holds in one boot:
// after a power cut the file may be torn, and show nothing of it. The device is left out, since the number
// of a loopback pool's changes when that is mounted.
type noted struct {
	Boot  string           `json:"boot"`
	Ino   uint64           `json:"ino"`
	Size  int64            `json:"size"`
	MTime syscall.Timespec `json:"mtime"`
	CTime syscall.Timespec `json:"ctime"`
}

func (id identity) noted() (noted, error) {
	boot, err := boot.ID()
	return noted{Boot: boot, Ino: id.ino, Size: id.size, MTime: id.mtime, CTime: id.ctime}, err
}

// verifyOnce verifies a template, unless that was done since the file changed last. It returns the file's
// size too.
func (s *Store) verifyOnce(f *os.File, key string) (r Record, bytes int64, err error) {
	id, err := identify(f)
	if err != nil {
		return Record{}, 0, err
	}
	s.mu.Lock()
	r, known := s.verified[id]
	s.mu.Unlock()
	if known && r.Key == key {
		return r, id.size, nil
	}
	if s.wasVerified(key, id) {
		r, _, err = readRecord(f, key)
	} else {
		r, err = verify(f, key)
	}
	if err != nil {
		return Record{}, 0, err
	}
	s.remember(f, id, r)
	return r, id.size, nil
}

// wasVerified reports whether another process has verified this file in this boot.
func (s *Store) wasVerified(key string, id identity) bool {
	var was noted
	if s.cfg.Pool.Noted(key, pool.VerifiedAttr, &was) != nil {
		return false
	}
	now, err := id.noted()
	return err == nil && was == now
}

// remember keeps that a file was verified; that of a large one for other processes too.
func (s *Store) remember(f *os.File, id identity, r Record) {
	s.mu.Lock()
	s.verified[id] = r
	s.mu.Unlock()
	if st, err := stat(f); err != nil || st.Blocks*512 < notedBytes || s.wasVerified(r.Key, id) {
		return
	}
	note, err := id.noted()
	if err == nil {
		err = s.cfg.Pool.Note(r.Key, pool.VerifiedAttr, note)
	}
	if err != nil {
		klog.ErrorS(err, "It is not noted that a template was verified; the next start of the plugin reads it again", "template", r.Key)
	}
}
