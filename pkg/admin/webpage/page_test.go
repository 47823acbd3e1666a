// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package webpage

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
)

// hostile is a name that would be a program, if it were taken for markup.
const hostile = `<img src=x onerror=alert(1)></script><script>alert(2)</script>`

func node() admin.Node {
	return admin.Node{
		Volumes: func() ([]admin.Volume, error) {
			return []admin.Volume{{ID: "v", Pod: &admin.Pod{Namespace: "shop", Name: hostile}}}, nil
		},
		Contents: func() ([]admin.Content, error) { return nil, errors.New(hostile) },
	}
}

func ask(method, host, path string) *httptest.ResponseRecorder {
	r, w := httptest.NewRequest(method, "http://"+host+path, nil), httptest.NewRecorder()
	Handler(node(), "page.example").ServeHTTP(w, r)
	return w
}

// TestAnswers asks for what there is and what there is not, and in vain for changes.
func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		method, path string
		code         int
		kind, says   string
	}{
		{"GET", "/", 200, "text/html; charset=utf-8", "Is it well?"},
		{"HEAD", "/", 200, "text/html; charset=utf-8", ""},
		{"GET", "/v1/volumes", 200, "application/json", `"id":"v"`},
		{"GET", "/v1/contents", 500, "application/json", `"error"`},
		{"GET", "/v1/other", 404, "text/plain; charset=utf-8", ""},
		{"GET", "/page.html", 404, "text/plain; charset=utf-8", ""},
		{"POST", "/", 405, "text/plain; charset=utf-8", ""},
		{"DELETE", "/v1/volumes/v", 405, "text/plain; charset=utf-8", ""},
		{"PUT", "/v1/volumes", 405, "text/plain; charset=utf-8", ""},
		{"OPTIONS", "/v1/volumes", 405, "text/plain; charset=utf-8", ""},
	} {
		w := ask(c.method, "localhost", c.path)
		if w.Code != c.code || w.Header().Get("Content-Type") != c.kind || !strings.Contains(w.Body.String(), c.says) {
			t.Errorf("%s %s: %d %s: %.200s", c.method, c.path, w.Code, w.Header().Get("Content-Type"), w.Body)
		}
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
			"Cross-Origin-Resource-Policy": "same-origin", "Access-Control-Allow-Origin": "",
		} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("%s %s: %s is %q", c.method, c.path, name, got)
			}
		}
		policy := w.Header().Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'; script-src 'sha256-") || strings.Contains(policy, "unsafe") {
			t.Errorf("%s %s: the policy is %q", c.method, c.path, policy)
		}
		if strings.Contains(w.Body.String(), "<img") { // a browser that took JSON for HTML would run it
			t.Errorf("%s %s has markup: %s", c.method, c.path, w.Body)
		}
	}
}

// TestHost refuses names that somebody else may point to this machine.
func TestHost(t *testing.T) {
	for host, code := range map[string]int{
		"localhost": 200, "localhost:8080": 200, "LOCALHOST:1": 200, "127.0.0.1:9809": 200, "127.0.0.1": 200,
		"10.0.0.7:9809": 200, "[::1]:9809": 200, "[::1]": 200, "page.example:9809": 200,
		"evil.example": 421, "evil.example:9809": 421, "localhost.evil.example:9809": 421, "127.0.0.1.evil.example": 421,
		"notlocalhost": 421, "0x7f.1:9809": 421,
	} {
		for _, path := range []string{"/", "/v1/volumes"} {
			if w := ask("GET", host, path); w.Code != code || code != 200 && strings.Contains(w.Body.String(), "shop") {
				t.Errorf("%s%s: %d, want %d", host, path, w.Code, code)
			}
		}
	}
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	r.Host = ""
	if Handler(node(), "").ServeHTTP(w, r); w.Code != http.StatusMisdirectedRequest {
		t.Errorf("no host: %d", w.Code)
	}
}

// TestSelfContained looks for what would load something, run something that the policy does not know, or make markup.
func TestSelfContained(t *testing.T) {
	for _, pattern := range []string{
		`https?://`, `<script [^>]*src`, `@import`, `url\(`, `(?i)\son[a-z]+\s*=\s*["']`, `style="`,
		`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function`,
	} {
		if found := regexp.MustCompile(pattern).FindString(page); found != "" {
			t.Errorf("the page has %q", found)
		}
	}
	for _, element := range []string{"script", "style"} {
		if n := strings.Count(page, "<"+element); n != 1 {
			t.Errorf("the page has %d elements %s, and the policy knows one", n, element)
		}
	}
}
