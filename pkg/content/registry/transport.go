// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	// connectTimeout is for one address of a host, and for TLS. A host that is up needs less than a second,
	// also on another continent and after a lost packet or two.
	connectTimeout = 10 * time.Second
	// handshakeTimeout is for finding out how to log in, and for doing it.
	handshakeTimeout = 2 * time.Minute
	// maxRedirects is what Go's client follows. Registries need one or two.
	maxRedirects = 10
)

// session is the exchange with one repository for one call. It is closed at the end of the call.
type session struct {
	ref     name.Reference
	host    string // of the registry, without port
	creds   *credentials
	idle    time.Duration
	client  *http.Client
	network *http.Transport

	plain func(host string) bool // may be spoken to by HTTP

	mu    sync.Mutex
	named []string // hosts that the operator named: the registry's, and proxies

	login sync.Mutex // held while the handshake is made
	ready bool
}

// newSession makes no connection.
func (c *Client) newSession(ref name.Reference) (*session, error) {
	creds, err := findCredentials(c.config.Credentials, ref.Context())
	if err != nil {
		return nil, err
	}
	s := &session{ref: ref, host: hostOf(ref.Context().RegistryStr()), creds: creds, idle: c.config.Idle}
	s.named = []string{s.host}
	s.plain = func(host string) bool { return isLoopback(hostOf(host)) || slices.Contains(c.config.PlainHTTP, host) }
	s.network = &http.Transport{
		Proxy:                  s.proxy,
		DialContext:            s.dial,
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    connectTimeout,
		ResponseHeaderTimeout:  s.idle,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // what is verified is what was sent
	}
	return s, nil
}

func (s *session) close() { s.network.CloseIdleConnections() }

// proxy is Go's own choice, by HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
func (s *session) proxy(r *http.Request) (*url.URL, error) {
	u, err := http.ProxyFromEnvironment(r)
	if u != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.named = append(s.named, u.Hostname())
	}
	return u, err
}

// handshake finds out how to log in, and does it, unless that was done. It reports errors as they are.
func (s *session) handshake(ctx context.Context) error {
	s.login.Lock()
	defer s.login.Unlock()
	if s.ready {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	repo := s.ref.Context()
	scopes := []string{repo.Scope(transport.PullScope)}
	logged, err := transport.NewWithContext(ctx, repo.Registry, s.creds.auth, (*guard)(s), scopes)
	if err != nil {
		return err
	}
	s.client = &http.Client{Transport: logged, CheckRedirect: s.checkRedirect}
	s.ready = true
	return nil
}

// The kinds of what a repository has, as in its URLs.
const manifests, blobs = "manifests", "blobs"

// get asks for a manifest or a blob, or for the part of a blob that begins at byte from and ends before to. ctx
// must end with the body. The answer is 200, or 206 if from is not 0.
func (s *session) get(ctx context.Context, kind, digest string, from, to int64) (*http.Response, error) {
	if err := s.handshake(ctx); err != nil {
		return nil, err
	}
	repo := s.ref.Context()
	scheme := "https"
	if s.plain(repo.RegistryStr()) {
		scheme = repo.Scheme()
	}
	path := "/v2/" + repo.RepositoryStr() + "/" + kind + "/" + digest
	at := url.URL{Scheme: scheme, Host: repo.RegistryStr(), Path: path}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	if kind == manifests {
		req.Header.Set("Accept", accepted)
	}
	if from > 0 { // some registries know only ranges with an end
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to-1))
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent && from > 0 {
		return resp, nil
	}
	resp.Body.Close()
	return nil, &statusError{code: resp.StatusCode, after: retryAfter(resp)}
}

// retryAfter returns what a server asks to wait for, if it says so in seconds.
func retryAfter(resp *http.Response) time.Duration {
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, maxPause)
}

// checkRedirect lets a redirect lead to https, or from http to the same host.
func (s *session) checkRedirect(to *http.Request, via []*http.Request) error {
	first := via[0].URL
	stays := to.URL.Hostname() == first.Hostname()
	switch {
	case len(via) >= maxRedirects:
		return fmt.Errorf("%w: %d redirects in a row", errRefused, maxRedirects)
	case to.URL.Scheme == "https", to.URL.Scheme == "http" && first.Scheme == "http" && stays:
		return nil
	}
	return fmt.Errorf("%w: %s redirects to %s by %q; only https is followed",
		errRefused, first.Host, to.URL.Host, to.URL.Scheme)
}

// guard is below everything that the library sends: requests for tokens and redirected ones too.
type guard session

// RoundTrip refuses requests in the clear to hosts that must have TLS, and to addresses that no request
// may go to. An address behind a name is judged when it is dialed; behind a proxy, by the proxy.
func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	s := (*session)(g)
	if r.URL.Scheme != "https" && !s.plain(r.URL.Host) {
		return nil, fmt.Errorf("%w: %s", errNoTLS, r.URL.Host)
	}
	if ip, err := netip.ParseAddr(r.URL.Hostname()); err == nil {
		if err := s.mayReach(r.URL.Hostname(), ip); err != nil {
			return nil, err
		}
	}
	return s.network.RoundTrip(r)
}

// dial connects to a host, if it may be connected to.
func (s *session) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host := hostOf(address)
	d := net.Dialer{Timeout: connectTimeout, Control: func(_, to string, _ syscall.RawConn) error {
		at, err := netip.ParseAddrPort(to)
		if err != nil {
			return err
		}
		return s.mayReach(host, at.Addr())
	}}
	return d.DialContext(ctx, network, address)
}

// awsMetadata is the IPv6 address of a cloud's metadata service that is not link-local.
var awsMetadata = netip.MustParseAddr("fd00:ec2::254")

// mayReach tells whether a host may be connected to at an address. No image is served from link-local addresses,
// where clouds have what a node is and may. This node itself is reached only if the operator named the host.
func (s *session) mayReach(host string, ip netip.Addr) error {
	ip = ip.Unmap().WithZone("")
	switch {
	case ip.IsLinkLocalUnicast(), ip == awsMetadata:
		return fmt.Errorf("%w: %s is a link-local or metadata address, from which no image is pulled",
			errRefused, placeOf(host, ip.String()))
	case (ip.IsLoopback() || ip.IsUnspecified()) && !s.isNamed(host):
		return fmt.Errorf("%w: %s is on this node, and the image is not from there",
			errRefused, placeOf(host, ip.String()))
	}
	return nil
}

func (s *session) isNamed(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.named, host)
}

// hostOf returns the host of an authority or address, without its port.
func hostOf(address string) string {
	u := url.URL{Host: address}
	return u.Hostname()
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// isCertificate reports whether TLS failed for the server's certificate.
func isCertificate(err error) bool {
	var invalid *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &invalid) || errors.As(err, &unknown)
}
