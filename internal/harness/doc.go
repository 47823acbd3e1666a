// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package harness plays a node of a Kubernetes cluster for a plugin that really runs: it starts the plugin's process, knows
// kubelet's paths, makes the calls that kubelet and the sidecars make over gRPC, and finds what volumes have left.
//
// It knows the plugin only by its command line and by CSI, and nothing of its packages. The tests of pkg/driver,
// hack/torture and hack/demo share it. Package harnesstest ends a test where this package returns an error.
package harness
