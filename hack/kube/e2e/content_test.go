// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// contentsDoc is the document whose blocks these tests run.
const contentsDoc = "docs/contents.md"

// block returns the only block of a document that is in a language and has a text.
func block(t testing.TB, doc, language, has string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, doc))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
		if strings.Contains(m[1], has) {
			found = append(found, m[1])
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has %d blocks of %s with %q, expected one", doc, len(found), language, has)
	}
	return found[0]
}

// replace replaces texts of a manifest, each of which must be there.
func replace(t testing.TB, manifest string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(manifest, pairs[i]) {
			t.Fatalf("there is no %q in\n%s", pairs[i], manifest)
		}
		manifest = strings.ReplaceAll(manifest, pairs[i], pairs[i+1])
	}
	return manifest
}

// withContents installs the component that reads the list of contents, and the list. When the test ends, the usual
// install is back.
func withContents(t testing.TB, list string) {
	t.Helper()
	t.Cleanup(func() {
		if err := install(); err != nil {
			t.Error(err)
		}
		freshSidecars(t)
		mustBeClean(t)
	})
	listContents(t, list)
	component := kustomize(t, withComponents(t, "snapshots", "contents"))
	if _, err := cluster(component, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	pluginReady(t)
	kubectl(t, "rollout", "restart", "-n", namespace, "daemonset/claims") // as freshSidecars does
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/claims", "--timeout="+patience.String())
}

// listContents makes the list of contents, or changes it.
func listContents(t testing.TB, list string) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: csi-disktemplate-contents, namespace: %s}
data: {contents.yaml: %q}
`, namespace, list))
}

// putContent writes a file into the node's directory of contents.
func putContent(t testing.TB, name string, b []byte) {
	t.Helper()
	path := filepath.Join(stateDir(), "root/var/lib/csi-disktemplate-contents", name)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

// tree makes a tar archive of files that have their names in them, and of directories.
func tree(t testing.TB, files ...string) []byte {
	t.Helper()
	var members []any
	for _, name := range files {
		members = append(members, name, []byte(name+"\n"))
	}
	return archiveOf(t, members...)
}

// templates is how many templates the plugin has built since its start.
func templates(t testing.TB) float64 {
	t.Helper()
	return metric(t, "csi_disktemplate_template_build_duration_seconds_count")
}

// jobLogs returns the logs of a Job's pods, by their index.
func jobLogs(t testing.TB, job string) map[string]string {
	t.Helper()
	logs := map[string]string{}
	out := kubectl(t, "get", "pods", "-l", "batch.kubernetes.io/job-name="+job, "-o",
		`jsonpath={range .items[*]}{.metadata.annotations.batch\.kubernetes\.io/job-completion-index} {.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		index, pod, _ := strings.Cut(strings.TrimSpace(line), " ")
		logs[index], _ = cluster("", "kubectl", "logs", pod) // there is none as long as it does not run
	}
	return logs
}

// completed waits until a Job has ended well, and returns its pods' logs.
func completed(t testing.TB, job string, within time.Duration) map[string]string {
	t.Helper()
	wait := []string{"kubectl", "wait", "--for=condition=Complete", "job/" + job, "--timeout=" + within.String()}
	if _, err := cluster("", wait...); err != nil {
		t.Fatalf("%v\n%s\n%q", err, kubectl(t, "get", "events"), jobLogs(t, job))
	}
	return jobLogs(t, job)
}

// makeDatabase runs the block of the document that makes the content "postgres", in a pod, and puts the archive into the
// node's directory.
func makeDatabase(t testing.TB) {
	t.Helper()
	command := "set -e\n" + block(t, contentsDoc, "sh", "initdb") + "echo made; sleep infinity"
	apply(t, replace(t, pod("makes-database", command, "emptyDir: {}"), "busybox:1.37", "postgres:15",
		"restartPolicy: Always", "restartPolicy: Never\n  securityContext: {runAsUser: 999, runAsGroup: 999}"))
	ready(t, "makes-database")
	eventually(t, "the log", func() string { return kubectl(t, "logs", "makes-database") }, "made")
	archive := kubectl(t, "exec", "makes-database", "--", "cat", "/tmp/postgres.tar.zst")
	putContent(t, "postgres.tar.zst", []byte(archive))
}

const manyDatabases = 100

// many makes the example with ten databases one with manyDatabases.
func many(t testing.TB, manifest, name string) string {
	t.Helper()
	return replace(t, manifest, "name: database-per-test", "name: "+name,
		"completions: 10", fmt.Sprint("completions: ", manyDatabases), "parallelism: 10", fmt.Sprint("parallelism: ", manyDatabases))
}

