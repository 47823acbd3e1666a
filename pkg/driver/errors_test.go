// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// mustSay checks the code that an error has on the wire, and the words that its message must contain.
func mustSay(t testing.TB, err error, code codes.Code, says ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("code %s, not %s: %v", status.Code(err), code, err)
	}
	for _, s := range says {
		if !strings.Contains(status.Convert(err).Message(), s) {
			t.Errorf("does not say %q: %v", s, err)
		}
	}
	for _, fault := range plain.Faults(status.Convert(err).Message()) {
		t.Errorf("%s: %v", fault, err)
	}
}

func TestCode(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want codes.Code
	}{
		"busy":                     {errdefs.ErrBusy, codes.Aborted},
		"token":                    {errToken, codes.Aborted},
		"elsewhere":                {errElsewhere, codes.ResourceExhausted},
		"under way":                {errdefs.ErrUnderWay, codes.Aborted},
		"under way, out of time":   {fmt.Errorf("%w: %w", errdefs.ErrUnderWay, context.DeadlineExceeded), codes.DeadlineExceeded},
		"building":                 {template.ErrBuilding, codes.Aborted},
		"formatter changed":        {template.ErrChanged, codes.Aborted},
		"building, canceled":       {fmt.Errorf("%w: %w", template.ErrBuilding, context.Canceled), codes.Aborted},
		"building, out of time":    {fmt.Errorf("%w: %w", template.ErrBuilding, context.DeadlineExceeded), codes.DeadlineExceeded},
		"size":                     {diskfs.ErrOutOfRange, codes.OutOfRange},
		"filesystem":               {diskfs.ErrUnknown, codes.InvalidArgument},
		"label or option":          {diskfs.ErrInvalid, codes.InvalidArgument},
		"request":                  {errdefs.ErrInvalid, codes.InvalidArgument},
		"volume exists":            {errdefs.ErrExists, codes.AlreadyExists},
		"no volume":                {errdefs.ErrNotFound, codes.NotFound},
		"no volume at this path":   {fmt.Errorf("%w: %w", errdefs.ErrNotFound, errdefs.ErrExists), codes.NotFound},
		"no volume at such a path": {fmt.Errorf("%w: %w", errdefs.ErrNotFound, errdefs.ErrInvalid), codes.NotFound},
		"full":                     {fmt.Errorf("%w: %w", pool.ErrFull, syscall.ENOSPC), codes.ResourceExhausted},
		"limit":                    {errdefs.ErrLimit, codes.ResourceExhausted},
		"too many templates":       {fmt.Errorf("volume v: %w", template.ErrTooMany), codes.ResourceExhausted},
		"state":                    {errdefs.ErrState, codes.FailedPrecondition},
		"no formatter":             {template.ErrNoFormatter, codes.FailedPrecondition},
		"no content":               {template.ErrNoContent, codes.FailedPrecondition},
		"pool":                     {pool.ErrUnusable, codes.FailedPrecondition},
		"unhealthy":                {errUnhealthy, codes.FailedPrecondition},
		"locked":                   {pool.ErrLocked, codes.Unavailable},
		"locked, out of time":      {fmt.Errorf("%w: %w", pool.ErrLocked, context.DeadlineExceeded), codes.Unavailable},
		"canceled":                 {context.Canceled, codes.Canceled},
		"corrupt":                  {template.ErrCorrupt, codes.Internal},
		"from the kernel":          {syscall.EIO, codes.Internal},
		"anything":                 {errors.New("?"), codes.Internal},
		"from gRPC":                {status.Error(codes.Unimplemented, "no"), codes.Unimplemented},
	} {
		t.Run(name, func(t *testing.T) {
			for how, err := range map[string]error{
				"as it is": c.err,
				"wrapped":  fmt.Errorf("volume v: %w (%w)", c.err, errors.New("more")),
				"joined":   errors.Join(c.err, syscall.EIO),
			} {
				if got := code(err); got != c.want {
					t.Errorf("%s: %s, not %s", how, got, c.want)
				}
				sent := toStatus(err)
				if status.Code(sent) != c.want {
					t.Errorf("%s: sent as %s, not %s", how, status.Code(sent), c.want)
				}
				if again := toStatus(sent); !errors.Is(again, sent) {
					t.Errorf("%s: changed by a second translation: %v", how, again)
				}
			}
			if got := status.Convert(toStatus(c.err)).Message(); name != "from gRPC" && got != c.err.Error() {
				t.Errorf("the message became %q", got)
			}
		})
	}
	if err := toStatus(nil); err != nil || code(nil) != codes.OK {
		t.Errorf("no error became %v, %s", err, code(nil))
	}
}
