// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// left are the tests of Kubernetes' suite that are not run, by a pattern of their names, and why. README.md has the same
// rows.
var left = []struct {
	name, what, why string
	unless          func(t *testing.T) bool // nil: never run
}{
	{"`[Disruptive]`", `\[Disruptive\]`,
		"restarts kubelet through SSH on a cloud's nodes. `TestKubeletRestarts`, `TestForceDeleted` and `TestReboot` test the same here", nil},
	{"`Pre-provisioned Snapshot`", `Pre-provisioned Snapshot`,
		"a VolumeSnapshotContent that an administrator writes needs the label `snapshot.storage.kubernetes.io/managed-by`, which names the node whose snapshotter handles it. The suite's has no label. `TestPreprovisionedSnapshot` tests one that has", nil},
	{"`any volume data source`", `any volume data source`,
		"needs the images hello-populator and volume-data-source-validator, which these tests have no way to build", nil},
	{"ext4: `pod is using it`, `expansion of pvcs created for ephemeral pvcs`", `for ext4.*(pod is using it|expansion of pvcs created for ephemeral pvcs)`,
		"growing a mounted ext4 takes CAP_SYS_RESOURCE. The tests run where the machine gives it, which is not the case where they are developed", mayResizeExt4},
}

// mayResizeExt4 reports whether the machine gives CAP_SYS_RESOURCE (24), see capabilities(7).
func mayResizeExt4(t *testing.T) bool {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^CapBnd:\s*([0-9a-f]+)$`).FindSubmatch(b)
	bounding, err := strconv.ParseUint(string(m[1]), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return bounding>>24&1 == 1
}

// report is ginkgo's report in JUnit's format.
type report struct {
	Cases []struct {
		Name    string `xml:"name,attr"`
		Status  string `xml:"status,attr"`
		Skipped *struct {
			Message string `xml:"message,attr"`
		} `xml:"skipped"`
	} `xml:"testsuite>testcase"`
}

// TestStorageSuite runs Kubernetes' own suite for storage drivers, for every filesystem. The files in suite/ declare
// everything that the driver can do.
func TestStorageSuite(t *testing.T) {
	var skip []string
	for _, l := range left {
		if l.unless == nil || !l.unless(t) {
			skip = append(skip, l.what)
			t.Logf("left out: %s: %s", l.what, l.why)
		}
	}
	out := filepath.Join(stateDir(), "logs")
	args := []string{"run", "env", "GOMAXPROCS=2", "GOGC=400", filepath.Join(stateDir(), "bin/ginkgo"),
		"-procs=" + strconv.Itoa(suiteProcs), "--timeout=40m", "--no-color", "--focus=External.Storage", "--skip=" + strings.Join(skip, "|"),
		"--junit-report=suite.xml", "--output-dir=" + out, filepath.Join(stateDir(), "bin/storage-e2e.test"), "--",
		"-kubeconfig=" + filepath.Join(stateDir(), "kubeconfig"), "-provider=skeleton", "-num-nodes=1"}
	for _, fs := range []string{"btrfs", "ext4", "xfs"} {
		args = append(args, "-storage.testdriver="+filepath.Join(root, "hack/kube/e2e/suite", fs+".yaml"))
	}
	log, err := cluster("", args...)
	if err := os.WriteFile(filepath.Join(out, "suite.log"), []byte(log), 0o644); err != nil {
		t.Error(err)
	}
	if err != nil {
		t.Errorf("see %s/suite.log: %.2000v", out, err)
	}
	b, err := os.ReadFile(filepath.Join(out, "suite.xml"))
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := xml.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	passed, skipped := 0, map[string]int{}
	for _, c := range r.Cases {
		switch {
		case c.Status == "passed":
			passed++
		case c.Status == "skipped" && c.Skipped != nil && c.Skipped.Message != "skipped": // by the test itself
			skipped[c.Skipped.Message]++
		case c.Status != "skipped":
			t.Errorf("%s: %s", c.Status, c.Name)
		}
	}
	t.Logf("%d tests passed", passed)
	if passed < 250 {
		t.Errorf("only %d tests passed: did the suite run?", passed)
	}
	readme, err := os.ReadFile(filepath.Join(root, "hack/kube/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var reasons []string
	for reason, n := range skipped {
		reason = strings.TrimPrefix(reason, "skipped - ")
		reasons = append(reasons, strconv.Itoa(n)+" × "+reason)
		if !strings.Contains(string(readme), "| `"+strings.TrimSuffix(reason, " -- skipping")) {
			t.Errorf("README.md does not say why %d tests are skipped with the message %q", n, reason)
		}
	}
	for _, l := range left {
		if row := "| " + l.name + " | " + l.why + " |\n"; !strings.Contains(string(readme), row) {
			t.Errorf("README.md lacks %s", row)
		}
	}
	slices.Sort(reasons)
	t.Logf("skipped by themselves:\n%s", strings.Join(reasons, "\n"))
}
