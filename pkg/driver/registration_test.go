// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// TestRegistration plays kubelet: it asks who is there and reports results.
func TestRegistration(t *testing.T) {
	dir, endpoint := t.TempDir(), filepath.Join(t.TempDir(), "plugins/csi.disktemplate.io/csi.sock")
	r, err := NewRegistration(dir, DefaultName, "unix://"+endpoint)
	if err != nil {
		t.Fatal(err)
	}
	if err := makeSocketDir("unix://" + endpoint); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Dir(endpoint)); err != nil || !fi.IsDir() || fi.Mode().Perm()&0o027 != 0 {
		t.Errorf("the directory for the socket: %v, %v", fi, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.serve(ctx) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "csi.disktemplate.io-reg.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	kubelet := registration.NewRegistrationClient(conn)
	info, err := kubelet.GetInfo(t.Context(), &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(r.socket); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	if info.GetType() != "CSIPlugin" || info.GetName() != DefaultName || info.GetEndpoint() != endpoint || !slices.Equal(info.GetSupportedVersions(), []string{"1.0.0"}) {
		t.Errorf("kubelet is told %v", info)
	}
	if c := r.Conditions(); len(c) != 1 || c[0].Code != "NotRegistered" || !strings.Contains(c[0].Text, "kubelet has not asked yet") || !strings.Contains(c[0].Remedy, "--registration-dir") {
		t.Errorf("before kubelet's answer: %v", c)
	}
	for _, c := range []struct {
		status *registration.RegistrationStatus
		says   string
	}{
		{&registration.RegistrationStatus{Error: "no such driver"}, "no such driver"},
		{&registration.RegistrationStatus{PluginRegistered: true}, ""},
	} {
		if _, err := kubelet.NotifyRegistrationStatus(t.Context(), c.status); err != nil {
			t.Fatal(err)
		}
		err := health.Err(r.Conditions())
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("after %v: %v", c.status, err)
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("serve does not end")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("kubelet will not see that the driver is gone: %v, %v", left, err)
	}
}

func TestBadRegistration(t *testing.T) {
	for dir, says := range map[string]string{
		"relative": "absolute",
		"/" + strings.Repeat("long", 30) + "/plugins_registry": "107",
	} {
		_, err := NewRegistration(dir, DefaultName, "unix:///csi.sock")
		t.Log(err)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}
