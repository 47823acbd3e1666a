// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
)

// server is the library's registry behind a handler that may misbehave.
type server struct {
	*httptest.Server
	host   string
	inner  http.Handler
	mu     sync.Mutex
	spoil  func(w http.ResponseWriter, r *http.Request) (done bool)
	ranges []string // of requests for blobs, "" for all of a blob
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{inner: ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))}
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	s.host = strings.TrimPrefix(s.URL, "http://")
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	spoil := s.spoil
	if isBlob(r) {
		s.ranges = append(s.ranges, r.Header.Get("Range"))
	}
	s.mu.Unlock()
	if spoil == nil || !spoil(w, r) {
		s.inner.ServeHTTP(w, r)
	}
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

func isManifest(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/")
}

// set makes the server misbehave from now on.
func (s *server) set(spoil func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil, s.ranges = spoil, nil
}

// layer is a tar archive with one file of random bytes.
func layer(t *testing.T, file string, size int) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	content := make([]byte, size)
	rand.New(rand.NewSource(int64(size))).Read(content)
	err := w.WriteHeader(&tar.Header{Name: file, Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg})
	if err == nil {
		_, err = w.Write(content)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// image has a layer of each kind.
func image(t *testing.T, size int) v1.Image {
	t.Helper()
	return imageOf(t,
		static.NewLayer(gzipped(t, layer(t, "first", size)), types.DockerLayer),
		static.NewLayer(layer(t, "second", size+1), types.OCIUncompressedLayer),
		static.NewLayer(layer(t, "third", size+2), "application/vnd.example.data.v1.tar"))
}

func imageOf(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	for _, l := range layers {
		var err error
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l}); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// push pushes an image or an index under a tag, and returns the reference with its digest.
func (s *server) push(t *testing.T, what remote.Taggable, tag string) string {
	t.Helper()
	ref, err := name.ParseReference(s.host + "/team/data:" + tag)
	if err != nil {
		t.Fatal(err)
	}
	switch what := what.(type) {
	case v1.Image:
		err = remote.Write(ref, what)
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, what)
	}
	if err != nil {
		t.Fatal(err)
	}
	digest, err := what.(interface{ Digest() (v1.Hash, error) }).Digest()
	if err != nil {
		t.Fatal(err)
	}
	return s.host + "/team/data@" + digest.String()
}

