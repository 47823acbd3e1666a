// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestPoolVanishes takes the pool away from a plugin that nobody calls. The log says so at once, and then /readyz, the
// metrics and the health calls do, and the plugin gives back what it keeps ready. When the pool is back, all of them say that,
// and the same process works on.
func TestPoolVanishes(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 1<<30)
			at := filepath.Dir(n.Pool)
			for _, c := range []struct {
				name, says string
				flags      []string
				take       func(t *testing.T)
				back       []string
			}{
				{"something mounted over it", "mount it again", nil,
					func(t *testing.T) { testenv.Run(t, "mount", "-t", "tmpfs", "cover", at) }, []string{"umount", at}},
				// What is kept ready would keep the pool busy.
				{"read-only", "read-only", []string{"--warm-max", "0"},
					func(t *testing.T) { testenv.ReadOnly(t, at) }, []string{"mount", "-o", "remount,rw", at}},
			} {
				t.Run(c.name, func(t *testing.T) {
					p := n.with(t).start(c.flags...)
					r := p.request("before", "ext4", "size", "64Mi")
					p.publish(r)
					p.unpublish(r)
					p.ends()
					if c.flags == nil {
						p.await("volumes that are ready", p.AllReady)
					}
					p.saysUnusable(false, c.says)
					began := func() []string { return p.log.lines(`] "A condition began`, `condition="PoolUnusable"`, c.says) }
					ended := func() []string { return p.log.lines(`] "A condition ended"`, `condition="PoolUnusable"`, "lasted=") }
					before := len(ended())
					c.take(t)
					back := func() { testenv.Run(t, c.back[0], c.back[1:]...) }
					defer func() { back() }()
					p.await("a line of the log", func() bool { return len(began()) > 0 })
					p.saysUnusable(true, c.says)
					p.saysUnusable(true, c.says) // and logs it once
					p.await("the end of what was ready", func() bool { return p.metric("csi_disktemplate_warm_volumes") == 0 })
					back()
					back = func() {}
					p.await("a line of the log", func() bool { return len(ended()) > before })
					p.saysUnusable(false, c.says)
					if b, e := began(), ended(); len(b) != 1 || !strings.HasPrefix(b[0], "E") || len(e) != before+1 || !strings.HasPrefix(e[before], "I") {
						t.Errorf("the log says\n%s%s", b, e)
					}
					r = p.request("afterwards", "ext4", "size", "64Mi")
					p.publish(r)
					p.unpublish(r)
					if code := p.terminate(); code != 0 {
						t.Errorf("exit code %d", code)
					}
				})
			}
		})
	}
}

// saysUnusable checks that everything that tells of the pool says whether it can be used.
func (p *plugin) saysUnusable(unusable bool, says string) {
	t := p.t
	t.Helper()
	code, body := p.get("/readyz")
	if unusable && (code != 503 || !strings.HasPrefix(body, "PoolUnusable since ") || !strings.Contains(body, says)) || !unusable && (code != 200 || body != "ok\n") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	for _, name := range []string{"csi_disktemplate_pool_size_bytes", "csi_disktemplate_pool_available_bytes"} {
		if got := p.samples(name); unusable != (len(got) == 0) {
			t.Errorf("the metrics are %s", got)
		}
	}
	if got := p.metric(`csi_disktemplate_condition{code="PoolUnusable"}`) == 1; got != unusable {
		t.Errorf("the metric of the condition: %v", got)
	}
	health, err := p.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || unusable != (len(health.GetBackendHealth()) == 1 && health.GetBackendHealth()[0].GetReason() == "PoolUnusable") {
		t.Errorf("NodeGetStorageHealth: %v: %v", health, err)
	}
}
