#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# Builds what the test cluster is made of: Kubernetes, CSI's sidecars, and
# Kubernetes' storage suite, at the versions of build/go.mod, and Helm, at that
# of ../chart/go.mod. Prints the directory. It is kept below the user's cache
# directory, by a hash of the recipe; a build with nothing cached took 345 s on
# two cores, before Helm was added.
set -euo pipefail
export PATH="$PATH:/usr/local/go/bin" CGO_ENABLED=0
here=$(dirname "$(realpath "$0")")
recipe=("$here/build.sh" "$here"/build/go.{mod,sum} "$here"/build/*/*.go "$here"/../chart/go.{mod,sum})
key=$({ go version && cat "${recipe[@]}"; } | sha256sum | cut -c-16)
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/csi-disktemplate/kube
out=$cache/$key
if [[ -e $out ]]; then
	touch "$out"
	echo "$out"
	exit
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two builds at once would take twice as long each
if [[ ! -e $out ]]; then
	echo "kube: building Kubernetes; this takes a while, once" >&2
	# What recipes of before made may be in use; what nobody looked at for a month is not.
	find "$cache" -mindepth 1 -maxdepth 1 -type d -mtime +30 -exec rm -rf {} +
	new=$cache/building
	rm -rf "$new" # of a killed build
	mkdir "$new"
	cd "$here/build"

	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	minor=${version#v1.}
	link="-s -w"
	for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
		link+=" -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=${minor%%.*} -X $package.gitTreeState=clean"
		link+=" -X $package.gitCommit=0000000000000000000000000000000000000000 -X $package.buildDate=2026-01-01T00:00:00Z"
	done
	# No -trimpath: with replace directives it keeps modules from sharing the build cache.
	go build -ldflags "$link" -o "$new/" ./hyper \
		github.com/kubernetes-csi/external-{provisioner/v6/cmd/csi-provisioner,resizer/v2/cmd/csi-resizer} \
		github.com/kubernetes-csi/external-snapshotter/v8/cmd/{csi-snapshotter,snapshot-controller} \
		github.com/onsi/ginkgo/v2/ginkgo k8s.io/kubernetes/test/images/agnhost >&2
	# -vet=off: vet would read 2,900 packages.
	go test -vet=off -c -ldflags "$link" -o "$new/storage-e2e.test" ./suite >&2
	go build -C "$here/../chart" -ldflags "-s -w" -o "$new/helm" helm.sh/helm/v4/cmd/helm >&2
	for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl etcd; do
		ln -s hyper "$new/$name"
	done
	crds=$(go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)/config/crd
	mkdir "$new/crds"
	install -m 0644 "$crds"/snapshot.storage.k8s.io_*.yaml "$new/crds"
	controller=$(go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/v8)/deploy/kubernetes/snapshot-controller
	install -m 0644 "$controller/rbac-snapshot-controller.yaml" "$new/snapshot-controller-rbac.yaml"
	mv "$new" "$out"
fi
echo "$out"
