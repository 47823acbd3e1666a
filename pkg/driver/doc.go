// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package driver speaks CSI 1.13 over gRPC: the Identity, Controller and Node
// services, all of them on each node.
//
// It turns requests into plain values (request.go; parameters.go for those of a
// StorageClass), has package volume carry them out, and turns errors into status codes (errors.go), each in one place.
// It knows no system call, no VM, and no path inside the pool.
//
// Sources: the CSI specification 1.13; "Pod Inline Volume Support" and "Pod
// Info" in the Kubernetes CSI developer documentation for the keys of an inline
// volume's context.
package driver