// withEmptyDir makes the example one whose databases are made by initdb in emptyDirs.
func withEmptyDir(t testing.TB, manifest string) string {
	t.Helper()
	start := regexp.MustCompile(`(?m)^( +)pg_ctl start`).FindStringSubmatch(manifest)
	volume := regexp.MustCompile(`(?m)^ +csi:\n.*\n +volumeAttributes: .*$`).FindString(manifest)
	if start == nil || volume == "" {
		t.Fatalf("the example has another form now:\n%s", manifest)
	}
	var initdb string
	for line := range strings.Lines(block(t, contentsDoc, "sh", "initdb")) {
		if strings.HasPrefix(line, "initdb") || strings.HasPrefix(line, "printf") {
			initdb += start[1] + replace(t, line, "/tmp/data", "$PGDATA")
		}
	}
	const insert = "psql --quiet --command \""
	return replace(t, manifest, start[0], initdb+start[0], "value: /data", "value: /data/db", volume, "        emptyDir: {}",
		insert, insert+"CREATE TABLE visitors (name text); INSERT INTO visitors VALUES ('everybody'); ")
}

// TestDatabasePerTest makes the content of the how-to and applies its example as it is written. Then it starts a hundred
// such databases at once, each of which must have the rows of the content and its own.
func TestDatabasePerTest(t *testing.T) {
	makeDatabase(t)
	withContents(t, block(t, contentsDoc, "yaml", "tar: postgres.tar.zst"))
	before := templates(t)
	manifest := example(t, "contents-database.yaml")
	apply(t, manifest)
	mustKnowItself := func(logs map[string]string, want int) {
		t.Helper()
		if len(logs) != want {
			t.Errorf("%d databases answered, expected %d", len(logs), want)
		}
		for index, log := range logs {
			if log != "everybody\ntest "+index+"\n" {
				t.Errorf("database %s has %q", index, log)
			}
		}
	}
	mustKnowItself(completed(t, "database-per-test", patience), 10)
	remove(t, manifest)

	stays := many(t, replace(t, manifest, "ORDER BY name\"", "ORDER BY name\"\n          sleep infinity"), "databases")
	start := time.Now()
	apply(t, stays)
	logs := map[string]string{}
	for deadline := start.Add(10 * time.Minute); time.Now().Before(deadline); time.Sleep(time.Second) {
		if get(t, "job databases", ".status.ready") != fmt.Sprint(manyDatabases) {
			continue
		}
		logs = jobLogs(t, "databases")
		silent := func(log string) bool { return !strings.Contains(log, "test ") }
		if !slices.ContainsFunc(slices.Collect(maps.Values(logs)), silent) {
			break
		}
	}
	t.Logf("%d databases have answered after %s", len(logs), time.Since(start).Round(time.Second))
	mustKnowItself(logs, manyDatabases)
	mustShareNothing(t)
	if built := templates(t) - before; built != 1 {
		t.Errorf("%g templates were built, expected 1", built)
	}
	remove(t, stays)
}

// mustShareNothing looks at all files of all volumes that pods have: no two are the same file.
func mustShareNothing(t testing.TB) {
	t.Helper()
	out := strings.Fields(on(t, "sh", "-c", `
		volumes=$(ls -d /var/lib/kubelet/pods/*/volumes/kubernetes.io~csi/*/mount)
		find $volumes -xdev -type f -printf '%D:%i\n' >/tmp/files-of-volumes
		echo $(echo "$volumes" | wc -l) $(wc -l </tmp/files-of-volumes) $(sort /tmp/files-of-volumes | uniq -d | wc -l)
		rm /tmp/files-of-volumes`))
	if out[0] != fmt.Sprint(manyDatabases) || len(out[1]) < 5 || out[2] != "0" {
		t.Errorf("%s volumes with %s files share %s files", out[0], out[1], out[2])
	}
	t.Logf("%s volumes with %s files share %s files", out[0], out[1], out[2])
}

