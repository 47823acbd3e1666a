// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package webpage

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
)

//go:embed page.html
var page string

// Handler serves the page of a running plugin, and the JSON that it shows. host is the name or address that the page
// listens on; it may be empty.
func Handler(n admin.Node, host string) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/", n.Handler())
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, page)
	})
	policy := contentPolicy(page)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if !isOurs(r.Host, host) {
			http.Error(w, "This page answers to no such host. Use localhost or the address.", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// isOurs reports whether a request's Host header names the page by what no web site can point elsewhere: an IP
// address, localhost (RFC 6761, 6.3), or the host that the page listens on. The port may be any, as of a port that
// is forwarded.
func isOurs(header, host string) bool {
	name, _, err := net.SplitHostPort(header)
	if err != nil {
		name = header
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return true
	}
	return strings.EqualFold(name, "localhost") || host != "" && strings.EqualFold(name, host)
}

// contentPolicy allows a page its own script and style by their digests, and requests to its own host.
func contentPolicy(page string) string {
	return "default-src 'none'; script-src " + digestOf(page, "script") + "; style-src " + digestOf(page, "style") +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
		"; require-trusted-types-for 'script'; trusted-types 'none'"
}

// digestOf is the digest of what an element of a page contains, as a policy spells it.
func digestOf(page, element string) string {
	_, rest, _ := strings.Cut(page, "<"+element+">")
	text, _, _ := strings.Cut(rest, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
