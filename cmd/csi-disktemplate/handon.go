// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// handOnOptions are the flags of `csi-disktemplate golden snapshot`.
type handOnOptions struct{ pool, node, driver, namespace string }

func newGoldenSnapshotCommand() *cobra.Command {
	var o handOnOptions
	cmd := &cobra.Command{
		Use:   "snapshot [NAMESPACE/]NAME[@N]",
		Short: "Hand a golden on as a VolumeSnapshot, for the claims of a namespace",
		Long: `Hand a golden on as a VolumeSnapshot, for the claims of a namespace.

It makes a snapshot of a generation, the newest if none is named, and prints a
VolumeSnapshotContent and a VolumeSnapshot for kubectl apply. Claims of that namespace
can name the VolumeSnapshot as their dataSource, on this node. Deleting the
VolumeSnapshot deletes the snapshot. The golden may go before that.

A namespace gets one snapshot of each generation: typed again, the command prints the
same. It may run beside the plugin.`,
		Example: `  csi-disktemplate golden snapshot shop/build-cache
  csi-disktemplate golden snapshot go-modules@3 --namespace shop --node node1`,
		Args: namesOf(cobra.ExactArgs(1), "one golden"),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := golden.ParseGeneration(args[0])
			if err != nil {
				return err
			}
			o.namespace = cmp.Or(o.namespace, g.Namespace)
			if o.namespace == "" {
				return errors.New("a shared golden has no namespace: give --namespace, of the claims that are to start from it")
			}
			p, err := openExisting(cmd, o.pool)
			if err != nil {
				return err
			}
			defer p.Close()
			if _, err := golden.NewStore(p).Choose(args[0]); err != nil { // its error says what may be meant
				return err
			}
			of, snap, err := volume.NewPromoter(p).HandOn(cmd.Context(), g, o.namespace)
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), of, snap)
		},
		ValidArgsFunction: goldensShown.completion(&o.pool),
	}
	f := cmd.Flags()
	addExistingPool(f, &o.pool)
	host, _ := os.Hostname()
	addValue(f, &o.node, "node", cmp.Or(os.Getenv("NODE_NAME"), host), checked(driver.CheckNodeID),
		"name of this node, as Kubernetes has it; the variable NODE_NAME replaces the default, which is the host's name")
	addValue(f, &o.driver, "driver-name", driver.DefaultName, checked(driver.CheckName),
		"name of the driver, as the plugin was given it")
	addValue(f, &o.namespace, "namespace", "", namespace, "namespace of the VolumeSnapshot (default: the golden's)")
	return cmd
}

// namespace is the name of a namespace, or nothing.
var namespace = kindOf("namespace", "must be the name of a namespace, as default", func(s string) (string, bool) {
	_, err := golden.ParseName(s + "/x")
	return s, s == "" || err == nil
})

// print prints the objects that hand a snapshot on. The content has the snapshot's id as its name: numbers of
// generations begin anew when a golden was removed. The label tells which node's snapshotter is to look at it.
func (o handOnOptions) print(out io.Writer, of golden.Record, snap image.SnapshotRecord) error {
	return objects.Execute(out, map[string]any{
		"Golden": of.Is(), "By": fmt.Sprintf("%.200q", of.By), "Spec": snap.Spec, "Size": size.Format(snap.Spec.Size),
		"Node": o.node, "Driver": o.driver, "ID": snap.ID,
		"Namespace": o.namespace, "Name": fmt.Sprintf("golden-%s-%d", of.Name, of.Generation),
	})
}

// objects has nothing in quotes that would have to be escaped there: ids, and names of Kubernetes.
var objects = template.Must(template.New("").Parse(`# Golden {{.Golden}} on node {{.Node}}: {{.Spec}}, by {{.By}}.
# Claims that start from it need {{.Spec.Filesystem}}, a size of at least {{.Size}}, and a pod on that node.
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: "{{.ID}}"
  labels: {snapshot.storage.kubernetes.io/managed-by: "{{.Node}}"}
spec:
  deletionPolicy: Delete
  driver: "{{.Driver}}"
  source: {snapshotHandle: "{{.ID}}"}
  sourceVolumeMode: Filesystem
  volumeSnapshotRef: {name: "{{.Name}}", namespace: "{{.Namespace}}"}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: "{{.Name}}", namespace: "{{.Namespace}}"}
spec: {source: {volumeSnapshotContentName: "{{.ID}}"}}
`))
