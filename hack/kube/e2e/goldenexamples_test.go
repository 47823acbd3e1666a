// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// goldenExample reads an example of goldens.
func goldenExample(t testing.TB, name string) string {
	t.Helper()
	return example(t, "goldens/"+name)
}

// goldenVolume is what an example says of its volume.
type goldenVolume struct {
	Driver, FSType   string
	VolumeAttributes map[string]string
}

// manifest makes the manifest of a pod that looks at such a volume. It commits nothing.
func (v goldenVolume) manifest(t testing.TB, name string) string {
	t.Helper()
	b, err := json.Marshal(map[string]any{"driver": v.Driver, "fsType": v.FSType, "volumeAttributes": v.VolumeAttributes})
	if err != nil {
		t.Fatal(err)
	}
	return replace(t, pod(name, "ls -A /data", "csi: "+string(b)), "restartPolicy: Always", "restartPolicy: Never")
}

// ofActionsRunner returns the volume of an example for actions-runner-controller, whose pod the API server validates.
func ofActionsRunner(t testing.TB, name string) (v goldenVolume) {
	t.Helper()
	var values struct {
		GithubConfigURL string `json:"githubConfigUrl"`
		Template        struct{ Spec map[string]any }
	}
	if err := yaml.Unmarshal([]byte(goldenExample(t, name)), &values); err != nil || values.GithubConfigURL == "" {
		t.Fatalf("%s: %v, %+v", name, err, values)
	}
	spec, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "runner"}, "spec": values.Template.Spec,
	})
	if err != nil {
		t.Fatal(err)
	}
	validate(t, string(spec))
	var pod struct {
		Spec struct {
			Volumes []struct {
				Name string
				CSI  goldenVolume
			}
		}
	}
	if err := yaml.Unmarshal(spec, &pod); err != nil || len(pod.Spec.Volumes) == 0 || pod.Spec.Volumes[0].Name != "golden" {
		t.Fatalf("%s: %v, %+v", name, err, pod)
	}
	return pod.Spec.Volumes[0].CSI
}

// ofGitLabRunner returns the volume of an example for GitLab's runner.
func ofGitLabRunner(t testing.TB, name string) goldenVolume {
	t.Helper()
	v, section := goldenVolume{VolumeAttributes: map[string]string{}}, ""
	for line := range strings.Lines(goldenExample(t, name)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, _ := strings.Cut(line, " = ")
		value = strings.Trim(value, `"`)
		switch {
		case section == "runners.kubernetes.volumes.csi.volume_attributes":
			v.VolumeAttributes[key] = value
		case section == "runners.kubernetes.volumes.csi" && key == "driver":
			v.Driver = value
		case section == "runners.kubernetes.volumes.csi" && key == "fs_type":
			v.FSType = value
		}
	}
	return v
}

// jobLog waits until a Job of one pod has ended well, and returns the pod's log.
func jobLog(t testing.TB, job string, within time.Duration) string {
	t.Helper()
	completed(t, job, within)
	return kubectl(t, "logs", "job/"+job)
}

// TestGoldenExamples applies the examples of goldens, as far as there are images for them: what they call of programs
// that are not there is replaced. Those for runners of CI systems must have pods that the API server takes, and volumes
// that the plugin takes. TestBuildFromGolden applies go-build.yaml.
func TestGoldenExamples(t *testing.T) {
	makeDatabase(t)
	listContents(t, block(t, contentsDoc, "yaml", "tar: postgres.tar.zst"))
	withGoldens(t, "goldens: []", []string{"contents"})
	t.Run("volumes", testVolumesOfRunners)
	t.Run("database", testDatabaseExample)
	t.Run("node-modules", testNodeModulesExample)
	t.Run("claim", func(t *testing.T) {
		apply(t, goldenExample(t, "claim.yaml"))
		ready(t, "from-go-cache")
		eventually(t, "the log", func() string { return kubectl(t, "logs", "from-go-cache") }, "listed")
	})
	files, err := filepath.Glob(filepath.Join(root, examples, "goldens/*.yaml"))
	if err != nil || len(files) != 5 {
		t.Errorf("expected 5 examples, found %s: %v", strings.Join(files, ", "), err)
	}
}

