// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

// TestCommandNamed: the binary's name decides which command it is.
func TestCommandNamed(t *testing.T) {
	for argv0, want := range map[string]string{
		"/usr/local/bin/kubectl-disktemplate": "kubectl disktemplate", "csi-disktemplate": "csi-disktemplate", "/init": "csi-disktemplate",
	} {
		if got := commandNamed(argv0).DisplayName(); got != want {
			t.Errorf("%s is %s, want %s", argv0, got, want)
		}
	}
}

// TestKubectlFlags checks which flags are kubectl's, and are passed on.
func TestKubectlFlags(t *testing.T) {
	var f fleet
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.add(flags)
	if err := flags.Parse([]string{"--context=a b", "--kubeconfig", "k", "--request-timeout=5s", "--as=eve", "--plugin-namespace=storage"}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(f.client().Flags, f.inNamespace()); got != "[--as=eve --context=a b --kubeconfig=k --request-timeout=5s] [-n storage]" {
		t.Error(got)
	}
	if got := fmt.Sprint(new(fleet).client().Flags, new(fleet).inNamespace()); got != "[] [-A]" {
		t.Error(got)
	}
}

func TestWorst(t *testing.T) {
	findings := []health.Finding{
		{Code: "ContentFailed", State: health.StateDegraded, Text: "no\nsource"}, {Code: "PoolFull", State: health.StateDegraded},
		{Requirement: "plugin", State: health.StateBroken, Text: "it hangs"},
	}
	for n, want := range []string{
		"-", "degraded ContentFailed: no; source", "degraded ContentFailed (and 1 more): no; source", "broken plugin (and 2 more): it hangs",
	} {
		if got := worst(findings[:n]); got != want {
			t.Errorf("%d findings: %s, want %s", n, got, want)
		}
	}
}

func TestWorstOf(t *testing.T) {
	good, degraded, broken := nodeFindings{State: health.StateGood}, nodeFindings{State: health.StateDegraded}, nodeFindings{State: health.StateBroken}
	for want, nodes := range [][]nodeFindings{{good, good}, {good, degraded, good}, {broken, degraded}} {
		code := 0
		if err := worstOf(nodes); err != nil {
			code, _ = exitCode(err)
		}
		if code != want {
			t.Errorf("%v: %d, want %d", nodes, code, want)
		}
	}
}

// TestQuestions checks which node is asked what.
func TestQuestions(t *testing.T) {
	made, asked, unasked := claimWhy{Volume: "id-1"}, claimWhy{Volume: "pvc-2", Node: "n2", Phase: "Pending"}, claimWhy{Volume: "pvc-3", Phase: "Pending"}
	for want, w := range map[string]podWhy{
		"[]":                              {Pod: "a/b", Node: "n1"},
		"[{n1 a/b}]":                      {Pod: "a/b", Node: "n1", Inline: []string{"data"}},
		"[{n1 a/b} {n1 id-1}]":            {Pod: "a/b", Node: "n1", Claims: []claimWhy{made, {Name: "c", Phase: "missing"}}},
		"[{n2 pvc-2}]":                    {Pod: "a/b", Claims: []claimWhy{asked, unasked}},
		"[{n1 a/b} {n1 id-1} {n1 pvc-3}]": {Pod: "a/b", Node: "n1", Claims: []claimWhy{made, unasked}},
	} {
		if got := fmt.Sprint(w.questions()); got != want {
			t.Errorf("%+v: %s, want %s", w, got, want)
		}
	}
}

// TestMerged: what one answer knows, another suspects.
func TestMerged(t *testing.T) {
	wait := func(volume string) admin.Wait { return admin.Wait{Volume: volume} }
	a := admin.Why{Asked: "a/b", Waits: []admin.Wait{wait("1")}, Others: []admin.Wait{wait("2"), wait("3")}, Volumes: []admin.Volume{{ID: "4"}}}
	b := admin.Why{Waits: []admin.Wait{wait("2"), wait("1")}, Others: []admin.Wait{wait("3")}, Volumes: []admin.Volume{{ID: "4"}, {ID: "5"}}}
	m := merged(a, b)
	if len(m.Waits) != 2 || m.Waits[1].Volume != "2" || len(m.Others) != 1 || m.Others[0].Volume != "3" || len(m.Volumes) != 2 || m.Asked != "a/b" {
		t.Errorf("%+v", m)
	}
}

// TestScrubbed checks what a bundle does not have, and what it keeps.
func TestScrubbed(t *testing.T) {
	const token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0abc.c2lnbmF0dXJl"
	for text, want := range map[string]string{
		"Authorization: Bearer abcdefghijkl==":                                                 "Authorization: Bearer [removed]",
		"cookie " + token + " end":                                                             "cookie [removed] end",
		"pulling https://user:pa55@registry.ci/x: 401":                                         "pulling https://[removed]@registry.ci/x: 401",
		`{"auth": "dXNlcjpwYXNz", "source": "registry.ci/x:1"}`:                                `{"auth": "[removed]", "source": "registry.ci/x:1"}`,
		`{"text": "login with token=\"abc\" failed"}`:                                          `{"text": "login with token=\"[removed]\" failed"}`,
		"DB_PASSWORD:  hunter2\n  --api-key=x1 AWS_SECRET_ACCESS_KEY=abc/d":                    "DB_PASSWORD:  [removed]\n  --api-key=[removed] AWS_SECRET_ACCESS_KEY=[removed]",
		"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nx":              "[removed]\nx",
		"TokenExpirationSeconds:  3607, SecretName: registry, image: ghcr.io/a/b:v1@sha256:00": "TokenExpirationSeconds:  3607, SecretName: registry, image: ghcr.io/a/b:v1@sha256:00",
	} {
		got := string(scrubbed([]byte(text)))
		if got != want {
			t.Errorf("%s\nbecomes %s\nwant    %s", text, got, want)
		}
		if json.Valid([]byte(text)) && !json.Valid([]byte(got)) {
			t.Errorf("%s is no JSON", got)
		}
	}
}

// TestWriteWhole: a file is there when it is whole, or not at all, and none is replaced.
func TestWriteWhole(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "a")
	hello := func(w io.Writer) error { _, err := io.WriteString(w, "hello"); return err }
	failing := errors.New("no")
	if err := writeWhole(name, func(io.Writer) error { return failing }); !errors.Is(err, failing) {
		t.Error(err)
	}
	if err := writeWhole(name, hello); err != nil {
		t.Error(err)
	}
	if err := writeWhole(name, hello); !errors.Is(err, os.ErrExist) {
		t.Errorf("a file was replaced: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 || err != nil {
		t.Errorf("%v %v", left, err)
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o600 || fi.Size() != 5 {
		t.Errorf("%v %v", fi, err)
	}
}

// TestHostileTexts: no value of the cluster makes a line of its own on a terminal, or is obeyed by it.
func TestHostileTexts(t *testing.T) {
	const hostile = "x\x1b]0;OWNED\a\nshop/web-0 is fine\t\r\u202e\u009b"
	why := podWhy{Pod: "shop/" + hostile, Node: hostile, Warnings: []string{hostile, hostile}, Inline: []string{"data"}, Claims: []claimWhy{
		{Name: hostile, Phase: "Pending", Class: hostile, Volume: "v", Node: hostile, Warnings: []string{hostile}, Note: hostile}},
		Nodes: []nodeWhy{{Node: "node1"}}}
	pending := podWhy{Pod: "shop/web-0", Scheduler: hostile, Claims: why.Claims}
	printed := func(print func(io.Writer) error) string {
		var b strings.Builder
		if err := print(&b); err != nil {
			t.Error(err)
		}
		return b.String()
	}
	for name, c := range map[string]struct {
		lines int
		print func(io.Writer) error
	}{
		"why":     {10, func(w io.Writer) error { return why.print(w, "") }},
		"pending": {6, func(w io.Writer) error { return pending.print(w, "") }},
		"status": {2, func(w io.Writer) error {
			return printNodes(w, []nodeStatus{{Node: hostile, Pod: hostile, Error: hostile}}, "")
		}},
		"worst": {2, func(w io.Writer) error {
			s := admin.Status{Plugin: admin.Plugin{Version: hostile}, Findings: []health.Finding{{State: health.StateBroken, Code: hostile, Text: hostile}}}
			return printNodes(w, []nodeStatus{{Node: "n", Status: &s}}, "")
		}},
		"doctor": {2, func(w io.Writer) error {
			return printDoctor(w, []nodeFindings{{Node: hostile, Pod: hostile, State: hostile, Error: hostile}}, "")
		}},
		"error": {1, func(w io.Writer) error {
			err := inOneLine(func(*cobra.Command, []string) error { return &exit{3, errors.New(hostile)} })(nil, nil)
			if code, print := exitCode(err); code != 3 || !print {
				t.Errorf("the exit code is %d, %v", code, print)
			}
			_, printErr := fmt.Fprintln(w, err)
			return printErr
		}},
	} {
		got := printed(c.print)
		if n := strings.Count(got, "\n"); n != c.lines || !strings.Contains(got, `x\x1b]0;OWNED\a\nshop/web-0 is fine`) {
			t.Errorf("%s: %d lines, want %d:\n%q", name, n, c.lines, got)
		}
		for line := range strings.Lines(got) {
			if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%s: a terminal obeys %q", name, line)
			}
		}
	}
}

// labelled is a pod with the plugin's labels.
func labelled(t *testing.T, namespace, owner string, controller, privileged bool) (p kubectl.Pod) {
	t.Helper()
	text := fmt.Sprintf(`{"metadata": {"name": "a", "namespace": %q, "ownerReferences": [{"kind": %q, "uid": "u", "controller": %t}]},
		"spec": {"containers": [{"name": "plugin", "securityContext": {"privileged": %t}}, {"name": "x"}]}}`, namespace, owner, controller, privileged)
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestOfPlugin: labels do not make a pod the plugin's.
func TestOfPlugin(t *testing.T) {
	ours := labelled(t, "csi", "DaemonSet", true, true)
	others := []kubectl.Pod{
		labelled(t, "shop", "DaemonSet", true, false), labelled(t, "shop", "ReplicaSet", true, true), labelled(t, "shop", "DaemonSet", false, true),
	}
	if pods, err := ofPlugin(append(others, ours, ours)); len(pods) != 2 || err != nil || pods[0].Meta.Namespace != "csi" {
		t.Errorf("%v %v", pods, err)
	}
	if pods, err := ofPlugin(others); err == nil || !strings.Contains(err.Error(), "the plugin is not installed in this cluster") {
		t.Errorf("%v %v", pods, err)
	}
	pods, err := ofPlugin([]kubectl.Pod{ours, labelled(t, "shop", "DaemonSet", true, true), ours})
	if err == nil || len(pods) != 0 || !strings.Contains(err.Error(), "in several namespaces: csi, shop; ") || !strings.Contains(err.Error(), "--plugin-namespace") {
		t.Errorf("%v %v", pods, err)
	}
}

// TestOn names the nodes that may be meant.
func TestOn(t *testing.T) {
	var p kubectl.Pod
	p.Spec.NodeName = "node1"
	if there, err := on([]kubectl.Pod{p}, "node1"); len(there) != 1 || err != nil {
		t.Error(err)
	}
	if _, err := on([]kubectl.Pod{p}, "node2"); err == nil || !strings.Contains(err.Error(), "did you mean node1?") {
		t.Error(err)
	}
}
