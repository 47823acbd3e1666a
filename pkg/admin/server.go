// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	// SocketName is the name of the socket in a pool's directory.
	SocketName = "admin.sock"

	// mostAnswers is how many answers are made at a time: an operator waits, and pods do not. Answers that read the pool
	// have turns of their own, so that one that hangs with the pool's disk holds up none that can say so.
	mostAnswers = 2

	// turnPatience is how long a caller waits for its turn.
	turnPatience = 10 * time.Second

	// patience is how long a caller may take to send its request.
	patience = 10 * time.Second
)

// Listen makes the socket in a pool's directory. What an earlier plugin left there is replaced: the caller
// owns the pool, so that nobody serves there.
func Listen(ctx context.Context, dir string) (net.Listener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	l, err := listenIn(ctx, d)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, SocketName), err)
	}
	return &listener{l, d}, nil
}

func listenIn(ctx context.Context, dir *os.File) (net.Listener, error) {
	if err := os.Remove(within(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	listen := net.ListenConfig{Control: ownerOnly}
	return listen.Listen(ctx, "unix", within(dir))
}

// within is the socket's path by way of its open directory: the kernel allows 107 bytes for a path.
func within(dir *os.File) string { return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), SocketName) }

// ownerOnly gives the socket a mode before it gets its name: the kernel takes it over to the file.
func ownerOnly(_, _ string, c syscall.RawConn) (err error) {
	e := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) })
	return errors.Join(e, err)
}

// listener removes its socket when it is closed, in the directory that was opened, whatever its path leads to by then.
type listener struct {
	net.Listener
	dir *os.File
}

func (l *listener) Close() error { return errors.Join(l.Listener.Close(), l.dir.Close()) }

// Serve answers at the socket until ctx ends.
func Serve(ctx context.Context, l net.Listener, n Node) error {
	server := &http.Server{Handler: n.Handler(), ReadTimeout: patience, WriteTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// The paths of what is served.
const (
	pathPlugin    = "/v1/plugin"
	pathStatus    = "/v1/status"
	pathVolumes   = "/v1/volumes"
	pathTemplates = "/v1/templates"
	pathSnapshots = "/v1/snapshots"
	pathContents  = "/v1/contents"
	pathGoldens   = "/v1/goldens"
	pathRequests  = "/v1/requests"
	pathFindings  = "/v1/findings"
	pathWhy       = "/v1/why"
)

// Handler serves what a running plugin's node has, as JSON, to GET and HEAD below /v1/.
func (n Node) Handler() http.Handler {
	mux := http.NewServeMux()
	serve := func(turns turns, path string, answer func(*http.Request) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			reply(w, func() (any, error) { return turns.take(r, answer) })
		})
	}
	own, ofPool := make(turns, mostAnswers), make(turns, mostAnswers)
	get := func(path string, answer func(*http.Request) (any, error)) { serve(ofPool, path, answer) }
	serve(own, pathRequests, func(*http.Request) (any, error) { return n.Requests() })
	serve(own, pathFindings, func(*http.Request) (any, error) { return n.Findings() })
	get(pathPlugin, func(*http.Request) (any, error) { return n.Plugin() })
	get(pathStatus, func(*http.Request) (any, error) { return n.Status() })
	get(pathVolumes, func(*http.Request) (any, error) { return n.Volumes() })
	get(pathVolumes+"/{id}", func(r *http.Request) (any, error) { return n.Volume(r.PathValue("id")) })
	get(pathTemplates, func(*http.Request) (any, error) { return n.Templates() })
	get(pathTemplates+"/{key}", func(r *http.Request) (any, error) { return n.Template(r.PathValue("key")) })
	get(pathSnapshots, func(*http.Request) (any, error) { return n.Snapshots() })
	get(pathSnapshots+"/{id}", func(r *http.Request) (any, error) { return n.Snapshot(r.PathValue("id")) })
	get(pathContents, func(*http.Request) (any, error) { return n.Contents() })
	get(pathGoldens, func(*http.Request) (any, error) { return n.Goldens() })
	get(pathWhy, func(r *http.Request) (any, error) { return n.Why(r.URL.Query().Get("of")) })
	return mux
}

// turns bounds how many answers are made at a time.
type turns chan struct{}

// errBusy means that other answers took too long.
var errBusy = errors.New("the plugin is busy with other answers, which may hang with the pool's disk: ask again, or see `csi-disktemplate doctor`")

func (t turns) take(r *http.Request, answer func(*http.Request) (any, error)) (any, error) {
	ctx, cancel := context.WithTimeoutCause(r.Context(), turnPatience, errBusy)
	defer cancel()
	select {
	case t <- struct{}{}:
	case <-ctx.Done(): // or the caller is gone
		return nil, context.Cause(ctx)
	}
	defer func() { <-t }()
	return answer(r)
}

// failure is the body of an answer that is no success.
type failure struct {
	Error string `json:"error"`
}

// reply makes an answer, and sends it when it is whole.
func reply(w http.ResponseWriter, answer func() (any, error)) {
	status := http.StatusOK
	body, err := answer()
	if err != nil {
		status, body = http.StatusInternalServerError, failure{err.Error()}
	}
	switch {
	case errors.Is(err, ErrNotFound):
		status = http.StatusNotFound
	case errors.Is(err, errBusy):
		status = http.StatusServiceUnavailable
	}
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(body); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // a caller who is gone has no use for an error
}
