// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"flag"
	"os"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/prewarm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
)

// pluginOptions are the flags of the plugin.
type pluginOptions struct {
	endpoint, nodeID, driverName string
	kubeletDir, registrationDir  string
	httpEndpoint, pageEndpoint   string
	profiling, volumeMetrics     bool
	maxVMs, maxBuildsPerHour     int
	templateCache, headroom      size.Share
	overcommit                   float64
	maxVolumes                   int64
	sharedResizer                bool
	sweepInterval, trimInterval  time.Duration
	trialInterval                time.Duration
	durability                   image.Durability
	limits                       quota.Limits
	warm, warmMost               int
	pool                         pool.Config
	vm                           vmformat.Config
	prewarm                      prewarm.Config
	contents                     contentOptions
	goldens                      goldenOptions
}

func (o *pluginOptions) add(f *pflag.FlagSet) {
	addValue(f, &o.endpoint, "endpoint", cmp.Or(os.Getenv("CSI_ENDPOINT"), "unix:///csi/csi.sock"), checked(driver.CheckEndpoint),
		"unix socket to serve CSI on; the environment variable CSI_ENDPOINT replaces the default")
	addValue(f, &o.nodeID, "node-id", os.Getenv("NODE_NAME"), checked(driver.CheckNodeID),
		"name of this node, also its topology segment; the environment variable NODE_NAME is the default")
	addValue(f, &o.driverName, "driver-name", driver.DefaultName, checked(driver.CheckName), "name of the driver, as CSIDriver objects and pods refer to it")
	f.StringVar(&o.registrationDir, "registration-dir", "", "kubelet's plugins_registry, to register the driver there; kubelet must see --endpoint at the same path (default: a node-driver-registrar does it)")
	addValue(f, &o.httpEndpoint, "http-endpoint", "", optionalListener,
		"where to serve /healthz, /readyz and /metrics, as 10.0.0.7:9808, or :9808 on every address; IPv6 needs no brackets (default: nowhere)")
	addValue(f, &o.pageEndpoint, "page-endpoint", "", optionalListener,
		"where to serve a page for people, as 127.0.0.1:9809; it names pods and asks for no password, so it belongs on loopback (default: nowhere)")
	f.BoolVar(&o.profiling, "profiling", false, "serve profiles of the plugin itself on --http-endpoint, below /debug/pprof/, to everybody who reaches it")
	f.BoolVar(&o.volumeMetrics, "volume-metrics", false, "also serve metrics of each volume, which name its pod; they are five series for each volume")
	addValue(f, &o.maxVolumes, "max-volumes-per-node", "1024", upperCount[int64](), "how many claims the scheduler may place on this node; 0 means no limit")
	addValue(f, &o.sweepInterval, "sweep-interval", "10m", interval, "time between two sweeps of what crashes and lost calls left behind; 0 means no sweep, not even at start; see the command gc")
	addValue(f, &o.trimInterval, "trim-interval", "1m", interval, "time between two looks for space of deleted files, which is then returned to the pool and the node; 0 means never")
	addValue(f, &o.trialInterval, "trial-interval", "1m", interval,
		"time between two trials of a clone in the pool and of a loop device; 0 means only when somebody asks for /readyz?verbose")
	f.BoolVar(&o.sharedResizer, "shared-resizer", false, "one external-resizer serves all nodes: a volume that is not on this node is left to its own node, without an error")
	addKubeletDir(f, &o.kubeletDir)
	o.addTemplates(f)
	addValue(f, &o.warm, "warm", "2", atLeastOne, "how many volumes of each kind of disk are kept ready before anybody asks for them, at least, once one was asked for")
	addValue(f, &o.warmMost, "warm-max", "8", upperCount[int](),
		"how many volumes of all kinds are kept ready; each takes up to 5 MiB of memory and 2 MiB of the pool; 0 means none")
	addPrewarm(f, &o.prewarm)
	addContents(f, &o.contents)
	addGoldens(f, &o.goldens)
	addPool(f, &o.pool)
	addValue(f, &o.pool.NodeHeadroom, "node-headroom", "20%", poolShare,
		"space that new volumes leave free on a filesystem that is kubelet's too; kubelet evicts pods below 10% (nodefs) and 15% (imagefs)")
	addValue(f, &o.headroom, "headroom", "5%", poolShare, "space of the pool that new volumes leave free: a quantity, as 10Gi, or a percentage")
	addValue(f, &o.overcommit, "overcommit", "1", factor, "how many times its size the pool promises to thin claims; at 1 there is room to fill every claim")
	addValue(f, &o.durability, "default-durability", string(image.Synced), oneOf(image.Durabilities...),
		"durability of inline volumes that ask for none: in volatile ones a sync costs nothing, and a reboot of the node empties them")
	addLimits(f, &o.limits)
	addVM(f, &o.vm)
}

func (o *pluginOptions) addTemplates(f *pflag.FlagSet) {
	addValue(f, &o.maxVMs, "max-formatting-vms", strconv.Itoa(vmformat.DefaultVMs), atLeastOne,
		"how many VMs build templates at the same time, each up to 16 of them; a VM takes a processor and 310 MiB of memory")
	addValue(f, &o.maxBuildsPerHour, "max-template-builds-per-hour", strconv.Itoa(template.DefaultBuildsPerHour), upperCount[int](),
		"how many templates may be built in a row, and then per hour, evenly; 0 means no limit")
	addValue(f, &o.templateCache, "template-cache", "20%", poolShare,
		"space of the pool that templates may take, a quantity or a percentage; the least recently used are removed first; 0 means no limit")
}

