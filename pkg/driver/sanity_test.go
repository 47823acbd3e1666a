// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// mayBeSkipped matches the specs for capabilities that this driver does not declare: no controller attaches volumes,
// nothing about them can be modified, and there are no groups.
var mayBeSkipped = regexp.MustCompile(`ControllerPublishVolume|ControllerUnpublishVolume|volume lifecycle|` +
	`ModifyVolume|volume attribute class|GroupController|VolumeGroupSnapshot`)

// sized computes the size of each answer. A spec of csi-test 5.6.0 compares the topology of a snapshot with the node's by
// reflection, which includes protobuf's size caches. The node's topology has been sent by then, so its cache is filled.
// Without this no driver that reports a snapshot's topology could pass.
func sized(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, conn, opts...)
	proto.Size(reply.(proto.Message))
	return err
}

// TestSanity runs csi-test's specs for a CSI driver on a pool of each kind, with claims of each filesystem and with block
// volumes. Ginkgo runs one suite per process, so all of them are parts of one suite.
func TestSanity(t *testing.T) {
	var plugins []*plugin
	for _, kind := range testenv.PoolKinds {
		p := newNode(t, kind, 256<<30).start("-v", "2")
		plugins = append(plugins, p)
		for _, class := range []struct {
			name, accessType string
			parameters       map[string]string
		}{
			{"ext4", "mount", map[string]string{paramFSType: "ext4"}},
			{"xfs", "mount", map[string]string{paramFSType: "xfs"}},
			{"btrfs", "mount", map[string]string{paramFSType: "btrfs"}},
			{"block", "block", nil},
		} {
			config := sanity.NewTestConfig()
			config.Address = p.Endpoint()
			config.TargetPath = filepath.Join(p.Kubelet, "sanity-target")
			config.StagingPath = filepath.Join(p.Kubelet, "sanity-staging")
			config.DialOptions = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(sized)}
			config.TestVolumeSize = 1 << 30
			config.TestVolumeAccessType = class.accessType
			config.TestVolumeParameters = class.parameters
			ginkgo.Describe(fmt.Sprintf("%s on %s", class.name, kind.Name), func() { sanity.GinkgoTest(&config) })
		}
	}
	var passed int
	skipped := map[string]bool{}
	ginkgo.ReportAfterSuite("count", func(r types.Report) {
		for _, s := range r.SpecReports {
			switch {
			case s.LeafNodeType != types.NodeTypeIt:
			case s.State.Is(types.SpecStatePassed):
				passed++
			case s.State.Is(types.SpecStateSkipped):
				skipped[s.FullText()] = true
			}
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct, reporter.NoColor = true, true
	if !ginkgo.RunSpecs(t, "csi-sanity", suite, reporter) {
		t.Error("csi-sanity failed")
	}
	t.Logf("%d passed, %d skipped", passed, len(skipped))
	for name := range skipped {
		if !mayBeSkipped.MatchString(name) {
			t.Errorf("skipped: %s", strings.TrimSpace(name))
		}
	}
	if passed < 8*60 {
		t.Errorf("only %d passed", passed)
	}
	for _, p := range plugins {
		if code := p.terminate(); code != 0 {
			t.Errorf("exit code %d after SIGTERM", code)
		}
	}
}
