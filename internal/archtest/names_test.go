// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// TestGuideNamesWhatExists checks the table "To change X, edit Y" of ARCHITECTURE.md. A
// row that names a function which was renamed sends its reader nowhere.
func TestGuideNamesWhatExists(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := guide(string(b))
	if len(rows) < 15 {
		t.Errorf("the table has only %d rows: was its heading changed?", len(rows))
	}
	for to, edit := range rows {
		for _, wrong := range checkGuide(edit) {
			t.Errorf("to %s: %s", to, wrong)
		}
	}
}

const guideHeading = "## To change X, edit Y\n"

// guide returns the rows of the table, from what somebody wants to do to where to do it.
func guide(text string) map[string]string {
	_, section, _ := strings.Cut(text, guideHeading)
	section, _, _ = strings.Cut(section, "\n## ")
	rows := map[string]string{}
	for line := range strings.Lines(section) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		to := strings.TrimPrefix(cells[0], "| ")
		if !strings.HasPrefix(line, "| ") || len(cells) < 2 || to == "to" {
			continue
		}
		rows[to] = strings.TrimSuffix(strings.Join(cells[1:], " | "), " |")
	}
	return rows
}

// guideTerm finds what a row names: an expression in backquotes, a path from the root of
// the tree, or the name of a Go file.
var guideTerm = regexp.MustCompile("`([^`]+)`" + `|\b((?:cmd|deploy|docs|hack|internal|pkg)/[\w./-]*\w)` + `|\b(\w+\.go)\b`)

// identifier is a Go name, or that of a type's field or method, perhaps with parentheses.
var identifier = regexp.MustCompile(`^(?:\w+\.)?\w+(?:\(\))?$`)

// checkGuide returns what is wrong with a row. A Go file without a directory lies in that
// of the path before it. A name in backquotes belongs to the first path behind it, or, if
// there is none, to the last one before it.
func checkGuide(edit string) (wrong []string) {
	var places, waiting []string // paths so far; names that no path has followed yet
	belong := func(place string) {
		for _, name := range waiting {
			ok, err := declares(place, name)
			if err != nil {
				wrong = append(wrong, err.Error())
			} else if !ok {
				wrong = append(wrong, fmt.Sprintf("`%s` is not in %s", name, place))
			}
		}
		waiting = nil
	}
	for _, m := range guideTerm.FindAllStringSubmatch(edit, -1) {
		name, place, file := m[1], m[2], m[3]
		switch {
		case identifier.MatchString(name):
			waiting = append(waiting, strings.TrimSuffix(name, "()"))
			continue
		case name != "": // a command, or a flag
			continue
		case file != "" && len(places) > 0:
			place = places[len(places)-1]
			if filepath.Ext(place) != "" {
				place = filepath.Dir(place)
			}
			place = filepath.Join(place, file)
		case file != "": // of any package
			if !exists(file) {
				wrong = append(wrong, "there is no "+file)
			}
			continue
		}
		if _, err := os.Stat(filepath.Join(root, place)); err != nil {
			wrong = append(wrong, "there is no "+place)
			waiting = nil
			continue
		}
		places = append(places, place)
		belong(place)
	}
	if len(waiting) > 0 && len(places) == 0 {
		wrong = append(wrong, fmt.Sprintf("no path is named for %s", strings.Join(waiting, ", ")))
	} else if len(waiting) > 0 {
		belong(places[len(places)-1])
	}
	return wrong
}

// exists reports whether there is a file of this name anywhere in cmd or pkg.
func exists(name string) bool {
	found := false
	for _, dir := range []string{"cmd", "pkg"} {
		_ = filepath.WalkDir(filepath.Join(root, dir), func(path string, _ fs.DirEntry, _ error) error {
			found = found || filepath.Base(path) == name
			return nil
		})
	}
	return found
}

