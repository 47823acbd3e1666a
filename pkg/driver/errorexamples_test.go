// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
)

// shown is how many characters of a message a reader surely sees: events and lists are cut.
const shown = 200

// errorExample is a row of docs/errors.md.
type errorExample struct {
	kind string
	do   string // who does what
	says string // words of the message that tell what to do, among the first that are shown

	refused func() error // from a request alone; nil for what depends on the node
	code    codes.Code   // of what depends on the node: TestErrorExamples provokes it, and compares code and text
	text    string
}

// publishing and creating read a request, as the plugin does.
func publishing(req *csi.NodePublishVolumeRequest) func() error {
	return func() error { _, err := inlineRequest(req); return err }
}

func creating(req *csi.CreateVolumeRequest) func() error {
	return func() error { _, err := claimRequest(req); return err }
}

// sharedClaim is a claim with ReadWriteMany.
func sharedClaim() *csi.CreateVolumeRequest {
	r := create(mounted(""))
	r.VolumeCapabilities[0].AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	return r
}

// withOption is a claim with a mount option.
func withOption(option string) *csi.CreateVolumeRequest {
	r := create(mounted("ext4"))
	r.VolumeCapabilities[0].GetMount().MountFlags = []string{option}
	return r
}

const (
	byPod   = "Pod's author: "
	byClass = "Author of the StorageClass: "
	byItem  = "Operator: "
	byWait  = "Nobody: Kubernetes asks again. "
)

// The keys of what depends on the node.
const (
	tooLarge   = "larger than the node allows"
	ofLimit    = "too many volumes of a namespace"
	ofBuilds   = "too many new kinds of disks"
	isBuilding = "the template is being built"
	isBusy     = "the volume is being worked on"
	isFull     = "no room for a claim"
	noContents = "no contents on this node"
	noGoldens  = "no goldens on this node"
	isAway     = "the source is on another node"
	isGone     = "the claim is on another node"
	isOnePods  = "a claim of one pod at a time"
	isDisk     = "another volumeMode"
	noBuilder  = "the node cannot format"
)

