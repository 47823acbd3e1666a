// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestValidate serves bad texts. The command line refuses the same texts by flag.
func TestValidate(t *testing.T) {
	good := Config{Endpoint: "unix:///csi/csi.sock", Name: DefaultName, NodeID: "node1"}
	if err := good.validate(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		says   []string
	}{
		"no node":        {func(c *Config) { c.NodeID = "" }, []string{"node id", "NODE_NAME"}},
		"long node":      {func(c *Config) { c.NodeID = strings.Repeat("n", 64) }, []string{"node id", "nnn", "63"}},
		"node with /":    {func(c *Config) { c.NodeID = "rack/7" }, []string{"node id", `"rack/7"`}},
		"no name":        {func(c *Config) { c.Name = "" }, []string{"driver name", `""`, "63"}},
		"name with /":    {func(c *Config) { c.Name = "../other" }, []string{"driver name", `"../other"`, DefaultName}},
		"long name":      {func(c *Config) { c.Name = strings.Repeat("n", 64) }, []string{"driver name", "nnn", "63"}},
		"no endpoint":    {func(c *Config) { c.Endpoint = "" }, []string{"endpoint", `""`, "unix:///csi/csi.sock"}},
		"a path":         {func(c *Config) { c.Endpoint = "/csi/csi.sock" }, []string{"endpoint", `"/csi/csi.sock"`, "unix:///csi/csi.sock"}},
		"TCP":            {func(c *Config) { c.Endpoint = "tcp://127.0.0.1:1" }, []string{"endpoint", "tcp://", "unix:///csi/csi.sock"}},
		"a relative one": {func(c *Config) { c.Endpoint = "unix://csi.sock" }, []string{"endpoint", "unix://csi.sock", "absolute"}},
		"a long one":     {func(c *Config) { c.Endpoint = "unix:///" + strings.Repeat("p", 107) }, []string{"endpoint", "ppp", "108", "107"}},
	} {
		t.Run(name, func(t *testing.T) {
			bad := good
			c.change(&bad)
			err := bad.validate()
			t.Log(err)
			for _, s := range c.says {
				if err == nil || !strings.Contains(err.Error(), s) {
					t.Errorf("does not say %s", s)
				}
			}
			if served := Serve(t.Context(), bad); served == nil || served.Error() != err.Error() {
				t.Errorf("Serve says %v", served)
			}
		})
	}
}

// TestLargeMessages sends requests that are larger than a request may be.
func TestLargeMessages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "csi.sock")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- Serve(ctx, Config{Endpoint: "unix://" + path, Name: DefaultName, NodeID: "node1", Metrics: NewMetrics(prometheus.NewRegistry())})
	}()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := csi.NewIdentityClient(conn).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	node := csi.NewNodeClient(conn)
	publish := func(bytes int) error {
		_, err := node.NodePublishVolume(t.Context(), inline("ext4", "size", strings.Repeat("9", bytes)))
		return err
	}
	var all sync.WaitGroup
	for range 8 { // a request that is too large must not harm others on the same connection
		all.Go(func() {
			mustSay(t, publish(maxMessage), codes.ResourceExhausted, "larger than max")
			mustSay(t, publish(4<<20), codes.ResourceExhausted, "larger than max")
		})
		all.Go(func() {
			mustSay(t, publish(maxMessage-4096), codes.InvalidArgument, "size") // was read
			mustSay(t, publish(5), codes.OutOfRange, "size")
		})
	}
	all.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "csi.sock")
	for _, endpoint := range []string{"unix://" + path, "unix:" + path} {
		l, err := listen(endpoint)
		if err != nil {
			t.Fatalf("%s: %v", endpoint, err)
		}
		fi, err := os.Lstat(path)
		if err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s: %v, %v", endpoint, fi.Mode(), err)
		}
		if _, err := listen(endpoint); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Errorf("a living socket: %v", err)
		} else {
			t.Log(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket stays: %v", err)
		}
	}
}

func TestListenReplacesADeadSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "csi.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // as after SIGKILL
	dead.Close()
	l, err := listen("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// TestListenSparesABusySocket has a living listener whose backlog is full.
func TestListenSparesABusySocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "csi.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path) // fills the backlog: one of 0 holds one connection
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l, err := listen("unix://" + path)
	if err == nil {
		l.Close()
		t.Fatal("replaced the socket of a living process")
	}
	t.Log(err)
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func TestListenMovesNothingAway(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "file"), []byte("precious"), 0o600),
		os.Mkdir(filepath.Join(dir, "dir"), 0o700),
		os.Symlink("file", filepath.Join(dir, "link")),
	); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "dir", "link"} {
		path := filepath.Join(dir, name)
		_, err := listen("unix://" + path)
		t.Log(err)
		if err == nil || !strings.Contains(err.Error(), "not a socket") || !strings.Contains(err.Error(), path) {
			t.Errorf("%s in the way: %v", name, err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := listen("unix://" + filepath.Join(dir, "missing", "csi.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory for it: %v", err)
	}
}

func TestSanitized(t *testing.T) {
	req := inline("xfs", keyTokens, `{"":{"token":"hush-token"}}`, "size", "1Gi")
	req.Secrets = map[string]string{"password": "hush-secret"}
	printed := sanitized{req}.String()
	t.Log(printed)
	if strings.Contains(printed, "hush") {
		t.Error("prints secrets")
	}
	for _, s := range []string{"csi-0123456789abcdef", "1Gi", "web-0", "xfs", "stripped"} {
		if !strings.Contains(printed, s) {
			t.Errorf("does not print %s", s)
		}
	}
	if !strings.Contains(req.VolumeContext[keyTokens], "hush-token") || req.Secrets["password"] != "hush-secret" {
		t.Error("changed the request itself")
	}
	if printed := (sanitized{&csi.NodeGetInfoRequest{}}).String(); printed != "{}" {
		t.Errorf("an empty request prints as %q", printed)
	}
}

// TestRequestsAreRemembered checks what the operator is told of a call: its pod, its error and why, and nothing of its
// secrets and attributes.
func TestRequestsAreRemembered(t *testing.T) {
	m := NewMetrics(prometheus.NewRegistry())
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/NodePublishVolume"}
	req := inline("xfs", keyTokens, `{"":{"token":"hush-token"}}`, "size", "1Gi")
	req.Secrets = map[string]string{"password": "hush-secret"}
	var during admin.Requests
	_, err := m.intercept(t.Context(), req, info, func(context.Context, any) (any, error) {
		during = m.Requests()
		return nil, fmt.Errorf("%w: 3Gi are missing", pool.ErrFull)
	})
	if err == nil || len(during.UnderWay) != 1 || len(during.Last) != 0 {
		t.Errorf("%v: under way %+v", err, during)
	}
	after := m.Requests()
	if len(after.UnderWay) != 0 || len(after.Last) != 1 || len(after.Failed) != 1 {
		t.Fatalf("%+v", after)
	}
	r := after.Last[0]
	if r.Pod.String() != "shop/web-0" || r.Cause != admin.CauseSpace || r.Code != "ResourceExhausted" || r.Error != "pool is full: 3Gi are missing" {
		t.Errorf("%+v of %s", r, r.Pod)
	}
	text, err := json.Marshal([]admin.Requests{during, after})
	if err != nil || strings.Contains(string(text), "hush") || strings.Contains(string(text), "1Gi") {
		t.Errorf("%s: %v", text, err)
	}
}

// TestCauses gives each error the cause that an operator can mend.
func TestCauses(t *testing.T) {
	for want, errs := range map[admin.Cause][]error{
		"":                   {nil},
		admin.CauseTemplate:  {template.ErrBuilding, template.ErrTooMany, template.ErrChanged},
		admin.CauseContent:   {template.NoContent(errors.New("registry down"))},
		admin.CauseSpace:     {pool.ErrFull, pool.ErrCannotReserve},
		admin.CauseLimit:     {errdefs.ErrLimit},
		admin.CauseElsewhere: {errElsewhere},
		admin.CauseBusy:      {errdefs.ErrBusy, errdefs.ErrUnderWay, pool.ErrLocked},
		admin.CauseRequest:   {errdefs.ErrInvalid, errdefs.ErrExists, errdefs.ErrNotFound, errdefs.ErrState, diskfs.ErrOutOfRange},
		admin.CauseCondition: {pool.ErrUnusable, template.ErrNoFormatter, fmt.Errorf("%w: %w", template.ErrNoFormatter, pool.ErrFull)},
		admin.CauseNode:      {errors.New("input/output error")},
	} {
		for _, err := range errs {
			if got := causeOf(err); got != want {
				t.Errorf("%v: %s, want %s", err, got, want)
			}
		}
	}
}

// TestIntercept checks what the caller of a failed call gets, and what the metrics count.
func TestIntercept(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := NewMetrics(registry)
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/NodePublishVolume"}
	_, err := m.intercept(t.Context(), inline(""), info, func(ctx context.Context, _ any) (any, error) {
		note(ctx, "key", "value")
		return nil, errdefs.ErrBusy
	})
	if status.Code(err) != codes.Aborted || status.Convert(err).Message() != errdefs.ErrBusy.Error() {
		t.Errorf("the caller gets %v", err)
	}
	for _, r := range []volume.Result{
		{Template: "t", TemplateHit: true}, {Template: "t"}, {Golden: "g"}, {Source: image.Source{Snapshot: "s"}},
		{Source: image.Source{Volume: "v"}}, {},
	} {
		m.Made(r)
	}
	met(t.Context(), volume.Result{Template: "t", TemplateHit: true}) // outside of a call there is no line to add to
	note(t.Context(), "outside of", "a call")

	page := httptest.NewRecorder()
	HTTPHandler(func() []health.Condition { return nil }, nil, registry).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	for _, line := range []string{
		`csi_disktemplate_operation_duration_seconds_count{code="Aborted",method="NodePublishVolume"} 1`,
		`csi_disktemplate_template_requests_total{result="hit"} 1`,
		`csi_disktemplate_template_requests_total{result="miss"} 1`,
		`csi_disktemplate_volumes_created_total{source="template"} 2`,
		`csi_disktemplate_volumes_created_total{source="golden"} 1`,
		`csi_disktemplate_volumes_created_total{source="snapshot"} 1`,
		`csi_disktemplate_volumes_created_total{source="volume"} 1`,
		`csi_disktemplate_volumes_created_total{source="none"} 1`,
	} {
		if !strings.Contains(page.Body.String(), line+"\n") {
			t.Errorf("no metric %s in\n%s", line, page.Body)
		}
	}
}

// TestMethods checks that quiet has exactly the methods that the driver implements.
func TestMethods(t *testing.T) {
	implemented := map[string]bool{}
	for service, server := range map[*grpc.ServiceDesc]any{
		&csi.Identity_ServiceDesc:   &identityServer{},
		&csi.Controller_ServiceDesc: &controllerServer{},
		&csi.Node_ServiceDesc:       &nodeServer{},
	} {
		for _, m := range service.Methods {
			implemented[m.MethodName] = implements(server, m)
		}
	}
	for method, is := range implemented {
		if _, listed := quiet[method]; listed != is {
			t.Errorf("%s: implemented %v, listed %v", method, is, listed)
		}
	}
	for method := range quiet {
		if _, known := implemented[method]; !known {
			t.Errorf("CSI has no %s", method)
		}
	}
}

// implements reports whether a server answers a method with anything but Unimplemented. A server without a configuration
// may panic then.
func implements(server any, m grpc.MethodDesc) (does bool) {
	defer func() {
		if recover() != nil {
			does = true
		}
	}()
	_, err := m.Handler(server, context.Background(), func(any) error { return nil }, nil)
	return status.Code(err) != codes.Unimplemented
}

func TestHTTP(t *testing.T) {
	var conditions []health.Condition
	met := []health.Requirement{{Name: "pool", Good: func() string { return "it is there" }}}
	findings := func() []health.Finding { return health.Findings(met, conditions) }
	h := HTTPHandler(func() []health.Condition { return conditions }, findings, prometheus.NewRegistry())
	get := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code, w.Body.String()
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
		if c, body := get("GET", path); c != http.StatusOK {
			t.Errorf("%s: %d %s", path, c, body)
		}
		if c, _ := get("POST", path); c != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, c)
		}
	}
	conditions = []health.Condition{
		{Code: "FormatterUnavailable", Text: "no QEMU\nno kernel", Remedy: "install the package qemu"},
		{Code: "PoolUnusable", Text: "the pool is read-only", Since: time.Unix(0, 0)},
	}
	const want = "FormatterUnavailable: no QEMU; no kernel: install the package qemu\nPoolUnusable since 1970-01-01T00:00:00Z: the pool is read-only\n"
	if c, body := get("GET", "/readyz"); c != http.StatusServiceUnavailable || body != want {
		t.Errorf("not ready: %d %s", c, body)
	}
	full := health.Condition{Code: "PoolFull", Text: "nothing is free", Since: time.Unix(60, 0), StillReady: true}
	const degraded = "degraded: PoolFull since 1970-01-01T00:01:00Z: nothing is free\n"
	conditions = append(conditions, full)
	if c, body := get("GET", "/readyz"); c != http.StatusServiceUnavailable || body != want+degraded {
		t.Errorf("not ready, and degraded: %d %s", c, body)
	}
	for _, query := range []string{"?verbose", "?verbose=1&output=text"} {
		const lines = "[+]pool ok: it is there\n[-]FormatterUnavailable failed: no QEMU; no kernel: install the package qemu\n" +
			"[-]PoolUnusable failed: the pool is read-only\n[+]PoolFull degraded: nothing is free\nreadyz check failed\n"
		if c, body := get("GET", "/readyz"+query); c != http.StatusServiceUnavailable || body != lines {
			t.Errorf("%s: %d %s", query, c, body)
		}
	}
	limited := health.Condition{Code: "NoKVM", Severity: health.Limited, Text: "no KVM", Cost: "it is slow", Remedy: "get KVM", StillReady: true, Requirement: "pool"}
	conditions = []health.Condition{limited}
	if c, body := get("GET", "/readyz"); c != http.StatusOK || body != "ok\n" {
		t.Errorf("a limit of the node: %d %s", c, body)
	}
	if c, body := get("GET", "/readyz?verbose"); c != http.StatusOK || body != "[+]pool degraded: no KVM; it is slow: get KVM\nreadyz check passed\n" {
		t.Errorf("a limit of the node: %d %s", c, body)
	}
	const asJSON = `{"findings":[{"state":"degraded","requirement":"pool","text":"no KVM","cost":"it is slow","remedy":"get KVM","code":"NoKVM"}]}` + "\n"
	if c, body := get("GET", "/readyz?verbose&output=json"); c != http.StatusOK || body != asJSON {
		t.Errorf("as JSON: %d %s", c, body)
	}
	conditions = []health.Condition{full}
	if c, body := get("GET", "/readyz"); c != http.StatusOK || body != "ok\n"+degraded {
		t.Errorf("degraded: %d %s", c, body)
	}
	if c, _ := get("GET", "/healthz"); c != http.StatusOK {
		t.Errorf("alive, but not ready: %d", c)
	}
}

