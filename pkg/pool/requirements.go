// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Requirements are what the pool needs of its filesystem, of the layers below it, and of the loop driver.
func (p *Pool) Requirements() []health.Requirement {
	return []health.Requirement{
		{Name: "pool", Look: p.Conditions, Good: func() string { return fmt.Sprintf("%s is on %s, and writable", p.root, p.id.Type.Name()) }},
		{Name: "reflink", Look: p.whileUsable(health.PoolUnusable, tryReflink), Good: p.ifUsable("files in the pool can share extents"), Seldom: true, Code: health.PoolUnusable},
		{Name: "loop-devices", Look: p.whileUsable(health.LoopUnavailable, tryLoop), Good: describeLoops, Seldom: true, Code: health.LoopUnavailable},
		{Name: "layers", Look: p.layerConditions, Good: p.describeLayers},
		{Name: "thick-claims", Look: p.reserveConditions, Good: p.ifUsable("space can be reserved through all layers")},
		{Name: "disk-image-bounds", Look: p.boundConditions, Good: p.ifUsable("the kernel bounds the space of each disk.img")},
	}
}

// unusable makes an error a condition in which the plugin is not ready.
func unusable(code string, err error) []health.Condition {
	if err == nil {
		return nil
	}
	text, remedy := health.Advice(err)
	return []health.Condition{{Code: code, Severity: health.Inaccessible, Text: text, Remedy: remedy}}
}

// whileUsable is a look that tries something in the pool's directory. Of a pool that fails [Pool.Check] it says
// nothing.
func (p *Pool) whileUsable(code string, try func(dir string) error) func() []health.Condition {
	return func() []health.Condition {
		if p.Check() != nil {
			return nil
		}
		return unusable(code, try(p.root))
	}
}

func (p *Pool) ifUsable(good string) func() string {
	return func() string {
		if p.Check() != nil {
			return ""
		}
		return good
	}
}

func describeLoops() string {
	text := "a trial volume was attached with direct I/O"
	if all, used, err := loopdev.Count(); err == nil {
		text += fmt.Sprintf("; %d of %d loop devices are in use, and the kernel makes more", used, all)
	}
	if private, err := devfs.Private(); err == nil && private {
		text += "; /dev is private, so the plugin finds them in a devtmpfs of its own"
	}
	return text
}

// layerConditions are about the layers below the pool.
func (p *Pool) layerConditions() []health.Condition {
	limited := health.Condition{Code: health.PoolLimited, Severity: health.Limited, StillReady: true}
	if p.layers.hidden != "" {
		limited.Text = fmt.Sprintf("the pool is on %s, which the plugin cannot look into", p.layers.hidden)
		limited.Cost = "the space below the pool is not counted, and thick claims are refused"
		limited.Remedy = showFile
		return []health.Condition{limited}
	}
	s, err := p.Space()
	if err != nil || s.Limit == "" {
		return nil
	}
	limited.Text = "the pool cannot use all of its size: " + s.Limit
	limited.Cost = fmt.Sprintf("it has room for %s in all, and %s of that are free", size.Format(s.Total), size.Format(s.Available))
	limited.Remedy = "make room below the pool, or make the pool smaller"
	return []health.Condition{limited}
}

// describeLayers describes the space of all layers, from the pool's own down.
func (p *Pool) describeLayers() string {
	all, err := p.Layers()
	if err != nil {
		return ""
	}
	var texts []string
	for i, l := range all {
		where := "the " + l.Type.Name() + " of " + l.Path
		if i > 0 {
			where = "below it, " + where
		}
		texts = append(texts, fmt.Sprintf("%s has %s of %s free", where, size.Format(l.Available), size.Format(l.Total)))
	}
	return strings.Join(texts, "; ")
}

func (p *Pool) reserveConditions() []health.Condition {
	err := p.CanReserve()
	if !errors.Is(err, ErrCannotReserve) {
		return nil
	}
	text, remedy := health.Advice(err)
	return []health.Condition{{
		Code: health.NoThickClaims, Severity: health.Limited, StillReady: true, Text: text, Cost: "thick claims are refused", Remedy: remedy,
	}}
}

func (p *Pool) boundConditions() []health.Condition {
	if on, err := p.CanBound(); p.Check() != nil || err == nil && on {
		return nil
	}
	c := health.Condition{
		Code: health.DiskImagesUnbounded, Severity: health.Limited, StillReady: true,
		Text:   "the kernel does not bound the space of a disk.img: the pool is on btrfs",
		Cost:   "a pod can make its disk.img larger until the pool is full, which the condition DiskImageGrown reports",
		Remedy: "if pods are given disk.img, put the pool on an xfs with the mount option prjquota, or add --loopback-pool-size",
	}
	if p.id.Type == fsctl.XFS {
		c.Text = "the kernel does not bound the space of a disk.img: the pool's xfs has no project quotas"
		c.Remedy = "mount it with prjquota, on a kernel with CONFIG_XFS_QUOTA (Linux 5.14 or newer); a loopback pool gets them by itself there, when the node reboots"
	}
	return []health.Condition{c}
}