func newBlobs(t *testing.T) *Blobs {
	t.Helper()
	b, err := OpenBlobs(filepath.Join(t.TempDir(), "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// impatient is a client whose pauses are short.
func impatient(c Config) *Client {
	c.Idle, c.pause = 200*time.Millisecond, time.Millisecond
	return New(c)
}

func files(t *testing.T, b *Blobs) (names []string) {
	t.Helper()
	all, _, err := b.list()
	if err != nil {
		t.Fatal(err)
	}
	for _, fi := range all {
		names = append(names, fi.Name())
	}
	return names
}

// fails checks an error, its kind and its words.
func fails(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	t.Log(err)
	if !errors.Is(err, kind) {
		t.Errorf("the error is not of the kind %q: %v", kind, err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error lacks %q: %v", w, err)
		}
	}
	for _, fault := range plain.Faults(err.Error()) {
		t.Errorf("%s: %v", fault, err)
	}
}

func TestPull(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	img := image(t, 100_000)
	ref := s.push(t, img, "v1")
	c := impatient(Config{})
	digest, err := c.Resolve(t.Context(), s.host+"/team/data:v1")
	if err != nil || !strings.HasSuffix(ref, digest) {
		t.Fatalf("the tag is %s: %v", digest, err)
	}
	got, err := c.Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if got.Digest != digest || len(got.Layers) != 3 {
		t.Fatalf("pulled %+v", got)
	}
	want, _ := img.Layers()
	for i, compression := range []Compression{Gzip, Plain, Plain} {
		if l := got.Layers[i]; l.Compression != compression {
			t.Errorf("layer %d is %q", i, l.Compression)
		}
		r, err := got.Layers[i].Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if h, _ := want[i].Digest(); err != nil || digestOf(b) != h.String() {
			t.Errorf("layer %d has the digest %s: %v", i, digestOf(b), err)
		}
		r.Close()
	}
	if n := len(files(t, blobs)); n != 5 { // manifest, config and layers
		t.Errorf("%d blobs are there", n)
	}
	for _, name := range files(t, blobs) {
		if fi, err := os.Stat(filepath.Join(blobs.dir, name)); err != nil || fi.Mode().Perm() != 0o400 {
			t.Errorf("%s has mode %v: %v", name, fi.Mode(), err)
		}
	}

	s.Close() // what is there needs no registry
	again, err := c.Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// TestPlatform picks an image out of an index.
func TestPlatform(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	for_ := func(platform string, size int) mutate.IndexAddendum {
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		return mutate.IndexAddendum{Add: image(t, size), Descriptor: v1.Descriptor{Platform: p}}
	}
	ours, other := for_("linux/"+runtime.GOARCH, 2000), for_("linux/s390x", 1000)
	ref := s.push(t, mutate.AppendManifests(empty.Index, other, ours), "v1")
	want, _ := ours.Add.(v1.Image).Digest()
	c := impatient(Config{})
	if digest, err := c.Resolve(t.Context(), s.host+"/team/data:v1"); err != nil || digest != want.String() {
		t.Errorf("resolved to %s, want %s: %v", digest, want, err)
	}
	img, err := c.Pull(t.Context(), ref, blobs)
	if err != nil || img.Digest != want.String() {
		t.Errorf("pulled %+v, want %s: %v", img, want, err)
	}
	img.Close()

	s.push(t, mutate.AppendManifests(empty.Index, other), "foreign")
	_, err = c.Resolve(t.Context(), s.host+"/team/data:foreign")
	fails(t, err, ErrNotFound, "linux/"+runtime.GOARCH, "linux/s390x")
}

// TestResume breaks each download several times.
func TestResume(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 1<<20), types.OCIUncompressedLayer)), "v1")
	var left atomic.Int32
	left.Store(3)
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r) || left.Add(-1) < 0 {
			return false
		}
		s.inner.ServeHTTP(&cut{ResponseWriter: w, left: 100_000}, r)
		return true
	})
	img, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
	resumed := 0
	for _, r := range s.ranges {
		if r != "" {
			resumed++
		}
	}
	if resumed < 2 {
		t.Errorf("the requests had the ranges %q", s.ranges)
	}
}

// cut ends a connection in the middle of an answer.
type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b[:min(len(b), c.left)])
	if c.left -= n; c.left == 0 {
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// TestResumeLater breaks a download for good. The next pull in the same process goes on, until the blobs are trimmed.
func TestResumeLater(t *testing.T) {
	for _, trimmed := range []bool{false, true} {
		s, blobs := newServer(t), newBlobs(t)
		ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 1<<20), types.OCIUncompressedLayer)), "v1")
		begun := false
		s.set(func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r) || !strings.Contains(r.URL.Path, digestOfLayer(t, s, ref)) {
				return false
			}
			if begun {
				http.Error(w, "", http.StatusServiceUnavailable)
			} else {
				begun = true
				s.inner.ServeHTTP(&cut{ResponseWriter: w, left: 300_000}, r)
			}
			return true
		})
		c := impatient(Config{})
		_, err := c.Pull(t.Context(), ref, blobs)
		fails(t, err, ErrUnreachable, "503", ref)
		if trimmed {
			if _, err := blobs.Trim(1 << 40); err != nil {
				t.Fatal(err)
			}
		}
		s.set(nil)
		img, err := c.Pull(t.Context(), ref, blobs)
		if err != nil {
			t.Fatal(err)
		}
		img.Close()
		if got, want := strings.Contains(strings.Join(s.ranges, " "), "bytes=300000-"), !trimmed; got != want {
			t.Errorf("trimmed is %t, and the ranges are %q", trimmed, s.ranges)
		}
	}
}

// TestPartsThatDoNotFit begins a download with wrong bytes and goes on with right ones.
func TestPartsThatDoNotFit(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 1<<20), types.OCIUncompressedLayer)), "v1")
	wrong := true
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r) || !strings.Contains(r.URL.Path, digestOfLayer(t, s, ref)) || !wrong {
			return false
		}
		wrong = false
		w.Write(make([]byte, 100_000))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	img, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
	s.set(func(w http.ResponseWriter, r *http.Request) bool { // it always cuts, and always sends wrong parts
		if !isBlob(r) || !strings.Contains(r.URL.Path, digestOfLayer(t, s, ref)) {
			return false
		}
		if r.Header.Get("Range") == "" {
			s.inner.ServeHTTP(&cut{ResponseWriter: w, left: 300_000}, r)
		} else {
			rec := httptest.NewRecorder()
			s.inner.ServeHTTP(rec, r)
			w.Header().Set("Content-Range", rec.Header().Get("Content-Range"))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(make([]byte, rec.Body.Len()))
		}
		return true
	})
	_, err = impatient(Config{}).Pull(t.Context(), ref, newBlobs(t))
	fails(t, err, ErrInvalid, "other bytes")
}

