// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package shapes describes the JSON of Go types, for a test that compares a document with them.
package shapes

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"
)

// AreDocumented compares a part of a document with the types of source files that have JSON names. With UPDATE=1 in the
// environment it writes the part. It stands between two lines, of which the first names the running test, and its
// package.
func AreDocumented(t *testing.T, doc, pkg string, files ...string) {
	t.Helper()
	begin := fmt.Sprintf("<!-- Written by UPDATE=1 go test -run %s ./%s -->\n", t.Name(), pkg)
	const end = "<!-- End of the shapes. -->\n"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, began := strings.Cut(string(b), begin)
	has, after, ended := strings.Cut(rest, end)
	if !began || !ended {
		t.Fatalf("%s lacks the lines around the shapes: %s%s", doc, begin, end)
	}
	want := describe(t, files)
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(doc, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if has != want {
		t.Errorf("%s does not have the shapes as they are; run the line that stands in it", doc)
	}
}

// describe describes each type that has JSON names, in the order of the sources.
func describe(t *testing.T, files []string) string {
	t.Helper()
	var all strings.Builder
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			spec := g.Specs[0].(*ast.TypeSpec)
			if s, ok := spec.Type.(*ast.StructType); ok {
				all.WriteString(shape(spec.Name.Name, oneLine(g.Doc), s))
			}
		}
	}
	return all.String()
}

// shape describes a type, or is empty if its fields have no JSON names.
func shape(name, about string, s *ast.StructType) string {
	var rows, embedded strings.Builder
	for _, f := range s.Fields.List {
		if len(f.Names) == 0 {
			fmt.Fprintf(&embedded, "| and the fields of | %s | |\n", jsonType(f.Type))
		}
		if f.Tag == nil {
			continue
		}
		tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json")
		json, omit, _ := strings.Cut(tag, ",")
		means := strings.TrimSpace(oneLine(f.Doc) + " " + oneLine(f.Comment))
		if omit != "" {
			means = strings.TrimSuffix("may be missing; "+means, "; ")
		}
		fmt.Fprintf(&rows, "| `%s` | %s | %s |\n", json, jsonType(f.Type), strings.ReplaceAll(means, "|", `\|`))
	}
	if rows.Len() == 0 {
		return ""
	}
	return fmt.Sprintf("\n## %s\n\n%s\n\n| field | type | meaning |\n|---|---|---|\n%s%s", title(name), title(about), &rows, &embedded)
}

// title begins with a capital letter.
func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// jsonType is the type that JSON has for a Go type.
func jsonType(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return jsonType(e.X)
	case *ast.ArrayType:
		return "list of " + jsonType(e.Elt)
	case *ast.MapType:
		return "object of " + jsonType(e.Value)
	case *ast.SelectorExpr:
		if e.Sel.Name == "Time" {
			return "time"
		}
		return jsonType(e.Sel)
	}
	switch name := e.(*ast.Ident).Name; name {
	case "int", "int64":
		return "integer"
	case "float64":
		return "number"
	case "bool":
		return "boolean"
	case "string", "State", "Cause", "Verb":
		return "string"
	default:
		return fmt.Sprintf("[%s](#%s)", title(name), strings.ToLower(name))
	}
}

func oneLine(g *ast.CommentGroup) string {
	if g == nil {
		return ""
	}
	return strings.Join(strings.Fields(g.Text()), " ")
}