func TestProbe(t *testing.T) {
	conditions := []health.Condition{{Code: "FormatterUnavailable", Text: "no QEMU", Remedy: "install the package qemu"}}
	s := &identityServer{cfg: Config{Health: func() []health.Condition { return conditions }}}
	_, err := s.Probe(t.Context(), nil)
	mustSay(t, toStatus(err), codes.FailedPrecondition, "FormatterUnavailable", "no QEMU", "install the package qemu")
	if !errors.Is(err, errUnhealthy) {
		t.Errorf("a condition holds: %v", err)
	}
	for _, conditions = range [][]health.Condition{nil, {{Code: "PoolFull", Text: "nothing is free", StillReady: true}}} {
		if r, err := s.Probe(t.Context(), nil); err != nil || !r.GetReady().GetValue() {
			t.Errorf("the conditions %v hold: %v %v", conditions, r, err)
		}
	}
}

func TestProfiles(t *testing.T) {
	plain := HTTPHandler(func() []health.Condition { return nil }, nil, prometheus.NewRegistry())
	for _, c := range []struct {
		name  string
		h     http.Handler
		path  string
		code  int
		holds string
	}{
		{"without profiles", plain, "/debug/pprof/", http.StatusNotFound, ""},
		{"the list", WithProfiles(plain), "/debug/pprof/", http.StatusOK, "mutex"},
		{"contention", WithProfiles(plain), "/debug/pprof/mutex?debug=1", http.StatusOK, "sampling period=100"},
		{"the other pages", WithProfiles(plain), "/healthz", http.StatusOK, "ok"},
	} {
		w := httptest.NewRecorder()
		c.h.ServeHTTP(w, httptest.NewRequest("GET", c.path, nil))
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.holds) {
			t.Errorf("%s: GET %s: %d %s", c.name, c.path, w.Code, w.Body)
		}
	}
}