var errorExamples = []errorExample{
	{kind: "unknown attribute", do: byPod + "correct the name", says: "did you mean size?", refused: publishing(inline("", "siez", "1Gi"))},
	{kind: "a field as an attribute", do: byPod + "move it", says: "beside volumeAttributes", refused: publishing(inline("", "fsType", "xfs"))},
	{kind: "unknown filesystem", do: byPod + "name another", says: "one of btrfs, ext4, xfs", refused: publishing(inline("ntfs"))},
	{kind: "no size", do: byPod + "write a quantity", says: "did you mean 10M (10,000,000 bytes) or 10Mi", refused: publishing(inline("", "size", "10MB"))},
	{kind: "size beyond the filesystem", do: byPod + "ask for a size in between", says: "300Mi to", refused: publishing(inline("xfs", "size", "1Gi", "size", "100Mi"))},
	{kind: "label too long", do: byPod + "shorten it", says: "shorten it", refused: publishing(inline("xfs", "label", "scratch-of-tests"))},
	{kind: "label with other characters", do: byPod + "use those that it names", says: "only letters, digits", refused: publishing(inline("", "label", "my data"))},
	{kind: "unknown value", do: byPod + "use one of those listed", says: "one of filesystem, diskImage", refused: publishing(inline("", "publishAs", "block"))},
	{kind: "values that exclude each other", do: byPod + "leave one out", says: "leave durability out", refused: publishing(inline("", "durability", "volatile", "publishAs", "diskImage"))},
	{kind: "an attribute that needs another", do: byPod + "set that too", says: "set that too", refused: publishing(inline("", "commitWhen", "always"))},
	{kind: "no golden's name", do: byPod + "write one of the two forms", says: "golden/NAME or shared/NAME", refused: publishing(inline("", "from", "go-cache"))},
	{kind: "unknown parameter", do: byClass + "make another class: a class cannot be changed", says: "did you mean provisioning?", refused: creating(create(mounted(""), "provisionin", "thick"))},
	{kind: "the size as a parameter", do: byClass + "leave it out", says: "resources.requests.storage", refused: creating(create(mounted(""), "size", "1Gi"))},
	{kind: "unknown format option", do: byClass + "use one of those listed", says: "ext4 has only inode-size", refused: creating(create(mounted("ext4"), "formatOptions", "bigtime=1"))},
	{kind: "two filesystems for one volume", do: byClass + "leave `csi.storage.k8s.io/fstype` out, or name the same", says: "a mounted volume has one filesystem", refused: creating(create(mounted("btrfs"), "format", "xfs"))},
	{kind: "a mount option that is not allowed", do: byClass + "leave it out of mountOptions", says: "allowed are ro, rw", refused: creating(withOption("data=journal"))},
	{kind: "a volume for several nodes", do: "Author of the claim: ask for another access mode", says: "ReadWriteOnce or ReadWriteOncePod", refused: creating(sharedClaim())},

	{kind: tooLarge, do: byPod + "ask for less, or use a claim. " + byItem + "`--max-inline-size`", says: "use a claim", code: codes.OutOfRange,
		text: "size out of range: volume attribute size 301Mi: an inline volume may have at most 300Mi (--max-inline-size); ask for less, use a claim, or have the operator raise the flag"},
	{kind: ofLimit, do: byPod + "delete pods. " + byItem + "[the flag](operating.md#limits-for-pods)", says: "delete pods with inline volumes", code: codes.ResourceExhausted,
		text: `limit reached: --max-inline-volumes-per-namespace 1: namespace "shop" has 1 inline volumes on this node; delete pods with inline volumes in this namespace, or have the operator raise the flag`},
	{kind: ofBuilds, do: byWait + byPod + "use fewer kinds. " + byItem + "`--max-template-builds-per-hour`", says: "try again in ", code: codes.ResourceExhausted,
		text: "too many templates were built lately: --max-template-builds-per-hour 2 is reached; try again in 30m0s, ask for a disk of a kind (filesystem, size, label, options) that this node has already, or have the operator raise the flag"},
	{kind: isBuilding, do: byWait + byItem + "[prewarm it](operating.md#prewarming)", says: "Kubernetes will ask again", code: codes.Aborted,
		text: "template ext4 65Mi is being built (about 8 s); Kubernetes will ask again"},
	{kind: isBusy, do: byWait, says: "try again", code: codes.Aborted,
		text: "volume slow: another operation on it is under way; try again"},
	{kind: isFull, do: "Author of the claim: ask for less, delete claims. " + byItem + "[enlarge the pool](operating.md#how-to-size-a-pool)", says: "have the operator enlarge the pool", code: codes.ResourceExhausted,
		text: "pool is full: 64Gi is asked for, and 800Mi can be promised; ask for less, delete claims or snapshots, or have the operator enlarge the pool, drop cached templates (`csi-disktemplate clean-all`), or raise --overcommit: …"},
	{kind: noContents, do: byItem + "[install contents](installing.md#volumes-with-something-inside)", says: "the operator names them", code: codes.InvalidArgument,
		text: `invalid request: content "postgres": this node has no contents; the operator names them with --contents`},
	{kind: noGoldens, do: byItem + "[turn goldens on](installing.md#volumes-that-start-from-the-last-job)", says: "the operator turns them on", code: codes.InvalidArgument,
		text: `invalid request: golden "go-cache": this node has no goldens; the operator turns them on with --goldens`},
	{kind: isAway, do: "Pod's author: [put the pod on the source's node](claims.md#copies-stay-on-their-sources-node)", says: "put the pod there", code: codes.ResourceExhausted,
		text: "not on this node: dataSource: volume pvc-elsewhere is not here, and a copy is made on the node of its source; put the pod there: nodeAffinity of its PersistentVolume names it"},
	{kind: isGone, do: byItem + "[find the volume's node](installing.md#nodes-that-come-and-go)", says: "compare its PersistentVolume", code: codes.NotFound,
		text: "not found: there is no volume pvc-elsewhere on this node; a claim is on the node that made it, unless it was deleted: compare its PersistentVolume"},
	{kind: isOnePods, do: byPod + "delete the other pod, or ask for ReadWriteOnce, which all pods of a node may share", says: "delete that pod first", code: codes.FailedPrecondition,
		text: "operation not possible in this state: volume pvc-1: another pod has it, and its access mode allows one at a time: delete that pod first; it is published at …"},
	{kind: isDisk, do: "Author of the PersistentVolume: use the mode that it was made with", says: "use the volumeMode that its claim had", code: codes.FailedPrecondition,
		text: "operation not possible in this state: volumeMode Filesystem: volume pvc-1 was made as block; use the volumeMode that its claim had"},
	{kind: noBuilder, do: byItem + "do what it says, and see [Is it well?](operating.md#is-it-well)", says: "install the package", code: codes.FailedPrecondition,
		text: "this node cannot make a template of ext4 67Mi: formatter unavailable: --qemu /nonexistent: lstat /nonexistent: no such file or directory; install the package qemu-system-x86"},
}

// example is the message of an example, and its code.
func (e errorExample) example() (codes.Code, string) {
	if e.refused == nil {
		return e.code, e.text
	}
	s := status.Convert(toStatus(e.refused()))
	return s.Code(), s.Message()
}

// TestErrorsAreDocumented compares docs/errors.md with what the plugin says, and reads each message as an author of a
// pod: within what is shown of it, it says what to do.
func TestErrorsAreDocumented(t *testing.T) {
	var table strings.Builder
	table.WriteString("\n| kind | code | example | who does what |\n|---|---|---|---|\n")
	for _, e := range errorExamples {
		code, text := e.example()
		if at := strings.Index(text, e.says); at < 0 || at+len(e.says) > shown {
			t.Errorf("%s: does not say %q in its first %d characters: %s", e.kind, e.says, shown, text)
		}
		for _, fault := range plain.Faults(text) {
			t.Errorf("%s: %s: %s", e.kind, fault, text)
		}
		text = strings.ReplaceAll(strings.ReplaceAll(text, "`", "'"), "|", `\|`)
		fmt.Fprintf(&table, "| %s | %s | `%s` | %s |\n", e.kind, code, text, strings.TrimSpace(e.do))
	}
	documented(t, "errors.md", "table of errors", table.String()+"\n")
}