// BenchmarkDatabases measures the time from the creation of a hundred pods at once until each has started a PostgreSQL,
// written a row and read all rows: on volumes with a content, synced and volatile, and on emptyDirs, in which initdb makes
// the same database first. The kinds take turns.
//
//	go test -tags e2e -run '^$' -bench Databases -benchtime 1x ./hack/kube/e2e
func BenchmarkDatabases(b *testing.B) {
	makeDatabase(b)
	withContents(b, block(b, contentsDoc, "yaml", "tar: postgres.tar.zst"))
	manifest := example(b, "contents-database.yaml")
	volatile := replace(b, manifest, "content: postgres,", "content: postgres, durability: volatile,")
	kinds := []struct{ job, manifest string }{
		{"content", many(b, manifest, "content")},
		{"empty-dir", many(b, withEmptyDir(b, manifest), "empty-dir")},
		{"volatile", many(b, volatile, "volatile")},
	}
	apply(b, manifest) // makes the template
	completed(b, "database-per-test", patience)
	remove(b, manifest)
	took := map[string]float64{}
	i := 0
	for b.Loop() {
		i++
		for _, k := range kinds {
			start := time.Now()
			apply(b, k.manifest)
			if logs := completed(b, k.job, 15*time.Minute); len(logs) != manyDatabases {
				b.Fatalf("%d databases answered", len(logs))
			}
			took[k.job] += time.Since(start).Seconds()
			remove(b, k.manifest)
		}
	}
	for _, k := range kinds {
		b.ReportMetric(took[k.job]/float64(i), k.job+"-s")
	}
}

// TestContents looks at what pods see of contents that are theirs, and of such that are not.
func TestContents(t *testing.T) {
	r := newRegistry(t)
	lower, upper := tree(t, "etc/", "etc/lower", "etc/gone", "both"), tree(t, "etc/.wh.gone", "etc/upper", "both")
	r.push(t, "trees/two:1", lower, upper)
	r.trust(t)
	putContent(t, "tree.tar", tree(t, "dir/", "dir/file", "file"))
	putContent(t, "large.tar", archiveOf(t, "large", bytes.Repeat([]byte("0123456789abcdef"), 5<<20)))
	const mine = `
- {name: tree, tar: tree.tar, namespaces: [default]}
- {name: of-group, tar: tree.tar, namespaces: [default], fsGroup: 2000}
- {name: large, tar: large.tar, namespaces: [default]}
- {name: image, oci: "%[1]s/trees/two:1", namespaces: ["*"]}
- {name: no-image, oci: "%[1]s/trees/none:1", namespaces: ["*"]}
- {name: mode, tar: tree.tar, namespaces: ["*"], owner: "1000:1001", mode: "2751"}
`
	list := fmt.Sprintf("contents:"+mine, r.address)
	const others = "- {name: of-others, tar: tree.tar, namespaces: [others]}\n"
	withContents(t, list+others)
	apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: others}\n")

	volume := func(attributes string) string {
		return "csi: {driver: csi.disktemplate.io, volumeAttributes: {" + attributes + "}}"
	}
	class := func(content string) string {
		return fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: of-%s}
