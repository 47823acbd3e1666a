// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
)

// nodeAddress is the node's own, see node.sh. Pods reach it.
const nodeAddress = "172.31.255.1"

// user and password are what the registry asks pods for.
const user, password = "ci", "sesame"

// testRegistry is a registry on the node, by TLS and with a password. The test pushes past both.
type testRegistry struct {
	address     string // HOST:PORT, for pods
	certificate []byte // PEM
	here        string // HOST:PORT, for the test
}

// newRegistry serves a registry on the node until the test ends.
func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	here := httptest.NewServer(handler)
	t.Cleanup(here.Close)
	there := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	there.Listener.Close()
	there.Listener = listenOnNode(t)
	there.Config.ErrorLog = log.New(io.Discard, "", 0)
	pair, certificate := selfSigned(t)
	there.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	there.StartTLS()
	t.Cleanup(there.Close)
	return &testRegistry{there.Listener.Addr().String(), certificate, strings.TrimPrefix(here.URL, "http://")}
}

// listenOnNode listens at the node's address. A socket stays in the network namespace of the thread that made it.
func listenOnNode(t testing.TB) net.Listener {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(stateDir(), "init.pid"))
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		net.Listener
		error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%s/ns/net", strings.TrimSpace(string(pid))))
		if err != nil {
			done <- result{error: err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{error: os.NewSyscallError("setns", err)}
			return
		}
		l, err := net.Listen("tcp", nodeAddress+":0")
		done <- result{l, err}
	}()
	r := <-done
	if r.error != nil {
		t.Fatal(r.error)
	}
	return r.Listener
}

// selfSigned makes a certificate for the node's address that is its own authority.
func selfSigned(t testing.TB) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.ParseIP(nodeAddress)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, certificate
}

// trust makes the objects by which the plugin trusts the registry and has its password, as the component says.
func (r *testRegistry) trust(t testing.TB) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: csi-disktemplate-certificates, namespace: %s}
data: {ca.crt: %q}
---
apiVersion: v1
kind: Secret
metadata: {name: csi-disktemplate-credentials, namespace: %[1]s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: %[3]q}
`, namespace, r.certificate, fmt.Sprintf(`{"auths": {%q: {"username": %q, "password": %q}}}`, r.address, user, password)))
}

// push makes an image of layers, bottom first, which are tar archives.
func (r *testRegistry) push(t testing.TB, reference string, layers ...[]byte) {
	t.Helper()
	image := empty.Image
	for _, b := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err == nil {
			image, err = mutate.AppendLayers(image, layer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ref, err := name.ParseReference(r.here+"/"+reference, name.Insecure)
	if err := errors.Join(err, remote.Write(ref, image)); err != nil {
		t.Fatal(err)
	}
}

// archiveOf makes a tar archive of names and what is in them, in turns. A name that ends with "/" is a directory.
func archiveOf(t testing.TB, members ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(members); i += 2 {
		name := members[i].(string)
		data, _ := members[i+1].([]byte)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1, 0)}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode, h.Size, data = tar.TypeDir, 0o755, 0, nil
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
