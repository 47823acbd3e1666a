// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"reflect"
	"slices"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestEveryFieldIsCompared changes each field of a request in turn. The volume that the
// request made must then count as different. A field that is not compared would be a hole in
// idempotency that no other test finds.
func TestEveryFieldIsCompared(t *testing.T) {
	inline := InlineRequest{
		ID: "v", Target: "/k/pods/u/v", Spec: diskfs.Spec{Filesystem: "ext4", Size: diskfs.MiB}, Mode: image.ModeFilesystem,
	}
	have := inline.record()
	changes(t, inline, map[string]string{
		"ID": "finds the volume", "Pod": "kubelet says who it is, and a name may be used again",
	}, func(r InlineRequest) error { return r.compare(have) })

	claim := ClaimRequest{Name: "v", Spec: diskfs.Spec{Filesystem: "ext4", Size: 4 * diskfs.MiB}, Limit: 8 * diskfs.MiB, Mode: image.ModeFilesystem}
	made := claim.record()
	changes(t, claim, map[string]string{
		"DefaultSpec": "tells what Spec means", "AnyFilesystem": "so does this", "AnyMode": "tells what Mode means", "Namespace": "may use the content or not, and changes nothing of it",
	}, func(r ClaimRequest) error { return r.compare(made) })
}

// TestDifferencesAreSaid checks how differences are described.
func TestDifferencesAreSaid(t *testing.T) {
	claim := ClaimRequest{Name: "v", Spec: diskfs.Spec{Filesystem: "xfs", Size: 300 * diskfs.MiB}, Mode: image.ModeFilesystem}
	made := claim.record()
	for _, c := range []struct {
		change func(*ClaimRequest)
		want   string
	}{
		{func(r *ClaimRequest) { r.Spec.Size = 396 * diskfs.MiB }, "its size is 300Mi, and 396Mi is asked for"},
		{func(r *ClaimRequest) { r.Limit = 300e6 }, "its size is 300Mi, and a limit of 300000000 bytes is asked for"},
		{func(r *ClaimRequest) { r.Spec.Label = "data" }, "its content is xfs 300Mi, and xfs 300Mi label=data is asked for"},
		{func(r *ClaimRequest) { r.Provisioning = image.Thick; r.Source.Snapshot = "s" },
			"its provisioning is thin, and thick is asked for; its source is none, and snapshot s is asked for"},
	} {
		r := claim
		c.change(&r)
		err := r.compare(made)
		if want := "already exists and is different: volume " + made.ID + ": " + c.want + "; use another name"; err == nil || err.Error() != want {
			t.Errorf("%v, not %q", err, want)
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Error(fault)
		}
	}
}

// changes calls compare with each field of a request changed, also within structs. The
// excused fields are left out.
func changes[T any](t *testing.T, request T, excused map[string]string, compare func(T) error) {
	t.Helper()
	if err := compare(request); err != nil {
		t.Fatalf("%T: the same request: %v", request, err)
	}
	var walk func(at reflect.Value, path string, whole *T)
	walk = func(at reflect.Value, path string, whole *T) {
		if at.Kind() == reflect.Struct {
			for i := range at.NumField() {
				name := at.Type().Field(i).Name
				if excused[name] != "" && path == "" {
					continue
				}
				walk(at.Field(i), path+"."+name, whole)
			}
			return
		}
		before := reflect.ValueOf(at.Interface())
		var others []any
		switch at.Kind() {
		case reflect.String:
			others = []any{at.String() + "x"}
		case reflect.Bool:
			others = []any{!at.Bool()}
		case reflect.Int64: // a size may be less, and a limit more
			others = []any{int64(diskfs.MiB), int64(64 * diskfs.MiB)}
		case reflect.Map:
			others = []any{map[string]string{"journal": "off"}}
		default:
			t.Fatalf("%T%s: teach this test to change a %s", *whole, path, at.Kind())
		}
		if !slices.ContainsFunc(others, func(other any) bool {
			at.Set(reflect.ValueOf(other).Convert(at.Type()))
			return compare(*whole) != nil
		}) {
			t.Errorf("%T%s: compare does not tell %v from %v", *whole, path, others, before)
		}
		at.Set(before)
	}
	walk(reflect.ValueOf(&request).Elem(), "", &request)
}
