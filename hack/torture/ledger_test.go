// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"maps"
	"slices"
	"sync"
)

// state is what the container orchestrator knows of a volume or a snapshot.
type state int

const (
	creating state = iota // its creation began and was not answered
	there                 // its creation was answered
	deleting              // its deletion began and was not answered
)

// entry says what must be found of a volume or a snapshot if the power is cut now.
type entry struct {
	disk       *disk
	snapshotOf *disk // a snapshot's source
	state      state
	words      []string // it holds one of these; "" stands for nothing yet
}

// goldenEntry says what a golden may have if the power is cut now.
type goldenEntry struct {
	fs    string
	words []string // of the jobs whose work it has: one of these; "" stands for no golden yet
	ever  []string // the same since the beginning
	// under has the jobs whose commits have begun and not ended. Those whose value is true had no other one beside
	// them.
	under map[string]bool
}

// ledger has every volume and snapshot whose creation has begun, until its deletion is answered, and every golden for
// good.
type ledger struct {
	mu      sync.Mutex
	entries map[string]entry
	goldens map[string]goldenEntry
	commits int // how many have ended
	ended   int // how many came and went
	// built has the contents or labels of templates that were built meanwhile.
	built []string
}

func newLedger() *ledger {
	return &ledger{entries: map[string]entry{}, goldens: map[string]goldenEntry{}}
}

// change changes an entry in one step.
func (l *ledger) change(d *disk, change func(*entry)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[d.id]
	change(&e)
	l.entries[d.id] = e
}

func (l *ledger) creating(d *disk) {
	now := *d // the disk may grow
	l.change(d, func(e *entry) { *e = entry{disk: &now, words: []string{""}} })
}

// snapshotting enters a snapshot of a volume that holds a word.
func (l *ledger) snapshotting(name string, of *disk, word string) *disk {
	s, source := &disk{id: name}, *of
	l.change(s, func(e *entry) { *e = entry{disk: s, snapshotOf: &source, words: []string{word}} })
	return s
}

func (l *ledger) there(d *disk)    { l.change(d, func(e *entry) { e.state = there }) }
func (l *ledger) deleting(d *disk) { l.change(d, func(e *entry) { e.state = deleting }) }

func (l *ledger) writing(d *disk, word string) {
	l.change(d, func(e *entry) { e.words = append(slices.Clone(e.words), word) })
}

// written enters a word that was synced.
func (l *ledger) written(d *disk, word string) {
	l.change(d, func(e *entry) { e.words = []string{word} })
}

func (l *ledger) gone(d *disk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.entries, d.id)
	l.ended++
}

// isBuilt enters a template whose first volume was published.
func (l *ledger) isBuilt(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.built = append(l.built, name)
}

func (l *ledger) copy() map[string]entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.entries)
}

// during does something while the ledger stands still, and returns its entries, and those of goldens.
func (l *ledger) during(do func()) (map[string]entry, map[string]goldenEntry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	do()
	return maps.Clone(l.entries), maps.Clone(l.goldens)
}

// golden returns what is known of a golden.
func (l *ledger) golden(name string) goldenEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ofGolden(name)
}

func (l *ledger) ofGolden(name string) goldenEntry {
	if g, known := l.goldens[name]; known {
		return g
	}
	return goldenEntry{words: []string{""}, ever: []string{""}, under: map[string]bool{}}
}

// committing enters that a job's commit begins. From now on the golden may have its work.
func (l *ledger) committing(d *disk, word string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.ofGolden(d.commitTo)
	g.fs, g.under = d.fs, maps.Clone(g.under)
	g.words, g.ever = append(slices.Clone(g.words), word), append(slices.Clone(g.ever), word)
	for other := range g.under {
		g.under[other] = false
	}
	g.under[word] = len(g.under) == 0
	l.goldens[d.commitTo] = g
}

// committed enters that a commit has ended, and whether its generation has been seen. It reports whether no other was
// beside it: then the golden has the job's work, or what it had before.
func (l *ledger) committed(d *disk, word string, seen bool) (alone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.ofGolden(d.commitTo)
	switch alone = g.under[word]; {
	case alone && seen:
		g.words = []string{word}
	case alone:
		g.words = slices.DeleteFunc(slices.Clone(g.words), func(w string) bool { return w == word })
	}
	if seen {
		l.commits++
	}
	g.under = maps.Clone(g.under)
	delete(g.under, word)
	l.goldens[d.commitTo] = g
	return alone
}