provisioner: csi.disktemplate.io
volumeBindingMode: WaitForFirstConsumer
parameters: {content: %[1]s}
---`, content)
	}
	says := func(t *testing.T, pod string, want ...string) {
		t.Helper()
		ready(t, pod)
		eventually(t, "the log of "+pod, func() string { return kubectl(t, "logs", pod) }, want...)
	}

	t.Run("files", func(t *testing.T) {
		const look = "cd /data && cat $(find . -type f | sort) && stat -c '%u:%g %a' . && touch mine && sleep infinity"
		apply(t, pod("of-tar", look, volume("content: tree"))+
			pod("of-image", look, volume("content: image, size: 300Mi"))+
			pod("of-mode", look, volume("content: mode"))+
			class("tree")+pod("of-claim", look, ephemeral("of-tree", "64Mi")))
		says(t, "of-tar", "dir/file\nfile\n0:0 755\n")
		says(t, "of-image", "both\netc/lower\netc/upper\n0:0 755\n")
		says(t, "of-mode", "dir/file\nfile\n1000:1001 2751\n")
		says(t, "of-claim", "dir/file\nfile\n0:0 755\n")
	})
	t.Run("group", func(t *testing.T) { testGroup(t, volume) })
	t.Run("refused", func(t *testing.T) {
		const sleep = "sleep infinity"
		apply(t, pod("wants-others", sleep, volume("content: of-others"))+
			pod("wants-nothing", sleep, volume("content: nobody-made-it"))+
			pod("wants-small", sleep, volume("content: large, size: 64Mi"))+
			pod("wants-image", sleep, volume("content: no-image"))+
			class("of-others")+claim("claims-others", "of-of-others", "64Mi"))
		for name, words := range map[string][]string{
			"wants-others":  {"FailedMount", "InvalidArgument", `"of-others" does not exist, or namespace "default" may not use it`, "tree"},
			"wants-nothing": {"FailedMount", "InvalidArgument", `"nobody-made-it" does not exist, or namespace "default" may not`, "tree"},
			"wants-small":   {"FailedMount", "OutOfRange", "content large", "80Mi of data", "needs 93Mi as ext4", "ask for a larger size"},
			"wants-image":   {"FailedMount", "trees/none:1", "the registry has no such tag"},
			"claims-others": {"ProvisioningFailed", "InvalidArgument", `"of-others" does not exist, or namespace "default" may not`},
		} {
			t.Log(eventually(t, "the events of "+name, func() string { return events(t, name) }, words...))
		}
		// The other namespace has it, also by a claim.
		owners := pod("has", sleep, volume("content: of-others")) + pod("claims", sleep, ephemeral("of-of-others", "64Mi"))
		apply(t, replace(t, owners, "metadata: {", "metadata: {namespace: others, "))
		kubectl(t, "wait", "-n", "others", "--for=condition=Ready", "--timeout="+patience.String(), "pod/has", "pod/claims")
	})
	t.Run("removed", func(t *testing.T) {
		stays := replace(t, writer("stays", volume("content: tree")), "i=0;", "i=0; cat /data/file;")
		apply(t, stays)
		says(t, "stays", "file\n", "2\n")
		listContents(t, strings.Replace(list, "{name: tree, ", "{name: another, ", 1))
		eventually(t, "what a new pod gets", func() string {
			name := fmt.Sprint("too-late-", time.Now().UnixMilli())
			late := pod(name, "sleep infinity", volume("content: tree"))
			apply(t, late)
			defer remove(t, late)
			time.Sleep(2 * time.Second)
			return events(t, name)
		}, "FailedMount", `"tree" does not exist, or namespace "default" may not use it`, "another")
		at := kubectl(t, "logs", "--tail=1", "stays")
		time.Sleep(time.Second)
		if now := kubectl(t, "logs", "--tail=1", "stays"); now == at || strings.Contains(now, "failed") {
			t.Errorf("the pod stands at %s after its content was removed", now)
		}
	})
}

// testGroup starts pods with an fsGroup on a content that is prepared for it. Kubelet changes nothing there, which the
// time of a file's last change tells; with another group it does.
func testGroup(t *testing.T, volume func(string) string) {
	const look = "cd /data && stat -c 'changed %Z, %g %a' dir/file && stat -c 'root %g %a' . && " +
		"touch dir/mine && stat -c 'mine %u:%g' dir/mine && sleep infinity"
	const context = "\n  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: %d, fsGroupChangePolicy: OnRootMismatch}"
	grouped := func(name string, group int) string {
		const before = "restartPolicy: Always"
		return replace(t, pod(name, look, volume("content: of-group")), before, before+fmt.Sprintf(context, group))
	}
	changed := func(name string, group int) string {
		t.Helper()
		ready(t, name)
		log := eventually(t, "the log of "+name, func() string { return kubectl(t, "logs", name) },
			fmt.Sprintf("%d 664\n", group), fmt.Sprintf("root %d 2775\n", group), fmt.Sprintf("mine 1000:%d", group))
		return regexp.MustCompile(`changed (\d+)`).FindStringSubmatch(log)[1]
	}
	apply(t, grouped("group-first", 2000))
	first := changed("group-first", 2000)
	time.Sleep(1100 * time.Millisecond)
	apply(t, grouped("group-second", 2000)+grouped("group-other", 2001))
	if second := changed("group-second", 2000); second != first {
		t.Errorf("kubelet changed the file of the second pod: %s, and not %s as in the first", second, first)
	}
	if other := changed("group-other", 2001); other == first {
		t.Error("kubelet did not change the file for another group, so this tests nothing")
	}
}

// TestContentsReachRegistries looks at the policy of the plugin with contents: it may connect to registries and resolvers,
// and nobody else may connect to it than without contents.
func TestContentsReachRegistries(t *testing.T) {
	policy := func(manifest string) object {
		for _, o := range objects(t, manifest) {
			if o.Kind == "NetworkPolicy" && o.Metadata.Name == "plugin" {
				return o
			}
		}
		t.Fatal("there is no policy")
		return object{}
	}
	usual := policy(kustomize(t, filepath.Join(root, manifests)))
	with := policy(kustomize(t, withComponents(t, "snapshots", "contents")))
	if len(usual.Spec.Egress) != 0 || len(with.Spec.Egress) != 1 || fmt.Sprint(with.Spec.Ingress) != fmt.Sprint(usual.Spec.Ingress) {
		t.Errorf("the policy is\n%+v, without contents\n%+v", with, usual)
	}
}
