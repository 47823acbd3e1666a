// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

const (
	// tries bounds how often in a row something is asked for in vain. With the pauses between them, they
	// outlast a restart of the registry or of the network.
	tries = 6
	// firstPause doubles with each try, up to maxPause.
	firstPause, maxPause = 500 * time.Millisecond, 30 * time.Second
	// progress is how much must arrive for a try not to have been in vain, in bytes: else a registry that sends
	// a byte a try would never be given up.
	progress = 1 << 20
)

// partial is a blob that is being downloaded: an unnamed file, and the hash of what it has. It is gone with the
// process, so after a crash there is nothing to check and nothing to remove.
type partial struct {
	file *os.File
	hash hash.Hash
	size int64 // bytes that file and hash have
	anew bool  // it was begun anew, since its parts did not fit together
}

func newPartial(dir string) (*partial, error) {
	f, err := tmpfile.Create(dir, 0o400)
	if err != nil {
		return nil, pool.Full(err)
	}
	return &partial{file: f, hash: sha256.New()}, nil
}

// reset drops what has arrived.
func (p *partial) reset() error {
	p.size = 0
	p.hash.Reset()
	if err := p.file.Truncate(0); err != nil {
		return err
	}
	_, err := p.file.Seek(0, io.SeekStart)
	return err
}

// Write appends. File and hash always have the same bytes.
func (p *partial) Write(b []byte) (int, error) {
	n, err := p.write(b)
	p.hash.Write(b[:n])
	p.size += int64(n)
	return n, pool.Full(err)
}

func (p *partial) write(b []byte) (int, error) {
	if err := failpoint.Before("write"); err != nil {
		return 0, &os.PathError{Op: "write", Path: p.file.Name(), Err: err}
	}
	return p.file.Write(b)
}

func digestOfHash(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// retry calls a function until it succeeds, fails for good, or has failed [tries] times in a row without
// getting on. got is how many bytes the function has gained so far, in total.
func (c *Client) retry(ctx context.Context, got func() int64, do func() error) error {
	last := got()
	for failed := 0; ; {
		err := do()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if now := got(); now-last >= progress {
			failed, last = 0, now
		}
		if failed++; failed >= tries || !mayPass(err) {
			return err
		}
		pause := min(c.config.pause<<(failed-1), maxPause)
		var status *statusError
		if errors.As(err, &status) {
			pause = max(pause, status.after)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// download brings a blob into p. After an error, p has what arrived, and the next call goes on there.
func (s *session) download(ctx context.Context, p *partial, d descriptor) error {
	resumed := p.size > 0
	if p.size == d.Size {
		return p.verify(d, resumed)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(handshakeTimeout, func() { cancel(fmt.Errorf("%w from %s in time", errIdle, s.host)) })
	defer timer.Stop()
	resp, err := s.get(ctx, blobs, d.Digest, p.size, d.Size)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK && resumed { // it does not know ranges
		resumed = false
		if err := p.reset(); err != nil {
			return err
		}
	}
	if err := checkLength(resp, p.size, d); err != nil {
		return err
	}
	timer.Stop()
	timer = time.AfterFunc(s.idle, func() { cancel(fmt.Errorf("%w from %s for %s", errIdle, s.host, s.idle)) })
	body := &watched{r: resp.Body, idle: s.idle, timer: timer}
	defer timer.Stop()
	_, err = io.Copy(p, io.LimitReader(body, d.Size-p.size+1))
	switch {
	case p.size > d.Size:
		err := fmt.Errorf("%w: the registry sends more than the %d bytes that the manifest says of %s",
			ErrInvalid, d.Size, d.Digest)
		return errors.Join(err, p.reset())
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case p.size < d.Size:
		err := fmt.Errorf("%w: the registry sent %d bytes of %s, and the manifest says %d",
			ErrInvalid, p.size, d.Digest, d.Size)
		return errors.Join(err, p.reset())
	}
	return p.verify(d, resumed)
}

// errParts means that the parts of a download do not fit together. The first may have been wrong, so it
// is begun anew.
var errParts = errors.New("the parts of a blob do not fit together")

// verify checks a whole blob, which is dropped if it is another one. One that arrived in parts is tried once more.
func (p *partial) verify(d descriptor, resumed bool) error {
	got := digestOfHash(p.hash)
	if got == d.Digest {
		return nil
	}
	err := fmt.Errorf("%w: the registry sent other bytes than %s: they have the digest %s; push the image again",
		ErrInvalid, d.Digest, got)
	if resumed && !p.anew {
		p.anew = true
		err = errParts
	}
	return errors.Join(err, p.reset())
}

// checkLength compares what an answer says of its length with the manifest.
//
// "Content-Range: bytes 42-1233/1234" RFC 9110, 14.4
func checkLength(resp *http.Response, from int64, d descriptor) error {
	if resp.StatusCode == http.StatusPartialContent {
		var first, last int64
		var total string
		_, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%s", &first, &last, &total)
		if err != nil || first != from {
			return fmt.Errorf("%w: the registry was asked for %s from byte %d on, and sends another part",
				ErrInvalid, d.Digest, from)
		}
	}
	if n := resp.ContentLength; n >= 0 && from+n != d.Size {
		return fmt.Errorf("%w: the registry has %d bytes of %s, and the manifest says %d; push the image again",
			ErrInvalid, from+n, d.Digest, d.Size)
	}
	return nil
}

// watched puts off its timer whenever something arrives.
type watched struct {
	r     io.Reader
	idle  time.Duration
	timer *time.Timer
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.r.Read(b)
	if n > 0 {
		w.timer.Reset(w.idle)
	}
	return n, err
}

// fetchManifest gets a manifest by tag or digest. It returns the manifest's bytes, which have the
// digest that was asked for, if one was.
func (s *session) fetchManifest(ctx context.Context, identifier string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	resp, err := s.get(ctx, manifests, identifier, 0, 0)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxManifest {
		return nil, fmt.Errorf("%w: its manifest has more than %d bytes", ErrInvalid, maxManifest)
	}
	if got := digestOf(b); strings.Contains(identifier, ":") && got != identifier {
		return nil, fmt.Errorf("%w: the registry sent another manifest than %s: it has the digest %s",
			ErrInvalid, identifier, got)
	}
	return b, nil
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}
