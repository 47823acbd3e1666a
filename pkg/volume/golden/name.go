// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Name names a golden.
type Name struct {
	Namespace string // whose it is; empty means that it is shared
	Name      string
}

// String is NAMESPACE/NAME, and NAME for a shared golden.
func (n Name) String() string {
	if n.Namespace == "" {
		return n.Name
	}
	return n.Namespace + "/" + n.Name
}

// Shared reports whether the golden belongs to no namespace.
func (n Name) Shared() bool { return n.Namespace == "" }

// ParseName reads what [Name.String] writes. Errors are [errdefs.ErrInvalid].
func ParseName(text string) (Name, error) {
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		namespace, name = "", text
	}
	if ok && !isLabel(namespace) || !isLabel(name) {
		return Name{}, fmt.Errorf("%w: golden %.140q: must be NAMESPACE/NAME, or NAME for a shared one; each has %s", errdefs.ErrInvalid, text, wantLabel)
	}
	return Name{namespace, name}, nil
}

// label is a DNS label, which a namespace's name is too: RFC 1123.
var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

const wantLabel = "1 to 63 lower-case letters, digits and '-', not at either end"

func isLabel(s string) bool { return label.MatchString(s) }

// Generation is one state of a golden.
type Generation struct {
	Name
	Number int // from 1; the highest is the newest
}

// String is [Name.String], and behind it @NUMBER.
func (g Generation) String() string { return fmt.Sprintf("%s@%d", g.Name, g.Number) }

// ParseGeneration reads what [Generation.String] writes. Without @NUMBER it is 0, for the newest one.
func ParseGeneration(text string) (Generation, error) {
	name, number, has := strings.Cut(text, "@")
	g := Generation{}
	var err error
	if g.Name, err = ParseName(name); err != nil || !has {
		return g, err
	}
	if g.Number, err = strconv.Atoi(number); err != nil || g.Number < 1 || strconv.Itoa(g.Number) != number {
		return g, fmt.Errorf("%w: golden %.140q: behind the @ must be the number of a generation", errdefs.ErrInvalid, text)
	}
	return g, nil
}

// compare orders generations by the names of their goldens, the oldest of each first.
func (g Generation) compare(o Generation) int {
	return cmp.Or(cmp.Compare(g.Namespace, o.Namespace), cmp.Compare(g.Name.Name, o.Name.Name), cmp.Compare(g.Number, o.Number))
}

// nobody stands in file names for the namespace of a shared golden. It is no namespace's name.
const nobody = "_"

// file is the name of the generation's image: neither part has a dot.
func (g Generation) file() string {
	return cmp.Or(g.Namespace, nobody) + "." + g.Name.Name + "." + strconv.Itoa(g.Number)
}

// ofFile is the generation that an image's name says.
func ofFile(file string) (g Generation, ok bool) {
	parts := strings.Split(file, ".")
	if len(parts) != 3 || parts[0] != nobody && !isLabel(parts[0]) || !isLabel(parts[1]) {
		return g, false
	}
	if parts[0] != nobody {
		g.Namespace = parts[0]
	}
	g.Name.Name = parts[1]
	var err error
	g.Number, err = strconv.Atoi(parts[2])
	return g, err == nil && g.Number > 0 && g.file() == file
}

// SourceKind is what a volume can start from.
type SourceKind string

// The kinds of sources.
const (
	Own     SourceKind = "golden"  // a golden of the volume's namespace
	Shared  SourceKind = "shared"  // a shared golden
	Content SourceKind = "content" // a content of the operator
)

var sourceKinds = []SourceKind{Own, Shared, Content}

// Source is what a volume can start from.
type Source struct {
	Kind SourceKind
	Name string
}

// Golden is the golden that a volume of a namespace means by a source.
func (s Source) Golden(namespace string) Name {
	if s.Kind == Shared {
		return Name{Name: s.Name}
	}
	return Name{Namespace: namespace, Name: s.Name}
}

// parseSource reads KIND/NAME, of one of some kinds.
func parseSource(text string, kinds ...SourceKind) (s Source, ok bool) {
	kind, name, _ := strings.Cut(text, "/")
	s = Source{SourceKind(kind), name}
	return s, slices.Contains(kinds, s.Kind) && isLabel(name)
}

// mostSources bounds how many sources are tried for one volume.
const mostSources = 8

// Sources are what a volume can start from, in the order in which they are tried. The last resort is an empty
// filesystem. The error names the field: field is what the request calls them, for example "volume attribute".
func Sources(l image.Lineage, field string) ([]Source, error) {
	if l.From == "" {
		if l.OrElse != "" {
			return nil, fmt.Errorf("%w: %s orElse %.64q: is for volumes with from; set that too, or leave orElse out", errdefs.ErrInvalid, field, l.OrElse)
		}
		return nil, nil
	}
	first, ok := parseSource(l.From, Own, Shared)
	if !ok {
		return nil, fmt.Errorf("%w: %s from %.80q: must be golden/NAME or shared/NAME; a name has %s",
			errdefs.ErrInvalid, field, l.From, wantLabel)
	}
	sources := []Source{first}
	if l.OrElse == "" {
		return sources, nil
	}
	for text := range strings.SplitSeq(l.OrElse, ",") {
		s, ok := parseSource(text, sourceKinds...)
		if !ok {
			return nil, fmt.Errorf("%w: %s orElse %.80q: must be golden/NAME, shared/NAME or content/NAME, or several of them with "+
				"commas between; a name has %s", errdefs.ErrInvalid, field, text, wantLabel)
		}
		if last := sources[len(sources)-1]; last.Kind == Content {
			return nil, fmt.Errorf("%w: %s orElse %.64q: nothing is tried after a content, which is always there; put it last", errdefs.ErrInvalid, field, l.OrElse)
		}
		sources = append(sources, s)
	}
	if len(sources) > mostSources {
		return nil, fmt.Errorf("%w: %s orElse %.64q: at most %d sources are tried; list fewer", errdefs.ErrInvalid, field, l.OrElse, mostSources-1)
	}
	return sources, nil
}

// Target is the golden that a volume is to become a generation of. The error names the field, as that of [Sources].
func Target(l image.Lineage, field string) (Source, error) {
	switch l.CommitWhen {
	case "", image.CommitMarked, image.CommitAlways:
	default:
		return Source{}, fmt.Errorf("%w: %s commitWhen %.64q: must be one of %s, %s", errdefs.ErrInvalid, field, l.CommitWhen, image.CommitMarked, image.CommitAlways)
	}
	if l.CommitTo == "" {
		if l.CommitWhen != "" {
			return Source{}, fmt.Errorf("%w: %s commitWhen %.64q: is for volumes with commitTo; set that too, or leave commitWhen out", errdefs.ErrInvalid, field, l.CommitWhen)
		}
		return Source{}, nil
	}
	name, shared := strings.CutPrefix(l.CommitTo, string(Shared)+"/")
	s := Source{Own, name}
	if shared {
		s.Kind = Shared
	}
	if !isLabel(name) {
		return Source{}, fmt.Errorf("%w: %s commitTo %.80q: must be NAME, or shared/NAME for a golden that the operator shares; a name has %s",
			errdefs.ErrInvalid, field, l.CommitTo, wantLabel)
	}
	return s, nil
}
