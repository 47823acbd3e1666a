// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// ErrNoPlugin means that no plugin serves in a pool's directory.
var ErrNoPlugin = errors.New("no plugin runs on this pool")

// answerPatience is how long a plugin may take for one answer. kubectl disktemplate waits half a minute for a node.
const answerPatience = 25 * time.Second

// Client asks a running plugin.
type Client struct {
	http http.Client
	dir  *os.File
}

// Dial connects to the plugin of the pool in dir. If none serves there, it returns [ErrNoPlugin].
func Dial(ctx context.Context, dir string) (*Client, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	c := &Client{dir: d, http: http.Client{Timeout: answerPatience}}
	c.http.Transport = &http.Transport{DialContext: c.dial}
	conn, err := c.dial(ctx, "", "")
	if err == nil {
		return c, conn.Close()
	}
	d.Close()
	// A socket that is left, without a process, refuses. One that is not there was removed, or never made.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", ErrNoPlugin, err)
	}
	return nil, err
}

func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", within(c.dir))
}

// Close closes the connection.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return c.dir.Close()
}

// Node is the plugin's node. Its functions end with ctx.
func (c *Client) Node(ctx context.Context) Node {
	return Node{
		Plugin:    func() (Plugin, error) { return ask[Plugin](ctx, c, pathPlugin) },
		Status:    func() (Status, error) { return ask[Status](ctx, c, pathStatus) },
		Volumes:   func() ([]Volume, error) { return ask[[]Volume](ctx, c, pathVolumes) },
		Volume:    func(id string) (Volume, error) { return ask[Volume](ctx, c, pathVolumes+"/"+url.PathEscape(id)) },
		Templates: func() ([]Template, error) { return ask[[]Template](ctx, c, pathTemplates) },
		Template: func(key string) (Template, error) {
			return ask[Template](ctx, c, pathTemplates+"/"+url.PathEscape(key))
		},
		Snapshots: func() ([]Snapshot, error) { return ask[[]Snapshot](ctx, c, pathSnapshots) },
		Snapshot:  func(id string) (Snapshot, error) { return ask[Snapshot](ctx, c, pathSnapshots+"/"+url.PathEscape(id)) },
		Contents:  func() ([]Content, error) { return ask[[]Content](ctx, c, pathContents) },
		Goldens:   func() ([]Golden, error) { return ask[[]Golden](ctx, c, pathGoldens) },
		Requests:  func() (Requests, error) { return ask[Requests](ctx, c, pathRequests) },
		Findings:  func() ([]health.Finding, error) { return ask[[]health.Finding](ctx, c, pathFindings) },
		Why:       func(of string) (Why, error) { return ask[Why](ctx, c, pathWhy+"?of="+url.QueryEscape(of)) },
	}
}

// ask asks for what is at a path.
func ask[T any](ctx context.Context, c *Client, path string) (answer T, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://plugin"+path, nil)
	if err != nil {
		return answer, err
	}
	response, err := c.http.Do(r)
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() && ctx.Err() == nil {
		return answer, fmt.Errorf("the plugin has not answered GET %s within %s; its pool's disk may hang: see `csi-disktemplate doctor`", path, answerPatience)
	}
	if err != nil {
		return answer, fmt.Errorf("asking the plugin: %w", err)
	}
	defer response.Body.Close()
	body := json.NewDecoder(response.Body)
	if response.StatusCode == http.StatusOK {
		return answer, body.Decode(&answer)
	}
	var f failure
	if err := body.Decode(&f); err != nil || f.Error == "" { // a plugin of another version has no such page
		return answer, fmt.Errorf("the plugin answers %s to GET %s; it may be of another version", response.Status, path)
	}
	err = errors.New(f.Error)
	if response.StatusCode == http.StatusNotFound {
		err = fromAfar{err}
	}
	return answer, err
}

// fromAfar is an [ErrNotFound] that the plugin said. Its text is the plugin's.
type fromAfar struct{ error }

func (e fromAfar) Unwrap() []error { return []error{ErrNotFound, e.error} }
