// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"context"
	"errors"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// carryOut does what an action says, if the action still fits once the volume is locked.
func (s *Sweeper) carryOut(ctx context.Context, a *Action) {
	if a.Verb == Leave {
		return
	}
	var err error
	switch find := a.find.(type) {
	case process.Process:
		var killed bool
		if killed, err = process.KillHolding(find.PID, s.templatesDir()); err == nil && !killed {
			err = ErrOutdated
		}
	case foundVolume:
		err = s.locked(find.ID, func() error { return s.carryOutVolume(ctx, a.Verb, find.ID) })
	case foundReplacement:
		err = s.locked(find.id, func() error { return s.removeReplacement(ctx, find.id) })
	case foundKept:
		err = s.carryOutKept(a.Verb, find.ID)
	case foundGolden:
		err = s.Goldens.Remove(find.Generation)
	case foundLoop:
		err = s.locked(find.name, func() error { return s.detachLost(find) })
	}
	switch {
	case err == nil:
		a.Result = Done
	case errors.Is(err, ErrOutdated):
		a.Result = Skipped
	default:
		a.Result = err.Error()
	}
}

// locked calls do while no other operation works on the volume.
func (s *Sweeper) locked(id string, do func() error) error {
	unlock, err := s.Lock(id)
	if err != nil {
		return ErrOutdated // another operation is changing it; the next sweep looks again
	}
	defer unlock()
	return do()
}

// again looks at a volume once more.
func (s *Sweeper) again(id string) (foundVolume, error) {
	loops, err := s.findLoops()
	if err != nil {
		return foundVolume{}, err
	}
	table, err := place.ReadTable()
	if err != nil {
		return foundVolume{}, err
	}
	v, err := s.findVolume(id, byInode(loops), table)
	if errors.Is(err, errdefs.ErrNotFound) {
		return v, ErrOutdated
	}
	return v, err
}

func (s *Sweeper) carryOutVolume(ctx context.Context, verb Verb, id string) error {
	if verb == Thaw {
		return s.Thaw(ctx, id)
	}
	v, err := s.again(id)
	if err != nil {
		return err
	}
	if now, _ := v.judge(); now != verb {
		return ErrOutdated
	}
	if verb == Delete {
		if err := s.Images.Remove(id); err != nil {
			return err
		}
		s.Quota.Forget(id)
		return nil
	}
	img, err := s.Images.Open(id)
	if err != nil {
		return err
	}
	defer img.Close()
	if err := device.Detach(img, v.loops); err != nil {
		return err
	}
	return img.UnmarkStaged()
}

// carryOutKept commits a volume that is kept, or lets it go.
func (s *Sweeper) carryOutKept(verb Verb, id string) error {
	if verb == Delete {
		return s.Images.RemoveKept(id)
	}
	s.Commit(id)
	return nil
}

// removeReplacement removes a file that was to replace a volume's image. A process that is
// about to replace the image holds the image's lock.
func (s *Sweeper) removeReplacement(ctx context.Context, id string) error {
	err := s.Images.RemoveReplacement(ctx, id)
	if errors.Is(err, errdefs.ErrUnderWay) || errors.Is(err, os.ErrNotExist) {
		return ErrOutdated
	}
	return err
}

// detachLost detaches a device whose volume was deleted, if the device has not changed.
func (s *Sweeper) detachLost(l foundLoop) error {
	loops, err := s.findLoops()
	if err != nil {
		return err
	}
	table, err := place.ReadTable()
	if err != nil {
		return err
	}
	now, here := loops[l.index]
	now.mounted = table.ByLoop[l.index]
	if verb, _ := now.judge(); !here || verb != Detach || now.name != l.name {
		return ErrOutdated
	}
	if ids, err := s.Images.IDs(); err != nil {
		return err
	} else if ids[now.image] != "" {
		return ErrOutdated
	}
	return device.Detach(place.NewLost(s.Images, l.name, image.ModeBlock), []int{l.index})
}
