// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// serve serves a node in a directory until the returned function is called.
func serve(t *testing.T, dir string, n Node) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l, err := Listen(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- Serve(ctx, l, n) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// dial connects to what serves in a directory.
func dial(t *testing.T, dir string) Node {
	t.Helper()
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.Node(t.Context())
}

// sample has a value of everything.
func sample() Node {
	now, own, percent := time.Unix(1e9, 0).UTC(), int64(5), 18
	return Node{
		Status: func() (Status, error) {
			return Status{Plugin: Plugin{Version: "v1", Since: now}, Volumes: 2, Findings: []health.Finding{}}, nil
		},
		Plugin: func() (Plugin, error) {
			return Plugin{Version: "v1", Since: now, Pool: Pool{Path: "/p", Layers: []Layer{{Path: "/p", Type: "xfs"}}}}, nil
		},
		Volumes: func() ([]Volume, error) { return []Volume{{ID: "a/b c", State: Idle, Created: now}}, nil },
		Volume: func(id string) (Volume, error) {
			if id != "a/b c" {
				return Volume{}, fmt.Errorf("%w: volume %s", ErrNotFound, id)
			}
			return Volume{ID: id, Own: &own, Created: now, Pod: &Pod{UID: "u"}}, nil
		},
		Templates: func() ([]Template, error) { return []Template{{Key: "k", State: Building, Percent: &percent}}, nil },
		Template: func(key string) (Template, error) {
			return Template{Key: key, Made: &Made{Built: now, Took: 0.5}, Ready: []Ready{{"mounted", 1, 2}}}, nil
		},
		Snapshots: func() ([]Snapshot, error) { return []Snapshot{{ID: "s", Created: now}}, nil },
		Snapshot:  func(id string) (Snapshot, error) { return Snapshot{ID: id, Own: &own, Created: now}, nil },
		Contents:  func() ([]Content, error) { return []Content{{Name: "c", Namespaces: []string{"*"}}}, nil },
		Goldens:   func() ([]Golden, error) { return []Golden{{Name: "g", Created: now, LastUse: now}}, nil },
		Requests: func() (Requests, error) {
			return Requests{UnderWay: []Request{{Method: "m", Began: now}}, Last: []Request{}, Failed: []Request{}}, nil
		},
		Findings: func() ([]health.Finding, error) { return nil, errors.New("the pool is gone") },
		Why:      func(of string) (Why, error) { return Why{Asked: of, Waits: []Wait{{Volume: "v", Since: now}}}, nil },
	}
}

// TestClient compares what a client is told with what the node has, function by function.
func TestClient(t *testing.T) {
	dir := t.TempDir()
	stop := serve(t, dir, sample())
	defer stop()
	here, there := reflect.ValueOf(sample()), reflect.ValueOf(dial(t, dir))
	for i := range here.NumField() {
		var args []reflect.Value
		if here.Field(i).Type().NumIn() == 1 {
			args = append(args, reflect.ValueOf("a/b c"))
		}
		want, got := here.Field(i).Call(args), there.Field(i).Call(args)
		if a, b := fmt.Sprint(want[1]), fmt.Sprint(got[1]); a != b {
			t.Errorf("%s: error %s, want %s", here.Type().Field(i).Name, b, a)
		} else if want[1].IsNil() && !reflect.DeepEqual(want[0].Interface(), got[0].Interface()) {
			t.Errorf("%s: %+v, want %+v", here.Type().Field(i).Name, got[0], want[0])
		}
	}
	if _, err := dial(t, dir).Volume("other"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "volume other") {
		t.Error(err)
	}
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := ask[Plugin](t.Context(), c, "/v2/plugin"); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Error(err)
	}
}

// TestSocket is for root only, gone when the plugin ends, and replaced if it was left.
func TestSocket(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120)) // longer than the path of a socket may be
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrNoPlugin) {
		t.Error(err)
	}
	path := filepath.Join(dir, SocketName)
	for range 2 {
		stop := serve(t, dir, sample())
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%v: %v", fi, err)
		}
		if _, err := dial(t, dir).Plugin(); err != nil {
			t.Error(err)
		}
		stop()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("it is left: %v", err)
		}
		// As a plugin that was killed leaves it.
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", within(d))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		d.Close()
		if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrNoPlugin) {
			t.Errorf("a socket that is left: %v", err)
		}
	}
}

// TestSlowReader asks and does not read. Others get their answers.
func TestSlowReader(t *testing.T) {
	dir := t.TempDir()
	n := sample()
	n.Contents = func() ([]Content, error) { return []Content{{Name: strings.Repeat("x", 8<<20)}}, nil }
	stop := serve(t, dir, n)
	defer stop()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for range 2 * mostAnswers {
		conn, err := net.Dial("unix", within(d))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		r, _ := http.NewRequest(http.MethodGet, "http://plugin"+pathContents, nil)
		if err := r.Write(conn); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := dial(t, dir).Plugin(); err != nil {
		t.Error(err)
	}
}

// TestHungAnswers: answers that hang with the pool's disk hold up none that can say so, and those behind them end.
func TestHungAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, answers := sample(), make(chan []Volume)
		n.Volumes = func() ([]Volume, error) { return <-answers, nil }
		n.Findings = func() ([]health.Finding, error) { return nil, nil }
		handler := n.Handler()
		get := func(path string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			return w
		}
		for range mostAnswers {
			go get(pathVolumes)
		}
		synctest.Wait()
		if w := get(pathFindings); w.Code != http.StatusOK {
			t.Errorf("the findings: %d %s", w.Code, w.Body)
		}
		if w := get(pathTemplates); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "doctor") {
			t.Errorf("behind those that hang: %d %s", w.Code, w.Body)
		}
		close(answers)
		synctest.Wait()
		if w := get(pathTemplates); w.Code != http.StatusOK {
			t.Errorf("after those ended: %d %s", w.Code, w.Body)
		}
	})
}

// TestHungPlugin: a command does not wait for ever.
func TestHungPlugin(t *testing.T) {
	dir, hang := t.TempDir(), make(chan bool)
	n := sample()
	n.Volumes = func() ([]Volume, error) { <-hang; return nil, nil }
	stop := serve(t, dir, n)
	defer stop()
	defer close(hang)
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.http.Timeout != answerPatience {
		t.Errorf("it waits %s", c.http.Timeout)
	}
	c.http.Timeout = 10 * time.Millisecond
	if _, err := c.Node(t.Context()).Volumes(); err == nil || !strings.Contains(err.Error(), "has not answered GET /v1/volumes") {
		t.Error(err)
	}
}
