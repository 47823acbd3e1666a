// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"
)

// pause is how long everything rests after each life. What a way does after its answer is not measured here then, and
// does not slow the next one, whose turn it is by chance. The case rate measures it: there nobody rests.
const pause = 5 * time.Millisecond

// every says that a way takes part in each so many rounds only, because it is slow, or nothing depends on its figure.
var every = map[string]int{habit: 4, otherHabit: 4, claim: 4}

// life measures publish and unpublish of all ways, which take turns.
func life(ctx context.Context, b *bench, d *bed) error {
	for _, fs := range filesystems {
		for i := range b.rounds(100, 20, 8*time.Second) {
			if err := b.round(ctx, d, key{Case: "life", FS: fs}, d.names(), i); err != nil {
				return err
			}
		}
	}
	return nil
}

// round lets each way have one volume.
func (b *bench) round(ctx context.Context, d *bed, k key, names []string, i int) error {
	k.Pool = d.kind.name
	for _, name := range b.shuffled(names) {
		if i%max(1, every[name]) != 0 {
			continue
		}
		k.Way = name
		published, unpublished, err := b.live(ctx, d.ways[name], d.volume(k.FS, volumeSize))
		if err != nil {
			return fmt.Errorf("%s of %s: %w", name, k.FS, err)
		}
		k.What = "publish"
		b.add(k, milliseconds(published))
		k.What = "unpublish"
		b.add(k, milliseconds(unpublished))
		time.Sleep(pause)
	}
	return ctx.Err()
}
