// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"slices"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedlist"
)

// Sharing says who may use which shared golden. The operator lists them in a file:
//
//	goldens:
//	- name: go-cache        # a DNS label
//	  readers: ["*"]        # namespaces whose volumes may start from it; "*" means everybody
//	  writers: [ci-main]    # namespaces whose volumes may commit to it, and start from it too
//
// One of readers and writers may be left out. Without writers only an operator's command makes generations. The
// file is looked at whenever somebody asks. Methods may be called at the same time.
type Sharing struct {
	list *watchedlist.List[sharedGolden]
}

// sharedGolden is one entry of the file.
type sharedGolden struct {
	name             string
	readers, writers watchedlist.Namespaces
}

// OpenSharing reads a file. An empty path means that nothing is shared.
func OpenSharing(path string) *Sharing {
	return &Sharing{watchedlist.Open(path, sharedFormat)}
}

var sharedFormat = watchedlist.Format[sharedGolden]{
	Key: "goldens", What: "shared goldens", Has: "name, and readers or writers or both",
	Name: func(g *sharedGolden) *string { return &g.name },
	Fields: map[string]func(*sharedGolden, any) error{
		"readers": (*sharedGolden).setReaders,
		"writers": (*sharedGolden).setWriters,
	},
	Complete: (*sharedGolden).complete,
}

func (g *sharedGolden) setReaders(value any) (err error) {
	g.readers, err = watchedlist.ParseNamespaces(value)
	return err
}

// setWriters refuses everybody: whoever may write decides what all readers run.
func (g *sharedGolden) setWriters(value any) (err error) {
	g.writers, err = watchedlist.ParseNamespaces(value)
	if err == nil && slices.Contains(g.writers, watchedlist.Everybody) {
		err = fmt.Errorf("%q would let every namespace decide what all others start from; list the namespaces that may",
			watchedlist.Everybody)
	}
	return err
}

func (g *sharedGolden) complete(map[string]any) error {
	if len(g.readers)+len(g.writers) == 0 {
		return errors.New("it has neither readers nor writers; list the namespaces that may use it")
	}
	return nil
}

func (g sharedGolden) mayRead(namespace string) bool {
	return g.readers.Allow(namespace) || g.mayWrite(namespace)
}

func (g sharedGolden) mayWrite(namespace string) bool { return g.writers.Allow(namespace) }

// CheckRead returns [errdefs.ErrInvalid] unless volumes of a namespace may start from a shared golden. The error is
// the same if no such golden is listed, so that nobody learns what others share.
func (s *Sharing) CheckRead(name, namespace string) error {
	return s.check(name, namespace, "start from", sharedGolden.mayRead)
}

// CheckWrite returns [errdefs.ErrInvalid], as CheckRead does, unless volumes of a namespace may commit to a shared
// golden.
func (s *Sharing) CheckWrite(name, namespace string) error {
	return s.check(name, namespace, "commit to", sharedGolden.mayWrite)
}

func (s *Sharing) check(name, namespace, what string, may func(sharedGolden, string) bool) error {
	s.list.Look()
	ok, instead := s.list.May(name, func(g sharedGolden) bool { return may(g, namespace) })
	if ok {
		return nil
	}
	return fmt.Errorf("%w: shared golden %.64q does not exist, or namespace %.64q may not %s it; "+
		"shared goldens that it may %s: %s", errdefs.ErrInvalid, name, namespace, what, what, instead)
}

// Conditions are those that leave the plugin ready: the file cannot be read, or an entry of it is wrong. What was
// listed before counts until the file can be read again.
func (s *Sharing) Conditions() []health.Condition {
	s.list.Look()
	return s.list.Conditions(health.GoldenFailed)
}
