// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package errdefs has the kinds of error that operations on volumes return, for all rooms of
// package volume.
//
// An error wraps one of them together with its cause. pkg/driver maps each to the gRPC
// status code that CSI 1.13 gives it ("Error Scheme").
package errdefs

import "errors"

var (
	// ErrInvalid means that the request itself is wrong, whatever the state of the node.
	ErrInvalid = errors.New("invalid request")
	// ErrExists means that the volume exists, or something is mounted at the target, and it
	// differs from what was asked for.
	ErrExists = errors.New("already exists and is different")
	// ErrNotFound means that there is no such volume or snapshot, or that the volume is not
	// at that path.
	ErrNotFound = errors.New("not found")
	// ErrBusy means that another operation works on the same volume or snapshot.
	ErrBusy = errors.New("another operation on it is under way; try again")
	// ErrUnderWay means that the caller's time ended before the work did. The work goes on,
	// and the same request joins it.
	ErrUnderWay = errors.New("still under way")
	// ErrState means that the node is not in the state that the operation needs. Somebody
	// has to change that first.
	ErrState = errors.New("operation not possible in this state")
	// ErrLimit means that a namespace or the node has as many inline volumes as its
	// administrator allows.
	ErrLimit = errors.New("limit reached")
)
