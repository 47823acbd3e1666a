// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

var (
	// ErrReference means that a reference, or a file with credentials, is not usable as it is written.
	ErrReference = errors.New("not a usable image reference")
	// ErrNotFound means that the registry has no such image, or not for this platform.
	ErrNotFound = errors.New("image not found")
	// ErrDenied means that the registry refuses the credentials, or asks for some.
	ErrDenied = errors.New("registry denies access")
	// ErrUnreachable means that the registry does not answer, or not now. Another try may succeed.
	ErrUnreachable = errors.New("registry is unreachable")
	// ErrInvalid means that what the registry sent is not what was asked for, or cannot be content.
	ErrInvalid = errors.New("image is invalid")
)

var (
	errIdle    = errors.New("nothing arrived")
	errRefused = errors.New("its registry leads elsewhere")
	// errNoTLS is not final: the library also tries by HTTP where HTTPS fails.
	errNoTLS = errors.New("no HTTPS")
)

// statusError is an answer that is no success.
type statusError struct {
	code  int
	after time.Duration // what the registry asks to wait for; 0 is nothing
}

func (e *statusError) Error() string {
	return fmt.Sprintf("it answers %d %s", e.code, http.StatusText(e.code))
}

// temporary reports whether another try may succeed.
func (e *statusError) temporary() bool {
	return e.code == http.StatusRequestTimeout || e.code == http.StatusTooManyRequests || e.code >= 500
}

// mayPass reports whether an error may pass by itself.
func mayPass(err error) bool {
	var status *statusError
	if errors.As(ownError(err), &status) {
		return status.temporary()
	}
	if errors.Is(err, errRefused) || errors.Is(err, context.Canceled) {
		return false
	}
	for _, final := range ours {
		if errors.Is(err, final) && final != ErrUnreachable {
			return false
		}
	}
	var file *os.PathError
	return !errors.As(err, &file) && !isCertificate(err)
}

// ownError turns the library's error of a status into our own.
func ownError(err error) error {
	var theirs *transport.Error
	if errors.As(err, &theirs) {
		return &statusError{code: theirs.StatusCode}
	}
	return err
}

// explain says what happened to an image, of which registry, and what to do. The error of a server, and of
// the library, can repeat what a server sent. So only words that are known to be the system's own are
// passed on.
func (s *session) explain(ctx context.Context, err error) error {
	var status *statusError
	switch err = ownError(err); {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("pulling the image %s: %w", s.ref, context.Cause(ctx))
	case errors.As(err, &status):
		return s.explainStatus(status)
	case isOurs(err):
		return fmt.Errorf("%w (image %s)", err, s.ref)
	case errors.Is(err, errRefused):
		return fmt.Errorf("%w: image %s: %w", ErrInvalid, s.ref, inner(err))
	}
	return fmt.Errorf("%w: image %s: %w; check the registry's name, the network and the proxy",
		ErrUnreachable, s.ref, s.reason(err))
}

func (s *session) explainStatus(err *statusError) error {
	switch {
	case err.code == http.StatusNotFound:
		return fmt.Errorf("%w: image %s: the registry has no such tag, digest or blob (404); check the reference",
			ErrNotFound, s.ref)
	case err.code == http.StatusUnauthorized || err.code == http.StatusForbidden:
		return fmt.Errorf("%w: image %s: %w; %s", ErrDenied, s.ref, err, s.creds.remedy())
	case err.code == http.StatusTooManyRequests:
		return fmt.Errorf("%w: image %s: it limits how often it may be asked (429); wait, or add credentials with a higher limit",
			ErrUnreachable, s.ref)
	case err.temporary():
		return fmt.Errorf("%w: image %s: %w; it is tried again", ErrUnreachable, s.ref, err)
	}
	return fmt.Errorf("%w: image %s: %w, which is no answer of a registry; check its name", ErrInvalid, s.ref, err)
}

// ours are the kinds of errors of which nothing is left to explain.
var ours = []error{ErrReference, ErrNotFound, ErrDenied, ErrUnreachable, ErrInvalid, pool.ErrFull}

// isOurs reports whether an error says already what happened: it has its sentinel, or is about a file of
// the pool, or is the caller's, from [Config.Room].
func isOurs(err error) bool {
	for _, kind := range ours {
		if errors.Is(err, kind) {
			return true
		}
	}
	var file *os.PathError
	var room *roomError
	return errors.As(err, &file) || errors.As(err, &room)
}

// roomError is what [Config.Room] returned.
type roomError struct{ error }

func (e *roomError) Unwrap() error { return e.error }

// reason returns the part of an error that the system, and not a server, has written.
func (s *session) reason(err error) error {
	var at *url.Error
	host := s.host
	if errors.As(err, &at) {
		// Its URL may have a token of another server, as redirects do.
		if u, e := url.Parse(at.URL); e == nil && u.Host != "" {
			host = u.Host
		}
	}
	var (
		dns   *net.DNSError
		op    *net.OpError
		errno syscall.Errno
	)
	switch {
	case errors.Is(err, errIdle):
		return err
	case errors.As(err, &dns):
		return fmt.Errorf("%s has no address in the DNS", dns.Name)
	case errors.As(err, &op) && op.Addr != nil && errors.As(err, &errno):
		return fmt.Errorf("%s: %w", placeOf(host, op.Addr.String()), errno)
	case errors.As(err, &errno):
		return fmt.Errorf("%s: %w", host, errno)
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return fmt.Errorf("%s does not answer in time", host)
	case isCertificate(err):
		return fmt.Errorf("the certificate of %s is not trusted", host)
	case errors.Is(err, errNoTLS), errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%s does not speak HTTPS, and is not among those that --content-plain-http names", host)
	}
	return fmt.Errorf("%s breaks off, or does not speak the registry's protocol", host)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// inner returns an error without the URL that the HTTP client puts around it.
func inner(err error) error {
	var at *url.Error
	for errors.As(err, &at) {
		err = at.Err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	return err
}

// placeOf names a host and its address, which may be the same.
func placeOf(host, address string) string {
	if host == address {
		return host
	}
	return host + " (" + address + ")"
}
