// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// errToken means that a list cannot go on from the given token.
var errToken = errors.New("invalid token")

// errElsewhere means that the request is for another node.
var errElsewhere = errors.New("not on this node")

// errUnhealthy means that Probe found a condition that keeps the plugin from working.
var errUnhealthy = errors.New("the plugin cannot do its work")

// code maps an error to the status code that the CSI specification gives it
// ("Error Scheme"). Nothing else chooses status codes.
func code(err error) codes.Code {
	if s, ok := status.FromError(err); ok { // gRPC itself made it, for example Unimplemented
		return s.Code()
	}
	switch {
	case errors.Is(err, errdefs.ErrNotFound): // first: its cause may be any other kind
		return codes.NotFound
	case errors.Is(err, template.ErrBuilding), errors.Is(err, errdefs.ErrUnderWay):
		if errors.Is(err, context.DeadlineExceeded) {
			return codes.DeadlineExceeded
		}
		return codes.Aborted
	case errors.Is(err, errdefs.ErrBusy), errors.Is(err, errToken), errors.Is(err, template.ErrChanged):
		return codes.Aborted
	case errors.Is(err, diskfs.ErrOutOfRange):
		return codes.OutOfRange
	case errors.Is(err, errdefs.ErrInvalid), errors.Is(err, diskfs.ErrUnknown), errors.Is(err, diskfs.ErrInvalid), errors.Is(err, size.ErrInvalid):
		return codes.InvalidArgument
	case errors.Is(err, errdefs.ErrExists):
		return codes.AlreadyExists
	case errors.Is(err, pool.ErrFull), errors.Is(err, pool.ErrCannotReserve), errors.Is(err, errdefs.ErrLimit), errors.Is(err, template.ErrTooMany), errors.Is(err, errElsewhere):
		return codes.ResourceExhausted
	case errors.Is(err, errdefs.ErrState), errors.Is(err, template.ErrNoFormatter), errors.Is(err, template.ErrNoContent), errors.Is(err, pool.ErrUnusable), errors.Is(err, errUnhealthy):
		return codes.FailedPrecondition
	case errors.Is(err, pool.ErrLocked):
		return codes.Unavailable
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return codes.Internal
}

// causeOf tells an operator why a call failed. Where two causes meet, it is the one that can be mended.
func causeOf(err error) admin.Cause {
	is := func(kinds ...error) bool {
		return slices.ContainsFunc(kinds, func(kind error) bool { return errors.Is(err, kind) })
	}
	switch {
	case err == nil:
		return ""
	case is(pool.ErrUnusable, template.ErrNoFormatter, errUnhealthy):
		return admin.CauseCondition
	case is(pool.ErrFull, pool.ErrCannotReserve):
		return admin.CauseSpace
	case is(template.ErrNoContent):
		return admin.CauseContent
	case is(template.ErrBuilding, template.ErrTooMany, template.ErrChanged):
		return admin.CauseTemplate
	case is(errdefs.ErrLimit):
		return admin.CauseLimit
	case is(errElsewhere):
		return admin.CauseElsewhere
	case is(errdefs.ErrBusy, errdefs.ErrUnderWay, pool.ErrLocked, context.Canceled):
		return admin.CauseBusy
	case code(err) == codes.Internal:
		return admin.CauseNode
	}
	return admin.CauseRequest
}

// inParameter adds the name of a StorageClass parameter to an error about it.
func inParameter(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("parameter %s: %w", name, err)
}

func outOfRange(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{diskfs.ErrOutOfRange}, args...)...)
}

// toStatus gives an error its status code, for the wire.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(code(err), err.Error())
}
