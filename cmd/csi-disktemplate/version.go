// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	_ "embed"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
)

// release is the version that the manifests name, as v0.1.0. The file is its only source: a
// test compares every image tag with it.
//
//go:embed RELEASE
var release string

// The linker sets these, see hack/stamp.sh. A build without them is one of the release to come.
var version, commit, date string

// versionName is the version of this build: v0.1.0 for the release itself, v0.1.0-12-gabc1234 for
// a build after it, v0.1.0-dev+abc1234 for one where no tag was seen.
func versionName() string {
	if version != "" {
		return version
	}
	// go install MODULE@v0.1.0 knows the version of the module. A build in a checkout without tags
	// has a pseudo-version, v0.0.0 with date and commit.
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") && !strings.HasPrefix(info.Main.Version, "v0.0.0-") {
		return info.Main.Version
	}
	return strings.TrimSpace(release) + "-dev"
}

// versionLine is what --version prints.
func versionLine() string {
	var origin []string
	for _, known := range []string{cmp.Or(commit, "unknown commit"), date, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH} {
		if known != "" {
			origin = append(origin, known)
		}
	}
	return fmt.Sprintf("%s (%s)", versionName(), strings.Join(origin, ", "))
}
