// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestVerbosity runs the plugin at each level of -v, and makes the same calls: what changes something, what a user got
// wrong, three times, and what only asks.
func TestVerbosity(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	for _, c := range []struct {
		v                                string
		refused, asked, swept, requested int // lines
		built                            int
	}{
		{"0", 1, 0, 0, 0, 1},
		{"2", 1, 0, 1, 0, 0},
		{"4", 3, 1, 1, 0, 0},
		{"5", 3, 1, 1, 6, 0},
	} {
		t.Run("-v="+c.v, func(t *testing.T) {
			n := n.with(t)
			p := n.start("-v", c.v)
			good, bad := p.request("good", "ext4", "size", "64Mi"), p.request("bad", "ext4", "color", "red")
			p.publish(good)
			for range 3 {
				p.refused(bad, codes.InvalidArgument, "color")
			}
			if _, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{}); err != nil {
				t.Error(err)
			}
			if code := p.terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			t.Log(p.log)
			size := regexp.MustCompile(`size="[0-9.]+Mi" free="[0-9.]+Mi" diskImagesBounded=(?:true|false) below="[a-z0-9]+ of ` + regexp.QuoteMeta(filepath.Dir(filepath.Dir(n.Pool))) + `/image, .* free" volumes=0 snapshots=0 templates=` + fmt.Sprint(1-c.built) + ` defaultDurability="synced" accelerator="tcg"`)
			for what, lines := range map[string]struct {
				got  []string
				want int
				from string // severity
			}{
				"started":   {p.log.lines(`] "Started" version="v`, `node="node-of-test"`, `pool="`+n.Pool+`" kind="xfs" `), 1, "I"},
				"built":     {p.log.lines(`] "Built a template"`), c.built, "I"},
				"published": {p.log.lines(`] "NodePublishVolume"`, `volume="good"`, `code="OK"`), 1, "I"},
				"refused":   {p.log.lines(`] "NodePublishVolume"`, `volume="bad"`, "color"), c.refused, "I"},
				"asked":     {p.log.lines(`] "NodeGetInfo"`), c.asked, "I"},
				"swept":     {p.log.lines(`] "Swept"`), c.swept, "I"},
				"stopped":   {p.log.lines(`] "Stopped; `, `reason="terminated signal received"`, "uptime=", "calls=6 ", "mountedVolumes=1"), 1, "I"},
			} {
				if len(lines.got) != lines.want {
					t.Errorf("%s: %d lines, expected %d: %s", what, len(lines.got), lines.want, lines.got)
				}
				for _, line := range lines.got {
					if !strings.HasPrefix(line, lines.from) {
						t.Errorf("%s: %s", what, line)
					}
					if what == "started" && !size.MatchString(line) {
						t.Errorf("the summary is %s", line)
					}
				}
			}
			if got := p.log.lines(`] "Request"`); len(got) != c.requested {
				t.Errorf("%d requests: %s", len(got), got)
			}
			for line := range strings.Lines(p.log.String()) {
				if strings.HasPrefix(line, "E") || strings.HasPrefix(line, "W") || !strings.HasPrefix(line, "I") {
					t.Errorf("nothing is wrong: %s", line)
				}
			}
			testenv.Run(t, "umount", good.TargetPath)
			testenv.NoLoopsBelow(t, n.Pool)
			p = n.start()
			p.unpublish(good)
			p.Kill()
		})
	}
}

// TestSummaryOfLoopbackPool reads what a plugin with a loopback pool says at its start.
func TestSummaryOfLoopbackPool(t *testing.T) {
	n := newNode(t, testenv.Ext4, 1<<30)
	p := n.start("--loopback-pool-size", "512Mi")
	defer testenv.Unmount(t, filepath.Join(n.Pool, "mnt"))
	if got := p.log.lines(`] "Started"`, fmt.Sprintf("kind=%q", "xfs in "+filepath.Join(n.Pool, "pool.img"))); len(got) != 1 {
		t.Errorf("the summary is %s", p.log.lines(`] "Started"`))
	}
	p.terminate()
}