// declares reports whether a Go file or package declares a name ("Store", "Key",
// "Store.Ensure"), tests included. Any other file must have it as a word.
func declares(place, name string) (bool, error) {
	at := filepath.Join(root, place)
	info, err := os.Stat(at)
	if err != nil {
		return false, err
	}
	files := []string{at}
	if info.IsDir() {
		if files, err = filepath.Glob(filepath.Join(at, "*.go")); err != nil {
			return false, err
		}
	}
	for _, file := range files {
		if filepath.Ext(file) != ".go" {
			b, err := os.ReadFile(file)
			return regexp.MustCompile(`\b` + regexp.QuoteMeta(name) + `\b`).Match(b), err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			return false, err
		}
		if slices.Contains(declared(parsed), name) {
			return true, nil
		}
	}
	return false, nil
}

// declared returns the names that a file declares outside of functions. Methods and fields
// are there twice: by themselves, and behind their type's name.
func declared(file *ast.File) (names []string) {
	member := func(of ast.Expr, name string) {
		names = append(names, name)
		if pointer, ok := of.(*ast.StarExpr); ok {
			of = pointer.X
		}
		if generic, ok := of.(*ast.IndexExpr); ok {
			of = generic.X
		}
		if t, ok := of.(*ast.Ident); ok {
			names = append(names, t.Name+"."+name)
		}
	}
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok {
			if f.Recv == nil {
				names = append(names, f.Name.Name)
			} else {
				member(f.Recv.List[0].Type, f.Name.Name)
			}
			continue
		}
		for _, s := range d.(*ast.GenDecl).Specs {
			switch s := s.(type) {
			case *ast.ValueSpec:
				for _, n := range s.Names {
					names = append(names, n.Name)
				}
			case *ast.TypeSpec:
				names = append(names, s.Name.Name)
				var fields *ast.FieldList
				switch t := s.Type.(type) {
				case *ast.StructType:
					fields = t.Fields
				case *ast.InterfaceType:
					fields = t.Methods
				default:
					continue
				}
				for _, f := range fields.List {
					for _, n := range f.Names {
						member(s.Name, n.Name)
					}
				}
			}
		}
	}
	return names
}

// others are the flags that the product's texts name and that are not its own: another
// program's, or what cobra and klog add.
var others = []string{
	"help", "version", // cobra
	"v", "vmodule", // klog
	"readonly",                                          // btrfs check
	"image-opts", "target-image-opts", "target-is-zero", // qemu-img
	"node-deployment", "extra-create-metadata", // external-provisioner, external-snapshotter
	"field-selector", "limit-bytes", "previous", "sort-by", "tail", "timestamps", // kubectl
	"make-rshared", // mount
}

// TestMessagesNameRealFlags checks every --flag in a string of the product. An error that
// tells its reader to set a flag which does not exist makes things worse.
func TestMessagesNameRealFlags(t *testing.T) {
	var have, named []string
	for _, dir := range []string{"cmd", "pkg"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			if dir == "cmd" {
				have = append(have, definedFlags(file)...)
			}
			named = append(named, namedFlags(file)...)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(have) < 20 || len(named) < 20 {
		t.Errorf("only %d flags were found to be defined, and %d to be named", len(have), len(named))
	}
	for _, name := range unknown(named, have) {
		t.Errorf("a message names --%s, which is no flag", name)
	}
}

// TestMessagesNameCleanAllInOnePlace: a message that recommends clean-all must name a line that
// works as typed, with the pod and the pool. Only pkg/pool/remedy.go has that line.
func TestMessagesNameCleanAllInOnePlace(t *testing.T) {
	var in []string
	err := filepath.WalkDir(filepath.Join(root, "pkg"), func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if strings.Contains(text(n), "clean-all") {
				in = append(in, path)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(root, "pkg/pool/remedy.go"); len(in) != 1 || in[0] != want {
		t.Errorf("messages in %q name clean-all; use pool.DropTemplates", in)
	}
}

var (
	flagMethod = regexp.MustCompile(`Var(?:P|PF|F)?$|^String$`)
	flagName   = regexp.MustCompile(`^[a-z][a-z0-9]*(?:-[a-z0-9]+)*$`)
	flagInText = regexp.MustCompile(`(?:^|[^-\w])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)`)
)

// definedFlags returns the names in calls as f.StringVar(&x, "name", …), of any method that
// pflag has for it, and in those of addValue in cmd/csi-disktemplate/values.go.
func definedFlags(file *ast.File) (names []string) {
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		var may []ast.Expr // arguments that may be the name
		switch f := call.Fun.(type) {
		case *ast.SelectorExpr:
			if flagMethod.MatchString(f.Sel.Name) {
				may = call.Args[:min(2, len(call.Args))]
			}
		case *ast.Ident:
			if strings.HasPrefix(f.Name, "addValue") && len(call.Args) > 2 {
				may = call.Args[2:3]
			}
		}
		for _, arg := range may {
			if name := text(arg); flagName.MatchString(name) {
				names = append(names, name)
			}
		}
		return true
	})
	return names
}

// namedFlags returns the flags that a file's strings name.
func namedFlags(file *ast.File) (names []string) {
	ast.Inspect(file, func(n ast.Node) bool {
		for _, m := range flagInText.FindAllStringSubmatch(text(n), -1) {
			names = append(names, m[1])
		}
		return true
	})
	return names
}

// text returns the value of a string literal, or "".
func text(n ast.Node) string {
	if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
		s, _ := strconv.Unquote(l.Value)
		return s
	}
	return ""
}

