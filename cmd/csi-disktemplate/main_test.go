// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http/httptest"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
)

func mustSay(t *testing.T, err error, says ...string) {
	t.Helper()
	t.Log(err)
	for _, s := range says {
		if err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("does not say %s: %v", s, err)
		}
	}
	if err == nil {
		return
	}
	for _, line := range strings.Split(err.Error(), "\n") {
		for _, fault := range plain.Faults(line) {
			t.Errorf("%s: %v", fault, err)
		}
	}
}

func TestFormatSpec(t *testing.T) {
	for name, c := range map[string]struct {
		fs, size, label string
		options         map[string]string
		want            string
	}{
		"defaults":           {fs: "ext4", want: "ext4 256Mi"},
		"default of xfs":     {fs: "xfs", want: "xfs 300Mi"},
		"rounded up":         {fs: "btrfs", size: "1500M", want: "btrfs 1431Mi"},
		"the maximum":        {fs: "xfs", size: "4294967295Mi", want: "xfs 4294967295Mi"},
		"label and option":   {fs: "ext4", size: "1Gi", label: "data", options: map[string]string{"inode-size": "512"}, want: "ext4 1Gi label=data inode-size=512"},
		"raw":                {fs: "raw", size: "1", want: "raw 1Mi"},
		"raw of some length": {fs: "raw", size: "3Gi", want: "raw 3Gi"},
	} {
		o := formatOptions{fs: c.fs, size: c.size, label: c.label, options: c.options}
		if got, err := o.spec(); err != nil || got.String() != c.want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// badSpecs are arguments that format must refuse, with the words that the error must have.
var badSpecs = map[string]struct {
	args []string
	says []string
}{
	"filesystem":        {[]string{"--fs", "ntfs"}, []string{"--fs", `"ntfs"`, "btrfs, ext4, raw, xfs"}},
	"size in words":     {[]string{"--size", "lots"}, []string{"--size", `"lots"`, "512Mi"}},
	"size in GB":        {[]string{"--size", "10GB"}, []string{`--size "10GB": must be a quantity, as 512Mi or 10Gi; did you mean 10G (10,000,000,000 bytes) or 10Gi (`}},
	"size zero":         {[]string{"--size", "0"}, []string{"--size", `"0"`, "9Mi", "8Ti"}},
	"size negative":     {[]string{"--size", "-1Gi"}, []string{"--size", `"-1Gi"`, "-1Gi", "9Mi", "8Ti"}},
	"size too small":    {[]string{"--fs", "xfs", "--size", "299Mi"}, []string{"--size", `"299Mi"`, "300Mi", "4294967295Mi"}},
	"size too large":    {[]string{"--size", "4294967296Mi"}, []string{"--size", `"4294967296Mi"`, "9Mi", "8Ti"}},
	"size huge":         {[]string{"--size", "1e30"}, []string{"--size", `"1e30"`, "9Mi", "8Ti"}},
	"size to the skies": {[]string{"--size", "1e999999999"}, []string{"--size", `"1e999999999"`, "512Mi"}},
	"size 2^64 + 1 Gi":  {[]string{"--size", "18446744074783293440"}, []string{"--size", "9Mi", "8Ti"}},
	"label":             {[]string{"--label", "a b"}, []string{"label", `"a b"`, "letters"}},
	"long label":        {[]string{"--fs", "xfs", "--label", "thirteen-char"}, []string{"label", `"thirteen-char"`, "12"}},
	"label of raw":      {[]string{"--fs", "raw", "--size", "1Mi", "--label", "l"}, []string{"label", "raw"}},
	"option":            {[]string{"--option", "journal-size=1"}, []string{"option", `"journal-size"`, "inode-size"}},
	"option's value":    {[]string{"--option", "inode-size=77"}, []string{"option", `"77"`, "256, 512, 1024"}},
	"option of raw":     {[]string{"--fs", "raw", "--option", "inode-size=512"}, []string{"option", "raw"}},
	"accelerator":       {[]string{"--accel", "warp"}, []string{"--accel", `"warp"`, "auto, kvm, tcg"}},
	"timeout":           {[]string{"--format-timeout", "-1s"}, []string{"--format-timeout", "-1s", "more than 0"}},
	"no output":         {[]string{"-o", ""}, []string{"--output"}},
	"argument":          {[]string{"disk.img"}, []string{"disk.img"}},
	"flag":              {[]string{"--sise", "1Gi"}, []string{"--sise"}},
}

func TestBadSpecs(t *testing.T) {
	for name, c := range badSpecs {
		t.Run(name, func(t *testing.T) {
			cmd := newCommand()
			cmd.SetArgs(append([]string{"format", "-o", "/nonexistent/disk.img"}, c.args...))
			mustSay(t, cmd.ExecuteContext(t.Context()), c.says...)
		})
	}
}

// parse returns the error of a command line that is parsed, but not run.
func parse(t *testing.T, o *pluginOptions, args ...string) error {
	t.Helper()
	t.Setenv("NODE_NAME", "node1")
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	o.add(f)
	if err := f.Parse(append([]string{"--pool", "/pool"}, args...)); err != nil {
		return flagError(newCommand(), err)
	}
	return refuse(f)
}

func TestPoolFlags(t *testing.T) {
	for value, want := range map[string]int64{"": 0, "20Gi": 20 << 30, "1.5G": 15e8, "1e30": math.MaxInt64, "18446744074783293440": math.MaxInt64} {
		var o pluginOptions
		if err := parse(t, &o, "--loopback-pool-size", value); err != nil || o.pool.LoopbackSize != want || o.pool.Dir != "/pool" {
			t.Errorf("%q is %+v, %v", value, o.pool, err)
		}
	}
	for value, says := range map[string]string{"big": "10Gi", "0": "more than 0", "-20Gi": "more than 0", "-1e30": "more than 0", "20GB": "did you mean 20G (20,000,000,000 bytes) or 20Gi", "1e999999999": "10Gi"} {
		mustSay(t, parse(t, &pluginOptions{}, "--loopback-pool-size", value), "--loopback-pool-size", value, says)
	}
}

// TestListener checks which addresses the plugin listens on. A pod's address comes from Kubernetes without brackets.
func TestListener(t *testing.T) {
	for value, want := range map[string]string{
		"": "", ":9808": ":9808", "10.0.0.7:9808": "10.0.0.7:9808", "localhost:9808": "localhost:9808", "127.0.0.1:0": "127.0.0.1:0",
		"[fd00::7]:9808": "[fd00::7]:9808", "fd00::7:9808": "[fd00::7]:9808", "fd00:1:2:3:4:5:6:7:9808": "[fd00:1:2:3:4:5:6:7]:9808", "::1:9808": "[::1]:9808",
		":::9808": "[::]:9808", "::ffff:10.0.0.7:9808": "[::ffff:10.0.0.7]:9808", "fe80::1%eth0:9808": "[fe80::1%eth0]:9808",
	} {
		var o pluginOptions
		if err := parse(t, &o, "--http-endpoint", value); err != nil || o.httpEndpoint != want {
			t.Errorf("%q is %q, %v", value, o.httpEndpoint, err)
		}
	}
	for _, value := range []string{"9808", "10.0.0.7", "fd00::", "fd00:1:2:3:4:5:6:7", "[fd00::7]", "fd00::7:", ":", "10.0.0.7:http", ":65536", ":-1", "http://10.0.0.7:9808", "a:b:9808"} {
		mustSay(t, parse(t, &pluginOptions{}, "--http-endpoint", value), "--http-endpoint", fmt.Sprintf("%q", value), "fd00::7:9808", ":9808")
	}
	// The plugin can really listen where the machine has IPv6.
	for _, value := range []string{"127.0.0.1:0", "::1:0"} {
		var o pluginOptions
		if err := parse(t, &o, "--http-endpoint", value); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", o.httpEndpoint)
		if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
			t.Logf("the machine has no such address: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}

// TestFlags checks what the plugin's flags are read as.
func TestFlags(t *testing.T) {
	var o pluginOptions
	if err := parse(t, &o); err != nil {
		t.Fatal(err)
	}
	want := quota.Limits{Size: 100 << 30, Volumes: 500}
	if o.nodeID != "node1" || o.limits != want || o.headroom != (size.Share{Percent: 5}) || o.templateCache != (size.Share{Percent: 20}) || o.overcommit != 1 ||
		o.durability != image.Synced ||
		o.sweepInterval != 10*time.Minute || o.trimInterval != time.Minute || o.maxVMs != 2 || o.maxBuildsPerHour != 120 || o.maxVolumes != 1024 ||
		o.vm != (vmformat.Config{Accel: vmformat.AccelAuto, Timeout: vmformat.DefaultTimeout}) || o.pool != (pool.Config{Dir: "/pool", NodeHeadroom: size.Share{Percent: 20}}) {
		t.Errorf("the defaults are %+v", o)
	}
	if err := parse(t, &o, "--headroom", "1Gi", "--template-cache", "0", "--overcommit", "2.5", "--sweep-interval", "0", "--format-timeout", "90s", "--accel", "tcg",
		"--max-formatting-vms", "0x10", "--max-template-builds-per-hour", "0", "--max-volumes-per-node", "0", "--max-inline-size", "0", "--max-inline-volumes", "7",
		"--max-inline-volumes-per-namespace", "3", "--max-inline-bytes", "1Ti", "--max-inline-bytes-per-namespace", "1e30",
		"--default-durability", "volatile"); err != nil {
		t.Fatal(err)
	}
	want = quota.Limits{Volumes: 7, VolumesPerNamespace: 3, Bytes: 1 << 40, BytesPerNamespace: math.MaxInt64}
	if o.limits != want || o.headroom != (size.Share{Bytes: 1 << 30}) || o.templateCache != (size.Share{}) || o.overcommit != 2.5 ||
		o.durability != image.Volatile ||
		o.sweepInterval != 0 || o.maxVMs != 16 || o.maxBuildsPerHour != 0 || o.maxVolumes != 0 ||
		o.vm != (vmformat.Config{Accel: vmformat.AccelTCG, Timeout: 90 * time.Second}) {
		t.Errorf("the flags are %+v", o)
	}
}

// TestPrewarmFlag checks which templates --prewarm lists.
func TestPrewarmFlag(t *testing.T) {
	for value, want := range map[string]string{
		"":         "[]",
		"xfs:10Gi": "[xfs 10Gi]",
		"ext4:1Gi, xfs:10Gi:label=data:inode-size=1024,btrfs:1G": "[ext4 1Gi xfs 10Gi label=data inode-size=1024 btrfs 954Mi]",
	} {
		var o pluginOptions
		if err := parse(t, &o, "--prewarm", value); err != nil || fmt.Sprint(o.prewarm.Specs) != want {
			t.Errorf("%q is %v, %v", value, o.prewarm.Specs, err)
		}
	}
}

// TestRefusedFlags checks that a bad value is refused with the flag, the value and what is
// allowed, in words of our own.
func TestRefusedFlags(t *testing.T) {
	for _, c := range []struct{ flag, value, says string }{
		{"pool", "", "btrfs or xfs"},
		{"node-id", "", "NODE_NAME"},
		{"node-id", "rack/7", "at most 63 letters"},
		{"node-id", strings.Repeat("n", 64), "at most 63 letters"},
		{"driver-name", "../other", "domain name of at most 63 characters"},
		{"endpoint", "tcp://127.0.0.1:1", "unix:///csi/csi.sock"},
		{"endpoint", "unix:///" + strings.Repeat("p", 107), "107"},
		{"accel", "warp", "auto, kvm, tcg"},
		{"accel", "", "auto, kvm, tcg"},
		{"format-timeout", "0s", "more than 0"},
		{"format-timeout", "soon", "90s"},
		{"sweep-interval", "-1s", "negative"},
		{"sweep-interval", "10", "negative, as 90s"},
		{"overcommit", "0.99", "at least 1"},
		{"overcommit", "NaN", "at least 1"},
		{"overcommit", "Inf", "at most 1000"},
		{"overcommit", "1001", "at most 1000"},
		{"overcommit", "twice", "at least 1"},
		{"headroom", "100%", "below 100%"},
		{"headroom", "some", "10Gi"},
		{"template-cache", "-1Gi", "negative"},
		{"max-formatting-vms", "0", "at least 1"},
		{"max-formatting-vms", "99999999999999999999", "at least 1"},
		{"max-template-builds-per-hour", "-1", "negative"},
		{"max-volumes-per-node", "-1", "negative"},
		{"max-volumes-per-node", "1.5", "whole number"},
		{"max-inline-size", "-1Gi", "negative"},
		{"max-inline-size", "", "10Gi"},
		{"max-inline-volumes", "many", "whole number"},
		{"max-inline-volumes-per-namespace", "-1", "negative"},
		{"max-inline-bytes", "1TB", "did you mean 1T (1,000,000,000,000 bytes) or 1Ti"},
		{"max-inline-size", "10GiB", "no limit; did you mean 10Gi?"},
		{"template-cache", "5 GiB", "not negative; did you mean 5Gi?"},
		{"max-inline-bytes-per-namespace", "-1", "negative"},
		{"default-durability", "", "synced, volatile"},
		{"default-durability", "none", "synced, volatile"},
		{"shared-resizer", "maybe", "true or false"},
		{"wait-for-prewarm", "maybe", "true or false"},
		{"prewarm", "xfs", "xfs:10Gi"},
		{"prewarm", "ntfs:10Gi", "btrfs, ext4, xfs"},
		{"prewarm", "raw:10Gi", "btrfs, ext4, xfs"},
		{"prewarm", "ext4:1Gi,xfs:10GB", `"xfs:10GB": size "10GB": `},
		{"prewarm", "ext4:1Gi,xfs:10GB", "did you mean 10G"},
		{"prewarm", "ext4:1Gi,", "FILESYSTEM:SIZE"},
		{"prewarm", "ext4:1Gi:inode-size=77", "256, 512, 1024"},
		{"prewarm", "ext4:1Gi:label=a b", "letters"},
	} {
		err := parse(t, &pluginOptions{}, "--"+c.flag+"="+c.value)
		mustSay(t, err, fmt.Sprintf("--%s %q: ", c.flag, c.value), c.says)
	}
	mustSay(t, parse(t, &pluginOptions{}, "--accel", "warp", "--node-id", "", "--headroom", "some"), "--accel", "--node-id", "--headroom")
	if err := parse(t, &pluginOptions{}, "--accel", "warp", "--accel", "tcg"); err != nil {
		t.Errorf("the last value counts: %v", err)
	}
	mustSay(t, parse(t, &pluginOptions{}, "--pol", "x"), "--pol", "csi-disktemplate --help")
	mustSay(t, parse(t, &pluginOptions{}, "--accel"), "--accel: its value is missing", "csi-disktemplate --help")
}

// TestEveryFlagRefusesPlainly gives every flag of every command texts that it may not take. What
// is refused names the flag and the text, in words of our own.
func TestEveryFlagRefusesPlainly(t *testing.T) {
	t.Setenv("NODE_NAME", "node1")
	t.Setenv("CSI_ENDPOINT", "")
	texts := []string{"", " ", "x", "=", "a=b", "a=\"b,c", "[a b]", "{}", "-1", "0", "1.5", "1e999999999", "99999999999999999999", "1e400", "NaN", "Inf", "\xff", "\n", strings.Repeat("x", 300)}
	refusals := 0
	for _, sub := range [][]string{nil, {"format"}, {"clean-all"}, {"gc"}, {"volume", "list"}, {"volume", "describe"}} {
		find := func() *cobra.Command {
			cmd, _, err := newCommand().Find(sub)
			if err != nil {
				t.Fatal(err)
			}
			cmd.InheritedFlags() // adds those of the root
			return cmd
		}
		find().Flags().VisitAll(func(f *pflag.Flag) {
			for _, text := range texts {
				cmd := find()
				var err error
				if parsing := cmd.ParseFlags([]string{"--" + f.Name + "=" + text}); parsing != nil {
					err = flagError(cmd, parsing)
				} else if v, ok := cmd.Flags().Lookup(f.Name).Value.(interface{ refusal() error }); ok && v.refusal() != nil {
					err = badFlag(f.Name, text, v.refusal())
				}
				if err == nil {
					continue
				}
				refusals++
				mustSay(t, err, fmt.Sprintf("--%s %q: ", f.Name, text))
				if strings.Contains(err.Error(), "is not what this flag takes") {
					t.Errorf("mustBe does not know flags like --%s: %v", f.Name, err)
				}
			}
		})
	}
	if refusals < 200 {
		t.Errorf("only %d texts were refused", refusals)
	}
}

// TestRefusedEnvironment checks that a bad default is refused like a bad flag.
func TestRefusedEnvironment(t *testing.T) {
	t.Setenv("CSI_ENDPOINT", "tcp://127.0.0.1:1")
	t.Setenv("NODE_NAME", "rack/7")
	cmd := newCommand()
	cmd.SetArgs([]string{"--pool", "/nonexistent/pool"})
	mustSay(t, cmd.ExecuteContext(t.Context()), `--endpoint "tcp://127.0.0.1:1"`, `--node-id "rack/7"`)
}

// TestRefusedRegistration checks the flag that is judged together with the driver's name.
func TestRefusedRegistration(t *testing.T) {
	for dir, says := range map[string]string{"relative": "absolute path", "/" + strings.Repeat("long", 30): "107"} {
		cmd := newCommand()
		cmd.SetArgs([]string{"--pool", "/nonexistent/pool", "--node-id", "node1", "--registration-dir", dir})
		mustSay(t, cmd.ExecuteContext(t.Context()), fmt.Sprintf("--registration-dir %q: ", dir), says)
	}
}

// TestWatched checks that conditions of all parts are shown, with the time they began.
// TestNoFormatter has no QEMU. What the store returns to a pod begins with "this node cannot make
// a template", so the formatter's part must not say it once more.
func TestNoFormatter(t *testing.T) {
	formatter, err := vmformat.New(vmformat.Config{QEMU: "/nonexistent/qemu", CacheDir: t.TempDir(), Accel: vmformat.AccelTCG})
	if err != nil {
		t.Fatal(err)
	}
	b := &builder{formatter: formatter}
	_, err = b.format(t.Context(), nil, diskfs.Spec{Filesystem: "ext4", Size: 300 << 20})
	if !errors.Is(err, template.ErrNoFormatter) || !errors.Is(err, vmformat.ErrUnavailable) || !strings.HasPrefix(err.Error(), "formatter unavailable: ") {
		t.Errorf("%v, want a formatter that is unavailable, as template.ErrNoFormatter", err)
	}
}

func TestWatched(t *testing.T) {
	var first, second []health.Condition
	healthy := watched(func() []health.Condition { return first })
	ready := joined(healthy, watched(func() []health.Condition { return second }))
	if c := ready(); len(c) != 0 {
		t.Errorf("nothing is wrong: %v", c)
	}
	first = []health.Condition{{Code: "A", Text: "a is broken"}}
	second = []health.Condition{{Code: "B", Severity: health.Inaccessible, Text: "b is gone"}}
	c := ready()
	if len(c) != 2 || c[0].Code != "A" || c[0].Text != "a is broken" || c[1].Code != "B" || c[1].Severity != health.Inaccessible {
		t.Fatalf("conditions %v", c)
	}
	// Probe asks only for the first part; that must not end the second part's condition.
	since := c[1].Since
	healthy()
	if again := ready(); since.IsZero() || len(again) != 2 || !again[1].Since.Equal(since) {
		t.Errorf("since %v, later %v", since, again)
	}
}

// TestConditionMetric checks that each known code has a series, whether it holds or not, and that
// an unknown one has a series while it holds.
func TestConditionMetric(t *testing.T) {
	look := conditionMetric(func() []health.Condition {
		return []health.Condition{{Code: health.PoolFull, StillReady: true}, {Code: health.FormatterUnavailable, Object: "QEMU"}, {Code: health.FormatterUnavailable, Object: "kernel"}, {Code: "New"}}
	})
	r := prometheus.NewRegistry()
	r.MustRegister(look)
	page := httptest.NewRecorder()
	driver.HTTPHandler(func() []health.Condition { return nil }, nil, r).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	const want = `# HELP csi_disktemplate_condition 1 while the condition holds, 0 while it does not; /readyz?verbose says why.
# TYPE csi_disktemplate_condition gauge
csi_disktemplate_condition{code="CapabilityMissing"} 0
csi_disktemplate_condition{code="ContentFailed"} 0
csi_disktemplate_condition{code="DiskImageEmptied"} 0
csi_disktemplate_condition{code="DiskImageGrown"} 0
csi_disktemplate_condition{code="DiskImageShortened"} 0
csi_disktemplate_condition{code="DiskImagesUnbounded"} 0
csi_disktemplate_condition{code="DriverNameTaken"} 0
csi_disktemplate_condition{code="FormatterUnavailable"} 1
csi_disktemplate_condition{code="GoldenFailed"} 0
csi_disktemplate_condition{code="KubeletDirUnusable"} 0
csi_disktemplate_condition{code="LeftBehind"} 0
csi_disktemplate_condition{code="LoopUnavailable"} 0
csi_disktemplate_condition{code="MountsNotShared"} 0
csi_disktemplate_condition{code="New"} 1
csi_disktemplate_condition{code="NoKVM"} 0
csi_disktemplate_condition{code="NoThickClaims"} 0
csi_disktemplate_condition{code="NotRegistered"} 0
csi_disktemplate_condition{code="PoolFull"} 1
csi_disktemplate_condition{code="PoolLimited"} 0
csi_disktemplate_condition{code="PoolUnusable"} 0
csi_disktemplate_condition{code="PrewarmFailed"} 0
csi_disktemplate_condition{code="PrewarmPending"} 0
csi_disktemplate_condition{code="SlowMountTable"} 0
`
	if got := page.Body.String(); got != want {
		t.Errorf("the metrics are\n%s", got)
	}
}

// TestKeepLooking checks that a look follows each tick, and that the end of the context ends it.
func TestKeepLooking(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tick, looks, done := make(chan time.Time), make(chan bool), make(chan bool)
	go func() {
		keepLooking(ctx, func() { looks <- true }, tick)
		close(done)
	}()
	for range 3 {
		tick <- time.Time{}
		<-looks
	}
	cancel()
	<-done
}

// TestDefaults checks the defaults as --help shows them, without and with the environment
// that a DaemonSet sets.
func TestDefaults(t *testing.T) {
	flag := func(name string) string { return newCommand().Flags().Lookup(name).DefValue }
	t.Setenv("CSI_ENDPOINT", "")
	t.Setenv("NODE_NAME", "")
	if flag("endpoint") != "unix:///csi/csi.sock" || flag("node-id") != "" || flag("kubelet-dir") != "/var/lib/kubelet" || flag("driver-name") != "csi.disktemplate.io" ||
		flag("headroom") != "5%" || flag("overcommit") != "1" || flag("max-volumes-per-node") != "1024" ||
		flag("max-template-builds-per-hour") != "120" || flag("template-cache") != "20%" ||
		flag("max-inline-size") != "100Gi" || flag("max-inline-volumes") != "500" || flag("max-inline-volumes-per-namespace") != "0" ||
		flag("max-inline-bytes") != "0" || flag("max-inline-bytes-per-namespace") != "0" ||
		flag("default-durability") != "synced" {
		t.Error("defaults changed")
	}
	t.Setenv("CSI_ENDPOINT", "unix:///other.sock")
	t.Setenv("NODE_NAME", "node1")
	if flag("endpoint") != "unix:///other.sock" || flag("node-id") != "node1" {
		t.Errorf("with the environment set: %s, %s", flag("endpoint"), flag("node-id"))
	}
}

func TestProgress(t *testing.T) {
	run := func(terminal bool, end error) string {
		var b bytes.Buffer
		p := newProgress(&b)
		if p.terminal {
			t.Error("takes a buffer for a terminal")
		}
		p.terminal = terminal
		p.enter(guest.Progress{Stage: guest.StageBoot})
		p.since = p.since.Add(-1500 * time.Millisecond)
		p.enter(guest.Progress{Stage: guest.StageMkfs})
		if end == nil {
			p.enter(guest.Progress{Stage: guest.StageCheck})
			p.enter(guest.Progress{Stage: guest.StageDone})
		}
		p.end(end)
		return b.String()
	}
	const seconds = ` +[0-9.m]*s  `
	for _, c := range []struct {
		terminal bool
		end      error
		want     string
	}{
		{false, nil, `^boot +1\.5\d?s  ok\nmkfs` + seconds + `ok\ncheck` + seconds + `ok\n$`},
		{false, errors.New("x"), `^boot +1\.5\d?s  ok\nmkfs` + seconds + `failed\n$`},
		{true, nil, `^boot …\r\x1b\[Kboot +1\.5\d?s  ok\nmkfs …\r\x1b\[Kmkfs` + seconds + `ok\ncheck …\r\x1b\[Kcheck` + seconds + `ok\n$`},
		{true, errors.New("x"), `^boot …\r\x1b\[Kboot +1\.5\d?s  ok\nmkfs …\r\x1b\[Kmkfs` + seconds + `failed\n$`},
	} {
		if got := run(c.terminal, c.end); !regexp.MustCompile(c.want).MatchString(got) {
			t.Errorf("terminal %v, %v: %q", c.terminal, c.end, got)
		}
	}
}

// TestPercent: how far a build has come is known while a content is unpacked.
func TestPercent(t *testing.T) {
	b, spec := &builder{under: map[string]progressOf{}}, diskfs.Spec{Filesystem: "ext4", Size: 1 << 30, Content: "files"}
	for _, c := range []struct {
		is   progressOf
		want string
	}{
		{progressOf{text: "its content is read and checked"}, "unknown"}, {unpacking(guest.Progress{Stage: guest.StageBoot}), "unknown"},
		{unpacking(guest.Progress{Stage: guest.StageUnpack, Done: 18, Total: 100}), "18"}, {progressOf{}, "unknown"},
	} {
		b.tell(spec, c.is)
		got := "unknown"
		if p := b.percent(spec); p != nil {
			got = fmt.Sprint(*p)
		}
		if got != c.want {
			t.Errorf("%+v: %s, want %s", c.is, got, c.want)
		}
	}
}

// TestHelp checks that --help mentions what a newcomer needs.
func TestHelp(t *testing.T) {
	for _, c := range []struct {
		args []string
		says []string
	}{
		{nil, []string{"format", "clean-all", "templates", "--pool", "--node-id", "NODE_NAME", "CSI_ENDPOINT",
			"--loopback-pool-size", "--overcommit", "--headroom", "--max-volumes-per-node", "--kubelet-dir", "--http-endpoint", "--accel", "-v, --v"}},
		{[]string{"format"}, append([]string{"--size", "--label", "--option", "-o, --output", "-n, --count", "--cache", "--content", "raw", "Example"}, diskfs.Names()...)},
		{[]string{"clean-all"}, []string{"--pool", `(default "/var/lib/csi-disktemplate")`, "--dry-run", "-o, --output", "lock", "Example"}},
		{[]string{"gc"}, []string{"--pool", `(default "/var/lib/csi-disktemplate")`, "--dry-run", "-o, --output", "--kubelet-dir", "KUBELET_DIR", "Example"}},
		{[]string{"volume"}, []string{"list", "describe"}},
		{[]string{"volume", "list"}, []string{"--pool", "-o, --output", "json|yaml|wide|name", "STATE", "ending", "Example"}},
		{[]string{"volume", "describe"}, []string{"--pool", "-o, --output", "json|yaml|name", "NAMESPACE/NAME", "Example"}},
		{[]string{"template", "list"}, []string{"EXTENTS", "FREES", "READY", "-o wide"}},
		{[]string{"snapshot", "list"}, []string{"snapshotHandle"}},
		{[]string{"content", "list"}, []string{"unavailable", "--contents"}},
		{[]string{"golden"}, []string{"list", "describe", "promote", "snapshot", "rm", "beside the plugin"}},
		{[]string{"golden", "list"}, []string{"--pool", "-o, --output", "OWN", "Example"}},
		{[]string{"golden", "describe"}, []string{"--pool", "-o, --output", "Example"}},
		{[]string{"golden", "rm"}, []string{"--pool", "Example"}},
		{[]string{"golden", "promote"}, []string{"--snapshot", "--content", "--contents", "--size", "--fs", "--golden-generations", "Example"}},
		{[]string{"golden", "snapshot"}, []string{"--node", "NODE_NAME", "--namespace", "--driver-name", "Example"}},
	} {
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetArgs(append(c.args, "--help"))
		cmd.SetOut(&out)
		if err := cmd.Execute(); err != nil {
			t.Error(err)
		}
		for _, s := range c.says {
			if !strings.Contains(out.String(), s) {
				t.Errorf("the help of %v does not mention %s:\n%s", c.args, s, &out)
			}
		}
		for line := range strings.Lines(out.String()) {
			if len([]rune(line)) > 200 {
				t.Errorf("a long line: %s", line)
			}
		}
	}
}
