// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
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

// TestWorstOf: what nobody knows to be good is not.
func TestWorstOf(t *testing.T) {
	good, degraded, broken := nodeFindings{State: health.StateGood}, nodeFindings{State: health.StateDegraded}, nodeFindings{State: health.StateBroken}
	for _, c := range []struct {
		want    int
		cluster health.State
		nodes   []nodeFindings
	}{
		{0, health.StateGood, []nodeFindings{good, good}},
		{1, health.StateGood, []nodeFindings{good, degraded, good}},
		{2, health.StateGood, []nodeFindings{broken, degraded}},
		{2, health.StateGood, []nodeFindings{good, {}, degraded}},
		{2, health.StateGood, []nodeFindings{{State: "well"}}},
		{1, health.StateDegraded, []nodeFindings{good}},
		{2, health.StateBroken, []nodeFindings{good, degraded}},
	} {
		code := 0
		if err := worstOf(clusterFindings{c.nodes, []health.Finding{{State: c.cluster}}}); err != nil {
			code, _ = exitCode(err)
		}
		if code != c.want {
			t.Errorf("%v: %d, want %d", c, code, c.want)
		}
	}
}

// TestAnswers: JSON that does not say how a node is does not say that it is well.
func TestAnswers(t *testing.T) {
	running := kubectl.Pod{}
	if err := json.Unmarshal([]byte(pluginState), &running); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		`{"state": "good", "findings": [{"state": "good", "requirement": "pool"}]}`: "good ",
		`{"state": "broken", "findings": [{"state": "good"}, {"state": "broken"}]}`: "broken ",
		`{}`:                `broken its answer cannot be read: csi-disktemplate doctor: its state is "", `,
		`[]`:                "broken its answer cannot be read: csi-disktemplate doctor: json: ",
		`{"state": "good"}`: "broken its answer cannot be read: csi-disktemplate doctor: it has no findings; ",
		`{"state": "fine", "findings": [{"state": "good"}]}`:   `broken its answer cannot be read: csi-disktemplate doctor: its state is "fine", `,
		`{"state": "good", "findings": [{"state": "fine"}]}`:   `broken its answer cannot be read: csi-disktemplate doctor: the state of a finding is "fine", `,
		`{"state": "good", "findings": [{"state": "broken"}]}`: "broken its answer cannot be read: csi-disktemplate doctor: its state is good, and the worst of its findings is broken; ",
	} {
		asKubectl(t, "cat <<'END'\n"+text+"\nEND\n")
		n := new(fleet).examined(t.Context(), running)
		got := string(n.State) + " " + n.Error
		if !strings.HasPrefix(got, want) || (n.Error == "") != strings.HasSuffix(want, " ") && !strings.Contains(got, "install the same version here") {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	asKubectl(t, `echo '{"error": "no", "node": "other"}'`)
	for name, into := range map[string]answer{"status": &statusAnswer{}, "why": &whyAnswer{}} {
		if err := new(fleet).ask(t.Context(), running, into, name); err == nil || !strings.HasPrefix(err.Error(), "its answer cannot be read: csi-disktemplate "+name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// pluginState is a pod in which the plugin runs.
const pluginState = `{"metadata": {"name": "plugin-1", "namespace": "csi", "ownerReferences": [{"kind": "DaemonSet", "uid": "u", "controller": true}]},
	"spec": {"nodeName": "node1"}, "status": {"containerStatuses": [{"name": "plugin", "state": {"running": {}}}]}}`

// asKubectl puts a script on PATH in kubectl's place.
func asKubectl(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "kubectl"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestSpread: nodes on which the plugin has no pod are not forgotten.
func TestSpread(t *testing.T) {
	pods := make([]kubectl.Pod, 4)
	for i := range pods {
		if err := json.Unmarshal([]byte(pluginState), &pods[i]); err != nil {
			t.Fatal(err)
		}
	}
	pods[2].Spec.NodeName, pods[3].Spec.NodeName, pods[3].Meta.Name = "node2", "", "plugin-4" // and two are on node1
	const set = `{"items": [{"metadata": {"name": "plugin", "namespace": "csi", "uid": %q}, "status": {"desiredNumberScheduled": %d}}]}`
	for script, want := range map[string]string{
		"echo '" + fmt.Sprintf(set, "u", 3) + "'": "good the plugin has a pod for each node that it is to be on (3)",
		"echo '" + fmt.Sprintf(set, "u", 4) + "'": "broken the plugin has pods for only 3 of 4 nodes that it is to be on",
		"echo '" + fmt.Sprintf(set, "v", 3) + "'": "broken the plugin has pods for only 0 of 3 nodes that it is to be on",
		`echo '{"items": []}'`:                    "degraded whether the plugin has a pod for each node that it is to be on is not known: no DaemonSet of the namespace csi has the labels ",
		`echo 'Error from server (Forbidden): x is forbidden: User "dev" cannot list resource "daemonsets" in API group "apps" in the namespace "csi"' >&2; exit 1`: "degraded " +
			"whether the plugin has a pod for each node that it is to be on is not known: you may not list daemonsets.apps in the namespace csi: ask for a Role",
	} {
		asKubectl(t, script)
		found := new(fleet).spread(t.Context(), pods)
		if len(found) != 1 || !strings.HasPrefix(string(found[0].State)+" "+found[0].Text, want) {
			t.Errorf("%s: %+v, want %s", script, found, want)
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
	const line = "MIIEpAIBAAKCAQEA0Z3VS5JJcds3xfn/ygWyF8PbnGy0AHB7"
	for text, want := range map[string]string{
		// By the form of the secret.
		"cookie " + token + " end":                                                "cookie [removed] end",
		"git clone with ghp_abcdefghijklmnop":                                     "git clone with [removed]",
		"sent Bearer abcdefghijkl== to it":                                        "sent Bearer [removed] to it",
		"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nx": "[removed]\nx",
		"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n" + line + "\n" + line + "\n+A==\n-----END RSA PRIVATE KEY-----":  "[removed]",
		"2026-11-27T01:02:03.4Z -----BEGIN PRIVATE KEY-----\n2026-11-27T01:02:03.5Z " + line + "\n2026-11-27T01:02:03.6Z I1127 stays": "2026-11-27T01:02:03.4Z [removed]\n2026-11-27T01:02:03.6Z I1127 stays",
		`"text"="-----BEGIN EC PRIVATE KEY-----\n` + line + `\nAb==\n-----END EC PRIVATE KEY-----\n" next=1`:                          `"text"="[removed]\n" next=1`,
		`[{"text": "-----BEGIN RSA PRIVATE KEY-----"}, {"text": "stays"}]`:                                                            `[{"text": "[removed]"}, {"text": "stays"}]`,
		`err="-----BEGIN RSA PRIVATE KEY-----" code=1` + "\nI1127 all the rest\n":                                                     `err="[removed]" code=1` + "\nI1127 all the rest\n",
		"-----BEGIN RSA PRIVATE KEY-----\nI1127 02:00:00.1 main.go:3] \"stays\"\n-----END RSA PRIVATE KEY-----\n":                     "[removed]\nI1127 02:00:00.1 main.go:3] \"stays\"\n-----END RSA PRIVATE KEY-----\n",
		// In URLs.
		"pulling https://user:pa55@registry.ci/x: 401":                       "pulling https://[removed]@registry.ci/x: 401",
		"http://token@proxy http://user:p/ss@proxy":                          "http://[removed]@proxy http://[removed]@proxy",
		`proxy="http://user:p@ss@proxy:3128" next`:                           `proxy="http://[removed]@proxy:3128" next`,
		"GET https://s3/x?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0a1b ok": "GET https://s3/x?X-Amz-Credential=[removed] ok",
		"GET https://s3/x?X-Amz-Signature=0a1b ok":                           "GET https://s3/x?X-Amz-Signature=[removed] ok",
		"GET https://blob/x?sv=1&sig=a%2Bb%3D ok":                            "GET https://blob/x?sv=1&sig=[removed] ok",
		"https://me:a@sha256:b@registry.ci/a/b@sha256:00":                    "https://[removed]@registry.ci/a/b@sha256:00",
		// By names.
		"Authorization: Bearer abcdefghijkl==":                                                  "Authorization: [removed]",
		`> "Authorization: token abc def" more`:                                                 `> "Authorization: [removed]" more`,
		"map[Accept:[*/*] Authorization:[Digest a b] X:[1]]":                                    "map[Accept:[*/*] Authorization:[removed]",
		"dbPassword: x\nclientSecret: x y\nok: x":                                               "dbPassword: [removed]\nclientSecret: [removed]\nok: x",
		"DB_PASS:  x\nREGISTRY_PWD:\tx\nAWS_SECRET_KEY: x\nPASSWORD_1: x\nMY_KEY: x\nurlSig: x": "DB_PASS:  [removed]\nREGISTRY_PWD:\t[removed]\nAWS_SECRET_KEY: [removed]\nPASSWORD_1: [removed]\nMY_KEY: [removed]\nurlSig: [removed]",
		"DB_PASSWORD:  hunter2\n  --api-key=x1 AWS_SECRET_ACCESS_KEY=abc/d":                     "DB_PASSWORD:  [removed]\n  --api-key=[removed] AWS_SECRET_ACCESS_KEY=[removed]",
		"2026-11-27T01:02:03Z   password: correct horse battery\nx":                             "2026-11-27T01:02:03Z   password: [removed]\nx",
		"run --password … --password hunter2 --verbose --token --user x":                        "run --password [removed] --password [removed] --verbose --token --user x",
		`args=["--password", "hunter 2", "--x"]`:                                                `args=["--password", "[removed]", "--x"]`,
		`password="correct horse" and pwd='correct horse'`:                                      `password="[removed]" and pwd='[removed]'`,
		`got {"password":"correct horse battery","user":"x"} from it`:                           `got {"password":"[removed]","user":"x"} from it`,
		`err="login with password=\"a \\\" b\" failed" next="x"`:                                `err="login with password=\"[removed]\" failed" next="x"`,
		`err="sent {\"password\":\"a b\"}" next="token" x="y"`:                                  `err="sent {\"password\":\"[removed]\"}" next="token" x="y"`,
		`err="token=\"a b" next="x"`:                                                            `err="token=\"[removed]" next="x"`,
		"token=\"a b\nI1127 \"stays\"":                                                          "token=\"[removed]\nI1127 \"stays\"",
		"tokens: [a b] secrets=[\"a\", \"b\"] end":                                              "tokens: [removed]",
		"got secrets=[\"a\", \"b\"] end":                                                        "got secrets=[removed] end",
		"password=":                                                                             "password=",
		// In JSON.
		`{"auth": "dXNlcjpwYXNz", "source": "registry.ci/x:1"}`:                                 `{"auth": "[removed]", "source": "registry.ci/x:1"}`,
		`{"accessToken":"a","refreshToken":"a b","password":"correct horse battery"}`:           `{"accessToken":"[removed]","refreshToken":"[removed]","password":"[removed]"}`,
		`{"text": "login with token=\"abc\" failed"}`:                                           `{"text": "login with token=\"[removed]\" failed"}`,
		`{"text": "password=", "other": "a\"b"}`:                                                `{"text": "password=", "other": "a\"b"}`,
		`{"pin": -1.5e+3, "token": -1.5e+3, "passwords": ["a", {"x": "b"}, 1], "secret": null}`: `{"pin": -1.5e+3, "token": "[removed]", "passwords": ["[removed]", {"x": "b"}, 1], "secret": null}`,
		`{"args": ["--password", "hunter2", "--token", "-v", "x=1"]}`:                           `{"args": ["--password", "[removed]", "--token", "-v", "x=1"]}`,
		`{"nested": "{\"password\": \"a b\"}"}`:                                                 `{"nested": "{\"password\": \"[removed]\"}"}`,
		`{"url": "http://u:p@ss@proxy/\u0026x"}`:                                                `{"url": "http://[removed]@proxy/\u0026x"}`,
		// What stays.
		"TokenExpirationSeconds:  3607, SecretName: registry, image: ghcr.io/a/b:v1@sha256:00":                       "",
		"--content-credentials=/etc/x --driver-name=csi.disktemplate.io --pool=/var/lib/x --loopback-pool-size=20Gi": "",
		"DB_PASS:  <set to the key 'password' in secret 'db'>  Optional: false":                                      "",
		`{"key": "ext4-64m-a0343d7f55067e4d", "uid": "2f1c", "sizeBytes": 67108864, "passed": true}`:                 "",
		"docker-pullable://ghcr.io/a/b@sha256:00 unix:///csi/csi.sock https://10.0.0.1:443/api?a=b":                  "",
		`I1127 "Read the list" token="" design=1 assigned="x" signal: 9 keys: 3 monkey=2`:                            `I1127 "Read the list" token="[removed]" design=1 assigned="x" signal: 9 keys: 3 monkey=2`,
		"the token is old; ask for a secret: ":                                                                       "",
		"secret reference: csi.storage.k8s.io/provisioner-secret-name: db, --password-file=/run/p":                   "",
		"authority=\"localhost\" key=ext4-64m templateKey: ext4-64m":                                                 "",
	} {
		if want == "" {
			want = text
		}
		got := string(scrubbed([]byte(text)))
		if got != want {
			t.Errorf("%s\nbecomes %s\nwant    %s", text, got, want)
		}
		if json.Valid([]byte(text)) && !json.Valid([]byte(got)) {
			t.Errorf("%s is no JSON", got)
		}
		if again := string(scrubbed([]byte(got))); again != got {
			t.Errorf("%s\nbecomes %s the second time", got, again)
		}
	}
}

// BenchmarkScrubbed: the time grows with the length of a text only, whatever is in it.
func BenchmarkScrubbed(b *testing.B) {
	for _, piece := range []string{"pass", "password=[", `"token":"`, `\"token\":\`, "://a@sha256:", "-----BEGIN PRIVATE KEY-----\nAAAA\n", "password: ", "--token ", "'secret':'"} {
		for _, size := range []int{64 << 10, 256 << 10} {
			text := []byte(strings.Repeat(piece, size/len(piece)))
			b.Run(fmt.Sprintf("%.10q/%d", piece, size), func(b *testing.B) {
				b.SetBytes(int64(len(text)))
				for b.Loop() {
					scrubbed(text)
				}
			})
		}
	}
}

// TestDescribed: of the environment, only what the manifests set keeps its value.
func TestDescribed(t *testing.T) {
	got := string(scrubbed(described([]byte(`Containers:
  plugin:
    Command:
      sidecar
    Args:
      --node-id=$(NODE_NAME)
      --registry-password
      hunter2
      --skip-token
    State:  Running
    Environment Variables from:
      settings  ConfigMap  Optional: false
    Environment:
      NODE_NAME:    (v1:spec.nodeName)
      OTHER_NAME:  x (v1:metadata.name)
      KUBELET_DIR:  /var/lib/kubelet
      HTTP_PROXY:   http://proxy
      DATABASE:     one

                    hunter2: x
      FROM_SECRET:  <set to the key 'a' in secret 'b'>  Optional: false
      EMPTY:        
    Mounts:
      /csi from socket (rw)
  other:
    Environment:  <none>
    Mounts:       <none>
Volumes:
  socket:
    Type:  HostPath (bare host directory volume)
`))))
	want := `Containers:
  plugin:
    Command:
      sidecar
    Args:
      --node-id=$(NODE_NAME)
      --registry-password
      [removed]
      --skip-token
    State:  Running
    Environment Variables from:
      settings  ConfigMap  Optional: false
    Environment:
      NODE_NAME:    (v1:spec.nodeName)
      OTHER_NAME:  x (v1:metadata.name)
      KUBELET_DIR:  /var/lib/kubelet
      HTTP_PROXY:  [removed]
      DATABASE:  [removed]
      FROM_SECRET:  <set to the key 'a' in secret 'b'>  Optional: false
      EMPTY:        
    Mounts:
      /csi from socket (rw)
  other:
    Environment:  <none>
    Mounts:       <none>
Volumes:
  socket:
    Type:  HostPath (bare host directory volume)
`
	if got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// TestBundle: each part is written as soon as it is there and dropped, the parts of a node come one after the other, and a
// node that does not answer is not asked again.
func TestBundle(t *testing.T) {
	var b bundle
	var got atomic.Int64
	most := 0 // in memory at a time
	const parts = 20
	var jobs []inTurn
	for range 40 {
		var all inTurn
		var running atomic.Int64
		for i := range parts {
			all = append(all, part{fmt.Sprintf("nodes/%d", i), func(context.Context) ([]byte, error) {
				if running.Add(1) != 1 {
					t.Error("two parts of a node are got at the same time")
				}
				time.Sleep(time.Millisecond)
				running.Add(-1)
				n := int(got.Add(1))
				b.mu.Lock()
				defer b.mu.Unlock()
				most = max(most, n-len(b.files))
				return []byte("password: hunter2\n"), nil
			}})
		}
		jobs = append(jobs, all)
	}
	asked := 0
	silent := func(context.Context) ([]byte, error) {
		asked++
		return nil, fmt.Errorf("%w within 30s", kubectl.ErrNoAnswer)
	}
	jobs = append(jobs, inTurn{{"nodes/x/1", silent}, {"nodes/x/2", silent}, {"nodes/x/3", silent}},
		inTurn{{"logs/a.log", func(context.Context) ([]byte, error) { return make([]byte, mostLog), nil }}})
	if err := b.write(t.Context(), io.Discard, "x", jobs); err != nil {
		t.Fatal(err)
	}
	if most == 0 || most > mostAtOnce {
		t.Errorf("%d parts were in memory", most)
	}
	if asked != 1 || len(b.failed) != 4 || !strings.Contains(b.errors(), "nodes/x/3: not asked for, after no answer within 30s for nodes/x/1\n") ||
		!strings.Contains(b.errors(), "logs/a.log: its end: it is cut after 16 MiB\n") {
		t.Errorf("asked %d times: %s", asked, b.errors())
	}
	if len(b.files) != 40*parts+3 || !strings.Contains(b.readme(), fmt.Sprintf("nodes/         %d", 40*parts)) {
		t.Errorf("%d files: %s", len(b.files), b.readme())
	}
}

// TestBundleUnwritten: what cannot be written ends the bundle.
func TestBundleUnwritten(t *testing.T) {
	failing := errors.New("no space")
	var asked atomic.Int64
	big := make([]byte, 256<<10) // more than gzip keeps
	_, _ = rand.Read(big)        // it never fails
	get := func(context.Context) ([]byte, error) { asked.Add(1); return big, nil }
	var jobs []inTurn
	for range 10 * mostAtOnce {
		jobs = append(jobs, inTurn{{"a", get}, {"b", get}})
	}
	if err := new(bundle).write(t.Context(), failingWriter{failing}, "x", jobs); !errors.Is(err, failing) {
		t.Error(err)
	}
	if n := asked.Load(); n > 3*mostAtOnce {
		t.Errorf("%d parts were asked for, though the first could not be written", n)
	}
}

type failingWriter struct{ error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.error }

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

// TestHostileTextsOfCluster: no value of the cluster makes a line of its own on a terminal, or is obeyed by it.
func TestHostileTextsOfCluster(t *testing.T) {
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
			return printNodes(w, clusterStatus{Nodes: []nodeStatus{{Node: hostile, Pod: hostile, Error: hostile}}}, "")
		}},
		"worst": {2, func(w io.Writer) error {
			s := admin.Status{Plugin: admin.Plugin{Version: hostile}, Findings: []health.Finding{{State: health.StateBroken, Code: hostile, Text: hostile}}}
			return printNodes(w, clusterStatus{Nodes: []nodeStatus{{Node: "n", Status: &s}}}, "")
		}},
		"doctor": {2, func(w io.Writer) error {
			return printDoctor(w, clusterFindings{Nodes: []nodeFindings{{Node: hostile, Pod: hostile, State: hostile, Error: hostile}}}, "")
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