func testVolumesOfRunners(t *testing.T) {
	validate(t, goldenExample(t, "buildkit.yaml"))
	var all string
	var pods []string
	for _, name := range []string{"go-build", "node-modules", "buildkit", "database"} {
		actions, gitlab := ofActionsRunner(t, "actions-runner/"+name+".yaml"), ofGitLabRunner(t, "gitlab-runner/"+name+".toml")
		if !reflect.DeepEqual(actions, gitlab) {
			t.Errorf("%s: the runner of GitHub has %+v, that of GitLab %+v", name, actions, gitlab)
		}
		var plain struct {
			Spec struct {
				Template struct {
					Spec struct{ Volumes []struct{ CSI goldenVolume } }
				}
			}
		}
		parts := strings.Split(goldenExample(t, name+".yaml"), "---\n")
		if err := yaml.Unmarshal([]byte(parts[len(parts)-1]), &plain); err != nil {
			t.Fatal(err)
		}
		volumes := plain.Spec.Template.Spec.Volumes
		if v := volumes[len(volumes)-1].CSI; name != "database" && !reflect.DeepEqual(v, actions) { // it is one of a branch
			t.Errorf("%s: the job has %+v, the runner of GitHub %+v", name, v, actions)
		}
		all += actions.manifest(t, "of-"+name)
		pods = append(pods, "of-"+name)
	}
	apply(t, all)
	for _, pod := range pods {
		outcome(t, pod, "Succeeded")
	}
	settled(t)
}

// testDatabaseExample runs the job of main, then that of a branch, then that of main as actions-runner-controller has it.
func testDatabaseExample(t *testing.T) {
	t.Cleanup(func() { forgetGoldens(t) })
	manifest := goldenExample(t, "database.yaml")
	branch := func(name, more string) string {
		t.Helper()
		job := replace(t, manifest, "my-branch", name, "database-"+name, "database-"+name+more)
		apply(t, job)
		return jobLog(t, "database-"+name+more, patience)
	}
	const made = "001-add-visits was made\n002-index was made\neverybody|0\n"
	const there = "001-add-visits is there\n002-index is there\neverybody|0\n"
	for _, c := range []struct{ name, more, want string }{
		{"main", "-1", made}, {"feature-1", "-1", there}, {"feature-1", "-2", there}, {"main", "-2", there},
	} {
		if got := branch(c.name, c.more); got != c.want {
			t.Errorf("the job of %s has %q, expected %q", c.name, got, c.want)
		}
		generation := strings.TrimPrefix(c.more, "-")
		eventually(t, "the pool", func() string { return kept(t) }, "default."+c.name+"."+generation, "to commit: .")
	}
	settled(t, "default.feature-1.1", "default.feature-1.2", "default.main.1", "default.main.2")

	runner := goldenExample(t, "actions-runner/database.yaml")
	_, spec, _ := strings.Cut(runner, "\n  spec:\n")
	spec = regexp.MustCompile(`(?m)^  `).ReplaceAllString(spec, "")
	apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: runner}\nspec:\n  restartPolicy: Never\n"+replace(t, spec,
		"[pg_isready, --username, postgres]", `[psql, --host, /tmp, --username, postgres, --command, SELECT]`,
		"image: postgres:15", "image: postgres:15\n    command: [postgres, -k, /tmp]",
		"ghcr.io/actions/actions-runner:latest", "busybox:1.37", "[/home/runner/run.sh]", "[touch, /golden/commit]"))
	outcome(t, "runner", "Succeeded")
	settled(t, "default.feature-1.1", "default.feature-1.2", "default.main.2", "default.main.3")
	if got := branch("main", "-4"); got != there {
		t.Errorf("the job of main has %q after the runner's", got)
	}
}