// digestOfLayer reads it from the image's manifest.
func digestOfLayer(t *testing.T, s *server, ref string) string {
	t.Helper()
	w := httptest.NewRecorder()
	_, digest, _ := strings.Cut(ref, "@")
	s.inner.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/team/data/manifests/"+digest, nil))
	m, err := parseManifest(w.Body.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return m.Layers[0].Digest
}

// TestJoin pulls one image from several goroutines: each blob is asked for once.
func TestJoin(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, image(t, 500_000), "v1")
	s.set(nil)
	c := impatient(Config{})
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			img, err := c.Pull(t.Context(), ref, blobs)
			if err != nil {
				t.Error(err)
				return
			}
			img.Close()
		})
	}
	wg.Wait()
	if n := len(s.ranges); n != 4 {
		t.Errorf("%d requests for 4 blobs", n)
	}
	if len(blobs.held) != 0 {
		t.Errorf("%d blobs are still held", len(blobs.held))
	}
}

// TestRegistryMisbehaves has what a registry may do wrong, and the words of the error.
func TestRegistryMisbehaves(t *testing.T) {
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("X-Echo", r.Header.Get("Authorization"))
			if isBlob(r) || isManifest(r) {
				http.Error(w, `{"errors":[{"code":"DENIED","message":"words of the server"}]}`, code)
				return true
			}
			return false
		}
	}
	for _, tc := range []struct {
		name  string
		spoil misbehavior
		kind  error
		words []string
	}{
		{"not there", with(status(404)), ErrNotFound, []string{"404", "check the reference"}},
		{"no credentials", with(status(401)), ErrDenied, []string{"401", "--content-credentials"}},
		{"denied", with(status(403)), ErrDenied, []string{"403"}},
		{"too often", with(status(429)), ErrUnreachable, []string{"429", "limits how often"}},
		{"broken", with(status(500)), ErrUnreachable, []string{"500", "tried again"}},
		{"no registry", with(status(418)), ErrInvalid, []string{"418", "check its name"}},
		{"hangs", func(_ *server, w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r) {
				return false
			}
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		}, ErrUnreachable, []string{"nothing arrived", "200ms"}},
		{"never answers", func(_ *server, w http.ResponseWriter, r *http.Request) bool {
			if isManifest(r) {
				<-r.Context().Done()
			}
			return isManifest(r)
		}, ErrUnreachable, []string{"does not answer in time"}},
		{"other bytes", answer(func(w http.ResponseWriter, b []byte) { b[len(b)/2]++; w.Write(b) }), ErrInvalid,
			[]string{"other bytes"}},
		{"longer", answer(func(w http.ResponseWriter, b []byte) { flush(w); w.Write(append(b, b...)) }), ErrInvalid,
			[]string{"more than the"}},
		{"says it is longer", answer(func(w http.ResponseWriter, b []byte) { w.Write(append(b, 0)) }), ErrInvalid,
			[]string{"the manifest says"}},
		{"shorter", answer(func(w http.ResponseWriter, b []byte) { flush(w); w.Write(b[1:]) }), ErrInvalid,
			[]string{"the manifest says"}},
		{"other manifest", func(_ *server, w http.ResponseWriter, r *http.Request) bool {
			if isManifest(r) {
				w.Write([]byte(`{"schemaVersion":2}`))
			}
			return isManifest(r)
		}, ErrInvalid, []string{"another manifest"}},
		{"endless manifest", func(_ *server, w http.ResponseWriter, r *http.Request) bool {
			for isManifest(r) {
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					return true
				}
			}
			return false
		}, ErrInvalid, []string{"more than 4194304 bytes"}},
		{"redirects to metadata", redirect("http://169.254.169.254/latest/meta-data"), ErrInvalid,
			[]string{"169.254.169.254", "only https"}},
		{"redirects to metadata by https", redirect("https://169.254.169.254/latest"), ErrInvalid, []string{"link-local"}},
		{"redirects to mapped metadata", redirect("https://[::ffff:169.254.169.254]/"), ErrInvalid, []string{"link-local"}},
		{"redirects to another scheme", redirect("ftp://127.0.0.1/"), ErrInvalid, []string{"only https"}},
		{"redirects forever", func(_ *server, w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r) {
				http.Redirect(w, r, r.URL.Path, http.StatusFound)
			}
			return isBlob(r)
		}, ErrInvalid, []string{"10 redirects"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, blobs := newServer(t), newBlobs(t)
			ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 50_000), types.OCIUncompressedLayer)), "v1")
			before := files(t, blobs)
			s.set(func(w http.ResponseWriter, r *http.Request) bool { return tc.spoil(s, w, r) })
			_, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
			fails(t, err, tc.kind, append(tc.words, ref)...)
			if strings.Contains(err.Error(), "words of the server") {
				t.Errorf("the error repeats the server: %v", err)
			}
			if len(before) != 0 || len(files(t, blobs)) > 2 { // manifest and config may be there
				t.Errorf("%q are left", files(t, blobs))
			}
			s.set(nil)
			img, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
			if err != nil {
				t.Fatalf("when the registry is well again: %v", err)
			}
			img.Close()
		})
	}
}

