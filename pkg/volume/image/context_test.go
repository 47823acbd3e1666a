// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

const fileType = "system_u:object_r:container_file_t"

// TestContext reads contexts as kubelet and administrators write them. Each becomes what the kernel
// shows, and so does what it became.
func TestContext(t *testing.T) {
	for given, want := range map[string]string{
		``:                                ``,
		`:s0`:                             `:s0`,
		`:s0:c1,c2`:                       `:s0:c1,c2`,
		`:s0:c27,c14`:                     `:s0:c14,c27`,
		`:s0:c2,c1,c2`:                    `:s0:c1,c2`,
		`:s0:c1,c2,c3`:                    `:s0:c1.c3`,
		`:s0:c1.c2`:                       `:s0:c1,c2`,
		`:s0:c7,c1.c3,c5.c6,c1023`:        `:s0:c1.c3,c5.c7,c1023`,
		`:s0:c5.c5`:                       `:s0:c5`,
		`:s0-s0`:                          `:s0`,
		`:s0-s0:c0.c1023`:                 `:s0-s0:c0.c1023`,
		`:s0:c2,c1-s0:c3,c2,c1`:           `:s0:c1,c2-s0:c1.c3`,
		`:s0:c2,c1-s0:c1,c2`:              `:s0:c1,c2`,
		`:SystemLow`:                      `:SystemLow`,
		`:s0:secret,c2,c1`:                `:s0:secret,c2,c1`,
		`:s0:c01,c00`:                     `:s0:c01,c00`,
		`:s0:c3.c1`:                       `:s0:c3.c1`,
		`:s0:c1,,c0`:                      `:s0:c1,,c0`,
		`:s0:c12345,c1`:                   `:s0:c12345,c1`,
		`:s0:` + strings.Repeat("c", 150): `:s0:` + strings.Repeat("c", 150),
	} {
		given, want = fileType+given, fileType+want
		for _, word := range []string{given, `"` + given + `"`, want} {
			for _, of := range []Lifecycle{Inline, Claim} {
				a, err := ParseMountFlags([]string{"ro", "context=" + word, "noatime"}, of)
				if err != nil || a != (Access{ReadOnly: true, NoATime: true, Context: want}) {
					t.Errorf("%s is read as %s: %v", word, a, err)
				}
			}
		}
	}
	// The last one counts.
	a, err := ParseMountFlags([]string{"context=a:b:c", `context="d:e:f"`}, Claim)
	if err != nil || a.Context != "d:e:f" || !strings.HasSuffix(a.String(), `,context="d:e:f"`) {
		t.Errorf("%s: %v", a, err)
	}
}

// TestContextRefused: what the kernel, the mount table or a message could take for something else
// is no context.
func TestContextRefused(t *testing.T) {
	for _, value := range []string{
		"", `"`, `""`, "a", "a:b", ":::", "a::c", "a:b:c:", "a:b:c:s0:", "a:b:c:s0:c0:c1:c2", `"a:b:c`, `a:b:c"`, `""a:b:c""`, `'a:b:c'`, `a:"b":c`, "a:b:c d",
		"a:b:c\n", "a:b:c\x00", "a:b,ro:c", "a:b:c,ro", "a:b:c=d", `a:b:c\`, "a:b:\xff", "a:b:ä", "a:b:c:s0:c1;c2", "a:b:" + strings.Repeat("c", 252), " a:b:c",
	} {
		_, err := ParseMountFlags([]string{"context=" + value}, Inline)
		if !errors.Is(err, errdefs.ErrInvalid) || len(err.Error()) > 600 || !strings.Contains(err.Error(), "user:role:type") {
			t.Errorf("%q: %v", value, err)
			continue
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Errorf("%q: %s", value, fault)
		}
	}
	if _, err := ParseMountFlags([]string{"context=a:b:" + strings.Repeat("c", 251)}, Inline); err != nil {
		t.Errorf("255 bytes: %v", err)
	}
	for _, word := range []string{"fscontext=a:b:c", "defcontext=a:b:c", "rootcontext=a:b:c", "context", "seclabel", "Context=a:b:c", "xcontext=a:b:c"} {
		_, err := ParseMountFlags([]string{word}, Claim)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.HasSuffix(err.Error(), " and context=") {
			t.Errorf("%q: %v", word, err)
		}
		other := slices.Contains([]string{"fscontext=a:b:c", "defcontext=a:b:c", "rootcontext=a:b:c"}, word)
		if strings.Contains(err.Error(), "of SELinux's options, only context= is") != other {
			t.Errorf("%q: %v", word, err)
		}
	}
}

// TestContextOfMount reads the options as selinux_sb_show_options writes them.
func TestContextOfMount(t *testing.T) {
	for options, want := range map[string]string{
		"rw":          "",
		"rw,seclabel": "",
		"rw,context=system_u:object_r:container_file_t:s0,discard":             "system_u:object_r:container_file_t:s0",
		`rw,context="system_u:object_r:container_file_t:s0:c1,c2",seclabel`:    "system_u:object_r:container_file_t:s0:c1,c2",
		`rw,fscontext=a:b:c,defcontext="d:e:f:s0:c1,c2",inode64,logbufs=8`:     "",
		`ro,fscontext="a:b:c:s0:c1,c2",context="d:e:f:s0:c3,c4",rootcontext=x`: "d:e:f:s0:c3,c4",
	} {
		a := AccessOf(&mount.Info{Options: options})
		if a.Context != want {
			t.Errorf("%s: %q", options, a.Context)
		}
	}
}
