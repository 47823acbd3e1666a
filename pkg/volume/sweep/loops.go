// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"errors"
	"os"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Loop is the attachment of a loop device that the plugin attached.
type Loop struct {
	loopdev.Attachment
	ID string // of the volume whose image it has; "" if that is ready for a volume, or deleted
}

// Loops lists the loop devices that the plugin attached. It disturbs none of them: see [loopdev.Attachments].
func (s *Sweeper) Loops() ([]Loop, error) {
	if err := s.Pool.Check(); err != nil { // volumes are found by their paths
		return nil, err
	}
	all, err := loopdev.Attachments()
	if err != nil {
		return nil, err
	}
	dir, err := os.Stat(s.Images.Dir())
	if err != nil {
		return nil, err
	}
	ids, err := s.Images.IDs()
	if err != nil {
		return nil, err
	}
	filesystem := dir.Sys().(*syscall.Stat_t).Dev
	var loops []Loop
	for _, a := range all {
		if a.Device != filesystem {
			continue
		}
		id := ids[image.FileID{Device: a.Device, Inode: a.Inode}]
		if id == "" {
			ours, err := s.madeAs(a.Index, a.Name)
			if err != nil && !errors.Is(err, loopdev.ErrNotAttached) {
				return nil, err
			}
			if !ours {
				continue
			}
		}
		loops = append(loops, Loop{a, id})
	}
	return loops, nil
}
