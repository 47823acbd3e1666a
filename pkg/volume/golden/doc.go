// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package golden has the goldens of a pool: what volumes left behind, for the next ones to start from.
//
// A golden has a name and belongs to a namespace, or is shared: then the operator has said who may start from it,
// and who may replace it. It consists of generations, one image each. A volume starts from the newest one. Nobody
// ever writes to a generation. The next one is linked beside it in one step, so that what has a name is whole, and
// of two that come at once the later one is the newest. Whoever has an older one open keeps it.
//
// An image's name says which generation of which golden it is, its record in trusted.disktemplate the rest, and its
// modification time when a volume last started from it, to within some seconds. Nothing else is kept anywhere.
//
// How much of the pool goldens may take, and which of them go, is decided in bounds.go.
package golden
