// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
)

// asked runs a command on the plugin's pool, and returns what it prints on each output.
func (b *born) asked(wantCode int, args ...string) (out, told string) {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), testenv.Binary(b.T), append(args, "--pool", b.Pool)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		b.Errorf("%v: exit code %d: %v: %s%s", args, code, err, &stdout, &stderr)
	}
	return stdout.String(), stderr.String()
}

// shows compares what a command prints, as a whole, with testdata/commands/NAME, where what varies is replaced. With
// UPDATE=1 in the environment it writes that file.
func (b *born) shows(name string, args ...string) {
	b.Helper()
	out, told := b.asked(0, args...)
	got, path := b.masked(told+out), filepath.Join("testdata", "commands", name)
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		b.Errorf("%v prints\n%s\nwant %s: %v\n%s", args, got, path, err, want)
	}
}

// variable are the parts of outputs that vary, and what stands for them.
var variable = []struct{ pattern, by string }{
	{`20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z`, "TIME"},
	{`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`, "UUID"},
	{`(-\d+m-)[0-9a-f]{16}`, "${1}KEY"},
	{`sha256:[0-9a-f]{64}`, "DIGEST"},
	{`/dev/loop\d+`, "/dev/loopN"},
	{`("?(?:used|allocated|own|shared|takes|frees|available)Bytes"?: )\d+`, "${1}N"},
	{`("?(?:extents|pid|durationSeconds)"?: )[0-9.e-]+`, "${1}N"},
	{`\b\d+(\.\d+)?(Ki|Mi|Gi)\b`, "BYTES"},
	{`\b\d+m?\d*s\b`, "AGE"},
	{`in \d+\.\d ms`, "in N ms"},
	{`(\S)   +`, "$1  "},
	{` +\n`, "\n"},
}

func (b *born) masked(text string) string {
	text = strings.ReplaceAll(strings.ReplaceAll(text, b.Kubelet, "KUBELET"), b.Pool, "POOL")
	for _, v := range variable {
		text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.by)
	}
	return text
}

// TestVolumeCommands lists and describes volumes, with a plugin and without.
func TestVolumeCommands(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			b := startBorn(t, kind, "contents: []\n", "--warm-max", "0")
			if out, told := b.asked(0, "volume", "list"); out != "There are no volumes.\n" || told != "" {
				t.Errorf("%s%s", out, told)
			}
			inline, claim := b.mustPublish("inline", "ext4", "size", "64Mi"), b.claim("origin", "")
			b.volumesAreListed()
			b.socketIsRoots()
			b.pluginIsGone()
			b.end(claim)
			b.mustUnpublish(inline)
		})
	}
}

func (b *born) volumesAreListed() {
	b.Helper()
	b.shows("volume-list", "volume", "list")
	b.shows("volume-list-wide", "volume", "list", "-o", "wide")
	b.shows("volume-list-json", "volume", "list", "-o", "json")
	b.shows("volume-list-yaml", "volume", "list", "-o", "yaml")
	b.shows("volume-list-name", "volume", "list", "-o", "name")
	b.shows("volume-describe", "volume", "describe", "shop/inline", "origin")
	b.shows("volume-describe-json", "volume", "describe", "inline", "-o", "json")
	for says, args := range map[string][]string{
		"there is no volume inlin on this node; did you mean inline?":                                      {"describe", "inline", "inlin"},
		"there is no volume other on this node; `csi-disktemplate volume list` shows those that are there": {"describe", "other"},
		"name at least one volume": {"describe"},
		`--output "xml": must be one of json, yaml, wide, name, or not given`: {"list", "-o", "xml"},
	} {
		if out, told := b.asked(1, append([]string{"volume"}, args...)...); out != "" || !strings.Contains(told, says) {
			b.Errorf("%v: %s%s, want %s", args, out, told, says)
		}
	}
}

// socketIsRoots looks at the socket's mode.
func (b *born) socketIsRoots() {
	b.Helper()
	if fi, err := os.Lstat(b.socket()); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		b.Errorf("%v: %v", fi, err)
	}
}

func (b *born) socket() string { return filepath.Join(b.Pool, admin.SocketName) }

// pluginIsGone kills the plugin, whose socket stays, starts it again, and stops it, which removes the socket.
func (b *born) pluginIsGone() {
	b.Helper()
	b.Kill()
	b.socketIsRoots()
	b.shows("volume-list-alone", "volume", "list")
	b.shows("volume-describe-alone", "volume", "describe", "inline")
	b.again()
	b.shows("volume-list", "volume", "list")
	if err := b.Stop(time.Minute); err != nil {
		b.Error(err)
	}
	if _, err := os.Lstat(b.socket()); !errors.Is(err, os.ErrNotExist) {
		b.Errorf("the socket is left: %v", err)
	}
	b.shows("volume-list-alone", "volume", "list")
	b.again()
}

// again starts another plugin on the same node.
func (b *born) again() {
	b.Helper()
	b.prewarmed = startPrewarmed(b.T, b.Node, nil, "--warm-max", "0")
	if err := b.Serves(b.Context(), b.client); err != nil {
		b.Fatal(err)
	}
}
