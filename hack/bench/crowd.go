// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
)

// crowd measures publish and unpublish beside more and more volumes that the plugin has mounted.
func crowd(ctx context.Context, b *bench, d *bed) error {
	w := d.ways[plugin]
	var mounted []*volume
	defer func() { b.takeAway(context.WithoutCancel(ctx), w, mounted) }()
	for _, at := range []int{1, 100, 300, 1000} {
		if b.o.quick && at > 300 {
			break
		}
		more := d.some("ext4", at-len(mounted))
		err := each(8, more, func(v *volume) error {
			if err := w.prepare(v); err != nil {
				return err
			}
			return w.publish(ctx, v)
		})
		mounted = append(mounted, more...)
		if err != nil {
			return err
		}
		for i := range b.n(50, 15) {
			k := key{Case: "crowd", FS: "ext4", At: at}
			if err := b.round(ctx, d, k, []string{plugin, floor}, i); err != nil {
				return err
			}
		}
	}
	err := b.note(d)
	if err == nil {
		err = b.takeAway(ctx, w, mounted)
	}
	mounted = nil
	return err
}
