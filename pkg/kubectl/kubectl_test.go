// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package kubectl

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFailure reads what kubectl 1.37 writes when it fails.
func TestFailure(t *testing.T) {
	const logged = `E1127 08:32:12.081025    9652 memcache.go:381] "Couldn't get current server API group list" err="no"`
	for stderr, want := range map[string]struct {
		is   error
		code int
		text string
	}{
		`Error from server (NotFound): pods "web-0" not found`:                {ErrNotFound, 0, `kubectl: pods "web-0" not found`},
		"csi-disktemplate: no plugin\ncommand terminated with exit code 1":    {nil, 1, "csi-disktemplate: no plugin"},
		logged + "\n" + logged + "\nThe connection to the server was refused": {nil, 0, "kubectl: The connection to the server was refused"},
		logged:                                {nil, 0, "kubectl: " + logged},
		"command terminated with exit code 2": {nil, 2, ""},
		"error: unable to upgrade connection:\n\n container not found (\"x\")": {nil, 0, `kubectl: unable to upgrade connection:; container not found ("x")`},
		`Error from server (Forbidden): pods is forbidden: User "dev" cannot list resource "pods" in API group "" at the cluster scope`: {ErrForbidden, 0,
			"you may not list pods in the whole cluster: ask for a ClusterRole with that verb on that resource; `kubectl auth can-i list pods -A` says when you have it"},
		`Error from server (Forbidden): pods "p" is forbidden: User "dev" cannot create resource "pods/exec" in API group "" in the namespace "csi"`: {ErrForbidden, 0,
			"you may not create pods/exec in the namespace csi: ask for a Role with that verb on that resource; `kubectl auth can-i create pods/exec -n csi` says when you have it"},
		`Error from server (Forbidden): storageclasses.storage.k8s.io "a" is forbidden: User "dev" cannot get resource "storageclasses" in API group "storage.k8s.io" at the cluster scope`: {ErrForbidden, 0,
			"you may not get storageclasses.storage.k8s.io in the whole cluster: ask for a ClusterRole with that verb on that resource; `kubectl auth can-i get storageclasses.storage.k8s.io -A` says when you have it"},
	} {
		f := failure([]byte("out"), stderr)
		if !errors.Is(f, want.is) && want.is != nil || f.is != want.is || f.Code != want.code || f.Error() != want.text || string(f.Output) != "out" {
			t.Errorf("%q: %+v: %v", stderr, f, f)
		}
	}
}