// flush begins an answer without saying how long it is.
func flush(w http.ResponseWriter) { w.(http.Flusher).Flush() }

// misbehavior answers a request in place of the server, or leaves it to it.
type misbehavior func(s *server, w http.ResponseWriter, r *http.Request) (done bool)

func with(spoil func(http.ResponseWriter, *http.Request) bool) misbehavior {
	return func(_ *server, w http.ResponseWriter, r *http.Request) bool { return spoil(w, r) }
}

// answer replaces the answers with blobs of some size; the config stays.
func answer(with func(w http.ResponseWriter, b []byte)) misbehavior {
	return func(s *server, w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r) {
			return false
		}
		rec := httptest.NewRecorder()
		r.Header.Del("Range")
		s.inner.ServeHTTP(rec, r)
		if rec.Body.Len() < 10_000 {
			return false
		}
		with(w, rec.Body.Bytes())
		return true
	}
}

func redirect(to string) misbehavior {
	return func(_ *server, w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
		return isBlob(r)
	}
}

// TestCredentialsStayAtTheirRegistry redirects blobs to another host. It must not see the credentials.
func TestCredentialsStayAtTheirRegistry(t *testing.T) {
	const user, secret = "robot", "t0p-s3cret"
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 50_000), types.OCIUncompressedLayer)), "v1")
	var seen atomic.Pointer[http.Header]
	elsewhere := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := r.Header.Clone()
		seen.Store(&h)
		s.inner.ServeHTTP(w, r)
	}))
	elsewhere.Config.ErrorLog = log.New(io.Discard, "", 0)
	elsewhere.StartTLS()
	defer elsewhere.Close()
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, _ := r.BasicAuth(); u != user || p != secret {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, r.Header.Get("Authorization"), http.StatusUnauthorized)
			return true
		}
		if isBlob(r) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path+"?token=of-another-server", http.StatusFound)
			return true
		}
		return false
	})
	dir := t.TempDir()
	config := fmt.Sprintf(`{"auths": {"https://%s": {"username": %q, "password": %q}}}`, s.host, user, secret)
	write(t, filepath.Join(dir, "secret", ".dockerconfigjson"), config)
	write(t, filepath.Join(dir, "..data", "config.json"), "kubelet's own")

	// The other server's certificate is not trusted, and the address is on this node.
	_, err := impatient(Config{Credentials: dir}).Pull(t.Context(), ref, blobs)
	fails(t, err, ErrUnreachable, "certificate")
	if strings.Contains(err.Error(), "of-another-server") || strings.Contains(err.Error(), secret) {
		t.Errorf("the error tells secrets: %v", err)
	}
	c := impatient(Config{Credentials: dir})
	session, err := c.open(ref)
	if err != nil {
		t.Fatal(err)
	}
	session.network.TLSClientConfig = elsewhere.Client().Transport.(*http.Transport).TLSClientConfig
	if err := c.pull(t.Context(), session, ref[strings.Index(ref, "@")+1:], &Image{blobs: blobs}); err != nil {
		t.Fatal(session.explain(t.Context(), err))
	}
	if h := seen.Load(); h == nil || h.Get("Authorization") != "" {
		t.Errorf("the other host saw %v", h)
	}

	// Wrong and missing credentials, and a server that repeats them.
	write(t, filepath.Join(dir, "secret", ".dockerconfigjson"), strings.ReplaceAll(config, secret, "wr0ng-s3cret"))
	_, err = impatient(Config{Credentials: dir}).Pull(t.Context(), ref, newBlobs(t))
	fails(t, err, ErrDenied, "401", "check what the credentials", ref)
	if strings.Contains(err.Error(), "s3cret") {
		t.Errorf("the error tells secrets: %v", err)
	}
	write(t, filepath.Join(dir, "secret", ".dockerconfigjson"), `{"credHelpers": {"`+s.host+`": "gcloud"}}`)
	write(t, filepath.Join(dir, "broken"), `{"auths": {"`+s.host+`": {"auth": "wr0ng-s3cret"}}}`)
	_, err = impatient(Config{Credentials: dir}).Pull(t.Context(), ref, newBlobs(t))
	fails(t, err, ErrDenied, "credential helper", "broken is not a docker config file",
		"there are no credentials for "+s.host)
	if strings.Contains(err.Error(), "s3cret") {
		t.Errorf("the error tells secrets: %v", err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err := errors.Join(err, os.WriteFile(path, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// TestToken logs in as the distribution specification has it, and the token server fails.
func TestToken(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 5000), types.OCIUncompressedLayer)), "v1")
	code := http.StatusOK
	body := `{"token": "s3cret-token"}`
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			w.WriteHeader(code)
			io.WriteString(w, body)
			return true
		}
		if r.Header.Get("Authorization") == "Bearer s3cret-token" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+s.URL+`/token",service="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	img, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
	code = http.StatusForbidden
	_, err = impatient(Config{}).Pull(t.Context(), ref, newBlobs(t))
	fails(t, err, ErrDenied, "403")
	code, body = http.StatusOK, `{"tokn": "s3cret-token"}`
	_, err = impatient(Config{}).Pull(t.Context(), ref, newBlobs(t))
	fails(t, err, ErrUnreachable)
	if strings.Contains(err.Error(), "s3cret") {
		t.Errorf("the error tells secrets: %v", err)
	}
}

// TestUnreachable has registries that are not there, and references that are none.
func TestUnreachable(t *testing.T) {
	s := newServer(t)
	s.Close()
	c := impatient(Config{})
	_, err := c.Resolve(t.Context(), s.host+"/team/data:v1")
	fails(t, err, ErrUnreachable, "connection refused", s.host)
	_, err = c.Resolve(t.Context(), "registry.invalid/team/data:v1")
	fails(t, err, ErrUnreachable, "registry.invalid has no address")
	_, err = c.Resolve(t.Context(), "169.254.169.254/team/data:v1")
	fails(t, err, ErrInvalid, "link-local")
	_, err = c.Resolve(t.Context(), "https://registry.example/team/data:v1")
	fails(t, err, ErrReference, "write registry/repository:tag")
	_, err = c.Pull(t.Context(), "registry.example/team/data:v1", newBlobs(t))
	fails(t, err, ErrReference, "resolve it first")
}

// TestPlainHTTP speaks HTTP only to registries that were listed, and not to those on private addresses, as the
// library would.
func TestPlainHTTP(t *testing.T) {
	s := newServer(t)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.push(t, image(t, 100), "v1")
	for _, tc := range []struct {
		host   string
		listed bool
	}{
		{"registry.example", true}, {"registry.example:5000", true}, {"10.9.8.7:5000", true},
		{"registry.example", false}, {"10.9.8.7:5000", false},
	} {
		config := Config{}
		if tc.listed {
			config.PlainHTTP = []string{tc.host}
		}
		c := impatient(config)
		session, err := c.open(tc.host + "/team/data:v1")
		if err != nil {
			t.Fatal(err)
		}
		session.network.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, s.host)
		}
		var asked atomic.Int32
		s.set(func(http.ResponseWriter, *http.Request) bool { asked.Add(1); return false })
		_, err = c.manifest(t.Context(), session, "v1")
		err = session.explain(t.Context(), err)
		if (err == nil) != tc.listed || (asked.Load() > 0) != tc.listed {
			t.Errorf("%s, listed %t, was asked %d times by HTTP: %v", tc.host, tc.listed, asked.Load(), err)
		}
		if !tc.listed {
			fails(t, err, ErrUnreachable, tc.host, "does not speak HTTPS")
		}
	}
}

func TestMayReach(t *testing.T) {
	c := New(Config{})
	s, err := c.open("registry.example/team/data:v1")
	if err != nil {
		t.Fatal(err)
	}
	local := httptest.NewServer(http.NotFoundHandler())
	defer local.Close()
	_, err = s.dial(t.Context(), "tcp", strings.TrimPrefix(local.URL, "http://"))
	fails(t, s.explain(t.Context(), err), ErrInvalid, "on this node")
	s.named = append(s.named, "127.0.0.1") // as a proxy
	conn, err := s.dial(t.Context(), "tcp", strings.TrimPrefix(local.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestRetryAfter(t *testing.T) {
	for header, want := range map[string]time.Duration{
		"7": 7 * time.Second, "100000": maxPause, "-1": 0, "": 0, "Fri, 27 Nov 2026 00:00:00 GMT": 0,
	} {
		resp := &http.Response{Header: http.Header{"Retry-After": {header}}}
		if got := retryAfter(resp); got != want {
			t.Errorf("%q is %s, want %s", header, got, want)
		}
	}
}

func TestRoom(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, image(t, 10_000), "v1")
	errRoom := errors.New("the pool has 3Mi")
	var asked int64
	_, err := impatient(Config{Room: func(n int64) error { asked = n; return errRoom }}).Pull(t.Context(), ref, blobs)
	if !errors.Is(err, errRoom) || asked < 30_000 || len(files(t, blobs)) != 1 {
		t.Errorf("asked for %d bytes, %q are there: %v", asked, files(t, blobs), err)
	}
}

func TestTrim(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	c := impatient(Config{})
	var refs []string
	for i := range 3 {
		one := static.NewLayer(layer(t, "file", 100_000+i), types.OCIUncompressedLayer)
		refs = append(refs, s.push(t, imageOf(t, one), fmt.Sprint(i)))
		img, err := c.Pull(t.Context(), refs[i], blobs)
		if err != nil {
			t.Fatal(err)
		}
		when := time.Now().Add(time.Duration(i-10) * time.Hour)
		for _, digest := range img.held {
			if err := os.Chtimes(blobs.path(digest), when, when); err != nil {
				t.Fatal(err)
			}
		}
		img.Close()
	}
	write(t, filepath.Join(blobs.dir, "somebody-elses"), "kept")
	used, err := c.Pull(t.Context(), refs[0], blobs) // the oldest one is used again
	if err != nil {
		t.Fatal(err)
	}
	removed, err := blobs.Trim(250_000)
	if err != nil || removed < 100_000 || removed > 120_000 {
		t.Errorf("removed %d bytes: %v", removed, err)
	}
	s.Close()
	for i, there := range []bool{true, false, true} {
		img, err := c.Pull(t.Context(), refs[i], blobs)
		if (err == nil) != there {
			t.Errorf("image %d: %v", i, err)
		}
		if err == nil {
			img.Close()
		}
	}
	if _, err := blobs.Trim(0); err != nil || len(files(t, blobs)) != 3 {
		t.Errorf("%q are left beside an image in use: %v", files(t, blobs), err)
	}
	used.Close()
	if _, err := blobs.Trim(0); err != nil || len(files(t, blobs)) != 0 {
		t.Errorf("%q are left: %v", files(t, blobs), err)
	}
	if _, err := os.Stat(filepath.Join(blobs.dir, "somebody-elses")); err != nil {
		t.Error(err)
	}
}

// TestDamaged changes a blob on the disk. Who reads it is told, and the next pull gets it anew.
func TestDamaged(t *testing.T) {
	s, blobs := newServer(t), newBlobs(t)
	ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 100_000), types.OCIUncompressedLayer)), "v1")
	c := impatient(Config{})
	for _, damage := range []func(path string) error{
		func(path string) error { return os.WriteFile(path, make([]byte, 102_400), 0o400) },
		func(path string) error { return os.Truncate(path, 1000) },
	} {
		img, err := c.Pull(t.Context(), ref, blobs)
		if err != nil {
			t.Fatal(err)
		}
		path := blobs.path(img.Layers[0].Digest)
		if err := damage(path); err != nil {
			t.Fatal(err)
		}
		r, err := img.Layers[0].Open()
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, r)
		fails(t, err, ErrInvalid, "damaged")
		r.Close()
		img.Close()
		if _, err := os.Stat(path); err == nil {
			t.Error("it is still there")
		}
	}
	img, err := c.Pull(t.Context(), ref, blobs)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
}

// TestManifests has what a manifest may say, and the words of the error.
func TestManifests(t *testing.T) {
	blob := func(mediaType string, size int) string {
		return fmt.Sprintf(`{"mediaType": %q, "digest": "sha256:%064x", "size": %d}`, mediaType, size, size)
	}
	of := func(layers ...string) string {
		config := blob("application/vnd.oci.empty.v1+json", 2)
		return `{"schemaVersion": 2, "config": ` + config + `, "layers": [` + strings.Join(layers, ",") + `]}`
	}
	const (
		tarLayer       = "application/vnd.oci.image.layer.v1.tar"
		restricted     = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
		dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
		dockersForeign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		chart          = "application/vnd.cncf.helm.chart.content.v1.json"
		index          = "application/vnd.oci.image.index.v1+json"
	)
	for name, tc := range map[string]struct{ manifest, words string }{
		"image":             {of(blob(tarLayer, 1), blob(tarLayer+"+zstd", 2), blob(dockerLayer, 3)), ""},
		"artifact":          {of(blob("application/x-tar", 1), blob("application/vnd.example.tar+gzip", 1)), ""},
		"no layers":         {of(), "0 layers"},
		"too many layers":   {of(strings.Split(strings.Repeat(blob(tarLayer, 1)+"\n", 513), "\n")[:513]...), "513 layers"},
		"foreign":           {of(blob(dockersForeign, 1)), "foreign layers included"},
		"not distributable": {of(blob(restricted, 1)), "foreign layers included"},
		"a chart":           {of(blob(tarLayer, 1), blob(chart, 1)), "layer 2 of 2: its media type"},
		"negative size":     {of(strings.Replace(blob(tarLayer, 7), `"size": 7`, `"size": -7`, 1)), "has -7 bytes"},
		"huge":              {of(blob(tarLayer, 1<<62)), "at most"},
		"huge together":     {of(blob(tarLayer, 1<<42), blob(tarLayer, 1<<42)), "more than 4Ti"},
		"another digest": {of(`{"mediaType": "` + tarLayer + `", "digest": "sha256:../../../../etc/shadow", "size": 1}`),
			"no digest that can be checked"},
		"two in one":     {`{"schemaVersion": 2, "layers": [], "manifests": []}`, "an index and an image at once"},
		"another type":   {`{"schemaVersion": 2, "mediaType": "` + index + `", "layers": []}`, "which its content is not"},
		"version 1":      {`{"schemaVersion": 1, "fsLayers": []}`, "schema version 1"},
		"not a manifest": {`<html>`, "not the JSON of a manifest"},
	} {
		_, err := parseManifest([]byte(tc.manifest))
		if tc.words == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if tc.words != "" {
			fails(t, err, ErrInvalid, tc.words)
		}
	}
}

func TestDockerConfig(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a"), `{"auths": {"registry.example": {"username": "host", "password": "x"},
		"https://registry.example/team/": {"username": "team", "password": "x"},
		"docker.io": {"username": "hub", "password": "x"}}}`)
	write(t, filepath.Join(dir, "b", "config.json"), `{"auths": {
		"registry.example": {"username": "later", "password": "x"},
		"other.example:5000": {"auth": "b3RoZXI6eA=="}, "empty.example": {}}, "credsStore": "desktop"}`)
	for ref, want := range map[string]string{
		"registry.example/app":            "host",
		"registry.example/team/app":       "team",
		"registry.example/teammates/app":  "host",
		"other.example:5000/app":          "other",
		"other.example/app":               "",
		"empty.example/app":               "",
		"ubuntu":                          "hub",
		"registry.example.evil.net/a/app": "",
	} {
		r, err := name.ParseReference(ref)
		if err != nil {
			t.Fatal(err)
		}
		c, err := findCredentials(dir, r.Context())
		if err != nil {
			t.Fatal(err)
		}
		if auth, err := c.auth.Authorization(); err != nil || auth.Username != want {
			t.Errorf("%s has the credentials of %q, want %q: %v", ref, auth.Username, want, err)
		}
	}
	_, err := impatient(Config{Credentials: filepath.Join(dir, "missing")}).Resolve(t.Context(), "registry.example/app")
	fails(t, err, ErrReference, "missing", "check the directory of credentials")
}
