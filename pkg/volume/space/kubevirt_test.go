// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

const (
	manifests = "../../../deploy/kubernetes/"
	gibibyte  = 1024 * size.MiB
)

// TestKubeVirtExamplesFit asks for everything at once that the examples for KubeVirt ask for, in their overlay's pool.
func TestKubeVirtExamplesFit(t *testing.T) {
	b := vmPool(t)
	var asked int64
	for _, d := range kubeVirtDemands(t) {
		if err := b.refuse(d); err != nil {
			t.Error(err)
		}
		b.thin, b.firm, asked = b.thin+d.Thin, b.firm+d.Firm, asked+d.Thin+d.Firm
	}
	t.Logf("asked for is %s: %s", size.Format(asked), b)
	if asked < 100*gibibyte {
		t.Errorf("the examples ask for %s, which cannot be all", size.Format(asked))
	}
}

// vmPool is the pool of components/vm-pool when it is new.
func vmPool(t *testing.T) budget {
	t.Helper()
	text := read(t, "components/vm-pool/kustomization.yaml")
	flag := func(name string) string {
		all := regexp.MustCompile("--"+name+"=([0-9.A-Za-z]+)").FindAllStringSubmatch(text, -1)
		if len(all) == 0 {
			t.Fatalf("no --%s in\n%s", name, text)
		}
		return all[len(all)-1][1]
	}
	overcommit, err := strconv.ParseFloat(flag("overcommit"), 64)
	if err != nil {
		t.Fatal(err)
	}
	total := bytesOf(t, flag("loopback-pool-size")) / 100 * 98 // an xfs takes 1.2% for itself
	return budget{
		total: total, available: total, headroom: total / 20, overcommit: overcommit,
		others: 4 * gibibyte, // the disk of a content, and what formats templates
	}
}

// manifest is what the objects of the examples say of space.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		manifestSpec
		ImportsToKeep       int64
		Template            struct{ Spec manifestSpec }
		DataVolumeTemplates []struct{ Spec manifestSpec }
	}
}

type manifestSpec struct {
	Resources resources
	Storage   struct{ Resources resources }
	Source    struct{ PersistentVolumeClaimName string }
}

type resources struct{ Requests struct{ Storage string } }

// kubeVirtDemands lists what the claims and snapshots of the examples take, and the claims that CDI adds.
func kubeVirtDemands(t *testing.T) (all []Demand) {
	t.Helper()
	claims := map[string]int64{} // sizes in bytes
	var snapshots []string
	claim := func(name string, bytes int64) {
		claims[name] = bytes
		all = append(all, Claim(name, bytes, image.Thin))
	}
	for _, m := range examples(t) {
		name, own := m.Metadata.Name, m.Spec.manifestSpec
		switch m.Kind {
		case "PersistentVolumeClaim":
			claim(name, bytesOf(t, own.Resources.Requests.Storage))
		case "DataVolume":
			claim(name, bytesOf(t, own.Storage.Resources.Requests.Storage))
			claim(name+"-scratch", scratch(claims[name]))
		case "DataImportCron":
			bytes := bytesOf(t, m.Spec.Template.Spec.Storage.Resources.Requests.Storage)
			for range m.Spec.ImportsToKeep + 1 { // the oldest goes after the newest is there
				claim(name, bytes)
			}
			claim(name+"-scratch", scratch(bytes))
		case "VirtualMachine":
			for _, v := range m.Spec.DataVolumeTemplates {
				claim(name, bytesOf(t, v.Spec.Storage.Resources.Requests.Storage))
			}
		case "VolumeSnapshot":
			snapshots = append(snapshots, own.Source.PersistentVolumeClaimName)
		}
	}
	for _, of := range snapshots { // at most: of a claim that is full
		if claims[of] == 0 {
			t.Errorf("a snapshot of %s, which no example makes", of)
		}
		all = append(all, Demand{Firm: claims[of]})
	}
	return all
}

// scratch is the size of the claim that CDI makes beside a target of the given bytes: 6% more, for a filesystem.
func scratch(bytes int64) int64 { return (bytes*106 + 99) / 100 }

func TestScratch(t *testing.T) {
	if got := scratch(10 * gibibyte); got != 11381663335 {
		t.Errorf("%d bytes", got)
	}
}

// examples reads the examples for KubeVirt.
func examples(t *testing.T) (all []manifest) {
	t.Helper()
	files, err := filepath.Glob(manifests + "examples/kubevirt/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		for doc := range strings.SplitSeq(read(t, strings.TrimPrefix(f, manifests)), "\n---\n") {
			var m manifest
			if err := yaml.Unmarshal([]byte(doc), &m); err != nil {
				t.Fatalf("%s: %v", f, err)
			}
			all = append(all, m)
		}
	}
	return all
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(manifests + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func bytesOf(t *testing.T, quantity string) int64 {
	t.Helper()
	bytes, err := size.Parse(quantity)
	if err != nil {
		t.Fatalf("%q: %v", quantity, err)
	}
	return bytes
}
