// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

func mustSay(t *testing.T, err error, says ...string) {
	t.Helper()
	t.Log(err)
	for _, s := range says {
		if err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("does not say %s: %v", s, err)
		}
	}
}

func TestFormatSpec(t *testing.T) {
	for name, c := range map[string]struct {
		fs, size, label string
		options         map[string]string
		want            string
	}{
		"defaults":           {fs: "ext4", want: "ext4 256Mi"},
		"default of xfs":     {fs: "xfs", want: "xfs 300Mi"},
		"rounded up":         {fs: "btrfs", size: "1500M", want: "btrfs 1431Mi"},
		"the maximum":        {fs: "xfs", size: "4294967295Mi", want: "xfs 4294967295Mi"},
		"label and option":   {fs: "ext4", size: "1Gi", label: "data", options: map[string]string{"inode-size": "512"}, want: "ext4 1Gi label=data inode-size=512"},
		"raw":                {fs: "raw", size: "1", want: "raw 1Mi"},
		"raw of some length": {fs: "raw", size: "3Gi", want: "raw 3Gi"},
	} {
		if got, err := formatSpec(c.fs, c.size, c.label, c.options); err != nil || got.String() != c.want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// badSpecs is what format must refuse, with what it must say.
var badSpecs = map[string]struct {
	args []string
	says []string
}{
	"filesystem":        {[]string{"--fs", "ntfs"}, []string{"--fs", `"ntfs"`, "btrfs, ext4, raw, xfs"}},
	"size in words":     {[]string{"--size", "lots"}, []string{"--size", `"lots"`, "512Mi"}},
	"size zero":         {[]string{"--size", "0"}, []string{"--size", `"0"`, "9Mi", "8Ti"}},
	"size negative":     {[]string{"--size", "-1Gi"}, []string{"--size", `"-1Gi"`, "-1Gi", "9Mi", "8Ti"}},
	"size too small":    {[]string{"--fs", "xfs", "--size", "299Mi"}, []string{"--size", `"299Mi"`, "300Mi", "4294967295Mi"}},
	"size too large":    {[]string{"--size", "4294967296Mi"}, []string{"--size", `"4294967296Mi"`, "9Mi", "8Ti"}},
	"size huge":         {[]string{"--size", "1e30"}, []string{"--size", `"1e30"`, "9Mi", "8Ti"}},
	"size to the skies": {[]string{"--size", "1e999999999"}, []string{"--size", `"1e999999999"`, "512Mi"}},
	"size 2^64 + 1 Gi":  {[]string{"--size", "18446744074783293440"}, []string{"--size", "9Mi", "8Ti"}},
	"label":             {[]string{"--label", "a b"}, []string{"label", `"a b"`, "letters"}},
	"long label":        {[]string{"--fs", "xfs", "--label", "thirteen-char"}, []string{"label", `"thirteen-char"`, "12"}},
	"label of raw":      {[]string{"--fs", "raw", "--size", "1Mi", "--label", "l"}, []string{"label", "raw"}},
	"option":            {[]string{"--option", "journal-size=1"}, []string{"option", `"journal-size"`, "inode-size"}},
	"option's value":    {[]string{"--option", "inode-size=77"}, []string{"option", `"77"`, "256, 512, 1024"}},
	"option of raw":     {[]string{"--fs", "raw", "--option", "inode-size=512"}, []string{"option", "raw"}},
	"accelerator":       {[]string{"--accel", "warp"}, []string{"--accel", `"warp"`, "auto, kvm, tcg"}},
	"timeout":           {[]string{"--format-timeout", "-1s"}, []string{"--format-timeout", "-1s", "more than 0"}},
	"no output":         {[]string{"-o", ""}, []string{"--output"}},
	"argument":          {[]string{"disk.img"}, []string{"disk.img"}},
	"flag":              {[]string{"--sise", "1Gi"}, []string{"--sise"}},
}

func TestBadSpecs(t *testing.T) {
	for name, c := range badSpecs {
		t.Run(name, func(t *testing.T) {
			cmd := newCommand()
			cmd.SetArgs(append([]string{"format", "-o", "/nonexistent/disk.img"}, c.args...))
			mustSay(t, cmd.ExecuteContext(t.Context()), c.says...)
		})
	}
}

func TestPoolFlags(t *testing.T) {
	for value, want := range map[string]int64{"": 0, "20Gi": 20 << 30, "1.5G": 15e8, "1e30": math.MaxInt64, "18446744074783293440": math.MaxInt64} {
		if c, err := (&poolFlags{dir: "/pool", loopback: value}).config(); err != nil || c.LoopbackSize != want || c.Dir != "/pool" {
			t.Errorf("%q is %+v, %v", value, c, err)
		}
	}
	for value, says := range map[string]string{"big": "10Gi", "0": "more than 0", "-20Gi": "more than 0", "-1e30": "more than 0", "20GB": "10Gi", "1e999999999": "10Gi"} {
		_, err := (&poolFlags{dir: "/pool", loopback: value}).config()
		mustSay(t, err, "--loopback-pool-size", value, says)
	}
}

// TestDefaults holds the flags against the environment that a DaemonSet sets.
func TestDefaults(t *testing.T) {
	flag := func(name string) string { return newCommand().Flags().Lookup(name).DefValue }
	t.Setenv("CSI_ENDPOINT", "")
	t.Setenv("NODE_NAME", "")
	if flag("endpoint") != "unix:///csi/csi.sock" || flag("node-id") != "" || flag("kubelet-dir") != "/var/lib/kubelet" || flag("driver-name") != "csi.disktemplate.io" ||
		flag("headroom") != "5%" || flag("overcommit") != "1" || flag("max-volumes-per-node") != "1024" ||
		flag("max-template-builds-per-hour") != "120" || flag("template-cache") != "20%" ||
		flag("max-inline-size") != "100Gi" || flag("max-inline-volumes") != "500" || flag("max-inline-volumes-per-namespace") != "0" ||
		flag("max-inline-bytes") != "0" || flag("max-inline-bytes-per-namespace") != "0" {
		t.Error("defaults changed")
	}
	t.Setenv("CSI_ENDPOINT", "unix:///other.sock")
	t.Setenv("NODE_NAME", "node1")
	if flag("endpoint") != "unix:///other.sock" || flag("node-id") != "node1" {
		t.Errorf("with the environment set: %s, %s", flag("endpoint"), flag("node-id"))
	}
}

func TestProgress(t *testing.T) {
	run := func(terminal bool, end error) string {
		var b bytes.Buffer
		p := newProgress(&b)
		if p.terminal {
			t.Error("takes a buffer for a terminal")
		}
		p.terminal = terminal
		p.enter(guest.StageBoot)
		p.since = p.since.Add(-1500 * time.Millisecond)
		p.enter(guest.StageMkfs)
		if end == nil {
			p.enter(guest.StageCheck)
			p.enter(guest.StageDone)
		}
		p.end(end)
		return b.String()
	}
	const seconds = ` +[0-9.m]*s  `
	for _, c := range []struct {
		terminal bool
		end      error
		want     string
	}{
		{false, nil, `^boot +1\.5\d?s  ok\nmkfs` + seconds + `ok\ncheck` + seconds + `ok\n$`},
		{false, errors.New("x"), `^boot +1\.5\d?s  ok\nmkfs` + seconds + `failed\n$`},
		{true, nil, `^boot …\r\x1b\[Kboot +1\.5\d?s  ok\nmkfs …\r\x1b\[Kmkfs` + seconds + `ok\ncheck …\r\x1b\[Kcheck` + seconds + `ok\n$`},
		{true, errors.New("x"), `^boot …\r\x1b\[Kboot +1\.5\d?s  ok\nmkfs …\r\x1b\[Kmkfs` + seconds + `failed\n$`},
	} {
		if got := run(c.terminal, c.end); !regexp.MustCompile(c.want).MatchString(got) {
			t.Errorf("terminal %v, %v: %q", c.terminal, c.end, got)
		}
	}
}

// TestHelp looks for what a newcomer needs in what --help prints.
func TestHelp(t *testing.T) {
	for _, c := range []struct {
		args []string
		says []string
	}{
		{nil, []string{"format", "clean-all", "templates", "--pool", "--node-id", "NODE_NAME", "CSI_ENDPOINT",
			"--loopback-pool-size", "--overcommit", "--headroom", "--max-volumes-per-node", "--kubelet-dir", "--http-endpoint", "--accel", "-v, --v"}},
		{[]string{"format"}, append([]string{"--size", "--label", "--option", "-o, --output", "raw", "Example"}, diskfs.Names()...)},
		{[]string{"clean-all"}, []string{"--pool", "lock"}},
	} {
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetArgs(append(c.args, "--help"))
		cmd.SetOut(&out)
		if err := cmd.Execute(); err != nil {
			t.Error(err)
		}
		for _, s := range c.says {
			if !strings.Contains(out.String(), s) {
				t.Errorf("the help of %v does not mention %s:\n%s", c.args, s, &out)
			}
		}
		for line := range strings.Lines(out.String()) {
			if len([]rune(line)) > 200 {
				t.Errorf("a long line: %s", line)
			}
		}
	}
}