// unknown returns the names that are neither flags of the product nor among [others].
func unknown(named, have []string) []string {
	named = slices.DeleteFunc(slices.Clone(named), func(name string) bool {
		return slices.Contains(have, name) || slices.Contains(others, name)
	})
	slices.Sort(named)
	return slices.Compact(named)
}

// TestTheNamesChecks shows that the checks above find what they are for.
func TestTheNamesChecks(t *testing.T) {
	const here = "internal/archtest"
	for edit, want := range map[string]string{
		"`checkGuide` in " + here + "/names_test.go":                      "",
		here + ": `checkGuide()`, and `guideTerm` (`make lint`)":          "",
		"`rooms` in " + here + "/arch_test.go, `others` in names_test.go": "",
		"`ast.File` in " + here:                                           "`ast.File` is not in " + here,
		"`checkGuides` in " + here:                                        "`checkGuides` is not in " + here,
		"`rooms` in " + here + "/names_test.go":                           "`rooms` is not in " + here + "/names_test.go",
		here + "/nowhere_test.go":                                         "there is no " + here + "/nowhere_test.go",
		here + "/arch_test.go, and nowhere.go":                            "there is no " + here + "/nowhere.go",
		"`rooms` in some file":                                            "no path is named for rooms",
		"its nowhere.go":                                                  "there is no nowhere.go",
		"`test` in .ci and the Makefile":                                  "no path is named for test",
	} {
		if got := strings.Join(checkGuide(edit), "; "); got != want {
			t.Errorf("%q: %q, want %q", edit, got, want)
		}
	}
	if rows := guide("# A\n" + guideHeading + "\n| to | edit |\n|---|---|\n| a | `b` in c |\n\n## Next\n| d | e |\n"); len(rows) != 1 || rows["a"] != "`b` in c" {
		t.Errorf("the table was read as %q", rows)
	}

	file, err := parser.ParseFile(token.NewFileSet(), "x.go", `package x
type s struct{ field int }
type i[T any] interface{ method() }
func (*s) do() { f.StringVar(&a, "one", "--two"); f.VarP(v, "three-four", "t", "") ; f.IntVar(&b, name, 5, ""); f.String("six", "", "") }
const c = "set --one, --three-four=5 or --no-such-flag" + `+"`--raw --readonly x--not -qemu --%s`"+`
`, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(declared(file)), "[s field s.field i method i.method do s.do c]"; got != want {
		t.Errorf("declared are %s, want %s", got, want)
	}
	have := definedFlags(file)
	if got, want := fmt.Sprint(have), "[one three-four six]"; got != want {
		t.Errorf("flags are %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(unknown(namedFlags(file), have)), "[no-such-flag raw two]"; got != want {
		t.Errorf("unknown flags are %s, want %s", got, want)
	}
}
