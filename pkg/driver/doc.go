// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package driver speaks CSI 1.13 over gRPC. Each node serves the Identity, Controller and
// Node services.
//
// The package turns requests into plain values (request.go; parameters.go for those of a
// StorageClass), calls package volume, and turns errors into status codes (errors.go), each
// in one place. It makes no system call for a volume, starts no VM, and knows no path
// inside the pool.
//
// Sources: the CSI specification 1.13; for the keys of an inline volume's context, "Pod
// Inline Volume Support" and "Pod Info" in the Kubernetes CSI developer documentation.
package driver