// standIn puts a script on PATH in kubectl's place.
func standIn(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "kubectl"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestRun checks the arguments that kubectl gets, and each way in which it can end.
func TestRun(t *testing.T) {
	standIn(t, `printf '[%s]' "$@"`)
	c := Client{Flags: []string{"--context=a b"}, Timeout: time.Minute}
	var p Pod
	p.Meta.Name, p.Meta.Namespace = "plugin-1", "csi"
	out, err := c.Exec(t.Context(), p, "plugin", "why", "$(id) --pool=x")
	if want := "[exec][-n][csi][pod/plugin-1][-c][plugin][--context=a b][--][why][$(id) --pool=x]"; string(out) != want || err != nil {
		t.Errorf("%s: %v", out, err)
	}
	if err := c.Get(t.Context(), &p, "pod/x"); err == nil || !strings.HasPrefix(err.Error(), "kubectl get pod/x printed no JSON") {
		t.Error(err)
	}
	standIn(t, `echo '{"metadata": {"name": "x"}}'`)
	if err := c.Get(t.Context(), &p, "pod/x"); err != nil || p.Meta.Name != "x" {
		t.Error(err)
	}
	standIn(t, `echo half; echo told >&2; echo command terminated with exit code 2 >&2; exit 2`)
	_, err = c.Run(t.Context())
	if f := (*Failed)(nil); !errors.As(err, &f) || f.Code != 2 || string(f.Output) != "half\n" || f.Text != "told" {
		t.Errorf("%+v", err)
	}
	standIn(t, `exit 3`)
	if _, err = c.Run(t.Context()); err == nil || err.Error() != "kubectl: exit status 3" {
		t.Error(err)
	}
	standIn(t, `sleep 60`)
	c.Timeout = 50 * time.Millisecond
	if _, err := c.Run(t.Context()); !errors.Is(err, ErrNoAnswer) || err.Error() != "no answer within 50ms" {
		t.Error(err)
	}
	c.Timeout = time.Minute
	for _, endless := range []string{`yes`, `yes >&2`} {
		standIn(t, `exec `+endless)
		if _, err := c.Run(t.Context()); !errors.Is(err, ErrTooLong) || !strings.HasPrefix(err.Error(), "the answer is too long: kubectl printed more than ") {
			t.Errorf("%s: %v", endless, err)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := c.Run(t.Context()); !errors.Is(err, ErrMissing) {
		t.Error(err)
	}
}

// TestPod reads pods as kubectl prints them.
func TestPod(t *testing.T) {
	var pods List[Pod]
	if err := json.Unmarshal([]byte(`{"items": [
  {"metadata": {"name": "web-0", "namespace": "shop"}, "spec": {"volumes": [{"name": "a", "csi": {"driver": "d"}},
    {"name": "b", "persistentVolumeClaim": {"claimName": "data"}}, {"name": "c", "ephemeral": {"volumeClaimTemplate": {}}}, {"name": "d", "emptyDir": {}}]},
   "status": {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}]}},
  {"spec": {"nodeName": "n"}, "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
   "containerStatuses": [{"name": "plugin", "state": {"running": {}}}, {"name": "x", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}},
     {"name": "y", "state": {"terminated": {"reason": "Error"}}}]}}]}`), &pods); err != nil {
		t.Fatal(err)
	}
	p, q := pods.Items[0], pods.Items[1]
	if p.String() != "shop/web-0" || p.Ready() || p.Unscheduled() != "0/1 nodes are available" || p.NotRunning("plugin") != "it does not run yet: Pending" {
		t.Errorf("%+v", p)
	}
	var claims []string
	for _, v := range p.Spec.Volumes {
		claims = append(claims, p.ClaimOf(v))
	}
	if got := fmt.Sprintf("%q", claims); got != `["" "data" "web-0-c" ""]` || p.Spec.Volumes[0].CSI.Driver != "d" {
		t.Error(got)
	}
	if !q.Ready() || q.Unscheduled() != "" || q.NotRunning("plugin") != "" || q.NotRunning("x") != "CrashLoopBackOff: back-off" || q.NotRunning("y") != "it has ended: Error" {
		t.Errorf("%+v", q)
	}
}

// TestClaim reads claims before and after they have a volume.
func TestClaim(t *testing.T) {
	for text, want := range map[string]string{
		`{"metadata": {"uid": "1-2", "annotations": {"volume.kubernetes.io/selected-node": "n1", "volume.kubernetes.io/storage-provisioner": "d"}}, "status": {"phase": "Pending"}}`: "n1 d pvc-1-2",
		`{"metadata": {"uid": "1-2", "annotations": {"volume.beta.kubernetes.io/storage-provisioner": "e"}}, "spec": {"volumeName": "static"}}`:                                      " e static",
		`{"metadata": {"uid": "1-2"}}`: "  pvc-1-2",
	} {
		var c Claim
		err := json.Unmarshal([]byte(text), &c)
		if got := fmt.Sprintf("%s %s %s", c.Node(), c.Provisioner(), c.VolumeName()); got != want || err != nil {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
}

func TestLastWarnings(t *testing.T) {
	var events List[Event]
	if err := json.Unmarshal([]byte(`{"items": [
  {"type": "Normal", "reason": "N", "message": "n", "lastTimestamp": "2026-01-01T00:00:09Z"},
  {"type": "Warning", "reason": "A", "message": "a", "lastTimestamp": "2026-01-01T00:00:01Z", "eventTime": null},
  {"type": "Warning", "reason": "B", "message": "b", "lastTimestamp": null, "eventTime": "2026-01-01T00:00:03.123456Z"},
  {"type": "Warning", "reason": "C", "message": "c", "lastTimestamp": "2026-01-01T00:00:02Z"}]}`), &events); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(LastWarnings(events.Items, 2), LastWarnings(nil, 2)); got != "[B: b C: c] []" {
		t.Error(got)
	}
}
