// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Command chart writes the templates of the Helm chart from the kustomize manifests, so that whoever changes
// what is deployed edits deploy/kubernetes alone.
//
//	go -C hack/chart run . # make chart
//
// A template is the text of a manifest, with its comments. Woven into it, at places named by JSON pointers, are
// the patches of kustomize components, each behind the value that turns it on, and values such as the image
// (plan.go has both tables). The templates are committed. Tests render chart and kustomize by their own
// libraries and compare the objects.
//
// Sources: "Kustomization" in the kustomize reference (patches, labels, namespace), RFC 6902 for the patches,
// RFC 6901 for pointers, and "The Chart Template Developer's Guide" in Helm's documentation.
package main
