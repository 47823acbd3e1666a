// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package loops_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/loops"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// attach attaches a file or device and returns the loop device's name.
func attach(t *testing.T, file string) string {
	t.Helper()
	device := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", file))
	detach(t, device)
	return filepath.Base(device)
}

func detach(t *testing.T, device string) {
	t.Cleanup(func() { testenv.Run(t, "losetup", "--detach", device) })
}

// attachElsewhere does so in a mount namespace where a directory has another one mounted over it. The namespace lives
// until the test ends: the paths of one that is gone begin at the mount's root.
func attachElsewhere(t *testing.T, file, over, under string) string {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", testenv.DropOthers(filepath.Dir(under))+`mount --bind "$1" "$2" && losetup --find --show "$0" && exec cat`, file, over, under)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(line)
	detach(t, device)
	return filepath.Base(device)
}

func file(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func names(devices []loops.Device) (names []string) {
	for _, d := range devices {
		names = append(names, d.Name)
	}
	return names
}

// TestForeignDevices attaches devices that are not the pool's, among them one with the path of the pool's own volume in
// another mount namespace.
func TestForeignDevices(t *testing.T) {
	testenv.Root(t)
	dir := testenv.Dir(t)
	image := filepath.Join(dir, "pool.img")
	testenv.XFS.Format(t, image, 512<<20)
	pool := attach(t, image)
	mounted := filepath.Join(dir, "mnt")
	volumes := filepath.Join(mounted, "volumes")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "/dev/"+pool, mounted)
	t.Cleanup(func() { testenv.Unmount(t, mounted) })
	if err := os.MkdirAll(volumes, 0o700); err != nil {
		t.Fatal(err)
	}
	volume := attach(t, file(t, filepath.Join(volumes, "volume")))
	holder := attach(t, "/dev/"+volume)

	other := filepath.Join(testenv.Dir(t), "volumes")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	foreign := []string{
		attach(t, file(t, filepath.Join(other, "other.img"))),
		attach(t, file(t, filepath.Join(other, "pool.img"))),
	}
	file(t, filepath.Join(other, "volume"))
	foreign = append(foreign, attachElsewhere(t, filepath.Join(volumes, "volume"), other, volumes))

	devices, err := loops.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range foreign {
		if !slices.Contains(names(devices), name) {
			t.Errorf("%s is not listed: %v", name, devices)
		}
	}
	id, err := loops.FileOf(image)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(loops.Above(devices, id)); !slices.Equal(got, []string{holder, volume, pool}) {
		t.Errorf("of the pool are %q, not %q: %v", got, []string{holder, volume, pool}, devices)
	}
	below, err := loops.Below(volumes)
	if err != nil || !slices.Equal(names(below), []string{volume}) {
		t.Errorf("below %s are %v, not %s: %v", volumes, below, volume, err)
	}
	i := slices.IndexFunc(devices, func(d loops.Device) bool { return d.Name == foreign[2] })
	if i < 0 || !strings.HasPrefix(devices[i].Path, volumes) {
		t.Errorf("the foreign device does not have the volume's path, and this tests nothing: %v", devices)
	}
}
