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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
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
	b.is(name, told+out)
}

// is compares a text with testdata/commands/NAME as [born.shows] does.
func (b *born) is(name, text string) {
	b.Helper()
	got, path := b.masked(text), filepath.Join("testdata", "commands", name)
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		b.Errorf("there is\n%s\nwant %s: %v\n%s", got, path, err, want)
	}
}

// variable are the parts of outputs that vary, and what stands for them.
var variable = []struct{ pattern, by string }{
	{`20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z`, "TIME"},
	{`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`, "UUID"},
	{`(-\d+m-)[0-9a-f]{16}`, "${1}KEY"},
	{`(sha256:)?[0-9a-f]{64}`, "DIGEST"},
	{`mke2fs \d.*|\b6\.\d+\.\d+-\S+`, "VERSION"},
	{`there  (.*)  \d+  (\d/\d|-)  TIME`, "there  $1  N  $2  TIME"},
	{`(Extents  |    in  )\d\S*`, "${1}N"},
	{`/dev/loop\d+`, "/dev/loopN"},
	{`("?(?:used|allocated|own|shared|takes|frees|available)Bytes"?: )\d+`, "${1}N"},
	{`("?(?:extents|pid|durationSeconds)"?: )[0-9.e-]+`, "${1}N"},
	{`\b\d+(\.\d+)?(Ki|Mi|Gi)\b|\b0 bytes\b`, "BYTES"},
	{`\b\d+m?\d*s\b`, "AGE"},
	{`in \d+\.\d ms`, "in N ms"},
	{` +\n`, "\n"},
}

func (b *born) masked(text string) string {
	text = strings.NewReplacer(b.Kubelet, "KUBELET", b.Pool, "POOL", b.dir, "FILES").Replace(text)
	text = regexp.MustCompile(`(\S)   +`).ReplaceAllString(text, "$1  ") // columns are as wide as what varies
	for _, v := range variable {
		text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.by)
	}
	return text
}

// TestCommands lists and describes everything, with a plugin and without.
func TestCommands(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			b := startBorn(t, kind, `contents:
- {name: files, tar: files.tar, namespaces: [shop, ci], size: 96Mi}
- {name: broken, tar: broken.tar, namespaces: ["*"]}
- {name: gone, tar: gone.tar, namespaces: [shop]}
`, "--warm-max", "0")
			b.write(filepath.Join(b.dir, "files.tar"), archiveOf(t, file{"name", "files", 0}))
			b.write(filepath.Join(b.dir, "broken.tar"), []byte(strings.Repeat("no archive", 1000)))
			for _, what := range []string{"volume", "template", "snapshot", "golden"} {
				if out, told := b.asked(0, what, "list"); out != "There are no "+what+"s.\n" || told != "" {
					t.Errorf("%s%s", out, told)
				}
			}
			inline, filled := b.mustPublish("inline", "ext4", "size", "64Mi"), b.mustPublish("filled", "ext4", "content", "files")
			claim := b.claim("origin", "")
			if _, err := b.publish("fails", "ext4", "content", "broken", "size", "128Mi"); err == nil {
				t.Error("an archive that is none was unpacked")
			}
			snap := b.snapshot(claim, "first")
			b.golden(0, "^Golden shop/cache@1 was made", "promote", "--snapshot", snap, "shop/cache")
			b.volumesAreListed()
			b.othersAreListed()
			b.namesAreCompleted()
			b.pluginAnswers()
			b.socketIsRoots()
			b.pluginIsGone()
			b.end(claim)
			b.mustUnpublish(inline)
			b.mustUnpublish(filled)
			b.deleteSnapshots(snap)
		})
	}
}

func (b *born) othersAreListed() {
	b.Helper()
	for _, what := range []string{"template", "snapshot", "content", "golden"} {
		b.shows(what+"-list", what, "list")
		for _, form := range []string{"wide", "json", "name"} {
			b.shows(what+"-list-"+form, what, "list", "-o", form)
		}
	}
	b.shows("snapshot-list-yaml", "snapshot", "list", "-o", "yaml")
	b.shows("golden-list-yaml", "golden", "list", "-o", "yaml")
	for name, of := range map[string][]string{
		"template": strings.Fields(first(b.asked(0, "template", "list", "-o", "name"))),
		"snapshot": {"first"}, "content": {"files", "broken", "gone"}, "golden": {"shop/cache"},
	} {
		b.shows(name+"-describe", append([]string{name, "describe"}, of...)...)
		b.shows(name+"-describe-json", append([]string{name, "describe", "-o", "json"}, of[0])...)
		out, told := b.asked(1, name, "describe", of[0]+"x")
		if !strings.Contains(told, "; did you mean "+of[0]) {
			b.Errorf("%s%s", out, told)
		}
	}
}

