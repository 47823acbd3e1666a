// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// withGoldens installs the component that turns goldens on, and others before it, with more arguments of the plugin and a
// list of shared goldens. When the test ends, the goldens are gone and the usual install is back.
func withGoldens(t testing.TB, shared string, components []string, args ...string) {
	t.Helper()
	t.Cleanup(func() {
		forgetGoldens(t)
		if err := install(); err != nil {
			t.Error(err)
		}
		freshSidecars(t)
		mustBeClean(t)
	})
	listShared(t, shared)
	dir := withComponents(t, "snapshots", append(components, "goldens")...)
	addArguments(t, dir, args...)
	if _, err := cluster(kustomize(t, dir), "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	pluginReady(t)
	kubectl(t, "rollout", "restart", "-n", namespace, "daemonset/claims") // as freshSidecars does
	kubectl(t, "rollout", "status", "-n", namespace, "daemonset/claims", "--timeout="+patience.String())
}

// addArguments adds arguments of the plugin to a user's kustomization.
func addArguments(t testing.TB, dir string, args ...string) {
	t.Helper()
	text := "patches:\n- target: {kind: DaemonSet, name: plugin}\n  patch: |\n"
	for _, arg := range args {
		text += "    - {op: add, path: /spec/template/spec/containers/0/args/-, value: " + arg + "}\n"
	}
	if len(args) == 0 {
		return
	}
	f, err := os.OpenFile(filepath.Join(dir, "kustomization.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// listShared makes the list of shared goldens, or changes it.
func listShared(t testing.TB, list string) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: csi-disktemplate-goldens, namespace: %s}
data: {goldens.yaml: %q}
`, namespace, list))
}

// inPool is a script that runs on the node in the pool's directory, as the plugin sees it.
const inPool = "set -e; pid=$(pgrep -f '^/usr/bin/csi-disktemplate --node-id' | head -1); " +
	"cd /proc/$pid/root/var/lib/csi-disktemplate/mnt; "

// forgetGoldens removes all goldens, when all volumes that may become some have ended.
func forgetGoldens(t testing.TB) {
	t.Helper()
	mustBeClean(t)
	eventually(t, "the pool", func() string { return kept(t) }, "to commit: .")
	if _, err := cluster("", "run", "sh", "-c", inPool+"rm -f goldens/*"); err != nil {
		t.Error(err)
	}
}

// kept lists the images of goldens, and of the volumes that wait for their commit.
func kept(t testing.TB) string {
	t.Helper()
	out, err := cluster("", "run", "sh", "-c", inPool+"echo goldens: $(ls goldens), to commit: $(ls commits).")
	if err != nil {
		return err.Error() // the plugin is away
	}
	return strings.TrimSpace(out)
}

// settled waits until all commits have ended and the pool has these generations, and nothing else of goldens.
func settled(t testing.TB, generations ...string) {
	t.Helper()
	eventually(t, "the pool", func() string { return kept(t) },
		"goldens: "+strings.Join(generations, " ")+", to commit: .")
}

// mustStay checks for some seconds that the pool has these generations, and nothing else of goldens.
func mustStay(t testing.TB, generations ...string) {
	t.Helper()
	settled(t, generations...)
	time.Sleep(3 * time.Second)
	settled(t, generations...)
}

// marked ends a job's command: what is in its volume may be committed.
const marked = "\nmkdir -p .disktemplate && touch .disktemplate/commit"

// job makes the manifest of a pod that runs a shell command once, in a volume with these attributes.
func job(t testing.TB, name, command, attributes string) string {
	t.Helper()
	volume := "csi: {driver: csi.disktemplate.io, volumeAttributes: {" + attributes + "}}"
	return replace(t, pod(name, "set -e; cd /data\n"+command, volume), "restartPolicy: Always", "restartPolicy: Never")
}

// outcome waits until a pod has ended, and returns its log.
func outcome(t testing.TB, name, phase string) string {
	t.Helper()
	return outcomeIn(t, "default", name, phase)
}

func outcomeIn(t testing.TB, namespace, name, phase string) string {
	t.Helper()
	_, err := cluster("", "kubectl", "wait", "-n", namespace, "--for=jsonpath={.status.phase}="+phase, "pod/"+name,
		"--timeout="+patience.String())
	log, _ := cluster("", "kubectl", "logs", "-n", namespace, name)
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, log, kubectl(t, "describe", "pod", "-n", namespace, name))
	}
	return log
}

// runJob applies a pod, waits until it has succeeded, and returns its log. The pod stays.
func runJob(t testing.TB, name, command, attributes string) string {
	t.Helper()
	apply(t, job(t, name, command, attributes))
	return outcome(t, name, "Succeeded")
}

// inNamespace moves a manifest's pods to another namespace.
func inNamespace(t testing.TB, namespace, manifest string) string {
	t.Helper()
	return replace(t, manifest, "metadata: {", "metadata: {namespace: "+namespace+", ")
}

// TestGoldens has jobs start from what others left. What is committed and what is not, the pool's directories say.
func TestGoldens(t *testing.T) {
	apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: others}\n")
	withGoldens(t, sharedGoldens, nil, "--golden-max-bytes=128Mi")
	for _, part := range []struct {
		name string
		test func(t *testing.T)
	}{
		{"first", testFirstUse},
		{"next", testNext},
		{"many", testManyStart},
		{"both", testBothCommit},
		{"boundaries", testBoundaries},
		{"refused", testRefused},
		{"claims", testGoldenClaims},
		{"ended", testEnded},
		{"killed", testPluginKilled},
		{"reboot", testGoldensReboot},
	} {
		t.Run(part.name, func(t *testing.T) {
			t.Cleanup(func() { forgetGoldens(t) })
			part.test(t)
		})
	}
}

// sharedGoldens are written by namespace default, and read by namespace others.
const sharedGoldens = "goldens:\n- {name: base, writers: [default], readers: [others]}\n"

// testFirstUse runs the pod that the document begins with three times.
func testFirstUse(t *testing.T) {
	manifest := block(t, "docs/goldens.md", "yaml", "name: counter")
	for run := 1; run <= 3; run++ {
		apply(t, manifest)
		if log := outcome(t, "counter", "Succeeded"); log != fmt.Sprintln(run) {
			t.Errorf("run %d says %q", run, log)
		}
		remove(t, manifest)
		eventually(t, "the pool", func() string { return kept(t) }, fmt.Sprintf("default.counter.%d, to commit: .", run))
	}
}

// testNext runs three jobs, each of which adds a line to what the last one left. Their pods stay: kubelet takes the
// volumes of pods that have ended.
func testNext(t *testing.T) {
	for i, want := range []string{"", "run 1\n", "run 1\nrun 2\n"} {
		command := fmt.Sprintf("cat runs || true; echo run %d >>runs", i+1)
		log := runJob(t, fmt.Sprint("next-", i+1), command+marked, "from: golden/cache, commitTo: cache, size: 300Mi")
		if !strings.HasPrefix(log, want) || want == "" && !strings.Contains(log, "No such file") {
			t.Errorf("job %d found %q, expected %q", i+1, log, want)
		}
		eventually(t, "the pool", func() string { return kept(t) }, fmt.Sprintf("default.cache.%d, to commit: .", i+1))
	}
	settled(t, "default.cache.2", "default.cache.3")
	log := runJob(t, "next-looks", "cat runs; ls -A; df -m . | awk 'END {print $2}'", "from: golden/cache")
	if !strings.HasPrefix(log, "run 1\nrun 2\nrun 3\n") || strings.Contains(log, ".disktemplate") {
		t.Errorf("a pod that only starts from the golden has\n%s", log)
	}
	mustStay(t, "default.cache.2", "default.cache.3")
}

// atOnce is how many pods start from one golden at the same time.
const atOnce = 20

// testManyStart starts many pods at once from one golden. Each has all of it, and what it writes itself, and nothing of
// the others.
func testManyStart(t *testing.T) {
	runJob(t, "many-makes", `for i in $(seq 200); do echo "$i of the golden" >f$i; done`+marked, "commitTo: tree, size: 300Mi")
	settled(t, "default.tree.1")
	var all string
	for i := range atOnce {
		command := fmt.Sprintf("echo mine >mine-%d; cat f* | sort | md5sum; ls | grep -c ^f; ls | grep mine; sleep 5", i)
		all += job(t, fmt.Sprint("many-", i), command, "from: golden/tree")
	}
	start := time.Now()
	apply(t, all)
	var sum string
	for i := range atOnce {
		log := outcome(t, fmt.Sprint("many-", i), "Succeeded")
		first, rest, _ := strings.Cut(log, "\n")
		if sum == "" {
			sum = first
		}
		if first != sum || rest != fmt.Sprintf("200\nmine-%d\n", i) {
			t.Errorf("pod %d has %q, the first one %q", i, log, sum)
		}
	}
	t.Logf("%d pods have started from a golden, read it and ended after %s", atOnce, time.Since(start).Round(time.Second))
	mustStay(t, "default.tree.1")
}

// testBothCommit lets two jobs commit at once. There are two generations, each of which is of one job.
func testBothCommit(t *testing.T) {
	all, end := "", time.Now().Add(15*time.Second).Unix()
	for _, who := range []string{"both-a", "both-b"} {
		command := fmt.Sprintf("for i in $(seq 500); do echo %s >f$i; done; while [ $(date +%%s) -lt %d ]; do sleep 0.1; done", who, end)
		all += job(t, who, command+marked, "from: golden/both, commitTo: both, size: 300Mi")
	}
	apply(t, all)
	outcome(t, "both-a", "Succeeded")
	outcome(t, "both-b", "Succeeded")
	settled(t, "default.both.1", "default.both.2")
	last := regexp.MustCompile(`"Committed a volume".*golden="default/both@2".*by="pod default/(\S+)"`).
		FindStringSubmatch(kubectl(t, "logs", "-n", namespace, plugin(t)))
	if last == nil {
		t.Fatal("the log does not say who committed last")
	}
	log := runJob(t, "both-looks", "ls | wc -l; cat f* | sort | uniq -c", "from: golden/both")
	if want := []string{"501", "500", last[1]}; !slices.Equal(strings.Fields(log), want) {
		t.Errorf("the golden has %q, expected %q", log, want)
	}
}

// testBoundaries looks at what one namespace gets of another's goldens, in the words that users read.
func testBoundaries(t *testing.T) {
	runJob(t, "mine", "echo trusted >who"+marked, "commitTo: cache, size: 300Mi")
	runJob(t, "base", "echo trusted >who"+marked, "commitTo: shared/base, size: 300Mi")
	settled(t, "_.base.1", "default.cache.1")

	// A golden of the same name is another namespace's own, and a reader's changes stay its own.
	apply(t, inNamespace(t, "others", job(t, "own", "ls -A", "from: golden/cache, size: 300Mi")+
		job(t, "reads", "cat who; echo poison >who"+marked, "from: shared/base, orElse: golden/cache, commitTo: cache")))
	if log := outcomeIn(t, "others", "own", "Succeeded"); strings.Contains(log, "who") {
		t.Errorf("namespace others has namespace default's golden: %s", log)
	}
	if log := outcomeIn(t, "others", "reads", "Succeeded"); log != "trusted\n" {
		t.Errorf("the shared golden has %q", log)
	}
	settled(t, "_.base.1", "default.cache.1", "others.cache.1")
	for name, from := range map[string]string{"still-base": "shared/base", "still-mine": "golden/cache"} {
		if log := runJob(t, name, "cat who", "from: "+from); log != "trusted\n" {
			t.Errorf("%s has %q after namespace others has committed", from, log)
		}
	}

	for attributes, want := range map[string]string{
		"commitTo: shared/base": `shared golden "base" does not exist, or namespace "others" may not commit to it; ` +
			"shared goldens that it may commit to: none",
		"from: shared/secret": `shared golden "secret" does not exist, or namespace "others" may not start from it; ` +
			"shared goldens that it may start from: base",
		"from: golden/default/cache": `volume attribute from "golden/default/cache": must be golden/NAME or shared/NAME; ` +
			"a name has 1 to 63 lower-case letters, digits and '-', not at either end",
		"commitTo: default/cache": `volume attribute commitTo "default/cache": must be NAME, or shared/NAME for a golden ` +
			"that the operator shares; a name has 1 to 63 lower-case letters, digits and '-', not at either end",
		"commitTo: cache, commitWhen: succeeded": `volume attribute commitWhen "succeeded": must be one of marked, always`,
		"orElse: golden/cache": `volume attribute orElse "golden/cache": is for volumes with from; ` +
			"set that too, or leave orElse out",
	} {
		name := fmt.Sprint("refused-", time.Now().UnixNano())
		apply(t, inNamespace(t, "others", job(t, name, "true", attributes)))
		event := eventually(t, "the events of a pod with "+attributes, func() string {
			return kubectl(t, "get", "events", "-n", "others", "--field-selector", "involvedObject.name="+name+",reason=FailedMount",
				"-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
		}, "rpc error")
		event, _, _ = strings.Cut(event, "\n")
		want = `MountVolume.SetUp failed for volume "data" : rpc error: code = InvalidArgument desc = invalid request: ` + want
		if event != want {
			t.Errorf("with %s the event is\n%s\nexpected\n%s", attributes, event, want)
		}
	}
	mustStay(t, "_.base.1", "default.cache.1", "others.cache.1")
}

// testRefused has a commit refused for its size, and one since the right to it was taken away meanwhile. Metric and
// condition say so, and the golden stays.
func testRefused(t *testing.T) {
	runJob(t, "fits", "echo first >who"+marked, "commitTo: shared/base, size: 300Mi")
	settled(t, "_.base.1")
	before := metric(t, `csi_disktemplate_commits_total{outcome="refused"}`)
	refused := func(n float64, says ...string) {
		t.Helper()
		eventually(t, "the metric", func() string {
			return fmt.Sprint(metric(t, `csi_disktemplate_commits_total{outcome="refused"}`)-before, " were refused")
		}, fmt.Sprint(n, " were refused"))
		t.Log(eventually(t, "/readyz", func() string { return pluginPage(t, "readyz") }, append(says, "degraded: GoldenFailed")...))
		mustStay(t, "_.base.1")
	}
	runJob(t, "too-large", "dd if=/dev/urandom of=large bs=1M count=150 2>/dev/null"+marked,
		"from: shared/base, commitTo: shared/base")
	refused(1, "golden base stays as it is", "pod default/too-large is not committed", "--golden-max-bytes")

	until := "while [ ! -e /data/go ]; do sleep 0.1; done"
	apply(t, job(t, "too-late", until+marked, "from: shared/base, commitTo: shared/base"))
	ready(t, "too-late")
	listShared(t, strings.Replace(sharedGoldens, "[default]", "[trusted]", 1))
	eventually(t, "what the plugin has read", func() string {
		name := fmt.Sprint("asks-", time.Now().UnixMilli())
		asks := job(t, name, "true", "commitTo: shared/base")
		apply(t, asks)
		defer remove(t, asks)
		time.Sleep(2 * time.Second)
		return events(t, name)
	}, `namespace "default" may not commit to it`)
	kubectl(t, "exec", "too-late", "--", "touch", "/data/go")
	refused(2, "pod default/too-late is not committed", `namespace "default" may not commit to it`)

	// A commit that succeeds ends the condition.
	listShared(t, sharedGoldens)
	eventually(t, "/readyz", func() string {
		name := fmt.Sprint("again-", time.Now().UnixMilli())
		apply(t, job(t, name, "true"+marked, "from: shared/base, commitTo: shared/base"))
		time.Sleep(5 * time.Second)
		return pluginPage(t, "readyz") + ":"
	}, "ok\n:")
}

// testGoldenClaims makes claims of a class that starts from a golden and commits to it when the claim is deleted.
func testGoldenClaims(t *testing.T) {
	runJob(t, "for-claims", "echo 1 >starts"+marked, "commitTo: state, size: 300Mi")
	settled(t, "default.state.1")
	apply(t, `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: of-golden}
provisioner: csi.disktemplate.io
volumeBindingMode: WaitForFirstConsumer
parameters: {from: golden/state, commitTo: state}
`)
	command := "set -e; cd /data; cat starts; echo 2 >>starts" + marked + "; sleep infinity"
	volume := func(name, command string) string {
		return replace(t, claim(name, "of-golden", "512Mi"),
			`"date >> /data/starts && sync && sleep infinity"`, fmt.Sprintf("%q", command))
	}
	first := volume("golden-claim", command)
	apply(t, first)
	ready(t, "golden-claim")
	eventually(t, "the log", func() string { return kubectl(t, "logs", "golden-claim") }, "1\n")
	mustStay(t, "default.state.1") // a claim is done when it is deleted
	remove(t, first)
	settled(t, "default.state.1", "default.state.2")
	second := volume("next-claim", "cat /data/starts; df -m /data | awk 'END {print ($2 > 400 ? \"grown\" : $0)}'; sleep infinity")
	apply(t, second)
	ready(t, "next-claim")
	eventually(t, "the log", func() string { return kubectl(t, "logs", "next-claim") }, "1\n2\n")
	remove(t, second) // it has no mark
	mustStay(t, "default.state.1", "default.state.2")
}

// testEnded ends jobs in all the ways in which they do not say that they have succeeded.
func testEnded(t *testing.T) {
	const attributes = "from: golden/cache, commitTo: cache, size: 300Mi"
	runJob(t, "whole", "echo whole >state"+marked, attributes)
	settled(t, "default.cache.1")
	const half = "cat state; echo half >state; sync; mkdir .disktemplate; touch half; "
	unmarked := metric(t, `csi_disktemplate_commits_total{outcome="unmarked"}`)
	ended := 0
	for name, c := range map[string]struct {
		command string
		end     func(name string)
	}{
		"fails": {half + "exit 1" + marked, func(name string) { outcome(t, name, "Failed") }},
		"killed": {half + "sleep 123456" + marked, func(name string) {
			id := strings.TrimPrefix(get(t, "pod "+name, ".status.containerStatuses[0].containerID"), "containerd://")
			on(t, "ctr", "--address", filepath.Join(stateDir(), "containerd.sock"), "--namespace", "k8s.io",
				"task", "kill", "--signal", "SIGKILL", id)
			outcome(t, name, "Failed")
		}},
		"deleted": {half + "sleep 123456" + marked, func(name string) { kubectl(t, "delete", "pod", name) }},
		"forced": {half + "sleep 123456" + marked, func(name string) {
			kubectl(t, "delete", "pod", name, "--force", "--grace-period=0")
		}},
		"another-mark": {half + "ln -s /etc/passwd .disktemplate/commit", func(name string) { outcome(t, name, "Succeeded") }},
	} {
		apply(t, job(t, name, c.command, attributes))
		eventually(t, "the log of "+name, func() string {
			log, _ := cluster("", "kubectl", "logs", name)
			return log
		}, "whole\n")
		c.end(name)
		ended++
		eventually(t, "the metric", func() string {
			return fmt.Sprint(metric(t, `csi_disktemplate_commits_total{outcome="unmarked"}`)-unmarked, " were not committed")
		}, fmt.Sprint(ended, " were not committed"))
		settled(t, "default.cache.1")
	}
	mustStay(t, "default.cache.1")
	log := runJob(t, "sees-whole", "cat state; ls", "from: golden/cache")
	if strings.Contains(log, "half") || !strings.HasPrefix(log, "whole\n") {
		t.Errorf("the golden has %q", log)
	}
}

// testPluginKilled kills the plugin as soon as the volume of a job is kept for its commit. The next plugin commits it, or
// leaves the golden as it is, where the last one had not yet seen that the volume was written. Both are whole.
func testPluginKilled(t *testing.T) {
	const fill = "for i in $(seq 3000); do echo %[1]d >f$i; done; echo %[1]d >round\n" +
		"dd if=/dev/urandom of=large bs=1M count=40 2>/dev/null\n"
	const attributes = "from: golden/cache, commitTo: cache, size: 300Mi"
	runJob(t, "round-0", fmt.Sprintf(fill, 0)+marked, attributes)
	settled(t, "default.cache.1")
	newest, has, caught := 1, 0, 0
	for round := 1; round <= 3; round++ {
		name := fmt.Sprint("round-", round)
		apply(t, job(t, name, fmt.Sprintf(fill, round)+"while [ ! -e go ]; do sleep 0.1; done; rm go"+marked, attributes))
		ready(t, name)
		kubectl(t, "exec", name, "--", "touch", "/data/go")
		if killPlugin(t, time.Duration(round-1)*50*time.Millisecond) {
			caught++
		}
		outcome(t, name, "Succeeded")
		pool := eventually(t, "the pool", func() string { return kept(t) }, "goldens: default.cache.", "to commit: .")
		if strings.Contains(pool, fmt.Sprintf("default.cache.%d,", newest+1)) {
			newest, has = newest+1, round
		}
		want := fmt.Sprint("default.cache.", newest)
		if newest > 1 {
			want = fmt.Sprintf("default.cache.%d %s", newest-1, want)
		}
		settled(t, want)
		log := runJob(t, "sees-"+name, "cat round f* | sort | uniq -c; ls | wc -l", "from: golden/cache")
		if want := fmt.Sprintf("3001 %d\n3003\n", has); strings.TrimLeft(log, " ") != want {
			t.Errorf("the golden has %q, expected %q", log, want)
		}
	}
	t.Logf("%d kills came while a volume was kept, and %d of 3 volumes were committed after that", caught, newest-1)
	if caught == 0 {
		t.Error("no kill came while a volume was kept, so this tests nothing")
	}
}

// killPlugin waits until a volume is kept for its commit, kills the plugin after a while, and reports whether the volume
// was kept even then.
func killPlugin(t *testing.T, after time.Duration) bool {
	t.Helper()
	// The open directory keeps the pool in sight when the plugin and its mounts are gone.
	found := on(t, "sh", "-c", inPool+"after="+fmt.Sprint(after.Seconds())+`
		for i in $(seq 20000); do
			if [ -n "$(ls commits)" ]; then
				sleep $after; kill -KILL $pid
				while [ -d /proc/$pid/root/proc ]; do :; done
				echo killed with $(ls commits) to commit, and goldens $(ls goldens)
				exit
			fi
		done
		echo nothing was kept`)
	t.Log(strings.TrimSpace(found))
	// Kubelet would start its container again only after a while, and starts a new pod at once.
	kubectl(t, "delete", "pod", "-n", namespace, "-l", "app.kubernetes.io/component=plugin", "--wait=false")
	return strings.Contains(found, "killed with csi-")
}

// testGoldensReboot takes from the node everything that a power cut takes, while a job runs. The node's boot id is the
// machine's, which stays: that nothing of another boot is committed, hack/torture and TestCommitOfAnotherBoot show.
func testGoldensReboot(t *testing.T) {
	const attributes = "from: golden/cache, commitTo: cache, size: 300Mi"
	runJob(t, "before-reboot", "echo whole >state"+marked, attributes)
	settled(t, "default.cache.1")
	apply(t, job(t, "at-reboot", "echo half >state; sync; sleep 123456"+marked, attributes))
	ready(t, "at-reboot")
	if _, err := cluster("", "reboot"); err != nil {
		t.Fatal(err)
	}
	pluginReady(t)
	outcome(t, "at-reboot", "Failed")
	mustStay(t, "default.cache.1")
	if log := runJob(t, "after-reboot", "cat state", "from: golden/cache"); log != "whole\n" {
		t.Errorf("the golden has %q after a reboot", log)
	}
}