// testNodeModulesExample runs the example twice, with an npm that is a shell function: the second job has the modules,
// and commits nothing.
func testNodeModulesExample(t *testing.T) {
	t.Cleanup(func() { forgetGoldens(t) })
	const npm = `npm() {
            case $1 in
            ci) mkdir -p node_modules/express; echo installed ;;
            test) ls node_modules ;;
            esac
          }
          echo '{}' >package-lock.json`
	manifest := replace(t, goldenExample(t, "node-modules.yaml"), "node:22", "busybox:1.37",
		"git clone --depth 1 https://github.com/expressjs/express /tmp/repository", npm, "cp -r /tmp/repository/. .", "")
	for i, want := range []string{"installed\nexpress\n", "express\n"} {
		name := fmt.Sprint("node-modules-", i)
		apply(t, replace(t, manifest, "{name: node-modules}", "{name: "+name+"}"))
		if got := jobLog(t, name, patience); got != want {
			t.Errorf("job %d has %q, expected %q", i, got, want)
		}
		settled(t, "default.node-modules.1")
	}
	mustStay(t, "default.node-modules.1")
}

// TestBuildFromGolden applies the example go-build.yaml twice, with this repository and its modules from the machine: once
// with empty caches, and once from the golden that the first job left. It logs how long both builds took.
//
//	hack/kube/e2e.sh -run TestBuildFromGolden
func TestBuildFromGolden(t *testing.T) {
	modules := exec.Command("go", "list", "-deps", "./cmd/csi-disktemplate") // downloads what is missing
	modules.Dir = root
	if out, err := modules.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	env, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	of := strings.Fields(string(env))
	withGoldens(t, "goldens: []", nil)
	manifest := replace(t, goldenExample(t, "go-build.yaml"), "golang:1.26", "busybox:1.37",
		"git clone --depth 1 https://github.com/csi-disktemplate/csi-disktemplate /src", "cp -r /repository /src",
		"go build", "now() { cut -d' ' -f1 /proc/uptime; }; started=$(now); go build",
		"mkdir -p", "echo $started $(now)\n          mkdir -p",
		"        env:\n", `        env:
        - {name: PATH, value: "/usr/local/go/bin:/bin"}
        - {name: HOME, value: /tmp}
        - {name: GOPROXY, value: "file:///modules"}
        - {name: GOFLAGS, value: -buildvcs=false}
        - {name: GOSUMDB, value: "off"}
        - {name: GOTOOLCHAIN, value: local}
        - {name: CGO_ENABLED, value: "0"}
`,
		"        volumeMounts:\n", `        volumeMounts:
        - {name: go, mountPath: /usr/local/go, readOnly: true}
        - {name: modules, mountPath: /modules, readOnly: true}
`, "      volumes:\n", fmt.Sprintf(`      volumes:
      - {name: go, hostPath: {path: %s}}
      - {name: modules, hostPath: {path: %s}}
`, of[0], filepath.Join(of[1], "cache/download")))
	manifest = replace(t, manifest, "- {name: go, mountPath", `- {name: repository, mountPath: /repository, readOnly: true}
        - {name: go, mountPath`, "- {name: go, hostPath", fmt.Sprintf(`- {name: repository, hostPath: {path: %s}}
      - {name: go, hostPath`, source(t)))
	var took [2]float64
	for i, from := range []string{"empty caches", "a golden"} {
		name := fmt.Sprint("go-build-", i)
		start := time.Now()
		apply(t, replace(t, manifest, "{name: go-build}", "{name: "+name+"}"))
		log := jobLog(t, name, 20*time.Minute)
		whole := time.Since(start)
		var began, ended float64
		if _, err := fmt.Sscan(log[strings.LastIndex(strings.TrimSpace(log), "\n")+1:], &began, &ended); err != nil {
			t.Fatalf("%v in %s", err, log)
		}
		took[i] = ended - began
		t.Logf("from %s: built in %.1f s, %.1f s from the creation of the job to its end", from, took[i], whole.Seconds())
		eventually(t, "the pool", func() string { return kept(t) }, fmt.Sprintf("default.go-cache.%d, to commit: .", i+1))
	}
	t.Logf("the build from a golden takes 1/%.0f of the time", took[0]/took[1])
	if took[1] > took[0]/2 {
		t.Errorf("a build takes %.1f s from a golden, and %.1f s from empty caches", took[1], took[0])
	}
}

// source is a directory of the node with what a clone of the repository has for a build.
func source(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(stateDir(), "root/source")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, name := range []string{"go.mod", "go.sum", "cmd", "pkg", "internal"} {
		if out, err := exec.Command("cp", "-r", "--target-directory", dir, filepath.Join(root, name)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return dir
}