func first(out, _ string) string { return out }

// pluginAnswers compares what the plugin tells on its socket, and what no command prints as it is.
func (b *born) pluginAnswers() {
	b.Helper()
	client, err := admin.Dial(b.Context(), b.Pool)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	n := client.Node(b.Context())
	plugin, err := n.Plugin()
	requests, e := n.Requests()
	findings, e2 := n.Findings()
	if err := errors.Join(err, e, e2); err != nil {
		b.Fatal(err)
	}
	if plugin.PID != b.PID() || plugin.Pool.Size <= plugin.Pool.Available || len(plugin.Pool.Layers) != 2 {
		b.Errorf("%+v", plugin)
	}
	plugin.Pool, plugin.Version = admin.Pool{Path: plugin.Pool.Path}, "VERSION" // each kind of pool has others
	// The other findings are of the machine that the test runs on.
	findings = slices.DeleteFunc(findings, func(f health.Finding) bool { return f.Requirement != "contents" })
	for name, answer := range map[string]any{"plugin": plugin, "requests": requests, "findings": findings} {
		var text strings.Builder
		if err := printObject(&text, answer, "json"); err != nil {
			b.Fatal(err)
		}
		b.is(name+"-json", text.String())
	}
}

// namesAreCompleted has a shell complete arguments and flags.
func (b *born) namesAreCompleted() {
	b.Helper()
	for line, want := range map[string]string{
		"why":                       "shop/fails|shop/filled|shop/inline",
		"volume describe":           "filled|inline|origin|shop/filled|shop/inline",
		"volume describe inline":    "filled|origin|shop/filled|shop/inline",
		"snapshot describe":         "first",
		"content describe":          "broken|files|gone",
		"golden describe":           "shop/cache|shop/cache@1",
		"golden rm":                 "shop/cache|shop/cache@1",
		"golden promote --snapshot": "first",
		"template build --content":  "broken|files|gone",
		"template build --fs":       "btrfs|ext4|xfs|raw",
		"volume list -o":            "json|yaml|wide|name",
		"gc -o":                     "json|yaml|wide",
		"template build --accel":    "auto|kvm|tcg",
		"volume list --kubelet-dir": "",
		"--default-durability":      "synced|volatile",
		"volume describe --output":  "json|yaml|name",
	} {
		words := strings.Fields(line)
		flag := ""
		if last := words[len(words)-1]; strings.HasPrefix(last, "-") { // whose value is completed
			words, flag = words[:len(words)-1], last
		}
		words = append([]string{"__complete"}, append(words, "--pool", b.Pool)...)
		if flag != "" {
			words = append(words, flag)
		}
		out := testenv.Run(b.T, testenv.Binary(b.T), append(words, "")...)
		var got []string
		for line := range strings.Lines(out) {
			name, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
			if !strings.HasPrefix(name, ":") && !strings.HasPrefix(name, "Completion ended") {
				got = append(got, name)
			}
		}
		if strings.Join(got, "|") != want {
			b.Errorf("%s is completed by %q, want %s\n%s", line, got, want, out)
		}
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
		"there is no volume inlin on this node; did you mean inline?":                          {"describe", "inline", "inlin"},
		"volume other on this node; `csi-disktemplate volume list` shows those that are there": {"describe", "other"},
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
	for _, what := range []string{"template", "snapshot", "content", "golden"} {
		b.shows(what+"-list-alone", what, "list")
	}
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
func (b *born) again(flags ...string) {
	b.Helper()
	b.prewarmed = startPrewarmed(b.T, b.Node, nil, append([]string{"--warm-max", "0"}, flags...)...)
	if err := b.Serves(b.Context(), b.client); err != nil {
		b.Fatal(err)
	}
}