func addPrewarm(f *pflag.FlagSet, c *prewarm.Config) {
	addValue(f, &c.Specs, "prewarm", "", specList,
		"templates to build before anybody asks, with commas between, as xfs:10Gi,ext4:1Gi:inode-size=512 (default: none)")
	f.StringVar(&c.File, "prewarm-file", "", "file that lists more of them, one a line; it is read again when it changes (default: none)")
	f.BoolVar(&c.Wait, "wait-for-prewarm", false,
		"the plugin is ready (/readyz) only when each template that these flags list is there, or could not be built")
}

func addContents(f *pflag.FlagSet, o *contentOptions) {
	f.StringVar(&o.file, "contents", "", "file that names what volumes can be born with, and who may use it; it is read again when it changes (default: nothing)")
	f.StringVar(&o.dir, "content-dir", "", "directory of the archives and disks that --contents names")
	f.StringVar(&o.credentials, "content-credentials", "", "directory of docker config files with the credentials for the registries that --contents names (default: none are used)")
	addValue(f, &o.plainHTTP, "content-plain-http", "", hostList,
		"registries, as HOST:PORT with commas between, that may be spoken to by HTTP; those on loopback always may (default: none)")
	addValue(f, &o.cache, "content-cache", "10%", poolShare,
		"space of the pool that layers of images may take, a quantity or a percentage; the least recently used are removed first; 0 means no limit")
}

func addKubeletDir(f *pflag.FlagSet, dir *string) {
	f.StringVar(dir, "kubelet-dir", cmp.Or(os.Getenv("KUBELET_DIR"), "/var/lib/kubelet"), "kubelet's root directory; nothing is ever mounted outside of it; the variable KUBELET_DIR replaces the default")
}

func addPool(f *pflag.FlagSet, c *pool.Config) {
	addValue(f, &c.Dir, "pool", "", given("must be a directory on btrfs or xfs"), "directory for templates and volumes, on btrfs or xfs; made if missing")
	addValue(f, &c.LoopbackSize, "loopback-pool-size", "", optionalSize,
		"size of an xfs to make as the pool, in a sparse file in --pool, as 20Gi; one that exists grows, and is never shrunk (default: no such file)")
}

// addLimits adds the limits of what pods may ask for with inline volumes.
//
// The defaults are far above what well-meant pods ask for. Kubelet runs 110 pods unless it
// is configured otherwise. A template of 100 GiB is made as fast as one of 1 GiB, but one of
// some TiB is not.
func addLimits(f *pflag.FlagSet, l *quota.Limits) {
	addValue(f, &l.Size, "max-inline-size", "100Gi", upperSize, "largest size of an inline volume; 0 means no limit")
	addValue(f, &l.Volumes, "max-inline-volumes", "500", upperCount[int](), "how many inline volumes there may be on this node; 0 means no limit")
	addValue(f, &l.VolumesPerNamespace, "max-inline-volumes-per-namespace", "0", upperCount[int](),
		"how many inline volumes the pods of one namespace may have on this node; 0 means no limit")
	addValue(f, &l.Bytes, "max-inline-bytes", "0", upperSize, "sum of the sizes of all inline volumes on this node, as 1Ti; 0 means no limit")
	addValue(f, &l.BytesPerNamespace, "max-inline-bytes-per-namespace", "0", upperSize,
		"sum of the sizes of the inline volumes of one namespace on this node; 0 means no limit")
}

// addVM adds the flags that say what the formatting VM is made of.
func addVM(f *pflag.FlagSet, c *vmformat.Config) {
	addValue(f, &c.Accel, "accel", string(vmformat.AccelAuto), oneOf(vmformat.AccelAuto, vmformat.AccelKVM, vmformat.AccelTCG),
		"accelerator of the formatting VM: auto is KVM where it works, else TCG")
	f.StringVar(&c.Kernel, "kernel", "", "kernel of the formatting VM, a vmlinuz or vmlinux (default: the newest in /boot that has its modules in /lib/modules)")
	f.StringVar(&c.QEMU, "qemu", "", "QEMU's binary (default: qemu-system-x86_64 on PATH)")
	addValue(f, &c.Timeout, "format-timeout", vmformat.DefaultTimeout.String(), timeLimit, "how long a formatting VM may take for one template; an eighth more for each further one")
}

// newFormatter makes the formatter that the flags describe. It keeps unpacked kernels in
// cacheDir, or in the user's cache directory if cacheDir is empty.
func newFormatter(c vmformat.Config, cacheDir string) (*vmformat.Formatter, error) {
	c.Init, c.CacheDir = failpoint.Init(), cacheDir
	return vmformat.New(c)
}

// addLogFlags adds two of klog's many flags.
func addLogFlags(f *pflag.FlagSet) {
	var all flag.FlagSet
	klog.InitFlags(&all)
	for name, usage := range map[string]string{
		"v":       "how much is logged: with 2 also each sweep, with 4 calls that change nothing and failures that repeat, with 5 the requests",
		"vmodule": "how much is logged of single source files: a list of FILE=LEVEL with commas between",
	} {
		f.AddGoFlag(all.Lookup(name))
		f.Lookup(name).Usage = usage
	}
}
